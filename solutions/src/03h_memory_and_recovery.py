# %% [markdown] lang="en"
# # Exercises of 03h: memory and recovery
#
# Five small functions, an hour or so: a block that is computed twice so that little is kept, the scale of a loss in 16
# bits, a run that is too expensive to lose, and its checkpoint on another number of ranks. They go with
# [chapter 03h](../chapters/03h_memory_and_recovery.ipynb): tasks 1 and 2 with its section 2, task 3 with section 3,
# task 4 with sections 7 and 8, task 5 with section 9.
#
# **How it works.** Run the cells from the top with Shift+Enter. Each task is a cell with a function for you to finish,
# where it says `raise NotImplementedError("your turn")`. The folded cell below it is its check: run it after yours. For
# a right answer it prints the line that stands there already, for a wrong one it says what is wrong. Checks do not use
# your earlier answers. Or let a terminal check, in the folder of the course, after you have saved:
#
#     python -m minipar grade exercises/03h_memory_and_recovery.ipynb
#     python -m minipar hint 03h.1
#     python -m minipar solution 03h.1    # once it has passed

# %% tags=["setup"]
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from minipar import Axis, World, ledger
from minipar.collectives import all_reduce
from minipar.course.checks import names_in, returned, verdict
from minipar.course.given import along, fresh_model, tokens

world = World(4)

# %% [markdown] lang="en"
# ## 03h.1 · Trace: what is kept
#
# A model of 6 blocks, one after the other. What goes into a block has 2 MB. What a block keeps *inside* for its
# backward has 34 MB, its input not counted. With full recompute forward keeps nothing but the input of each block; when
# backward comes to a block, the block runs forward once more, keeps its inside, and lets go of it when its backward is
# through.
#
# Work out, on paper: the most that is kept at any moment without recompute, the most with it, and how many times a
# block's forward runs in a step with recompute. (What the last block gives is not counted, nor are gradients.)

# %% [markdown] lang="en" hint="03h.1"
# Without: at the end of forward each of the 6 blocks keeps its input and its inside.

# %% [markdown] lang="en" hint="03h.1"
# With: 6 inputs, and the inside of the one block that backward is in. That is the most when backward begins with the
# last block, for then all inputs are still there.


# %% task="03h.1" title="Trace: what is kept"
def kept() -> tuple[int, int, int]:
    """MB without recompute, MB with it, forwards of a block in a step with it."""
    ### BEGIN SOLUTION
    return 6 * (2 + 34), 6 * 2 + 34, 2
    ### END SOLUTION


# %% check="03h.1" seconds=20
# Check of 03h.1: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    held, most, forwards = 0, {}, 0
    for again in (False, True):
        held, peak = 0, 0
        for _ in range(6):
            held += 2 + (0 if again else 34)
            peak = max(peak, held)
        for _ in range(6):
            peak = max(peak, held + (34 if again else 0))
            held -= 2 + (0 if again else 34)
        most[again] = peak
    answer = returned(kept(), "kept")
    assert isinstance(answer, tuple | list) and len(answer) == 3, f"kept gives {answer!r}: three numbers are asked for."
    without, with_it, times = answer
    what = f"Without recompute you say {without} MB"
    assert without != 6 * 34, f"{what}: each block keeps its input, too."
    assert without != most[False] + 2, f"{what}: what the last block gives is nobody's input, and not counted."
    assert without == most[False], f"{what}: add up what six blocks keep."
    what = f"With recompute you say {with_it} MB"
    assert with_it != 12, f"{what}: those are the inputs. What is there while backward is in a block?"
    assert with_it != 36, f"{what}: that is one block. The other five have their inputs there."
    assert with_it != most[True] + 2, f"{what}: is one input counted twice, or what the last block gives?"
    assert with_it == most[True], f"{what}: add up the inputs, and the inside of one block."
    assert times == 2, f"You say {times} forward{'s' * (times != 1)}: one, and one more when backward comes to it."
    print(f"with recompute, at most {most[True] / most[False]:.0%} of what is kept without")

