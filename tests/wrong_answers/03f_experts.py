# ruff: noqa
# Plausible wrong answers. Each must be refused with a message that contains what stands in `says`.

# %% task="03f.1" says="has 2 choices of the same expert before it: it is dropped, and route says it is not."
def route(probabilities, top, room):  # off by one: room for one more
    choices = probabilities.topk(top).indices
    flat = choices.flatten()
    so_far = F.one_hot(flat, probabilities.size(1)).cumsum(0)
    return choices, so_far.gather(1, flat[:, None]).view_as(choices) - 1 <= room


# %% task="03f.1" says="has 1 choices of the same expert before it: it is kept, and route says it is not."
def route(probabilities, top, room):  # off by one: counts itself among those before it
    choices = probabilities.topk(top).indices
    flat = choices.flatten()
    so_far = F.one_hot(flat, probabilities.size(1)).cumsum(0)
    return choices, so_far.gather(1, flat[:, None]).view_as(choices) < room


# %% task="03f.1" says="choice 1 of token 1 has 1 choices of the same expert before it: it is kept, and route says it is not."
def route(probabilities, top, room):  # all first choices, then all second ones
    choices = probabilities.topk(top).indices
    flat = choices.T.flatten()
    so_far = F.one_hot(flat, probabilities.size(1)).cumsum(0)
    return choices, so_far.gather(1, flat[:, None]).view(top, -1).T <= room


# %% task="03f.1" says="choices of the same expert before it: it is"
def route(probabilities, top, room):  # the heaviest first
    weights, choices = probabilities.topk(top)
    order = weights.flatten().argsort(descending=True)
    flat = choices.flatten()[order]
    so_far = F.one_hot(flat, probabilities.size(1)).cumsum(0)
    kept = torch.zeros(len(flat), dtype=torch.bool)
    kept[order] = so_far.gather(1, flat[:, None])[:, 0] <= room
    return choices, kept.view_as(choices)


# %% task="03f.1" says="6 tokens, 3 experts, top 2, room 2: choices has the shape (2, 3), and should be (6, 2)."
def route(probabilities, top, room):  # each expert picks tokens
    choices = probabilities.topk(top, dim=0).indices
    return choices, choices < room


# %% task="03f.1" says="and its likeliest experts are"
def route(probabilities, top, room):  # by number, not by probability
    choices = probabilities.topk(top).indices.sort(1).values
    flat = choices.flatten()
    so_far = F.one_hot(flat, probabilities.size(1)).cumsum(0)
    return choices, so_far.gather(1, flat[:, None]).view_as(choices) <= room


# %% task="03f.1" says="choices of the same expert before it: it is dropped, and route says it is not."
def route(probabilities, top, room):  # nobody is dropped
    choices = probabilities.topk(top).indices
    return choices, torch.ones_like(choices, dtype=torch.bool)


# %% task="03f.2" says="8 experts on 4 ranks: rank 0: its experts get (8, 3, 5), and should get (2, 12, 5): 2 experts, slots of 4 ranks."
def through_experts(slots, axis, experts):  # as it came
    return all_to_all(experts(all_to_all(slots, axis)), axis)


