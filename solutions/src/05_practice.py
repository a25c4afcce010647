# %% [markdown] lang="en"
# # Exercises of 05: a text classifier in practice
#
# Five functions that the chapter's project is made of, an hour or two: a split without leaks, scores that are right on
# ranks, an epoch with a short last batch, a plan for a model with a large head, and fine-tuning of a part on any mesh.
# They work on a small classifier in float64, so that one process and four ranks can be compared to twelve digits.
#
# **How it works.** Run the cells from the top with Shift+Enter. Each task is a cell with a function for you to finish;
# the folded cell below it is its check. In a terminal, in the folder of the course:
#
#     python -m minipar grade exercises/05_practice.ipynb
#     python -m minipar hint 05.1
#     python -m minipar solution 05.1    # once it has passed

# %% tags=["setup"]
import random
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minipar import Mesh, RankError, World, ledger, parallelize
from minipar.collectives import Axis, all_reduce, bounds
from minipar.course.checks import difference, returned, verdict
from minipar.course.given import along

world = World(4)


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given: a small classifier, and texts as numbers: rows of three classes, 16 numbers each
class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Classifier(nn.Module):
    """An embedding, blocks, and a head, as BERT has them. (rows, 16) -> logits (rows, classes)"""

    def __init__(self, classes: int, width: int = 16, depth: int = 2):
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def classifier(classes: int = 3, **changes: int) -> nn.Module:
    """The same weights, whoever calls."""
    torch.manual_seed(0)
    return Classifier(classes, **changes).double()


