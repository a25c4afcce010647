# ruff: noqa
# Plausible wrong answers. Each must be refused with a message that contains what stands in `says`.

# %% task="10.1" says="4 blocks on 2 stages: embed.token.weight is on the stages [0, 1]"
def stage_of(model, stage, stages):  # the embedding everywhere
    depth = len(model.blocks)
    blocks = model.blocks[depth * stage // stages : depth * (stage + 1) // stages]
    return nn.Sequential(model.embed, *blocks, *([model.norm, model.head] if stage == stages - 1 else []))


# %% task="10.1" says="3 blocks on 2 stages: blocks.2.norm1.weight is on no stage"
def stage_of(model, stage, stages):  # the rest of the division is lost
    each = len(model.blocks) // stages
    layers = [model.embed] * (stage == 0) + list(model.blocks[each * stage : each * (stage + 1)])
    return nn.Sequential(*layers, *([model.norm, model.head] if stage == stages - 1 else []))


# %% task="10.1" says="norm.weight is on no stage"
def stage_of(model, stage, stages):  # no final norm
    depth = len(model.blocks)
    layers = [model.embed] * (stage == 0) + list(model.blocks[depth * stage // stages : depth * (stage + 1) // stages])
    return nn.Sequential(*layers, *([model.head] if stage == stages - 1 else []))


# %% task="10.1" says="3 blocks on 2 stages: you share them out as [2, 1], and the formula as [1, 2]"
def stage_of(model, stage, stages):  # the first ones get more
    depth = len(model.blocks)
    layers = list(model.blocks[-(-depth * stage // stages) : -(-depth * (stage + 1) // stages)])
    return nn.Sequential(
        *([model.embed] if stage == 0 else []), *layers, *([model.norm, model.head] if stage == stages - 1 else [])
    )


# %% task="10.2" says="blocks.0.attention.q.bias has no gradient: is it used in forward?"
def cut_block(block, axis):  # the wrong dim
    for layer in (block.attention.q, block.attention.k, block.attention.v, block.mlp.up):
        layer.weight = nn.Parameter(shard(layer.weight.data, axis, 1))
        layer.bias = nn.Parameter(shard(layer.bias.data, axis, 0))
        layer.forward = lambda x, layer=layer: my.row_linear(shard(x, axis, -1), layer.weight, None, axis)[
            ..., : layer.bias.numel()
        ]
    for layer in (block.attention.out, block.mlp.down):
        layer.weight = nn.Parameter(shard(layer.weight.data, axis, 1))
        layer.forward = lambda x, layer=layer: my.row_linear(x, layer.weight, layer.bias, axis)


# %% task="10.2" says="Is a row cut's bias added once?"
def cut_block(block, axis):  # the bias on every rank, before the sum
    for layer in (block.attention.q, block.attention.k, block.attention.v, block.mlp.up):
        layer.weight = nn.Parameter(shard(layer.weight.data, axis, 0))
        layer.bias = nn.Parameter(shard(layer.bias.data, axis, 0))
        layer.forward = lambda x, layer=layer: my.column_linear(x, layer.weight, layer.bias, axis)
    for layer in (block.attention.out, block.mlp.down):
        layer.weight = nn.Parameter(shard(layer.weight.data, axis, 1))
        layer.forward = lambda x, layer=layer: all_reduce(F.linear(x, layer.weight, layer.bias), axis)


# %% task="10.2" says="the logits are right, but rank 0: the gradient of"
def cut_block(block, axis):  # nothing is summed in backward
    for layer in (block.attention.q, block.attention.k, block.attention.v, block.mlp.up):
        layer.weight = nn.Parameter(shard(layer.weight.data, axis, 0))
        layer.bias = nn.Parameter(shard(layer.bias.data, axis, 0))
        layer.forward = lambda x, layer=layer: F.linear(x, layer.weight, layer.bias)
    for layer in (block.attention.out, block.mlp.down):
        layer.weight = nn.Parameter(shard(layer.weight.data, axis, 1))
        layer.forward = lambda x, layer=layer: my.row_linear(x, layer.weight, layer.bias, axis)


# %% task="10.2" says="blocks.0.attention.q.weight has no gradient: is it used in forward?"
def cut_block(block, axis):  # every lambda calls the last layer
    for layer in (block.attention.q, block.attention.k, block.attention.v):
        layer.weight = nn.Parameter(shard(layer.weight.data, axis, 0))
        layer.bias = nn.Parameter(shard(layer.bias.data, axis, 0))
        layer.forward = lambda x: my.column_linear(x, block.attention.v.weight, block.attention.v.bias, axis)
    up = block.mlp.up
    up.weight, up.bias = nn.Parameter(shard(up.weight.data, axis, 0)), nn.Parameter(shard(up.bias.data, axis, 0))
    up.forward = lambda x: my.column_linear(x, up.weight, up.bias, axis)
    for row in (block.attention.out, block.mlp.down):
        row.weight = nn.Parameter(shard(row.weight.data, axis, 1))
        row.forward = lambda x, row=row: my.row_linear(x, row.weight, row.bias, axis)


# %% task="10.2" says="2 ranks: blocks.0.attention.q.weight has the shape (32, 32) on rank 0, not (16, 32)"
def cut_block(block, axis):  # cut where it is used: right, and no memory is saved
    for layer in (block.attention.q, block.attention.k, block.attention.v, block.mlp.up):
        layer.forward = lambda x, layer=layer: my.column_linear(
            x, layer.weight.chunk(axis.size)[axis.index], layer.bias.chunk(axis.size)[axis.index], axis
        )
    for layer in (block.attention.out, block.mlp.down):
        layer.forward = lambda x, layer=layer: my.row_linear(
            x, layer.weight.chunk(axis.size, 1)[axis.index], layer.bias, axis
        )


# %% task="10.3" says="dp 2 × pp 2 × tp 2, 4 microbatches, full rows: rank 0: the gradient of"
def train_step(part, axes, tokens, targets, microbatches, width):  # nobody sums over dp
    dp, pp = axes["dp"], axes["pp"]
    part.zero_grad()
    mine, labels = my.my_rows(tokens, dp), my.my_rows(targets, dp)
    inputs, answers = rows(mine, microbatches), rows(labels, microbatches)

    def loss_of(logits, m):
        total = F.cross_entropy(logits.flatten(0, 1), answers[m].flatten(), reduction="sum")
        return my.my_part_of_the_loss(total, (labels != -100).sum(), dp)

    my.run_schedule(my.one_f_one_b_order(pp.size, microbatches)[pp.index], part, pp, inputs, width, loss_of)


# %% task="10.3" says="is 4 times that of one process"
def train_step(part, axes, tokens, targets, microbatches, width):  # each microbatch a mean of its own
    dp, pp = axes["dp"], axes["pp"]
    part.zero_grad()
    mine, labels = my.my_rows(tokens, dp), my.my_rows(targets, dp)
    inputs, answers = rows(mine, microbatches), rows(labels, microbatches)

    def loss_of(logits, m):
        total = F.cross_entropy(logits.flatten(0, 1), answers[m].flatten(), reduction="sum")
        return my.my_part_of_the_loss(total, (answers[m] != -100).sum(), dp)

    my.run_schedule(my.one_f_one_b_order(pp.size, microbatches)[pp.index], part, pp, inputs, width, loss_of)
    my.reduce_flat(list(part.parameters()), dp)


# %% task="10.3" says="right, but stage 0 has 4 microbatches in flight, and 1F1B needs 2"
def train_step(part, axes, tokens, targets, microbatches, width):  # GPipe
    dp, pp = axes["dp"], axes["pp"]
    part.zero_grad()
    mine, labels = my.my_rows(tokens, dp), my.my_rows(targets, dp)
    inputs, answers = rows(mine, microbatches), rows(labels, microbatches)

    def loss_of(logits, m):
        total = F.cross_entropy(logits.flatten(0, 1), answers[m].flatten(), reduction="sum")
        return my.my_part_of_the_loss(total, (labels != -100).sum(), dp)

    program = sorted(my.one_f_one_b_order(pp.size, microbatches)[pp.index], key=lambda action: action.op != "F")
    my.run_schedule(program, part, pp, inputs, width, loss_of)
    my.reduce_flat(list(part.parameters()), dp)


# %% task="10.3" says="times that of one process"
def train_step(part, axes, tokens, targets, microbatches, width):  # the gradients of a step before stay
    dp, pp = axes["dp"], axes["pp"]
    mine, labels = my.my_rows(tokens, dp), my.my_rows(targets, dp)
    inputs, answers = rows(mine, microbatches), rows(labels, microbatches)
    part.zero_grad()

    def loss_of(logits, m):
        total = F.cross_entropy(logits.flatten(0, 1), answers[m].flatten(), reduction="sum")
        return my.my_part_of_the_loss(total, (labels != -100).sum(), dp)

    my.run_schedule(my.one_f_one_b_order(pp.size, microbatches)[pp.index], part, pp, inputs, width, loss_of)
    my.reduce_flat(list(part.parameters()), dp)
    my.reduce_flat(list(part.parameters()), axes["tp"])  # and once more along tp


# %% task="10.4" says="dp 2 × pp 2 × tp 2, rank 0: the loss before step 2 is"
def train(part, axes, batches, lr):  # SGD, for it is simpler
    optimizer, losses = torch.optim.SGD(part.parameters(), lr=lr), []
    for x, y in batches:
        losses.append(loss_now(part, axes, x, y))
        train_step(part, axes, x, y, 4, 32)
        optimizer.step()
    return losses


# %% task="10.4" says="the loss before step 1 is"
def train(part, axes, batches, lr):  # the loss after each step
    optimizer, losses = torch.optim.Adam(part.parameters(), lr=lr), []
    for x, y in batches:
        train_step(part, axes, x, y, 4, 32)
        optimizer.step()
        losses.append(loss_now(part, axes, x, y))
    return losses


# %% task="10.4" says="0 losses for 20 steps"
def train(part, axes, batches, lr):
    optimizer, losses = torch.optim.Adam(part.parameters(), lr=lr), []
    for x, y in batches:
        train_step(part, axes, x, y, 4, 32)
        optimizer.step()
    return losses


# %% task="10.4" says="the loss before step 2 is"
def train(part, axes, batches, lr):  # an optimizer anew in each step forgets its averages
    losses = []
    for x, y in batches:
        losses.append(loss_now(part, axes, x, y))
        train_step(part, axes, x, y, 4, 32)
        torch.optim.AdamW(part.parameters(), lr=lr, weight_decay=0.1).step()
    return losses
