# ruff: noqa
# Plausible wrong answers. Each must be refused with a message that contains what stands in `says`.

# %% task="03b.1" says="up.weight: you give the shape (6, 12), but it is stored as (out, in)"
def shapes_on_a_rank():  # (in, out)
    return {
        "x": (10, 6),
        "up.weight": (6, 12),
        "up.bias": (12,),
        "middle": (10, 12),
        "down.weight": (12, 6),
        "partial": (10, 6),
        "down.bias": (6,),
        "y": (10, 6),
    }


# %% task="03b.1" says="x: you give the shape (5, 6), but each rank reads all of x"
def shapes_on_a_rank():  # tokens shared out, as in data parallelism
    return {
        "x": (5, 6),
        "up.weight": (12, 6),
        "up.bias": (12,),
        "middle": (5, 12),
        "down.weight": (6, 12),
        "partial": (5, 6),
        "down.bias": (6,),
        "y": (5, 6),
    }


# %% task="03b.1" says="down.bias: you give the shape (3,), but it is added once, after the sum"
def shapes_on_a_rank():
    return {
        "x": (10, 6),
        "up.weight": (12, 6),
        "up.bias": (12,),
        "middle": (10, 12),
        "down.weight": (6, 12),
        "partial": (10, 6),
        "down.bias": (3,),
        "y": (10, 6),
    }


# %% task="03b.1" says="partial: you give the shape (10, 3), but a term of a sum has the shape of the sum"
def shapes_on_a_rank():
    return {
        "x": (10, 6),
        "up.weight": (12, 6),
        "up.bias": (12,),
        "middle": (10, 12),
        "down.weight": (6, 12),
        "partial": (10, 3),
        "down.bias": (6,),
        "y": (10, 6),
    }


# %% task="03b.1" says="up.bias: the shape of 12 numbers in a line is written (12,)."
def shapes_on_a_rank():
    return {
        "x": (10, 6),
        "up.weight": (12, 6),
        "up.bias": 12,
        "middle": (10, 12),
        "down.weight": (6, 12),
        "partial": (10, 6),
        "down.bias": 6,
        "y": (10, 6),
    }


# %% task="03b.1" says="shapes_on_a_rank says nothing about 'up.bias'"
def shapes_on_a_rank():
    return {"x": (10, 6), "up.weight": (12, 6)}


# %% task="03b.2" says="as a share of its largest value. It is a term: the sum over the ranks is right."
class CopyToRanks(torch.autograd.Function):  # autograd left alone
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def column_linear(x, weight, bias, axis):
    return F.linear(CopyToRanks.apply(x, axis), weight, bias)


# %% task="03b.2" says="the gradient of x is 0.25 times what it should be: divided by the ranks?"
class CopyToRanks(torch.autograd.Function):  # the mean
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient, ctx.axis) / ctx.axis.size, None


def column_linear(x, weight, bias, axis):
    return F.linear(CopyToRanks.apply(x, axis), weight, bias)


# %% task="03b.2" says="raised AssertionError: column_linear must return the shape (2, 3,"
class CopyToRanks(torch.autograd.Function):  # put together again
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient, ctx.axis), None


def column_linear(x, weight, bias, axis):
    from minipar.collectives import gather

    return gather(F.linear(CopyToRanks.apply(x, axis), weight, bias), axis, size=10)


# %% task="03b.2" says="column_linear uses the imported `enter`: here write what it does."
def column_linear(x, weight, bias, axis):
    return F.linear(enter(x, axis), weight, bias)


# %% task="03b.2" says="the values are right, but forward it makes 1 call with"
class CopyToRanks(torch.autograd.Function):  # makes sure that x is the same everywhere
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return all_reduce(x, axis, "max")

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient, ctx.axis), None


def column_linear(x, weight, bias, axis):
    return F.linear(CopyToRanks.apply(x, axis), weight, bias)


# %% task="03b.2" says="the gradient of weight is 4 times what it should be: counted by each rank?"
class CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient, ctx.axis), None


class Scaled(torch.autograd.Function):  # a factor where no sum is due
    @staticmethod
    def forward(ctx, x, n):
        ctx.n = n
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.n, None


def column_linear(x, weight, bias, axis):
    return F.linear(CopyToRanks.apply(x, axis), Scaled.apply(weight, axis.size), bias)


