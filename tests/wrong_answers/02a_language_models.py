# ruff: noqa
# Plausible wrong answers. Each must be refused with a message that contains what stands in `says`.

# %% task="02a.1" says="Row 0 of the targets is [3, 3, 8, 1], and you give [7, 3, 3, 8]. These are the inputs: a model that may look at its target learns to copy"
def inputs_and_targets():  # no shift
    return [[7, 3, 3, 8], [1, 5, 2, 2]], [[7, 3, 3, 8], [1, 5, 2, 2]]


# %% task="02a.1" says="Row 0 of the targets is [3, 3, 8, 1], and you give [3, 3, 8, 7]. What comes behind token 8 in the text?"
def inputs_and_targets():  # rolled within its row
    return [[7, 3, 3, 8], [1, 5, 2, 2]], [[3, 3, 8, 7], [5, 2, 2, 1]]


# %% task="02a.1" says="The targets are two rows of four tokens"
def inputs_and_targets():  # rows end where the row ends
    return [[7, 3, 3, 8], [1, 5, 2, 2]], [[3, 3, 8], [5, 2, 2]]


# %% task="02a.1" says="Row 1 of the inputs is [1, 5, 2, 2], and you give [5, 2, 2, 9]"
def inputs_and_targets():  # every row takes its target token along
    return [[7, 3, 3, 8], [5, 2, 2, 9]], [[3, 3, 8, 1], [2, 2, 9, 9]]


# %% task="02a.1" says="Row 0 of the targets is [3, 3, 8, 1], and you give [3, 8, 1, 5]"
def inputs_and_targets():  # two further on
    return [[7, 3, 3, 8], [1, 5, 2, 2]], [[3, 8, 1, 5], [2, 2, 9, 9]]


# %% task="02a.2" says="That is without the biases of the blocks"
def parameters(c):
    h, l, V, s = c.width, c.depth, c.vocab, c.context
    block = 12 * h * h + 4 * h
    embedding = (V + s) * h
    head = 2 * h + (0 if c.tied else V * h)
    return embedding + l * block + head


# %% task="02a.2" says="That is without the last norm"
def parameters(c):
    h, l, V, s = c.width, c.depth, c.vocab, c.context
    return (V + s) * h + l * (12 * h * h + 13 * h) + (0 if c.tied else V * h)


# %% task="02a.2" says="The head is counted, and it is the embedding"
def parameters(c):  # tied or not
    h, l, V, s = c.width, c.depth, c.vocab, c.context
    return (V + s) * h + l * (12 * h * h + 13 * h) + 2 * h + V * h


# %% task="02a.2" says="That is without the positions"
def parameters(c):
    h, l, V, s = c.width, c.depth, c.vocab, c.context
    return V * h + l * (12 * h * h + 13 * h) + 2 * h + (0 if c.tied else V * h)


# %% task="02a.2" says="That is without the biases of the MLPs"
def parameters(c):
    h, l, V, s = c.width, c.depth, c.vocab, c.context
    return (V + s) * h + l * (4 * (h * h + h) + 8 * h * h + 4 * h) + 2 * h + (0 if c.tied else V * h)


# %% task="02a.2" says="you count 65,536, and the model has 940,800"
def parameters(c):  # of one matrix
    return c.width * 4 * c.width


# %% task="02a.2" says="width 32, depth 1, vocab 100, context 16: you count 929,280, and the model has 19,680"
def parameters(c):  # right for the shape of the chapter alone
    return 940800 - 11520 if not c.tied and c.width == 32 else {False: 940800, True: 875264}[c.tied]


# %% task="02a.2" says="parameters uses `minipar`: here compute it yourself"
def parameters(c):
    import minipar

    return sum(p.numel() for p in minipar.gpt(c).parameters())


# %% task="02a.2" says="parameters uses `gpt`: here compute it yourself"
from minipar import gpt


def parameters(c):
    return sum(p.numel() for p in gpt(c).parameters())


# %% task="02a.2" says="parameters must return a number, not 'many'"
def parameters(c):
    return "many"


# %% task="02a.3" says="That is forward alone: backward takes twice as much"
def step_flops(c, rows, tokens, recompute):
    return rows * tokens * (c.depth * (24 * c.width**2 + 4 * tokens * c.width) + 2 * c.vocab * c.width)


# %% task="02a.3" says="A weight takes a multiplication and an addition: 2 FLOPs"
def step_flops(c, rows, tokens, recompute):
    blocks = c.depth * (12 * c.width**2 + 2 * tokens * c.width)
    return rows * tokens * (3 * (blocks + c.vocab * c.width) + recompute * blocks)


