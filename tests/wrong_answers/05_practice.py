# ruff: noqa
# Wrong answers to the exercises of 05, and what a learner is told.

# %% task="05.1" says="is on both sides"
def split(texts, sources, share, seed):
    rows = list(range(len(texts)))
    random.Random(seed).shuffle(rows)
    number = int(share * len(rows))
    known = {texts[row].lower() for row in rows[:number]}
    return sorted(row for row in rows[number:] if texts[row].lower() not in known), sorted(rows[:number])


# %% task="05.1" says="the judge has the same text in lower case"
def split(texts, sources, share, seed):
    names, kept = sorted(set(sources)), set()
    random.Random(seed).shuffle(names)
    for name in names:
        if sum(source in kept for source in sources) >= share * len(sources):
            break
        kept.add(name)
    judge = [row for row, source in enumerate(sources) if source in kept]
    known = {texts[row] for row in judge}
    learn = [row for row, source in enumerate(sources) if source not in kept and texts[row] not in known]
    return learn, judge


# %% task="05.1" says="the judge should get the rows"
def split(texts, sources, share, seed):
    names = sorted(set(sources))
    random.Random(seed).shuffle(names)
    kept = set(names[: int(share * len(names))])  # a share of the sources, not of the rows
    judge = [row for row, source in enumerate(sources) if source in kept]
    known = {texts[row].lower() for row in judge}
    learn = [row for row, source in enumerate(sources) if source not in kept and texts[row].lower() not in known]
    return learn, judge


# %% task="05.1" says="the judge should get the rows"
def split(texts, sources, share, seed):
    names, kept = sorted(set(sources)), set()
    random.Random(seed).shuffle(names)
    for name in names:
        if sum(source in kept for source in sources) >= share * len(sources):
            break
        kept.add(name)
    learn = [row for row, source in enumerate(sources) if source not in kept]
    known = {texts[row].lower() for row in learn}  # the judge is cleaned, not what is learned from
    return learn, [row for row, s in enumerate(sources) if s in kept and texts[row].lower() not in known]


# %% task="05.2" says="A mean of ratios, or this rank's rows only?"
def scores(axis, truth, answer, classes):
    right = torch.bincount(truth[truth == answer], minlength=classes).double()
    rows = torch.bincount(truth, minlength=classes).double()
    given = torch.bincount(answer, minlength=classes).double()
    precision, recall = right / given.clamp(min=1), right / rows.clamp(min=1)
    f1 = 2 * right / (rows + given).clamp(min=1)
    return all_reduce(torch.stack([precision, recall, f1]), axis) / axis.size


# %% task="05.2" says="A mean of ratios, or this rank's rows only?"
def scores(axis, truth, answer, classes):
    right = torch.bincount(truth[truth == answer], minlength=classes).double()
    rows = torch.bincount(truth, minlength=classes).double()
    given = torch.bincount(answer, minlength=classes).double()
    f1 = 2 * right / (rows + given).clamp(min=1)
    return torch.stack([right / given.clamp(min=1), right / rows.clamp(min=1), f1])


# %% task="05.2" says="is 0.600000024, not 0.6: divided in float32?"
def scores(axis, truth, answer, classes):
    right = torch.bincount(truth[truth == answer], minlength=classes)
    rows, given = torch.bincount(truth, minlength=classes), torch.bincount(answer, minlength=classes)
    right, rows, given = all_reduce(torch.stack([right, rows, given]), axis)
    f1 = 2 * right / (rows + given).clamp(min=1)
    return torch.stack([right / given.clamp(min=1), right / rows.clamp(min=1), f1]).double()  # too late


# %% task="05.2" says="bytes for 6 classes"
def scores(axis, truth, answer, classes):
    table = torch.bincount(truth * classes + answer, minlength=classes**2)
    table = all_reduce(table, axis).view(classes, classes).double()
    right, rows, given = table.diagonal(), table.sum(1), table.sum(0)
    return torch.stack([right / given.clamp(min=1), right / rows.clamp(min=1), 2 * right / (rows + given).clamp(min=1)])