# %% task="03b.2" says="the gradient of x is off by"
def column_linear(x, weight, bias, axis):  # a hook on x itself: what goes around the layer is summed, too
    x.register_hook(lambda gradient: all_reduce(gradient, axis))
    return F.linear(x, weight, bias)


# %% task="03b.2" says="backward it makes 2 calls with"
class CopyToRanks(torch.autograd.Function):  # twice, and half of it
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return (all_reduce(gradient, ctx.axis) + all_reduce(gradient, ctx.axis)) / 2, None


def column_linear(x, weight, bias, axis):
    return F.linear(CopyToRanks.apply(x, axis), weight, bias)


# %% task="03b.2" says="was it rounded to float32?"
class CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient.float(), ctx.axis).double(), None


def column_linear(x, weight, bias, axis):
    return F.linear(CopyToRanks.apply(x, axis), weight, bias)


# %% task="03b.2" says="column_linear returns nothing: is there a `return`?"
def column_linear(x, weight, bias, axis):
    F.linear(CopyToRanks.apply(x, axis), weight, bias)


# %% task="03b.2" says="8 outputs on 2 ranks, without bias, rank 0: the gradient of x is 2 times what it should be: counted by each rank?"
class CopyToRanks(torch.autograd.Function):  # for four ranks
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce(gradient, ctx.axis) * (4 / ctx.axis.size), None


def column_linear(x, weight, bias, axis):
    return F.linear(CopyToRanks.apply(x, axis), weight, bias)


# %% task="03b.3" says="The bias is in it 4 times."
class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def row_linear(x, weight, bias, axis):  # the bias once for each rank
    return SumOverRanks.apply(F.linear(x, weight, bias), axis)


# %% task="03b.3" says="the gradient of bias is 0.25 times what it should be: divided by the ranks?"
class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def row_linear(x, weight, bias, axis):  # a share of the bias on each rank
    return SumOverRanks.apply(F.linear(x, weight, None if bias is None else bias / axis.size), axis)


# %% task="03b.3" says="rank 1: the gradient of bias is None"
class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def row_linear(x, weight, bias, axis):  # the bias on rank 0 only
    return SumOverRanks.apply(F.linear(x, weight, bias if axis.index == 0 else None), axis)


# %% task="03b.3" says="the gradient of x is 4 times what it should be: counted by each rank?"
class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx, gradient):  # a sum is not its own adjoint
        return all_reduce(gradient, ctx.axis), None


def row_linear(x, weight, bias, axis):
    y = SumOverRanks.apply(F.linear(x, weight), axis)
    return y if bias is None else y + bias


# %% task="03b.3" says="PyTorch warns that a gradient goes through a collective that autograd knows nothing of"
def row_linear(x, weight, bias, axis):  # works by luck
    y = all_reduce(F.linear(x, weight), axis)
    return y if bias is None else y + bias


# %% task="03b.3" says="row_linear uses the imported `leave`: here write what it does."
def row_linear(x, weight, bias, axis):
    y = leave(F.linear(x, weight), axis)
    return y if bias is None else y + bias


# %% task="03b.3" says="y is off by"
def row_linear(x, weight, bias, axis):  # no sum
    return F.linear(x, weight, bias)