def rows_and_labels(number: int, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows around the center of their class, and their labels."""
    draw = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, 16, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    labels = torch.randint(classes, (number,), generator=draw)
    return centers[labels] + 0.9 * torch.randn(number, 16, generator=draw, dtype=torch.float64), labels


# %% [markdown] lang="en"
# ## 05.1 · Write: a split without leaks
#
# Rows of one source (a file, a customer, a patient) are alike. So whole sources go to one side. Write the split, so
# that everybody who knows the seed gets the same one:
#
# - bring the sources, each once, into alphabetical order, then shuffle them with `random.Random(seed).shuffle`;
# - take sources for the judge in this order until the judge has **at least** `share` of all rows; the rest is learned
#   from;
# - give the row numbers of both sides, in rising order.
#
# Two rows of different sources may have the same text. Then it is in both sides all the same. So leave those rows that
# **the judge has, too, out of what is learned from**. (Not the other way around: what is judged by should not depend
# on a cleaning.) Texts count as the same if they are equal in lower case.

# %% [markdown] lang="en" hint="05.1"
# Two steps, one after the other. First choose the judge's *sources*, with no look at the texts; then clean what is
# left. Sources have unequally many rows: what do you count, to know that the judge has enough?

# %% [markdown] lang="en" hint="05.1"
# `sorted(set(sources))` is the alphabetical order. Before you take the next name, count the rows that the judge has by
# now: `sum(source in kept for source in sources)`.

# %% [markdown] lang="en" hint="05.1"
# Collect the judge's texts in lower case in a set, and take a row to learn from only if its text is not in there.


# %% task="05.1" title="Write: a split without leaks"
def split(texts: list[str], sources: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers to learn from and to judge by."""
    ### BEGIN SOLUTION
    names, kept = sorted(set(sources)), set()
    random.Random(seed).shuffle(names)
    for name in names:
        if sum(source in kept for source in sources) >= share * len(sources):
            break
        kept.add(name)
    judge = [row for row, source in enumerate(sources) if source in kept]
    known = {texts[row].lower() for row in judge}
    learn = [row for row, source in enumerate(sources) if source not in kept and texts[row].lower() not in known]
    return learn, judge
    ### END SOLUTION


# %% check="05.1" seconds=20
# Check of 05.1: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    texts = ["Plot it", "Sum it", "sum it", "Solve it", "Cut it", "Draw it", "PLOT IT", "Fit it", "Add it"]
    texts, sources = [*texts, "Solve it", "Join it", "Add it."], ["ba", "ba", *5 * ["a"], "b", "bab", "bab", "ab", "c"]
    for share, seed in ((1 / 3, 0), (0.3, 1), (0.5, 2), (0.25, 3), (1 / 6, 4)):
        names = sorted(set(sources))
        random.Random(seed).shuffle(names)
        mine = [*texts], [*sources]
        found = returned(split(*mine, share, seed), "split")
        assert mine == (texts, sources), "`split` has changed the lists that it was given"
        assert isinstance(found, tuple | list) and len(found) == 2, "`split` returns two lists: to learn, to judge"
        learn, judge = (list(side) for side in found)
        both = {sources[row] for row in learn} & {sources[row] for row in judge}
        assert not both, f"source {sorted(both)[0]!r} is on both sides: whole sources go to one side"
        number = next(k for k in range(7) if sum(s in names[:k] for s in sources) >= share * len(sources))
        right = [row for row, source in enumerate(sources) if source in names[:number]]
        told = f"the sources in shuffled order are {', '.join(names)}"
        assert sorted(judge) == right, (
            f"seed {seed}, share {share:.2f}: the judge should get the rows {right}, not {sorted(judge)}; {told}"
        )
        same = {texts[row].lower() for row in judge}
        leaks = [row for row in learn if texts[row].lower() in same]
        assert not leaks, f"{texts[leaks[0]]!r} is learned from, and the judge has the same text in lower case"
        rest = [row for row, s in enumerate(sources) if s not in names[:number] and texts[row].lower() not in same]
        told = f"seed {seed}, share {share:.2f}: the rows to learn from should be {rest}, not {sorted(learn)}"
        assert sorted(learn) == rest, told
        assert learn == rest and judge == right, "row numbers are in rising order on both sides"
print("no source and no text on both sides, for five seeds and shares")

# %% [markdown] lang="en"
# ## 05.2 · Write: precision, recall and F1 on ranks
#
# Each data rank has labeled other rows, and not equally many. What are precision, recall and F1 of each class, over all
# rows? A mean of the ranks' ratios is wrong: 4 of 5 here and 0 of 1 there are 4 of 6. So **counts** travel.
#
# - recall of a class: right answers / rows that are of this class;
# - precision: right answers / rows that were given this class;
# - F1: 2 × precision × recall / (precision + recall);
# - each of them is 0 where its denominator is 0.
#
# **Target:** one `all_reduce`, of $3C$ numbers of 8 bytes for $C$ classes (the whole confusion matrix has $C^2$). The
# same on every rank. For 6 classes on 4 ranks each rank sends 2 × 3/4 × 18 × 8 = 216 bytes. With counts of
# 8 bytes we know of no way with fewer.

# %% [markdown] lang="en" hint="05.2"
# For each class three counts are enough: rows of this class, answers of this class, and rows where both are.
# `torch.bincount(truth, minlength=classes)` makes the first.

# %% [markdown] lang="en" hint="05.2"
# The third is `torch.bincount(truth[truth == answer], minlength=classes)`. Then `torch.stack([...])`, one `all_reduce`,
# `.double()`.

# %% [markdown] lang="en" hint="05.2"
# F1 is also 2 × right / (rows + answers). And where a denominator is 0 its numerator is, too: `clamp(min=1)`.


# %% task="05.2" title="Write: precision, recall and F1 on ranks"
def scores(axis: Axis, truth: Tensor, answer: Tensor, classes: int) -> Tensor:
    """Precision, recall and F1 of each class over the rows of all ranks: (3, classes), float64.

    truth, answer: of this rank's rows, whole numbers from 0 to classes - 1. There may be no row.
    """
    ### BEGIN SOLUTION
    right = torch.bincount(truth[truth == answer], minlength=classes)
    rows, given = torch.bincount(truth, minlength=classes), torch.bincount(answer, minlength=classes)
    right, rows, given = all_reduce(torch.stack([right, rows, given]), axis).double()
    return torch.stack([right / given.clamp(min=1), right / rows.clamp(min=1), 2 * right / (rows + given).clamp(min=1)])
    ### END SOLUTION


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for the check of 05.2: rows of unequal number on each rank
def scored(axis: Axis, scores: Callable, cases: list) -> list:
    """For each case (classes, truth and answer of each rank) what this rank gets, its calls and bytes."""
    found = []
    for classes, truths, answers in cases:
        with ledger() as book:
            got = scores(axis, truths[axis.index].clone(), answers[axis.index].clone(), classes)
        found.append((got, book.calls(), book.bytes()))
    return found


def answers_of(sizes: list[int], classes: int, seed: int) -> tuple[int, list[Tensor], list[Tensor]]:
    """Labels and answers, three in four of them right. Of the last four classes there is one row, which is answered
    right; one that is not; one answer; nothing."""
    draw, used = torch.Generator().manual_seed(seed), classes - 4
    truths = [torch.randint(used, (n,), generator=draw) for n in sizes]
    answers = [torch.where(torch.rand(len(t), generator=draw) < 0.75, t, (t + 1) % used) for t in truths]
    truths[0][0] = answers[0][0] = used
    truths[0][1], answers[1][0] = used + 1, used + 2
    return classes, truths, answers


# %% check="05.2" seconds=20
# Check of 05.2: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    cases = [answers_of([5, 9, 2, 0], 6, 1), answers_of([7, 1, 3, 4], 9, 2), answers_of([9000, 9, 2, 0], 6, 3)]
    for size in (4, 2):
        for rank, found in enumerate(along(world, "dp", scored, scores, cases, size=size)):
            for (classes, truths, answers), (got, calls, sent) in zip(cases, found, strict=True):
                returned(got, "scores")
                truth, answer = torch.cat(truths[:size]), torch.cat(answers[:size])
                shape = f"rank {rank}: `scores` gives {tuple(got.shape)} {got.dtype}, wanted is (3, {classes}) float64"
                assert got.shape == (3, classes) and got.dtype == torch.float64, shape
                for c in range(classes):
                    rows, given = (truth == c).sum().item(), (answer == c).sum().item()
                    right = ((truth == c) & (answer == c)).sum().item()
                    for i, (name, top, below) in enumerate(
                        [("precision", right, given), ("recall", right, rows), ("F1", 2 * right, rows + given)]
                    ):
                        share, mine = top / max(below, 1), got[i, c].item()
                        why = "of all rows together. A mean of ratios, or this rank's rows only?"
                        if abs(mine - share) < 1e-6:
                            why = "divided in float32? Make the counts float64 first"
                        told = f"the {name} of class {c} is {mine:.9g}, not {share:.9g}: {why if below else '0/0 is 0'}"
                        assert abs(mine - share) < 1e-12, f"rank {rank} of {size}: {told}"
                most = 2 * (size - 1) * 3 * classes * 8 // size
                assert calls == 1, f"rank {rank}: {calls} calls, and one is enough: stack the counts"
                assert sent <= most, f"rank {rank} sends {sent} bytes for {classes} classes, and {most} are enough"
print("scores of all rows on each of 4 ranks, for one call of 216 bytes")

# %% [markdown] lang="en"
# ## 05.3 · Mend: the last batch is short
#
# An epoch over 21 rows in batches of 6 on 4 data ranks: batches of 6, 6, 6 and 3 rows. In the last one a rank has no
# row. The function below was written for batches that divide, and somebody left the last batch out, "because it hangs".
# Mend it, so that **each row counts once, and each step is the one of a single process with the same batch**.
#
# `bounds(n, ranks)` gives the places where to cut n rows for the ranks, also unequally: `bounds(6, 4)` is
# `[0, 1, 3, 4, 6]`.
#
# **Target:** one `all_reduce` a step, of all gradients in one tensor; no call for the count, which every rank can
# compute by itself.

# %% [markdown] lang="en" hint="05.3"
# Two bugs: the range stops before the last batch, and `cross_entropy` gives the mean over *this rank's* rows.

# %% [markdown] lang="en" hint="05.3"
# With `reduction="sum"` a rank without rows has a loss of 0 and gradients of 0, no special case. Divide by the rows of
# the *batch*, and sum over ranks.


# %% task="05.3" title="Mend: the last batch is short"
def epoch(axis: Axis, model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, batch: int) -> None:
    """Train for one pass over all rows, in their order. x, y: all rows, on every rank."""
    ### BEGIN SOLUTION
    for start in range(0, len(x), batch):
        some, labels = x[start : start + batch], y[start : start + batch]
        edges = bounds(len(some), axis.size)
        mine = slice(edges[axis.index], edges[axis.index + 1])
        optimizer.zero_grad()
        loss = F.cross_entropy(model(some[mine]), labels[mine], reduction="sum") / len(some)
        loss.backward()
        flat = all_reduce(torch.cat([p.grad.flatten() for p in model.parameters()]), axis)
        for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
            p.grad = part.view_as(p)
        optimizer.step()
    ### INSTEAD
    # for start in range(0, len(x) - batch + 1, batch):
    #     some, labels = x[start : start + batch], y[start : start + batch]
    #     edges = bounds(len(some), axis.size)
    #     mine = slice(edges[axis.index], edges[axis.index + 1])
    #     optimizer.zero_grad()
    #     loss = F.cross_entropy(model(some[mine]), labels[mine])
    #     loss.backward()
    #     flat = all_reduce(torch.cat([p.grad.flatten() for p in model.parameters()]), axis) / axis.size
    #     for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()]), strict=True):
    #         p.grad = part.view_as(p)
    #     optimizer.step()
    ### END SOLUTION


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for the check of 05.3: an epoch on ranks, and on one process; with SGD, since Adam hides a gradient's scale
def changes(model: nn.Module) -> dict[str, Tensor]:
    """How far training has moved each parameter."""
    start = classifier(depth=1).state_dict()
    return {name: p.detach() - start[name] for name, p in model.named_parameters()}


def trained(axis: Axis, epoch: Callable, number: int, batch: int) -> tuple[dict[str, Tensor], int, int, int]:
    """What an epoch over so many rows changes, calls, bytes, and how many rows went through this rank's model."""
    model, seen = classifier(depth=1), [0]
    model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with ledger() as book:
        epoch(axis, model, optimizer, *(mine := rows_and_labels(number)), batch)
    assert all(a.equal(b) for a, b in zip(mine, rows_and_labels(number), strict=True)), "`epoch` has changed the rows"
    return changes(model), book.calls(), book.bytes(), sum(seen)


def trained_alone(number: int, batch: int, last: bool = True) -> dict[str, Tensor]:
    """The same by one process. last: also the last batch, if it is short."""
    model, (x, y) = classifier(depth=1), rows_and_labels(number)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for start in range(0, len(x) if last else len(x) - batch + 1, batch):
        optimizer.zero_grad()
        F.cross_entropy(model(x[start : start + batch]), y[start : start + batch]).backward()
        optimizer.step()
    return changes(model)


# %% check="05.3" seconds=30
# Check of 05.3: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    for number, batch, size in ((8, 8, 4), (12, 6, 4), (21, 6, 4), (9, 4, 2), (10, 4, 4)):
        found = along(world, "dp", trained, epoch, number, batch, size=size)
        moved, calls, sent, seen = zip(*found, strict=True)
        whole, steps = trained_alone(number, batch), -(-number // batch)
        case = f"{number} rows in batches of {batch} on {size} ranks"
        told = difference(moved, whole, "change")
        if told:
            for rows in dict.fromkeys([batch, number % batch or batch]):
                shares = [stop - start for start, stop in pairwise(bounds(rows, size))]
                told += f" Of a batch of {rows} rows, ranks have {shares}, and each row counts 1/{rows}."
            told += " A mean of means is not the mean." if len({*shares}) > 1 else ""
        if told and number % batch and not difference(moved, trained_alone(number, batch, last=False), "change"):
            told = "the last, shorter batch is left out: its rows should count, too"
        assert not told, f"{case}: {told}"
        assert set(calls) == {steps}, f"{case}: {max(calls)} calls for {steps} steps: one a step is enough"
        least = steps * 2 * (size - 1) * sum(w.numel() for w in whole.values()) * 8 / size
        told = f"{case}: {sum(seen)} rows go through the models of all ranks, rank 0 has {seen[0]}: who takes which?"
        assert sum(seen) == number * world.n // size and max(seen) <= -(-number // size) + steps, told
        assert max(sent) <= 1.01 * least, f"{case}: {max(sent):,} bytes, and {least:,.0f} are enough"
print("21 rows in batches of 6 on 4 ranks: four steps, four calls, the weights of one process")

# %% [markdown] lang="en"
# ## 05.4 · Write: a plan for a large head
#
# The classifier of this notebook has no plan. With 40 classes its head has 680 numbers, and whole on every tensor
# rank it would be the largest part of all: a block's 1,104 are cut, to 312 on four ranks. Write the plan, a style for
# each kind of layer. A `*` stands for the number of a block, as in `"blocks.*.up"`. The layers are `embed`,
# `blocks.*.norm`, `blocks.*.up`, `blocks.*.down` and `head`. The styles:
#
# | style | what it does |
# |---|---|
# | `replicate` | the layer is whole on every rank |
# | `colwise` | outputs are cut; each rank goes on with its own |
# | `colwise_gather_output` | outputs are cut, and gathered before anybody sees them |
# | `rowwise` | inputs are cut, as `colwise` has left them; outputs are summed |
#
# **Target:** the gradients of one process, and on each of 4 tensor ranks at most 1,066 numbers of 3,160.

# %% [markdown] lang="en" hint="05.4"
# What stands between `up` and `down` has no need of whole rows: one is cut by columns, the other by rows. The norm
# needs whole rows.

# %% [markdown] lang="en" hint="05.4"
# The loss needs all logits of a row. So the head is cut by columns, and what it gives has to be gathered.


# %% task="05.4" title="Write: a plan for a large head"
def head_plan() -> dict[str, str]:
    """Layer -> style, for the classifier."""
    ### BEGIN SOLUTION
    return {
        "embed": "replicate",
        "blocks.*.norm": "replicate",
        "blocks.*.up": "colwise",
        "blocks.*.down": "rowwise",
        "head": "colwise_gather_output",
    }
    ### END SOLUTION


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for the check of 05.4: a step with a plan, and by one process
def step_with(plan: dict[str, str], mesh: Mesh, classes: int) -> tuple[float, dict[str, Tensor], int, tuple[int, ...]]:
    """The loss, all gradients, how many numbers this rank holds, and the shape of the logits."""
    model = parallelize(classifier(classes), mesh, plan=plan)
    x, y = rows_and_labels(12, classes)
    with torch.no_grad():
        held, shape = sum(p.numel() for p in model.parameters()), tuple(model.forward(x).shape)
    loss = model.step(x, y).item() if shape == (12, classes) else 0.0
    return loss, model.full_gradients(), held, shape


def misfit(plan: dict[str, str]) -> str:
    """The first layer that is not given what its style takes, in a sentence; "" if there is none."""
    before, cut = "the rows", False
    for layer in ("embed", "blocks.*.norm", "blocks.*.up", "blocks.*.down", "head"):
        style = plan.get(layer, "replicate")
        if (style == "rowwise") != cut:
            takes = "a share of its inputs" if style == "rowwise" else "its inputs whole"
            return f"{layer!r} is {style}, which takes {takes}, and {before} come {'in shares' if cut else 'whole'}"
        before, cut = f"the outputs of {layer!r}, {style},", style == "colwise"
    return ""


def step_alone(classes: int) -> tuple[float, dict[str, Tensor]]:
    model, (x, y) = classifier(classes), rows_and_labels(12, classes)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


# %% check="05.4" seconds=30
# Check of 05.4: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    styles = returned(head_plan(), "head_plan")
    strange = sorted({*styles.values()} - {"replicate", "colwise", "colwise_gather_output", "rowwise"})
    assert not strange, f"{strange[0]!r} is none of the four styles"
    for mesh, classes, most in ((Mesh(tp=4), 40, 1066), (Mesh(dp=2, tp=2), 6, 1475)):
        whole_loss, whole = step_alone(classes)
        try:
            found = world.run(step_with, styles, mesh, classes, limit=15)
        except RankError as error:
            told = misfit(styles) if isinstance(error.exception, RuntimeError) else ""
            assert not told, f"{mesh}: shapes do not fit. {told}"
            raise
        loss, got, held, shape = zip(*found, strict=True)
        assert set(shape) == {(12, classes)}, (
            f"{mesh}: the logits are {shape[0]}: somebody has to gather {classes} classes"
        )
        told = difference(got, whole)
        assert not told, f"{mesh}: {told} Who is cut by columns, who by rows?"
        assert abs(loss[0] - whole_loss) < 1e-12, f"{mesh}: the loss is {loss[0]:.6f}, not {whole_loss:.6f}"
        told = f"{mesh}: a rank holds {max(held):,} numbers, and {most:,} are enough: what is still whole?"
        assert max(held) <= most, told
print("a third of the numbers on each of 4 tensor ranks, the gradients of one process")

# %% [markdown] lang="en"
# ## 05.5 · Write: fine-tune a part, on any mesh
#
# The chapter's loop, with one difficulty. The embedding and the first block stay as they are, and the head, which is
# new, learns ten times as fast as the rest. So the optimizer needs two groups, and on a pipeline a rank may have
# nothing of the head, or nothing that is frozen. The same lines have to work there, too.
#
# - Freeze **before** `parallelize`: it decides then what is summed.
# - `torch.optim.SGD` with `momentum=0.9`, in two groups: `lr=0.02` for blocks, `lr=0.2` for the head. Only what is
#   trained belongs in it.
# - So many passes over the rows in their order, `batch` rows a step, two microbatches.
# - Return the whole weights, which any program can use: `full_state_dict()`.
#
# `PLAN` is given, for tensor ranks: pass it as `plan=PLAN`.

# %% [markdown] lang="en" hint="05.5"
# `model.embed.requires_grad_(False)`, `model.blocks[0].requires_grad_(False)`, then
# `parallelize(model, mesh, plan=PLAN, microbatches=2)`.

# %% [markdown] lang="en" hint="05.5"
# `named_parameters()` of what `parallelize` gives are this rank's, under the names of the whole model. A group of an
# optimizer may be empty.

# %% [markdown] lang="en" hint="05.5"
# `step(x, y)` is given the whole batch on every rank, sets the gradients and needs no `zero_grad`; then
# `optimizer.step()`.

# %% tags=["setup"] jupyter={"source_hidden": true}
PLAN = {"blocks.*.norm": "replicate", "blocks.*.up": "colwise", "blocks.*.down": "rowwise"}


# %% task="05.5" title="Write: fine-tune a part, on any mesh"
def fine_tune(model: nn.Module, mesh: Mesh, x: Tensor, y: Tensor, batch: int, passes: int) -> dict[str, Tensor]:
    """Train all but the embedding and the first block. Called on every rank. Returns the whole weights."""
    ### BEGIN SOLUTION
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
    return parallel.full_state_dict()
    ### END SOLUTION


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for the check of 05.5: the same by one process, and how many rows weights label right
def tuned(fine_tune: Callable, mesh: Mesh, *how) -> tuple[dict[str, Tensor], list[int]]:
    """The weights, and how many rows at once went through a block of this rank."""
    model, seen = classifier(depth=4), set()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, given: seen.add(len(given[0])))
    return fine_tune(model, mesh, *how), sorted(seen)


def tuned_alone(x: Tensor, y: Tensor, batch: int, passes: int, depth: int) -> dict[str, Tensor]:
    model = classifier(depth=depth)
    groups = [{"params": model.blocks[1:].parameters(), "lr": 0.02}, {"params": model.head.parameters(), "lr": 0.2}]
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    for start in [*range(0, len(x), batch)] * passes:
        optimizer.zero_grad()
        F.cross_entropy(model(x[start : start + batch]), y[start : start + batch]).backward()
        optimizer.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def share_right(weights: dict[str, Tensor], depth: int) -> float:
    """Of 500 rows that nobody has learned from."""
    model, (x, y) = classifier(depth=depth), rows_and_labels(500, seed=7)
    model.load_state_dict(weights)
    return (model(x).argmax(1) == y).double().mean().item()


# %% check="05.5" seconds=30
# Check of 05.5: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    for mesh, rows, batch, passes in (
        (Mesh(dp=4), 44, 16, 2),
        (Mesh(dp=2, tp=2), 24, 8, 1),
        (Mesh(pp=2, tp=2), 48, 8, 3),
    ):
        x, y = rows_and_labels(rows)
        weights, seen = zip(*world.run(tuned, fine_tune, mesh, x, y, batch, passes, limit=15), strict=True)
        start, whole = classifier(depth=4).state_dict(), tuned_alone(x, y, batch, passes, 4)
        for rank, mine in enumerate(weights):
            returned(mine, "fine_tune")
            missing = sorted(start.keys() - mine.keys())
            assert not missing, f"{mesh}, rank {rank}: {missing[0]} is not in what you return: full_state_dict()"
            shapes = [n for n in start if mine[n].shape != start[n].shape]
            assert not shapes, f"{mesh}, rank {rank}: {shapes[0]} is this rank's part: use full_state_dict()"
            moved = [
                name for name in start if name.startswith(("embed", "blocks.0")) and (mine[name] != start[name]).any()
            ]
            assert not moved, f"{mesh}, rank {rank}: {moved[0]} has moved, and it was to stay as it is"
        still = [
            name for name in whole if (weights[0][name] == start[name]).all() and (whole[name] != start[name]).any()
        ]
        why = "is it in the optimizer, or was the optimizer made before parallelize?"
        assert not still, f"{mesh}: {still[0]} has not moved at all: {why}"
        told = difference(weights, whole, "weight")
        assert not told, f"{mesh}: {told} Look at learning rates, momentum, the order of the rows."
        half = sorted({n // mesh.dp // 2 for n in (batch, rows % batch or batch)})
        told = f"{mesh}, batches of {batch}: blocks are given {seen[0]} rows at once, and in two microbatches {half}"
        assert seen[0] == half, told
    right = share_right(weights[0], 4)
    assert right > 0.9, f"only {right:.0%} of 500 new rows are labeled right"
print("the weights of one process on three meshes; more than 90 percent of 500 new rows are right")

# %% [markdown] lang="en"
# ## All together
#
# Your pieces on a mesh of eight ranks, with all three axes: the split, the training, the scores.

# %% tags=["raises-exception"]
with World(8) as eight:
    x, y = rows_and_labels(96)
    learn, judge = split([str(row) for row in x.tolist()], [f"file {i // 4:02}" for i in range(96)], 0.25, 0)
    data = x[learn], y[learn]
    weights = eight.run(lambda: fine_tune(classifier(depth=4), Mesh(dp=2, pp=2, tp=2), *data, 8, 3))[0]
    model = classifier(depth=4)
    model.load_state_dict(weights)
    answers, truth = model(x[judge]).argmax(1), y[judge]

    def on_data_ranks(axis):
        edges = bounds(len(judge), axis.size)
        mine = slice(edges[axis.index], edges[axis.index + 1])
        return scores(axis, truth[mine], answers[mine], 3)

    found = along(eight, "dp", on_data_ranks)[0]
print(f"{len(learn)} rows to learn from, {len(judge)} to judge by; on 2x2x2:")
for name, of_classes in zip(("precision", "recall", "F1"), found.tolist(), strict=True):
    print(f"{name:10}", *(f"{share:6.1%}" for share in of_classes))