# %% task="05.2" says="3 calls, and one is enough"
def scores(axis, truth, answer, classes):
    right = all_reduce(torch.bincount(truth[truth == answer], minlength=classes), axis).double()
    rows = all_reduce(torch.bincount(truth, minlength=classes), axis).double()
    given = all_reduce(torch.bincount(answer, minlength=classes), axis).double()
    return torch.stack([right / given.clamp(min=1), right / rows.clamp(min=1), 2 * right / (rows + given).clamp(min=1)])


# %% task="05.2" says="0/0 is 0"
def scores(axis, truth, answer, classes):
    right = torch.bincount(truth[truth == answer], minlength=classes)
    rows, given = torch.bincount(truth, minlength=classes), torch.bincount(answer, minlength=classes)
    right, rows, given = all_reduce(torch.stack([right, rows, given]), axis).double()
    return torch.stack([right / given, right / rows, 2 * right / (rows + given)])


# %% task="05.2" says="the precision of class"
def scores(axis, truth, answer, classes):
    right = torch.bincount(truth[truth == answer], minlength=classes)
    rows, given = torch.bincount(truth, minlength=classes), torch.bincount(answer, minlength=classes)
    right, rows, given = all_reduce(torch.stack([right, rows, given]), axis).double()
    return torch.stack([right / rows.clamp(min=1), right / given.clamp(min=1), 2 * right / (rows + given).clamp(min=1)])


# %% task="05.3" says="the last, shorter batch is left out"
def epoch(axis, model, optimizer, x, y, batch):
    for start in range(0, len(x) - batch + 1, batch):
        some, labels = x[start : start + batch], y[start : start + batch]
        edges = bounds(len(some), axis.size)
        mine = slice(edges[axis.index], edges[axis.index + 1])
        optimizer.zero_grad()
        (F.cross_entropy(model(some[mine]), labels[mine], reduction="sum") / len(some)).backward()
        flat = all_reduce(torch.cat([p.grad.flatten() for p in model.parameters()]), axis)
        for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = part.view_as(p)
        optimizer.step()


# %% task="05.3" says="ranks have [1, 2, 1, 2], and each row counts 1/6. A mean of means is not the mean."
def epoch(axis, model, optimizer, x, y, batch):
    for start in range(0, len(x), batch):
        some, labels = x[start : start + batch], y[start : start + batch]
        edges = bounds(len(some), axis.size)
        mine = slice(edges[axis.index], edges[axis.index + 1])
        optimizer.zero_grad()
        F.cross_entropy(model(some[mine]), labels[mine]).backward()  # the mean of means
        flat = all_reduce(torch.cat([p.grad.flatten() for p in model.parameters()]), axis) / axis.size
        for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = part.view_as(p)
        optimizer.step()


# %% task="05.3" says="Of a batch of 3 rows, ranks have [0, 1, 1, 1], and each row counts 1/3."
def epoch(axis, model, optimizer, x, y, batch):
    for start in range(0, len(x), batch):
        some, labels = x[start : start + batch], y[start : start + batch]
        edges = bounds(len(some), axis.size)
        mine = slice(edges[axis.index], edges[axis.index + 1])
        optimizer.zero_grad()
        (F.cross_entropy(model(some[mine]), labels[mine], reduction="sum") / batch).backward()  # the last one has fewer
        flat = all_reduce(torch.cat([p.grad.flatten() for p in model.parameters()]), axis)
        for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = part.view_as(p)
        optimizer.step()


# %% task="05.3" says="is 0.25 times that of one process, on every rank: divided once too often by the 4 ranks?"
def epoch(axis, model, optimizer, x, y, batch):
    for start in range(0, len(x), batch):
        some, labels = x[start : start + batch], y[start : start + batch]
        edges = bounds(len(some), axis.size)
        mine = slice(edges[axis.index], edges[axis.index + 1])
        optimizer.zero_grad()
        (F.cross_entropy(model(some[mine]), labels[mine], reduction="sum") / len(some)).backward()
        flat = all_reduce(torch.cat([p.grad.flatten() for p in model.parameters()]), axis) / axis.size
        for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = part.view_as(p)
        optimizer.step()