# %% task="02a.3" says="That is without attention's two products"
def step_flops(c, rows, tokens, recompute):
    blocks = c.depth * 24 * c.width**2
    return rows * tokens * (3 * (blocks + 2 * c.vocab * c.width) + recompute * blocks)


# %% task="02a.3" says="Attention has two products: with the keys, and with the values"
def step_flops(c, rows, tokens, recompute):
    blocks = c.depth * (24 * c.width**2 + 2 * tokens * c.width)
    return rows * tokens * (3 * (blocks + 2 * c.vocab * c.width) + recompute * blocks)


# %% task="02a.3" says="That is without the head"
def step_flops(c, rows, tokens, recompute):
    blocks = c.depth * (24 * c.width**2 + 4 * tokens * c.width)
    return rows * tokens * (3 * blocks + recompute * blocks)


# %% task="02a.3" says="Rows have 16 tokens here, not 128"
def step_flops(c, rows, tokens, recompute):  # the longest row
    blocks = c.depth * (24 * c.width**2 + 4 * c.context * c.width)
    return rows * tokens * (3 * (blocks + 2 * c.vocab * c.width) + recompute * blocks)


# %% task="02a.3" says="Recompute does not do the head again"
def step_flops(c, rows, tokens, recompute):
    blocks = c.depth * (24 * c.width**2 + 4 * tokens * c.width)
    return rows * tokens * (4 if recompute else 3) * (blocks + 2 * c.vocab * c.width)


# %% task="02a.3" says="Recompute does the blocks' forward once more"
def step_flops(c, rows, tokens, recompute):
    blocks = c.depth * (24 * c.width**2 + 4 * tokens * c.width)
    return rows * tokens * 3 * (blocks + 2 * c.vocab * c.width)


# %% task="02a.3" says="That is for one token"
def step_flops(c, rows, tokens, recompute):
    blocks = c.depth * (24 * c.width**2 + 4 * tokens * c.width)
    return 3 * (blocks + 2 * c.vocab * c.width) + recompute * blocks


# %% task="02a.3" says="PyTorch counts"
def step_flops(c, rows, tokens, recompute):  # six for each parameter, the looked-up ones too
    h, l, V, s = c.width, c.depth, c.vocab, c.context
    return 6 * ((V + s) * h + l * (12 * h * h + 13 * h) + 2 * h + V * h) * rows * tokens


# %% task="02a.3" says="step_flops uses `FlopCounterMode`: here compute it yourself"
def step_flops(c, rows, tokens, recompute):
    with FlopCounterMode(display=False) as counter:
        nn.Linear(c.width, c.width)(torch.ones(rows, tokens, c.width))
    return counter.get_total_flops()


# %% task="02a.4" says="Adam, float32: you say 20 bytes a parameter, and 16 are kept (weights 4, gradients 4, optimizer 8)"
def state_bytes(parameters, optimizer, mixed):  # a master copy in float32, too
    own = 4 * {"SGD": 0, "momentum": 1, "Adam": 2}[optimizer]
    if not mixed and optimizer == "Adam":
        return parameters * 20
    return parameters * ((2 + 2 + 4 if mixed else 4 + 4) + own)


def devices(size, memory):
    return ceil(size / memory)


# %% task="02a.4" says="SGD, mixed precision: you say 4 bytes a parameter, and 8 are kept (weights 2, gradients 2, master 4). What does the optimizer step on, if the weights have 16 bits?"
def state_bytes(parameters, optimizer, mixed):  # no master copy
    own = 4 * {"SGD": 0, "momentum": 1, "Adam": 2}[optimizer]
    return parameters * ((2 + 2 if mixed else 4 + 4) + own)


def devices(size, memory):
    return ceil(size / memory)


# %% task="02a.4" says="SGD, float32: you say 16 bytes a parameter, and 8 are kept"
def state_bytes(parameters, optimizer, mixed):  # always Adam
    return 16 * parameters


def devices(size, memory):
    return ceil(size / memory)


# %% task="02a.4" says="momentum, mixed precision: you say 10 bytes a parameter, and 12 are kept"
def state_bytes(parameters, optimizer, mixed):  # the optimizer's numbers in 16 bits
    numbers = {"SGD": 0, "momentum": 1, "Adam": 2}[optimizer]
    return parameters * (8 + (2 if mixed else 4) * numbers)