# %% task="03f.2" says="8 experts on 4 ranks: rank 0 gets other results for"
def through_experts(slots, axis, experts):  # a view mixes experts
    came = all_to_all(slots, axis).view(slots.size(0) // axis.size, -1, slots.size(2))
    return all_to_all(experts(came).view(slots.shape), axis)


# %% task="03f.2" says="8 experts on 4 ranks: rank 0 returns (2, 12, 5), and its slots are (8, 3, 5)."
def through_experts(slots, axis, experts):  # nothing comes back
    came = all_to_all(slots, axis)
    return experts(torch.cat(came.chunk(axis.size, 0), 1))


# %% task="03f.2" says="8 experts on 4 ranks: rank 0 gets other results for 18 of its 24 slots, the first of expert 2"
def through_experts(slots, axis, experts):  # put together again at home, without sending
    came = all_to_all(slots, axis)
    gave = experts(torch.cat(came.chunk(axis.size, 0), 1))
    return torch.cat(gave.chunk(axis.size, 1), 0)


# %% task="03f.2" says="rank 0 has the right results, but sends"
def through_experts(slots, axis, experts):  # everything to everyone
    n, held = axis.size, slots.size(0) // axis.size
    every = all_to_all(slots.repeat(n, 1, 1), axis).chunk(n, 0)
    mine = slice(axis.index * held, (axis.index + 1) * held)
    gave = experts(torch.cat([part[mine] for part in every], 1))
    return all_to_all(torch.cat(gave.chunk(n, 1), 0), axis)


# %% task="03f.2" says="8 experts on 4 ranks: rank 0 calls its experts 4 times, and once is what they are for."
def through_experts(slots, axis, experts):  # one rank's slots after the other
    came = all_to_all(slots, axis)
    return all_to_all(torch.cat([experts(part) for part in came.chunk(axis.size, 0)], 0), axis)


# %% task="03f.2" says="rank 0 has the right results, but makes 4 calls: one there and one back."
def through_experts(slots, axis, experts):  # each half of the vectors by itself
    n = axis.size
    came = torch.cat([all_to_all(part.contiguous(), axis) for part in (slots[..., :2], slots[..., 2:])], 2)
    back = torch.cat(experts(torch.cat(came.chunk(n, 0), 1)).chunk(n, 1), 0)
    return torch.cat([all_to_all(part.contiguous(), axis) for part in (back[..., :2], back[..., 2:])], 2)


# %% task="03f.2" says="6 experts on 2 ranks: rank 0: its experts get"
def through_experts(slots, axis, experts):  # four ranks
    came = all_to_all(slots, axis)
    if axis.size == 2:
        came = came[:4]
    gave = experts(torch.cat(came.chunk(4, 0), 1))
    return all_to_all(torch.cat(gave.chunk(4, 1), 0), axis)


# %% task="03f.3" says="push_on_four gives [-2.0, -1.0, -1.0, 0.0]: L grows with each P, and no derivative is negative."
def push_on_four():  # the step, not the gradient
    return [-2, -1, -1, 0]


# %% task="03f.3" says="push_on_four gives [0.5, 0.25, 0.25, 0.0]: L is 4"
def push_on_four():  # without E
    return [1 / 2, 1 / 4, 1 / 4, 0]


# %% task="03f.3" says="an even load: the term is 0.2500, and should be 1.0000."
def push_on_four():
    return [2, 1, 1, 0]


def balance_loss(probabilities, choices):  # without E
    share = torch.bincount(choices.flatten(), minlength=probabilities.size(1)) / choices.numel()
    return (share * probabilities.mean(0)).sum()


# %% task="03f.3" says="16 tokens, 8 experts, top 2: the term is"
def push_on_four():
    return [2, 1, 1, 0]


def balance_loss(probabilities, choices):  # first choices only
    experts = probabilities.size(1)
    share = torch.bincount(choices[:, 0], minlength=experts) / len(choices)
    return experts * (share * probabilities.mean(0)).sum()


# %% task="03f.3" says="an even load: the term is right, but its gradient is not E f / T for each token"
def push_on_four():
    return [2, 1, 1, 0]


def balance_loss(probabilities, choices):  # probabilities for shares, twice
    mean = probabilities.mean(0)
    return len(mean) * (mean * mean).sum()


# %% task="03f.3" says="the term is right, but has no gradient: nothing would push the router."
def push_on_four():
    return [2, 1, 1, 0]


def balance_loss(probabilities, choices):  # of numbers
    experts = probabilities.size(1)
    share = torch.bincount(choices.flatten(), minlength=experts) / choices.numel()
    return experts * (share * probabilities.detach().mean(0)).sum()


# %% task="03f.3" says="16 tokens, 8 experts, top 2: the term is"
def push_on_four():
    return [2, 1, 1, 0]


def balance_loss(probabilities, choices):  # shares of tokens, which sum to `top`
    experts = probabilities.size(1)
    share = torch.bincount(choices.flatten(), minlength=experts) / len(choices)
    return experts * (share * probabilities.mean(0)).sum()


# %% task="03f.3" says="RuntimeError: The size of tensor a (3)"
def push_on_four():
    return [2, 1, 1, 0]


def balance_loss(probabilities, choices):  # the last experts are missing
    share = torch.bincount(choices.flatten()) / choices.numel()
    return probabilities.size(1) * (share * probabilities.mean(0)).sum()


# %% task="03f.3" says="an even load: the term has the shape (4,), and is one number."
def push_on_four():
    return [2, 1, 1, 0]


def balance_loss(probabilities, choices):  # not summed
    experts = probabilities.size(1)
    share = torch.bincount(choices.flatten(), minlength=experts) / choices.numel()
    return experts * share * probabilities.mean(0)


# %% task="03f.4" says="depends_on gives ['rows']: try a heavy choice at the end, and in another row."
def depends_on():
    return ["rows"]


# %% task="03f.4" says="choices of row 1 have another fate."
def depends_on():
    return ["later", "rows"]


def kept_choices(choices, weights, experts, capacity):  # a queue in order, but one of the whole batch
    room = ceil(capacity * choices.numel() / experts)
    flat = choices.flatten()
    so_far = F.one_hot(flat, experts).cumsum(0)
    return (so_far.gather(1, flat[:, None]) <= room).view_as(choices)


# %% task="03f.4" says="choices before it have another fate."
def depends_on():
    return ["later", "rows"]


def kept_choices(choices, weights, experts, capacity):  # by row, but still the heaviest first
    room = ceil(capacity * choices[0].numel() / experts)
    order = weights.flatten(1).argsort(1, descending=True)
    flat = choices.flatten(1).gather(1, order)
    place = F.one_hot(flat, experts).cumsum(1).gather(2, flat[..., None])[..., 0]
    return torch.zeros_like(flat, dtype=torch.bool).scatter(1, order, place <= room).view_as(choices)


# %% task="03f.4" says="the first row has another fate if it is the only one in the batch."
def depends_on():
    return ["later", "rows"]


def kept_choices(choices, weights, experts, capacity):  # room of the whole batch for each row
    room = ceil(capacity * choices.numel() / experts)
    flat = choices.flatten(1)
    so_far = F.one_hot(flat, experts).cumsum(1)
    return (so_far.gather(2, flat[..., None]) <= room).view_as(choices)


# %% task="03f.4" says="no leak is left, but"
def depends_on():
    return ["later", "rows"]


def kept_choices(choices, weights, experts, capacity):  # `top` forgotten
    room = ceil(capacity * choices.size(1) / experts)
    flat = choices.flatten(1)
    so_far = F.one_hot(flat, experts).cumsum(1)
    return (so_far.gather(2, flat[..., None]) <= room).view_as(choices)


# %% task="03f.4" says="no leak is left, but"
def depends_on():
    return ["later", "rows"]


def kept_choices(choices, weights, experts, capacity):  # nobody is dropped
    return torch.ones_like(choices, dtype=torch.bool)