# %% task="03b.3" says="the values are right, but forward it makes 1 call with 720 bytes, and should make 1 with 360 bytes"
class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):  # all terms to all ranks
        from minipar.collectives import all_gather

        return all_gather(x[None], axis).sum(0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def row_linear(x, weight, bias, axis):
    y = SumOverRanks.apply(F.linear(x, weight), axis)
    return y if bias is None else y + bias


# %% task="03b.3" says="10 inputs on 4 ranks, with bias, rank 0: the gradient of bias is -2 times what it should be"
class SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return all_reduce(x, axis)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def row_linear(x, weight, bias, axis):  # for four
    return SumOverRanks.apply(F.linear(x, weight, bias), axis) - 3 * bias


# %% task="03b.4" says="keys_read gives [0, 0, 1, 1]"
def keys_read():
    return [0, 0, 1, 1]


# %% task="03b.4" says="8 heads of queries, 4 of keys on 2 ranks, rank 0: y is off by"
def keys_read():
    return [0, 1, 0, 1]


def attention_of_my_heads(x, q, k, v, head_dim, axis):  # the bytes mended, not the keys
    def heads(y):
        return y.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    inside = enter(x, axis)
    queries, keys, values = (heads(F.linear(inside, weight)) for weight in (q, k, v))
    times = queries.size(1) // keys.size(1)
    keys, values = (some.repeat(1, times, 1, 1) for some in (keys, values))
    y = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    return y.transpose(1, 2).flatten(-2)


# %% task="03b.4" says="the values are right, but backward it makes 3 calls with 3,600 bytes, and should make 1 with 1,200 bytes. How often does x enter?"
def keys_read():
    return [0, 1, 0, 1]


def attention_of_my_heads(x, q, k, v, head_dim, axis):  # the keys mended, not the bytes
    def heads(y):
        return y.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    queries, keys, values = (heads(F.linear(enter(x, axis), weight)) for weight in (q, k, v))
    times = queries.size(1) // keys.size(1)
    keys, values = (some.repeat_interleave(times, 1) for some in (keys, values))
    y = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    return y.transpose(1, 2).flatten(-2)


# %% task="03b.4" says="rank 0: the gradient of x is off by"
def keys_read():
    return [0, 1, 0, 1]


def attention_of_my_heads(x, q, k, v, head_dim, axis):  # only the queries enter
    def heads(y):
        return y.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    queries, keys, values = heads(F.linear(enter(x, axis), q)), heads(F.linear(x, k)), heads(F.linear(x, v))
    times = queries.size(1) // keys.size(1)
    keys, values = (some.repeat_interleave(times, 1) for some in (keys, values))
    y = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    return y.transpose(1, 2).flatten(-2)


# %% task="03b.4" says="raised AssertionError: attention_of_my_heads must return the shape (2, 5, 12), not (2, 5, 6)"
def keys_read():
    return [0, 1, 0, 1]


def attention_of_my_heads(x, q, k, v, head_dim, axis):  # two for one, always
    def heads(y):
        return y.unflatten(-1, (-1, head_dim)).transpose(1, 2)

    inside = enter(x, axis)
    queries, keys, values = (heads(F.linear(inside, weight)) for weight in (q, k, v))
    if queries.size(1) > keys.size(1):
        keys, values = (some.repeat_interleave(2, 1) for some in (keys, values))
    queries, keys, values = queries[:, : keys.size(1)], keys[:, : queries.size(1)], values[:, : queries.size(1)]
    y = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    return y.transpose(1, 2).flatten(-2)


# %% task="03b.5" says="10 ids on 4 ranks, all of them looked up, rank 0: y is off by"
def vocabulary_embedding(ids, table, vocabulary, axis):  # equal shares
    first = vocabulary // axis.size * axis.index
    here = (ids >= first) & (ids < first + len(table))
    found = F.embedding((ids - first).masked_fill(~here, 0), table)
    return leave(found * here[..., None], axis)


# %% task="03b.5" says="rank 0: y is off by"
def vocabulary_embedding(ids, table, vocabulary, axis):  # what is not here is not zero
    first = vocabulary * axis.index // axis.size
    found = F.embedding((ids - first).clamp(0, len(table) - 1), table)
    return leave(found, axis)


# %% task="03b.5" says="index out of range"
def vocabulary_embedding(ids, table, vocabulary, axis):  # looks up what it does not have
    first = vocabulary * axis.index // axis.size
    here = (ids >= first) & (ids < first + len(table))
    return leave(F.embedding(ids, table) * here[..., None], axis)


# %% task="03b.5" says="y is off by"
def vocabulary_embedding(ids, table, vocabulary, axis):  # the last row of each rank is lost
    first = vocabulary * axis.index // axis.size
    here = (ids >= first) & (ids < first + len(table) - 1)
    found = F.embedding((ids - first).masked_fill(~here, 0), table)
    return leave(found * here[..., None], axis)


# %% task="03b.5" says="the values are right, but forward it makes 1 call with"
def vocabulary_embedding(ids, table, vocabulary, axis):  # the whole table on every rank
    from minipar.collectives import gather

    return F.embedding(ids, gather(table, axis, 0, vocabulary))


# %% task="03b.5" says="PyTorch warns that a gradient goes through a collective that autograd knows nothing of"
def vocabulary_embedding(ids, table, vocabulary, axis):
    first = vocabulary * axis.index // axis.size
    here = (ids >= first) & (ids < first + len(table))
    found = F.embedding((ids - first).masked_fill(~here, 0), table)
    return all_reduce(found * here[..., None], axis)


# %% task="03b.5" says="raised AssertionError: vocabulary_embedding: no gradient can go back through what it returns"
def vocabulary_embedding(ids, table, vocabulary, axis):  # a rank that has none of them does not take part
    first = vocabulary * axis.index // axis.size
    here = (ids >= first) & (ids < first + len(table))
    if not here.any():
        return table.new_zeros(*ids.shape, table.size(1))
    found = F.embedding((ids - first).masked_fill(~here, 0), table)
    return leave(found * here[..., None], axis)


# %% task="03b.5" says="rank 0 waits for ranks 1, 2, 3 in all_reduce"
def vocabulary_embedding(ids, table, vocabulary, axis):  # the same, and nothing fails
    first = vocabulary * axis.index // axis.size
    here = (ids >= first) & (ids < first + len(table))
    found = F.embedding((ids - first).masked_fill(~here, 0), table) * here[..., None]
    return leave(found, axis) if here.any() else found


# %% task="03b.5" says="the gradient of table is 4 times what it should be: counted by each rank?"
def vocabulary_embedding(ids, table, vocabulary, axis):  # enters, where nothing enters
    first = vocabulary * axis.index // axis.size
    here = (ids >= first) & (ids < first + len(table))
    found = F.embedding((ids - first).masked_fill(~here, 0), table)
    return leave(enter(found * here[..., None], axis) / axis.size, axis) * axis.size


# %% task="03b.6" says="forward in 1 call, and three numbers a token are"
def vocabulary_loss(logits, targets, vocabulary, axis):  # whole logits
    from minipar.collectives import gather

    return F.cross_entropy(gather(logits, axis, -1, vocabulary), targets, reduction="sum")


# %% task="03b.6" says="large logits, rank 0: the loss is not finite"
def vocabulary_loss(logits, targets, vocabulary, axis):  # no maximum
    first = vocabulary * axis.index // axis.size
    here = (targets >= first) & (targets < first + logits.size(-1))
    own = logits.gather(-1, (targets - first).masked_fill(~here, 0)[:, None]).squeeze(-1) * here
    total, own = leave(torch.stack([logits.exp().sum(-1), own]), axis)
    return ((total.log() - own) * (targets != -100)).sum()


# %% task="03b.6" says="small logits, rank 0: the loss is "
def vocabulary_loss(logits, targets, vocabulary, axis):  # each rank's own maximum
    first = vocabulary * axis.index // axis.size
    shifted = logits - logits.detach().amax(-1)[:, None]
    here = (targets >= first) & (targets < first + logits.size(-1))
    own = shifted.gather(-1, (targets - first).masked_fill(~here, 0)[:, None]).squeeze(-1) * here
    total, own = leave(torch.stack([shifted.exp().sum(-1), own]), axis)
    return ((total.log() - own) * (targets != -100)).sum()


# %% task="03b.6" says="small logits, rank 0: the loss is "
def vocabulary_loss(logits, targets, vocabulary, axis):  # padding counts
    first = vocabulary * axis.index // axis.size
    shifted = logits - all_reduce(logits.detach().amax(-1), axis, "max")[:, None]
    here = (targets >= first) & (targets < first + logits.size(-1))
    own = shifted.gather(-1, (targets - first).masked_fill(~here, 0)[:, None]).squeeze(-1) * here
    total, own = leave(torch.stack([shifted.exp().sum(-1), own]), axis)
    return (total.log() - own).sum()


# %% task="03b.6" says="small logits, rank 0: the loss is "
def vocabulary_loss(logits, targets, vocabulary, axis):  # the mean
    first = vocabulary * axis.index // axis.size
    shifted = logits - all_reduce(logits.detach().amax(-1), axis, "max")[:, None]
    here = (targets >= first) & (targets < first + logits.size(-1))
    own = shifted.gather(-1, (targets - first).masked_fill(~here, 0)[:, None]).squeeze(-1) * here
    total, own = leave(torch.stack([shifted.exp().sum(-1), own]), axis)
    return ((total.log() - own) * (targets != -100)).mean()


# %% task="03b.6" says="small logits, rank 0: the loss is "
def vocabulary_loss(logits, targets, vocabulary, axis):  # the target's logit as it was, the rest shifted
    first = vocabulary * axis.index // axis.size
    top = all_reduce(logits.detach().amax(-1), axis, "max")
    here = (targets >= first) & (targets < first + logits.size(-1))
    own = logits.gather(-1, (targets - first).masked_fill(~here, 0)[:, None]).squeeze(-1) * here
    total, own = leave(torch.stack([(logits - top[:, None]).exp().sum(-1), own]), axis)
    return ((total.log() - own) * (targets != -100)).sum()


# %% task="03b.6" says="rank 0: the gradient of logits is off by"
def vocabulary_loss(logits, targets, vocabulary, axis):  # the sum has no gradient
    first = vocabulary * axis.index // axis.size
    shifted = logits - all_reduce(logits.detach().amax(-1), axis, "max")[:, None]
    here = (targets >= first) & (targets < first + logits.size(-1))
    own = shifted.gather(-1, (targets - first).masked_fill(~here, 0)[:, None]).squeeze(-1) * here
    total = all_reduce(shifted.detach().exp().sum(-1), axis)
    return ((total.log() - leave(own, axis)) * (targets != -100)).sum()


# %% task="03b.6" says="forward in 4 calls"
def vocabulary_loss(logits, targets, vocabulary, axis):  # one call too many
    first = vocabulary * axis.index // axis.size
    shifted = logits - all_reduce(logits.detach().amax(-1), axis, "max")[:, None]
    here = (targets >= first) & (targets < first + logits.size(-1))
    own = shifted.gather(-1, (targets - first).masked_fill(~here, 0)[:, None]).squeeze(-1) * here
    total, own = leave(shifted.exp().sum(-1), axis), leave(own, axis)
    owned = all_reduce(here.double(), axis)
    return ((total.log() - own) * owned).sum()


# %% task="03b.6" says="PyTorch warns that a gradient goes through a collective that autograd knows nothing of"
def vocabulary_loss(logits, targets, vocabulary, axis):
    first = vocabulary * axis.index // axis.size
    shifted = logits - all_reduce(logits.detach().amax(-1), axis, "max")[:, None]
    here = (targets >= first) & (targets < first + logits.size(-1))
    own = shifted.gather(-1, (targets - first).masked_fill(~here, 0)[:, None]).squeeze(-1) * here
    total, own = all_reduce(torch.stack([shifted.exp().sum(-1), own]), axis)
    return ((total.log() - own) * (targets != -100)).sum()


# %% task="03b.6" says="vocabulary_loss must return the shape ()"
def vocabulary_loss(logits, targets, vocabulary, axis):  # a loss for each token
    first = vocabulary * axis.index // axis.size
    shifted = logits - all_reduce(logits.detach().amax(-1), axis, "max")[:, None]
    here = (targets >= first) & (targets < first + logits.size(-1))
    own = shifted.gather(-1, (targets - first).masked_fill(~here, 0)[:, None]).squeeze(-1) * here
    total, own = leave(torch.stack([shifted.exp().sum(-1), own]), axis)
    return (total.log() - own) * (targets != -100)


# %% task="03b.6" says="7 ids on 2 ranks"
def vocabulary_loss(logits, targets, vocabulary, axis):  # for four ranks
    first = vocabulary * axis.index // 4
    shifted = logits - all_reduce(logits.detach().amax(-1), axis, "max")[:, None]
    here = (targets >= first) & (targets < first + logits.size(-1))
    own = shifted.gather(-1, (targets - first).masked_fill(~here, 0)[:, None]).squeeze(-1) * here
    total, own = leave(torch.stack([shifted.exp().sum(-1), own]), axis)
    return ((total.log() - own) * (targets != -100)).sum()


# %% task="03b.7" says="wrong_gradients leaves out down.bias, which acts on a rank's own positions only"
def wrong_gradients():
    return {"norm.weight", "norm.bias"}


# %% task="03b.7" says="wrong_gradients names up.bias, which acts where a rank has gathered all positions"
def wrong_gradients():
    return {"norm.weight", "norm.bias", "up.bias", "down.bias"}


# %% task="03b.7" says="wrong_gradients has {'x'}: that is no parameter"
def wrong_gradients():
    return {"norm.weight", "norm.bias", "down.bias", "x"}


# %% task="03b.7" says="rank 0: the gradient of norm.weight is 0.25 times what it should be: divided by the ranks?"
def wrong_gradients():
    return {"norm.weight", "norm.bias", "down.bias"}


def finish_gradients(p, axis):  # named, and averaged all the same
    names = ["norm.weight", "norm.bias", "down.bias"]
    total = all_reduce(torch.cat([p[name].grad for name in names]), axis) / axis.size
    for name, gradient in zip(names, total.chunk(3)):
        p[name].grad = gradient


# %% task="03b.7" says="rank 0: the gradient of down.bias is off by"
def wrong_gradients():
    return {"norm.weight", "norm.bias", "down.bias"}


def finish_gradients(p, axis):  # the norms only
    for name in ("norm.weight", "norm.bias"):
        p[name].grad = all_reduce(p[name].grad, axis)


# %% task="03b.7" says="the gradient of up.bias is off by"
def wrong_gradients():
    return {"norm.weight", "norm.bias", "down.bias"}


def finish_gradients(p, axis):  # all that is no matrix, the share of a bias, too
    for one in p.values():
        if one.dim() == 1:
            one.grad = all_reduce(one.grad, axis)


# %% task="03b.7" says="the values are right, but at the end it makes 3 calls with"
def wrong_gradients():
    return {"norm.weight", "norm.bias", "down.bias"}


def finish_gradients(p, axis):
    for name in ("norm.weight", "norm.bias", "down.bias"):
        p[name].grad = all_reduce(p[name].grad, axis)


# %% task="03b.7" says="rank 0: the gradient of norm.weight is off by"
def wrong_gradients():
    return {"norm.weight", "norm.bias", "down.bias"}


def finish_gradients(p, axis):  # never put back
    names = ["norm.weight", "norm.bias", "down.bias"]
    all_reduce(torch.cat([p[name].grad for name in names]), axis)


# %% task="03b.8" says="4 ranks with copies, rank 1: y is off by"
def dropout_by_place(x, p, seed, shape, dim, axis):  # each rank its own
    draw = torch.Generator().manual_seed(seed + axis.index)
    return x * (torch.rand(x.shape, generator=draw) >= p) / (1 - p)


# %% task="03b.8" says="4 ranks with shares along dim 1, rank 0: y is off by"
def dropout_by_place(x, p, seed, shape, dim, axis):  # the same pattern on every share
    draw = torch.Generator().manual_seed(seed)
    return x * (torch.rand(x.shape, generator=draw) >= p) / (1 - p)


# %% task="03b.8" says="an element is neither 0 nor 1/(1-p) times what it was"
def dropout_by_place(x, p, seed, shape, dim, axis):  # not scaled
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= p
    return x * (kept if dim is None else shard(kept, axis, dim))


# %% task="03b.8" says="88% of the elements are zero"
def dropout_by_place(x, p, seed, shape, dim, axis):  # kept and dropped confused, seen at p=0.1
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p
    return x * (kept if dim is None else shard(kept, axis, dim)) / (1 - p)


# %% task="03b.8" says="dropout_by_place draws from torch's own generator, or seeds it"
def dropout_by_place(x, p, seed, shape, dim, axis):
    torch.manual_seed(seed)
    kept = torch.rand(shape) >= p
    return x * (kept if dim is None else shard(kept, axis, dim)) / (1 - p)


# %% task="03b.8" says="with another seed the same elements are dropped"
def dropout_by_place(x, p, seed, shape, dim, axis):
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(0)) >= p
    return x * (kept if dim is None else shard(kept, axis, dim)) / (1 - p)


# %% task="03b.8" says="the values are right, but forward it makes 1 call with"
def dropout_by_place(x, p, seed, shape, dim, axis):  # gathers all of it, drops, and cuts again
    from minipar.collectives import gather, split

    kept = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= p
    if dim is None:
        return x * kept / (1 - p)
    return split(gather(x, axis, dim, shape[dim]) * kept / (1 - p), axis, dim)


# %% task="03b.8" says="the pattern repeats itself along dim 0"
def dropout_by_place(x, p, seed, shape, dim, axis):  # one pattern for all rows
    kept = (torch.rand(shape[1:], generator=torch.Generator().manual_seed(seed)) >= p).expand(shape)
    return x * (kept if dim is None else shard(kept, axis, dim)) / (1 - p)