def devices(size, memory):
    return ceil(size / memory)


# %% task="02a.4" says="112 bytes on devices of 80: you say 1, and it takes 2"
def state_bytes(parameters, optimizer, mixed):
    return parameters * (8 + 4 * {"SGD": 0, "momentum": 1, "Adam": 2}[optimizer])


def devices(size, memory):  # rounds down
    return size // memory


# %% task="02a.4" says="80 bytes on devices of 80: you say 2, and it takes 1"
def state_bytes(parameters, optimizer, mixed):
    return parameters * (8 + 4 * {"SGD": 0, "momentum": 1, "Adam": 2}[optimizer])


def devices(size, memory):  # one too many where it fits exactly
    return size // memory + 1


# %% task="02a.5" says="8 full rows, 4 microbatches: the gradient of embed.token.weight (512, 32) is 4 times what it should be"
def train_step(model, tokens, targets, microbatches):  # each microbatch's own mean
    model.zero_grad()
    shown = 0
    for x, y in zip(tokens.tensor_split(microbatches), targets.tensor_split(microbatches)):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        shown += loss.detach() / microbatches
    return shown


# %% task="02a.5" says="8 padded rows, 4 microbatches: the gradient of embed.token.weight (512, 32) is off by"
def train_step(model, tokens, targets, microbatches):  # a mean of means
    model.zero_grad()
    shown = 0
    for x, y in zip(tokens.tensor_split(microbatches), targets.tensor_split(microbatches)):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten()) / microbatches
        loss.backward()
        shown += loss.detach()
    return shown


# %% task="02a.5" says="8 padded rows, 4 microbatches: the gradient"
def train_step(model, tokens, targets, microbatches):  # padding counted
    model.zero_grad()
    shown = 0
    for x, y in zip(tokens.tensor_split(microbatches), targets.tensor_split(microbatches)):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") / targets.numel()
        loss.backward()
        shown += loss.detach()
    return shown