# %% task="05.3" says="is 4 times that of one process, on every rank: summed over the 4 ranks?"
def epoch(axis, model, optimizer, x, y, batch):
    for start in range(0, len(x), batch):
        some, labels = x[start : start + batch], y[start : start + batch]
        edges = bounds(len(some), axis.size)
        mine = slice(edges[axis.index], edges[axis.index + 1])
        optimizer.zero_grad()
        F.cross_entropy(model(some[mine]), labels[mine]).backward()  # a mean on each rank, and the sum of means
        flat = all_reduce(torch.cat([p.grad.flatten() for p in model.parameters()]), axis)
        for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = part.view_as(p)
        optimizer.step()


# %% task="05.3" says="is 8 times that of one process, on every rank. Of a batch of 8 rows, ranks have [2, 2, 2, 2]"
def epoch(axis, model, optimizer, x, y, batch):
    for start in range(0, len(x), batch):
        some, labels = x[start : start + batch], y[start : start + batch]
        edges = bounds(len(some), axis.size)
        mine = slice(edges[axis.index], edges[axis.index + 1])
        optimizer.zero_grad()
        F.cross_entropy(model(some[mine]), labels[mine], reduction="sum").backward()
        flat = all_reduce(torch.cat([p.grad.flatten() for p in model.parameters()]), axis)
        for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = part.view_as(p)
        optimizer.step()


# %% task="05.3" says="calls for"
def epoch(axis, model, optimizer, x, y, batch):
    for start in range(0, len(x), batch):
        some, labels = x[start : start + batch], y[start : start + batch]
        edges = bounds(len(some), axis.size)
        mine = slice(edges[axis.index], edges[axis.index + 1])
        optimizer.zero_grad()
        (F.cross_entropy(model(some[mine]), labels[mine], reduction="sum") / len(some)).backward()
        for p in model.parameters():
            p.grad = all_reduce(p.grad, axis)
        optimizer.step()


# %% task="05.4" says="what is still whole?"
def head_plan():
    return {"blocks.*.norm": "replicate", "blocks.*.up": "colwise", "blocks.*.down": "rowwise"}


# %% task="05.4" says="what is still whole?"
def head_plan():
    return {"blocks.*.norm": "replicate", "head": "colwise_gather_output"}


# %% task="05.4" says="somebody has to gather 40 classes"
def head_plan():
    return {"blocks.*.norm": "replicate", "blocks.*.up": "colwise", "blocks.*.down": "rowwise", "head": "colwise"}


# %% task="05.4" says="is none of the four styles"
def head_plan():
    return {"blocks.*.up": "columns", "blocks.*.down": "rows", "head": "colwise_gather_output"}


# %% task="05.4" says="'head' is rowwise, which takes a share of its inputs, and the outputs of 'blocks.*.down'"
def head_plan():
    return {"blocks.*.norm": "replicate", "blocks.*.up": "colwise", "blocks.*.down": "rowwise", "head": "rowwise"}


# %% task="05.4" says="'blocks.*.up' is rowwise, which takes a share of its inputs, and the outputs of 'blocks.*.norm'"
def head_plan():
    return {"blocks.*.up": "rowwise", "blocks.*.down": "colwise", "head": "colwise_gather_output"}


# %% task="05.4" says="takes its inputs whole, and the outputs of 'blocks.*.up', colwise, come in shares"
def head_plan():
    return {"blocks.*.up": "colwise", "blocks.*.down": "replicate", "head": "colwise_gather_output"}


# %% task="05.4" says="'embed' is rowwise, which takes a share of its inputs, and the rows come whole"
def head_plan():
    return {"embed": "rowwise", "head": "colwise_gather_output"}


# %% task="05.4" says="matches no layer"
def head_plan():
    return {"blocks.up": "colwise", "blocks.*.down": "rowwise", "head": "colwise_gather_output"}