# %% [markdown] lang="en"
# ## 03h.2 · Complete: compute it again
#
# Now for real. `forward` runs the block without keeping anything; `backward` runs it once more, this time with
# autograd, and goes back through it. There is a trap. With dropout the second forward draws new random numbers, so it
# is another function than the first one, and its gradients belong to a loss that nobody has seen. So put torch's
# generator back to where it was at the first forward, and, when you are through, to where you found it.
#
# **Target:** the gradients of the block alone, with dropout, too, and nothing kept but the input; the random numbers
# after the block are those that would have come anyway.

# %% [markdown] lang="en" hint="03h.2"
# Without dropout first. Inside `backward` autograd does not watch; `with torch.enable_grad():` lets it. Begin from
# `x.detach().requires_grad_()`, run `ctx.block` on it, and call `y.backward(gradient)`. This gives the block's
# parameters their gradients, and the new x that of the input.

# %% [markdown] lang="en" hint="03h.2"
# `forward` has noted in `ctx.state` where torch's generator was. In backward: note where it is now, with
# `torch.get_rng_state()`, then `torch.set_rng_state(ctx.state)`, the block's forward, and back to where it was.


# %% task="03h.2" title="Complete: compute it again"
class Recomputed(torch.autograd.Function):
    """A block that keeps its input only: Recomputed.apply(x, block), x (..., width) that requires a gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, block: nn.Module) -> Tensor:
        ctx.block, ctx.state = block, torch.get_rng_state()
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        (x,) = ctx.saved_tensors
        ### BEGIN SOLUTION
        now = torch.get_rng_state()
        torch.set_rng_state(ctx.state)
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        torch.set_rng_state(now)
        y.backward(gradient)
        ### END SOLUTION
        return x.grad, None


# %% check="03h.2" seconds=20
# Check of 03h.2: run this after your answer
# NBVAL_CHECK_OUTPUT
def gradients_with(run, dropout: float) -> tuple[dict, int, float]:
    """Gradients by name, numbers that autograd keeps, and what is drawn next."""
    model = fresh_model(depth=2, dropout=dropout)
    sizes = []
    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        x = model.embed(tokens)
        for block in model.blocks:
            x = run(x, block)
        sizes_of_blocks = sum(sizes)
    after_forward = float(torch.rand(1))
    torch.manual_seed(6)
    x.square().sum().backward()
    return {n: p.grad for n, p in model.named_parameters()}, sizes_of_blocks, after_forward, float(torch.rand(1))


with verdict():
    for dropout in (0.0, 0.3):
        wanted, usual, *drawn = gradients_with(lambda x, block: block(x), dropout)
        got, kept_numbers, *mine = gradients_with(lambda x, block: Recomputed.apply(x, block), dropout)
        for name, g in wanted.items():
            if g is None:
                continue
            assert got[name] is not None, f"{name} has no gradient: is backward called on what the block gives again?"
            off = float((got[name] - g).abs().max() / g.abs().max())
            why = "Does the second forward drop the same elements as the first?" if dropout else "Does it run on x?"
            assert off < 1e-12, f"dropout {dropout}: the gradient of {name} is off by {off:.2g} of it. {why}"
        assert mine == drawn, f"dropout {dropout}: the gradients are right, but what is drawn afterwards is different."
        assert kept_numbers < 0.2 * usual, (
            f"Right, but {kept_numbers:,} numbers are kept, of {usual:,} without recompute."
        )
    print(f"less than a fifth of {usual:,} numbers kept, the same gradients with dropout")

# %% [markdown] lang="en"
# ## 03h.3 · Write: a scale that finds its place
#
# In float16 small gradients become 0. So the loss is multiplied by a scale, and gradients are divided by it. If that
# makes anything infinite, the step is thrown away and the scale halved; after `patience` good steps in a row it is
# doubled. With several ranks there is one more thing: an overflow on **one** rank must be known to all. Else one of
# them skips the step, the others take it, and they are never again the same model.
#
# `all_reduce(x, axis)` adds the tensors `x` of all ranks of the axis, `all_reduce(x, axis, "max")` gives the largest
# numbers. Every rank has to call it, and gets the same tensor.
#
# **Target:** the same answer on every rank, one all-reduce of a single number for each step.

# %% [markdown] lang="en" hint="03h.3"
# `torch.tensor(float(overflow))` is 1 where there is an overflow, else 0. The largest of them is 1 on every rank if it
# is 1 on any. Ask before you decide: a rank that returns early does not take part.

# %% [markdown] lang="en" hint="03h.3"
# Three cases: an overflow somewhere (half the scale, 0 good steps), the `patience`-th good step (twice the scale, 0
# good steps), any other good step (the same scale, one more).


# %% task="03h.3" title="Write: a scale that finds its place"
def next_scale(overflow: bool, scale: float, good: int, patience: int, axis: Axis) -> tuple[bool, float, int]:
    """After a step: is it taken, the scale of the next one, and how many good steps there were in a row.

    overflow: on this rank. scale, good: before the step, the same on every rank.
    """
    ### BEGIN SOLUTION
    if all_reduce(torch.tensor(float(overflow)), axis, "max") > 0:
        return False, scale / 2, 0
    good += 1
    return (True, scale * 2, 0) if good == patience else (True, scale, good)
    ### END SOLUTION


# %% check="03h.3" seconds=20
# Check of 03h.3: run this after your answer
# NBVAL_CHECK_OUTPUT
def scales(axis, function, where: dict, patience: int, steps: int) -> tuple[list, int, int]:
    """What a run of steps gives, its calls and bytes; `where`: step -> the ranks that overflow in it."""
    scale, good, seen = 1024.0, 0, []
    with ledger() as book:
        for step in range(steps):
            bad = axis.index in where.get(step, ())
            taken, scale, good = returned(function(bad, scale, good, patience, axis), "next_scale")
            seen.append((bool(taken), float(scale), int(good)))
    return seen, book.calls("dp"), book.bytes("dp")


def right_scales(where: dict, patience: int, steps: int) -> list:
    scale, good, seen = 1024.0, 0, []
    for step in range(steps):
        good = 0 if step in where else good + 1
        scale = scale / 2 if step in where else scale
        if good == patience:
            scale, good = scale * 2, 0
        seen.append((step not in where, scale, good))
    return seen


with verdict():
    made = []
    for where, patience, n in [({}, 3, 4), ({0: [2], 4: [0, 1], 5: [3]}, 2, 4), ({2: [1]}, 4, 2), ({1: [0]}, 1, 2)]:
        wanted = right_scales(where, patience, 8)
        ranks = along(world, "dp", scales, next_scale, where, patience, 8, size=n)[:: 4 // n]
        for rank, (got, calls, sent) in enumerate(ranks):
            for step, (mine, right) in enumerate(zip(got, wanted, strict=True)):
                who = f", overflow on ranks {where[step]}" if step in where else ""
                told = f"{n} ranks, patience {patience}, step {step}{who}: rank {rank} gives {mine}, and it is {right}."
                assert mine == right, f"{told} (Taken, scale, good steps in a row.)"
            made.append((n, rank, calls, sent))
    for n, rank, calls, sent in made:
        told = f"{n} ranks, rank {rank}: the answers are right, with {calls} calls and {sent:,} bytes in 8 steps."
        assert calls == 8, f"{told} One all-reduce a step is enough."
        assert sent <= 8 * 2 * 8 * (n - 1) / n, f"{told} One number a step is enough."
    print("four runs of eight steps, the same scale on every rank")

# %% [markdown] lang="en"
# ## 03h.4 · Write: a checkpoint of another shape
#
# A tensor with `length` numbers was saved by `saved` ranks, a file for each: file $i$ has the numbers from
# $\lfloor \text{length}\cdot i/\text{saved} \rfloor$ up to where file $i+1$ begins. Now the run goes on with `ranks`
# ranks, cut in the same way. Say what one rank has to read: from which files, and which numbers in each. The first
# number of each file is its number 0.
#
# **Target:** nothing that it does not need, each piece once, in order. Empty pieces are left out.

# %% [markdown] lang="en" hint="03h.4"
# Write down where this rank's share begins and ends within the whole tensor, and the same for each file. Two intervals
# overlap from the larger of the two beginnings to the smaller of the two ends.

# %% [markdown] lang="en" hint="03h.4"
# With `begin`, `end` for the rank's share and `first`, `behind` for the file's, the part that they share goes from
# `max(begin, first)` to `min(end, behind)`. If that is not empty, count both from `first`: that is where the file
# begins.


# %% task="03h.4" title="Write: a checkpoint of another shape"
def pieces(length: int, saved: int, ranks: int, index: int) -> list[tuple[int, int, int]]:
    """What rank `index` of `ranks` reads: (file, first number in it, number behind the last), in order."""
    ### BEGIN SOLUTION
    begin, end = length * index // ranks, length * (index + 1) // ranks
    found = []
    for file in range(saved):
        first, behind = length * file // saved, length * (file + 1) // saved
        a, b = max(begin, first), min(end, behind)
        if a < b:
            found.append((file, a - first, b - first))
    return found
    ### END SOLUTION


# %% check="03h.4" seconds=20
# Check of 03h.4: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    for length, saved, ranks in [(12, 4, 2), (12, 2, 4), (10, 4, 3), (7, 3, 5), (2, 4, 3), (11, 1, 2), (9, 3, 3)]:
        files = [list(range(length * i // saved, length * (i + 1) // saved)) for i in range(saved)]
        for index in range(ranks):
            got = [tuple(piece) for piece in returned(pieces(length, saved, ranks, index), "pieces")]
            wanted = list(range(length * index // ranks, length * (index + 1) // ranks))
            case = f"{length} numbers, {saved} files, rank {index} of {ranks}"
            read = []
            for file, a, b in got:
                assert 0 <= file < saved, f"{case}: there is no file {file}."
                assert a < b, f"{case}: you read file {file} from {a} to {b}, which is nothing: leave it out."
                has = f"file {file} has no numbers {a} to {b - 1}: it has {len(files[file])}, from its own number 0 on"
                assert 0 <= a < b <= len(files[file]), f"{case}: {has}."
                read += files[file][a:b]
            told = f"{case}: you read the numbers {read}, and its share is {wanted}."
            assert read == wanted, f"{told} Where does each file begin, and which of its numbers are wanted?"
            count = len(got)
            assert count == len({file for file, *_ in got}), (
                f"{case}: right, but in {count} pieces: one a file is enough."
            )
    print("read from 1 to 4 files, on 2 to 5 ranks, each number once")

# %% [markdown] lang="en"
# ## 03h.5 · Mend: killed while saving
#
# A checkpoint is a folder with a file for each part. This code writes it where the last one was. It has always worked.
# Then the machine was switched off in the middle, and what was there was half of the new checkpoint over half of the
# old one.
#
# `os.replace(a, b)` gives a file or an empty target folder another name, all at once: whoever looks sees it before or
# after. A folder that is there already is not replaced. So give each step's folder a name of its own, `step-7`, and
# write under another name first. `load` is given: of all folders whose names begin with `step-` it takes the one with
# the largest number behind that.
#
# **Target:** killed after any of its operations, `load` finds the old checkpoint or the new one, whole. At the end
# nothing else is left, not even of an earlier save that was killed: the new folder alone.

# %% [markdown] lang="en" hint="03h.5"
# Three things, in this order: write all parts under a name that `load` does not look at, give it its name, take the old
# ones away.

# %% [markdown] lang="en" hint="03h.5"
# Leftovers of a killed save may stand under the other name: take them away before you begin (`remove` does nothing
# where there is nothing).


# %% task="03h.5" title="Mend: killed while saving"
def save(folder: Path, step: int, parts: dict[str, str], write, rename, remove) -> None:
    """Save the parts, by file name, as the checkpoint of a step.

    write(path, text) makes the folders that are missing; rename(a, b) is os.replace; remove(path) removes a folder.
    """
    ### BEGIN SOLUTION
    unfinished, finished = folder / "unfinished", folder / f"step-{step}"
    remove(unfinished)
    for name, text in parts.items():
        write(unfinished / name, text)
    rename(unfinished, finished)
    for old in folder.glob("step-*"):
        if old != finished:
            remove(old)
    ### INSTEAD
    # for old in folder.glob("step-*"):
    #     rename(old, folder / f"step-{step}")
    # for name, text in parts.items():
    #     write(folder / f"step-{step}" / name, text)
    ### END SOLUTION


# %% tags=["setup"] jupyter={"source_hidden": true}
# Given, for 03h.5: what `save` may do, until it is killed
class Killed(BaseException):
    pass


def load(folder: Path) -> tuple[int, dict[str, str]]:
    """The step and the parts of the newest checkpoint. -1 and nothing where there is none."""
    found = list(folder.glob("step-*"))
    for path in found:
        assert path.name[5:].isdecimal(), f"load takes {path.name!r} for a checkpoint: its name begins with step-."
    steps = {int(path.name.removeprefix("step-")): path for path in found}
    if not steps:
        return -1, {}
    newest = max(steps)
    return newest, {path.name: path.read_text() for path in sorted(steps[newest].iterdir())}


def saved_until(function, folder: Path, step: int, parts: dict[str, str], most: int) -> bool:
    """Save, and be killed before operation number `most`. Did it come to its end?"""
    left = [most]

    def allowed(operation):
        def run(*args):
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            operation(*args)

        return run

    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    try:
        operations = write, os.replace, lambda path: shutil.rmtree(path, ignore_errors=True)
        function(folder, step, dict(parts), *map(allowed, operations))
    except Killed:
        return False
    return True


# %% check="03h.5" seconds=20
# Check of 03h.5: run this after your answer
# NBVAL_CHECK_OUTPUT
with verdict():
    others = {"shutil", "rmtree", "unlink", "rmdir", "write_text", "mkdir", "replace", "rename", "remove"}
    used = names_in(save) & others
    told = "use the write, rename and remove that it is given: they can be killed."
    assert not used, f"save uses {sorted(used)[0]!r} of a path or a module: {told}"
    old, new = ({f"rank-{i}": f"{what} {i}" for i in range(3)} for what in ("old", "new"))
    for start in (-1, 5):
        most, done = 0, False
        while not done:
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                if start >= 0:
                    for name, text in old.items():
                        (folder / "step-5").mkdir(exist_ok=True)
                        (folder / "step-5" / name).write_text(text)
                done = saved_until(save, folder, 9, new, most)
                step, parts = load(folder)
                before = (start, old if start >= 0 else {})
                told = f"Killed before operation {most + 1}: load finds step {step} with {parts or 'nothing'}."
                assert (step, parts) in (before, (9, new)), (
                    f"{told} It must be the old checkpoint or the new one, whole."
                )
                assert step == 9 or not done, (
                    f"Nobody killed it, and load finds step {step}: the new one was not saved."
                )
                again = saved_until(save, folder, 12, new, 100)
                assert again and load(folder) == (12, new), f"Killed before operation {most + 1}, the next save fails."
                left = sorted(path.name for path in folder.iterdir())
                assert left == ["step-12"], f"Killed before operation {most + 1}, and saved again: {left} are left."
            most += 1
            assert most < 50, "save does not come to an end within 50 operations."
    print("killed after each of its operations: the old checkpoint or the new one was there, whole")