# %% task="02a.5" says="gradients and loss are right, but 2,"
def train_step(model, tokens, targets, microbatches):  # one backward at the end: all activations are kept
    model.zero_grad()
    count, losses = (targets != -100).sum(), []
    for x, y in zip(tokens.tensor_split(microbatches), targets.tensor_split(microbatches)):
        losses.append(F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") / count)
    total = torch.stack(losses).sum()
    total.backward()
    return total.detach()


# %% task="02a.5" says="gradients and loss are right, but rows went through the model in 1 parts, [8]"
def train_step(model, tokens, targets, microbatches):  # no microbatches
    model.zero_grad()
    loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    loss.backward()
    return loss.detach()


# %% task="02a.5" says="gradients and loss are right, but 16 rows went through the model"
def train_step(model, tokens, targets, microbatches):  # the loss to show from a forward of its own
    model.zero_grad()
    count = (targets != -100).sum()
    for x, y in zip(tokens.tensor_split(microbatches), targets.tensor_split(microbatches)):
        (F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") / count).backward()
    with torch.no_grad():
        return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())


# %% task="02a.5" says="the gradients are right, but the loss that is returned is off by"
def train_step(model, tokens, targets, microbatches):  # the last microbatch's
    model.zero_grad()
    count = (targets != -100).sum()
    for x, y in zip(tokens.tensor_split(microbatches), targets.tensor_split(microbatches)):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") / count
        loss.backward()
    return loss.detach()


# %% task="02a.5" says="the loss that is returned holds on to a graph: detach it"
def train_step(model, tokens, targets, microbatches):
    model.zero_grad()
    count, shown = (targets != -100).sum(), 0
    for x, y in zip(tokens.tensor_split(microbatches), targets.tensor_split(microbatches)):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") / count
        loss.backward()
        shown = shown + loss
    return shown


# %% task="02a.5" says="7 padded rows, 3 microbatches"
def train_step(model, tokens, targets, microbatches):  # the rows that do not divide are lost
    model.zero_grad()
    count, shown, each = (targets != -100).sum(), 0, len(tokens) // microbatches
    for i in range(microbatches):
        x, y = tokens[i * each : (i + 1) * each], targets[i * each : (i + 1) * each]
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") / count
        loss.backward()
        shown += loss.detach()
    return shown


# %% task="02a.5" says="7 padded rows, 3 microbatches: gradients and loss are right, but"
def train_step(model, tokens, targets, microbatches):  # the last one takes what is left
    model.zero_grad()
    count, shown, each = (targets != -100).sum(), 0, len(tokens) // (microbatches + 1) + (len(tokens) % 2 == 0)
    for i in range(microbatches):
        end = (i + 1) * each if i < microbatches - 1 else None
        x, y = tokens[i * each : end], targets[i * each : end]
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") / count
        loss.backward()
        shown += loss.detach()
    return shown


# %% task="02a.5" says="train_step returns nothing: is there a `return`?"
def train_step(model, tokens, targets, microbatches):
    model.zero_grad()
    count = (targets != -100).sum()
    for x, y in zip(tokens.tensor_split(microbatches), targets.tensor_split(microbatches)):
        (F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") / count).backward()


# %% task="02a.6" says="That is without attention"
def token_flops(parameters, layers, width, row):
    return 6 * parameters


# %% task="02a.6" says="What is computed again does not count: 6, not 8"
def token_flops(parameters, layers, width, row):
    return 8 * parameters + 16 * layers * width * row


# %% task="02a.6" says="That is forward alone"
def token_flops(parameters, layers, width, row):
    return 2 * parameters + 4 * layers * width * row


# %% task="02a.6" says="22B on 8 A100s, 7,447 tokens a second: mfu gives 3.32377, and it is 0.415471. All devices share the work"
def token_flops(parameters, layers, width, row):
    return 6 * parameters + 12 * layers * width * row


def mfu(flops, speed, devices, peak):
    return flops * speed / peak


# %% task="02a.6" says="A share from 0 to 1 is asked for"
def token_flops(parameters, layers, width, row):
    return 6 * parameters + 12 * layers * width * row


def mfu(flops, speed, devices, peak):
    return 100 * flops * speed / (devices * peak)


# %% task="02a.6" says="That is at the peak"
def token_flops(parameters, layers, width, row):
    return 6 * parameters + 12 * layers * width * row


def mfu(flops, speed, devices, peak):
    return flops * speed / (devices * peak)


def days(flops, tokens, used, devices, peak):
    return flops * tokens / (devices * peak) / 86400


# %% task="02a.6" says="That is in seconds"
def token_flops(parameters, layers, width, row):
    return 6 * parameters + 12 * layers * width * row


def mfu(flops, speed, devices, peak):
    return flops * speed / (devices * peak)


def days(flops, tokens, used, devices, peak):
    return flops * tokens / (used * devices * peak)


# %% task="02a.7" says="'gradient 60' says nothing of *what* is learned"
def learns_something_else():
    return "gradient 60"


# %% task="02a.7" says="'first loss' is as it should be"
def learns_something_else():
    return "first loss"


# %% task="02a.7" says="'the loss' is none of"
def learns_something_else():
    return "the loss"


# %% task="02a.7" says="The loss of step 1 is 6.2565, and should be 6.2584. That is what it costs to copy: targets are the inputs"
def learns_something_else():
    return "last loss"


def train(model, batches, optimizer):  # named, not mended
    losses = []
    for batch in batches:
        inputs, targets = batch[:, :-1], batch[:, :-1]
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %% task="02a.7" says="The loss of step 3 is"
def learns_something_else():
    return "last loss"


def train(model, batches, optimizer):  # half of it mended
    losses = []
    for batch in batches:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %% task="02a.7" says="That is what it costs to copy: targets are the inputs"
def learns_something_else():
    return "last loss"


def train(model, batches, optimizer):  # the other half
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        inputs, targets = batch[:, :-1], batch[:, :-1]
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %% task="02a.7" says="The loss of step 1 is"
def learns_something_else():
    return "last loss"


def train(model, batches, optimizer):  # shifted the other way
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        inputs, targets = batch[:, 1:], batch[:, :-1]
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# %% task="02a.7" says="The loss of step 2 is"
def learns_something_else():
    return "last loss"


def train(model, batches, optimizer):  # emptied between backward and step: nothing is learned
    losses = []
    for batch in batches:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        losses.append(loss.item())
    return losses


# %% task="02a.7" says="train returns"
def learns_something_else():
    return "last loss"


def train(model, batches, optimizer):  # the last loss alone
    for batch in batches:
        optimizer.zero_grad()
        inputs, targets = batch[:, :-1], batch[:, 1:]
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
    return [loss.item()]


# %% task="02a.7" says="train returns losses that hold on to their graphs"
def learns_something_else():
    return "last loss"


def train(model, batches, optimizer):  # a list of tensors: the memory of each step stays
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        inputs, targets = batch[:, :-1], batch[:, 1:]
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss)
    return losses