# %% task="05.5" says="has moved, and it was to stay"
def fine_tune(model, mesh, x, y, batch, passes):
    parallel = parallelize(model, mesh, plan=PLAN, microbatches=2)
    named = list(parallel.named_parameters())
    groups = [
        {"params": [p for name, p in named if not name.startswith("head")], "lr": 0.02},
        {"params": [p for name, p in named if name.startswith("head")], "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for start in [*range(0, len(x), batch)] * passes:
        parallel.step(x[start : start + batch], y[start : start + batch])
        optimizer.step()
    return parallel.full_state_dict()


# %% task="05.5" says="Look at learning rates"
def fine_tune(model, mesh, x, y, batch, passes):
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    parallel = parallelize(model, mesh, plan=PLAN, microbatches=2)
    optimizer = torch.optim.SGD([p for p in parallel.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    for start in [*range(0, len(x), batch)] * passes:
        parallel.step(x[start : start + batch], y[start : start + batch])
        optimizer.step()
    return parallel.full_state_dict()


# %% task="05.5" says="is frozen since parallelize"
def fine_tune(model, mesh, x, y, batch, passes):
    parallel = parallelize(model, mesh, plan=PLAN, microbatches=2)
    for name, p in parallel.named_parameters():
        p.requires_grad_(not name.startswith(("embed", "blocks.0")))  # too late
    optimizer = torch.optim.SGD([p for p in parallel.parameters() if p.requires_grad], lr=0.02, momentum=0.9)
    for start in [*range(0, len(x), batch)] * passes:
        parallel.step(x[start : start + batch], y[start : start + batch])
        optimizer.step()
    return parallel.full_state_dict()


# %% task="05.5" says="is not in what you return"
def fine_tune(model, mesh, x, y, batch, passes):
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    parallel = parallelize(model, mesh, plan=PLAN, microbatches=2)
    named = [(name, p) for name, p in parallel.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if not name.startswith("head")], "lr": 0.02},
        {"params": [p for name, p in named if name.startswith("head")], "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for start in [*range(0, len(x), batch)] * passes:
        parallel.step(x[start : start + batch], y[start : start + batch])
        optimizer.step()
    return {name: p.detach() for name, p in parallel.named_parameters() if name.startswith("blocks")}


# %% task="05.5" says="has not moved at all"
def fine_tune(model, mesh, x, y, batch, passes):
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    parallel = parallelize(model, mesh, plan=PLAN, microbatches=2)
    blocks = [p for name, p in parallel.named_parameters() if p.requires_grad and not name.startswith("head")]
    optimizer = torch.optim.SGD([{"params": blocks}], lr=0.02, momentum=0.9)
    for start in [*range(0, len(x), batch)] * passes:
        parallel.step(x[start : start + batch], y[start : start + batch])
        optimizer.step()
    return parallel.full_state_dict()


# %% task="05.5" says="or was the optimizer made before parallelize?"
def fine_tune(model, mesh, x, y, batch, passes):
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if not name.startswith("head")], "lr": 0.02},
        {"params": [p for name, p in named if name.startswith("head")], "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    parallel = parallelize(model, mesh, plan=PLAN, microbatches=2)
    for start in [*range(0, len(x), batch)] * passes:
        parallel.step(x[start : start + batch], y[start : start + batch])
        optimizer.step()
    return parallel.full_state_dict()


# %% task="05.5" says="blocks are given [3, 4] rows at once, and in two microbatches [1, 2]"
def fine_tune(model, mesh, x, y, batch, passes):
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    parallel = parallelize(model, mesh, plan=PLAN)
    named = [(name, p) for name, p in parallel.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if not name.startswith("head")], "lr": 0.02},
        {"params": [p for name, p in named if name.startswith("head")], "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for start in [*range(0, len(x), batch)] * passes:
        parallel.step(x[start : start + batch], y[start : start + batch])
        optimizer.step()
    return parallel.full_state_dict()


# %% task="05.5" says="blocks are given [1, 2] rows at once, and in two microbatches [2]"
def fine_tune(model, mesh, x, y, batch, passes):
    model.embed.requires_grad_(False)
    model.blocks[0].requires_grad_(False)
    parallel = parallelize(model, mesh, plan=PLAN, microbatches=3)
    named = [(name, p) for name, p in parallel.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if not name.startswith("head")], "lr": 0.02},
        {"params": [p for name, p in named if name.startswith("head")], "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for start in [*range(0, len(x), batch)] * passes:
        parallel.step(x[start : start + batch], y[start : start + batch])
        optimizer.step()
    return parallel.full_state_dict()
