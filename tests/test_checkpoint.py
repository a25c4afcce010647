"""Checkpoints: what comes back is what was saved, on any layout, and no moment is a bad one to be killed."""

import json
import pickle
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from math import prod
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import batch_of, model_of
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import minipar
from minipar import Config, Mesh, RankError, checkpoint, here, parallelize
from minipar.cut import Cut

CONFIG = Config(vocab=37, context=12, depth=4, width=12, heads=2, tied=True, dropout=0.1)
BATCH = batch_of(CONFIG, 8, 8)


class Block(nn.Module):
    """With a parameter of no dims, one that nothing updates, and a buffer."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale = nn.Linear(6, 6), nn.Parameter(torch.randn(()))
        self.inner.bias.requires_grad_(False)
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x):
        return x + self.scale * torch.tanh(self.inner(x)) + self.shift


class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(37, 6), nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(6, 37)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def odd(seed=0):
    torch.manual_seed(seed)
    return Odd().double()


def adamw(model):
    """Two groups, whose settings differ."""
    decayed = [p for name, p in model.named_parameters() if "norm" not in name]
    others = [p for name, p in model.named_parameters() if "norm" in name]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": others, "lr": 0.02}], betas=(0.8, 0.9)
    )


def sgd(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True)


def amsgrad(model):
    return torch.optim.Adam(model.parameters(), amsgrad=True)


def gpt(seed=0):
    return model_of(CONFIG, seed)


# name -> model, optimizer, options of the run that saves, of those that load
RUNS = {
    "plain": (gpt, adamw, {}, {}),
    "zero 1": (gpt, sgd, {"zero": 1}, {"zero": 3}),
    "zero 3": (gpt, adamw, {"zero": 3}, {"zero": 1}),
    "to zero": (gpt, amsgrad, {}, {"zero": 2}),
}
ODD = {"odd": (odd, amsgrad, {"zero": 3}, {}), "odd to zero": (odd, amsgrad, {}, {"zero": 1})}


torch.set_num_threads(1)  # of small products two threads take longer where others work, too


def take_steps(model, optimizer, steps=2):
    losses = []
    for _ in range(steps):
        losses.append(model.step(*BATCH).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def contents(model, optimizer):
    """All that a run consists of, whole: weights, each state of the optimizer, hyperparameters, counters."""
    found = dict(model.full_state_dict())
    states = sorted({what for p in model.parameters() for what in optimizer.state[p]})
    for what in states:
        for name, p in model.named_parameters():
            x = optimizer.state[p].get(what)
            if x is not None and x.dim() == 0 and what == "step":
                found[f"{what} of {name}"] = x.clone()
            elif x is not None:
                p.grad = x.clone()
        if what != "step":
            found |= {f"{what} of {name}": x for name, x in model.full_gradients().items()}
    optimizer.zero_grad()
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return found, groups, (model.steps, model.seed)


def save_all(folder, mesh, runs):
    """On a rank: train, save, and go on undisturbed."""
    found = {}
    for name, (make, optimize, options, _) in runs.items():
        torch.manual_seed(5)
        model = parallelize(make(), mesh, microbatches=2, **options)
        optimizer = optimize(model)
        take_steps(model, optimizer)
        for group in optimizer.param_groups:
            group["lr"] *= 0.7  # as a schedule does
        minipar.save(folder / name, model, optimizer, note=name, data={"epoch": 1, "row": 48})
        found[name] = contents(model, optimizer), take_steps(model, optimizer)
    return found


def load_all(folder, mesh, runs, same=False):
    """On a rank: into another model, of another seed."""
    found = {}
    for name, (make, optimize, saved_with, options) in runs.items():
        torch.manual_seed(6)
        model = parallelize(make(seed=1), mesh, microbatches=2, **(saved_with if same else options))
        optimizer = optimize(model)
        take_steps(model, optimizer, 1)  # a used optimizer, too
        extra = minipar.load(folder / name, model, optimizer)
        assert extra == {"note": name, "data": {"epoch": 1, "row": 48}}
        found[name] = contents(model, optimizer), take_steps(model, optimizer)
    return found


def differing(got, wanted):
    (tensors, *rest), (wanted_tensors, *wanted_rest) = got, wanted
    wrong = [name for name, x in tensors.items() if name in wanted_tensors and not x.equal(wanted_tensors[name])]
    return wrong + [f"{a} for {b}" for a, b in zip(rest, wanted_rest, strict=True) if a != b]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, world8):
    """A folder, and what 2 x 2 x 2 ranks had when they saved there."""
    folder = tmp_path_factory.mktemp("checkpoints")
    answers = world8.run(save_all, folder, Mesh(dp=2, pp=2, tp=2), RUNS)
    return folder, answers


def whole_contents(answers, name):
    """What the ranks have together: steps are known by those that own the parameter."""
    tensors = {}
    for answer in answers:
        tensors |= answer[name][0][0]
    return tensors, *answers[0][name][0][1:]


def problems(loaded, saved, runs):
    found = []
    for name in runs:
        wanted, got = whole_contents(saved, name), whole_contents(loaded, name)
        if got[0].keys() != wanted[0].keys():
            found.append(f"{name}: {sorted(got[0].keys() ^ wanted[0].keys())[:3]} are in one only")
        for rank, answer in enumerate(loaded):
            found += [f"{name}, rank {rank}: {what}" for what in differing(answer[name][0], wanted)]
            losses, undisturbed = answer[name][1], saved[0][name][1]
            if not torch.allclose(torch.tensor(losses), torch.tensor(undisturbed), rtol=1e-9, atol=0):
                found.append(f"{name}, rank {rank}: {losses} for {undisturbed}")
    return found


# What comes back.


def test_saved_on_2x2x2_it_is_loaded_on_4x1x2_bit_for_bit(saved, world8):
    folder, answers = saved
    assert problems(world8.run(load_all, folder, Mesh(dp=4, tp=2), RUNS), answers, RUNS) == []


def test_saved_on_2x2x2_it_is_loaded_on_one_process_bit_for_bit(saved):
    folder, answers = saved
    assert problems([load_all(folder, Mesh(), RUNS)], answers, RUNS) == []


def test_what_one_process_saved_is_loaded_on_any_mesh(tmp_path, world4):
    wanted = [save_all(tmp_path, Mesh(), RUNS)]
    for mesh in (Mesh(pp=4), Mesh(cp=2, tp=2)):
        runs = RUNS if mesh.cp == 1 else {"plain": RUNS["plain"]}
        assert problems(world4.run(load_all, tmp_path, mesh, runs), wanted, runs) == []


def test_parameters_of_no_dims_frozen_ones_and_buffers_come_back(tmp_path, world4):
    wanted = world4.run(save_all, tmp_path, Mesh(dp=2, pp=2), ODD)
    assert problems(world4.run(load_all, tmp_path, Mesh(dp=4), ODD), wanted, ODD) == []
    assert problems([load_all(tmp_path, Mesh(), ODD)], wanted, ODD) == []


def test_experts_come_back_on_another_mesh(tmp_path, world4):
    def mixture(seed=0):
        return model_of(other(experts=4, dropout=0.0), seed)

    runs = {"whole": (mixture, adamw, {}, {"zero": 1}), "shares": (mixture, adamw, {"zero": 1}, {})}
    wanted = world4.run(save_all, tmp_path, Mesh(ep=2, tp=2), runs)
    assert problems(world4.run(load_all, tmp_path, Mesh(dp=2, ep=2), runs), wanted, runs) == []
    assert problems([load_all(tmp_path, Mesh(), runs)], wanted, runs) == []


def test_on_the_same_layout_a_run_goes_on_as_if_nothing_had_been(saved, world8):
    """With dropout, to the last bit."""
    folder, answers = saved
    again = world8.run(load_all, folder, Mesh(dp=2, pp=2, tp=2), RUNS, same=True)
    for name in RUNS:
        assert [answer[name][1] for answer in again] == [answer[name][1] for answer in answers]


def test_the_files_hold_every_element_once(saved):
    folder, answers = saved
    for name in RUNS:
        path = minipar.latest(folder / name)
        elements, wanted = Counter(), Counter()
        for file in path.glob("*.safetensors"):
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118
                    elements[key] += prod(opened.get_slice(key).get_shape())
        shapes = {n: p.shape for n, p in gpt().named_parameters()}
        for key in elements:
            kind, _, rest = key.partition("/")
            wanted[key] = 1 if kind == "scalar" else prod(shapes[rest.split("/")[-1]])
        assert elements == wanted
        states = {key.split("/")[1] for key in elements if key.startswith(("optimizer", "scalar"))}
        tensors, *_ = whole_contents(answers, name)
        assert len(elements) == len(shapes) * (1 + len(states)) and {f"model/{n}" for n in shapes} <= elements.keys()
        assert states == {key.split(" of ")[0] for key in tensors if " of " in key}


def test_a_scale_of_the_loss_comes_back(tmp_path):
    def half():
        return parallelize(minipar.gpt(CONFIG), Mesh(), dtype=torch.float16)

    model = half()
    model.scale.value, model.scale.good = 512.0, 7
    minipar.save(tmp_path, model, torch.optim.SGD(model.parameters(), 0.1))
    other = half()
    minipar.load(tmp_path, other)
    assert (other.scale.value, other.scale.good) == (512.0, 7)


def test_nothing_is_unpickled(saved, world8):
    def load_without_pickle(folder, mesh):
        def refuse(*_, **__):
            raise AssertionError("something is unpickled")

        places = [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (pickle, "_Unpickler"), (torch, "load")]
        patches = [patch.object(module, name, refuse) for module, name in places]
        patches.append(patch.object(checkpoint.Reading, "load_bytes", refuse))
        model = parallelize(gpt(seed=1), mesh)
        for one in patches:
            one.start()
        try:
            with pytest_free_raises(AssertionError):
                pickle.loads(b"N.")
            return minipar.load(folder, model, adamw(model))["note"]
        finally:
            for one in patches:
                one.stop()

    folder, _ = saved
    assert world8.run(load_without_pickle, folder / "zero 3", Mesh(dp=4, tp=2)) == ["zero 3"] * 8
    assert not [file for file in (folder / "zero 3").rglob("*") if file.is_file() and b"ctorch" in file.read_bytes()]


class pytest_free_raises:
    """pytest.raises, on ranks, which do not import pytest."""

    def __init__(self, kind):
        self.kind = kind

    def __enter__(self):
        pass

    def __exit__(self, kind, *_):
        assert kind is self.kind, "the patch does nothing"
        return True


# Boxes.


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_any_range_of_a_tensor_is_a_few_boxes(shape, data):
    size = prod(shape)
    start = data.draw(st.integers(0, size))
    stop = data.draw(st.integers(start, size))
    tensor, found = torch.arange(size).view(shape), []
    for offsets, sizes in checkpoint.boxes(tuple(shape), start, stop):
        found.append(tensor[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))].flatten())
    assert torch.cat([torch.arange(0), *found]).tolist() == list(range(start, stop))
    assert len(found) <= max(2 * len(shape) - 1, 1)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.data())
def test_a_piece_lies_in_the_whole_where_it_says_however_it_was_cut(shape, data):
    """Of a share whose places along one dim are any, such as those of fused q, k and v, any range of elements."""
    dim = data.draw(st.integers(0, len(shape) - 1))
    places = torch.tensor(sorted(data.draw(st.sets(st.integers(0, shape[dim] - 1), min_size=1))))
    tensor = torch.arange(prod(shape)).view(shape)
    share = tensor.index_select(dim, places)
    start = data.draw(st.integers(0, share.numel()))
    owned = share.flatten()[start:][: data.draw(st.integers(0, share.numel() - start))]
    model = SimpleNamespace(
        shapes={"p": tensor.shape},
        here={"p": SimpleNamespace(cuts=(Cut(SimpleNamespace(index=0), dim, shape[dim], (places,)),))},
        units={"p": SimpleNamespace(start=lambda name: start)},
    )
    piece, found = checkpoint.piece(model, "p", owned), []
    for offsets, box in piece.boxes.items():
        there = tensor[tuple(slice(a, a + n) for a, n in zip(offsets, box.shape, strict=True))]
        assert box.equal(there)
        box.zero_()
        found.append(there.numel())
    assert sum(found) == owned.numel() and not owned.any(), "views, of every element"


# The write.


def test_after_any_kill_the_last_checkpoint_or_the_next_is_there_whole():
    command = [sys.executable, Path(__file__).with_name("kills.py"), "20"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["broken"] == [] and report["kills"] == 20
    assert report["during"] >= 5 and report["saves"] >= 5, f"{report}: kills should fall into saves, and some behind"


def trained(config=CONFIG, optimize=sgd, mesh=None, **options):
    model = parallelize(model_of(config), mesh or Mesh(), **options)
    optimizer = optimize(model)
    take_steps(model, optimizer, 1)
    return model, optimizer


def test_a_rank_that_cannot_write_fails_the_save_on_all_and_the_last_checkpoint_stays(tmp_path, world2):
    def fail(folder):
        model, optimizer = trained(mesh=Mesh(dp=2), zero=1)
        minipar.save(folder, model, optimizer)
        take_steps(model, optimizer, 1)
        full = patch.object(checkpoint, "_alone", side_effect=OSError(28, "No space left on device"))
        with full if here().rank == 1 else nullcontext():
            said = refused(minipar.save, folder, model, optimizer)
        left = sorted(p.name for p in folder.iterdir())
        checkpoint.on_all(lambda: None)  # both have looked
        minipar.save(folder, model, optimizer)
        return said, left, sorted(p.name for p in folder.iterdir())

    (first, left, after), (second, _, _) = world2.run(fail, tmp_path)
    assert second == "OSError: [Errno 28] No space left on device"
    assert first == f"RuntimeError: rank 1: {second}"
    assert left == [".step-000002", "step-000001"]
    assert after == ["step-000001", "step-000002"], "what the failed save left is gone"


def test_the_newest_checkpoints_are_kept(tmp_path):
    assert minipar.latest(tmp_path) is None
    model, optimizer = trained()
    for _ in range(3):
        last = minipar.save(tmp_path, model, optimizer)
        take_steps(model, optimizer, 1)
    assert last == minipar.latest(tmp_path) == tmp_path / "step-000003"
    minipar.load(last, model, optimizer)
    assert minipar.save(tmp_path, model, optimizer, keep=3, again=True).name == "step-000003.1"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003", "step-000003.1"]
    assert minipar.load(tmp_path, model, optimizer) == {"again": True}, "the second save of a step is the newer one"
    minipar.load(tmp_path / "step-000002", model, optimizer)
    assert model.steps == 2, "a checkpoint may be named"


# What does not fit.


def refused(attempt, *args):
    try:
        attempt(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def other(**changes):
    return Config(**{**vars(CONFIG), **changes})


def cut_off(path):
    file = sorted(path.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])


def lose(path):
    sorted(path.glob("*.safetensors"))[0].unlink()


def scramble(path):
    file = sorted(path.glob("*.safetensors"))[0]
    file.write_bytes(b"\xff" * file.stat().st_size)


def edit(path, change):
    page = json.loads((path / checkpoint.PAGE).read_text())
    change(page)
    (path / checkpoint.PAGE).write_text(json.dumps(page))


def leave_out(path, file, key):
    """A tensor less in a file, and no word of it."""
    tensors = load_file(path / file)
    with safe_open(path / file, "pt") as opened:
        metadata = opened.metadata()
    tensors.pop(key)
    save_file(tensors, path / file, metadata)
    edit(path, lambda page: page["files"].update({file: (path / file).stat().st_size}))


def lose_a_tensor(path):
    leave_out(path, "shard-00001-model-00001-of-00001.safetensors", "model/norm.bias")


@pytest.mark.parametrize(
    ("config", "optimize", "damage", "said"),
    [
        (other(depth=6), sgd, None, "ValueError: step-000001 has no 'blocks.4.attention.k.bias' (32 tensors of the"),
        (other(depth=3), sgd, None, "ValueError: the model has no 'blocks.3.attention.k.bias' (16 tensors are not"),
        (other(vocab=38), sgd, None, "ValueError: 'embed.token.weight' is (37, 12) torch.float64 in step-000001, and"),
        (CONFIG, adamw, None, "ValueError: step-000001 is of SGD, and this optimizer is AdamW"),
        (
            CONFIG,
            sgd,
            cut_off,
            "ValueError: step-000001 is not whole: shard-00001-model-00001-of-00001.safe",
        ),
        (
            CONFIG,
            sgd,
            lose,
            "ValueError: step-000001 is not whole: shard-00001-model-00001-of-00001.safe",
        ),
        (CONFIG, sgd, scramble, "is broken"),
        (CONFIG, sgd, lose_a_tensor, "(1 tensors of the model are missing)"),
        (CONFIG, sgd, lambda path: (path / checkpoint.PAGE).write_text("{"), "checkpoint.json is broken: Expecting"),
        (CONFIG, sgd, lambda path: edit(path, lambda page: page.update(format=9)), "has format 9, and this minipar re"),
        (CONFIG, sgd, lambda path: path.rename(path.with_name("elsewhere")), "FileNotFoundError: no checkpoint in"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line_and_changes_nothing(config, optimize, damage, said, tmp_path):
    minipar.save(tmp_path, *trained())
    if damage:
        damage(tmp_path / "step-000001")
    model, optimizer = trained(config, optimize)
    take_steps(model, optimizer, 1)
    before, *_ = contents(model, optimizer)
    answer = refused(minipar.load, tmp_path, model, optimizer)
    assert said in answer and "\n" not in answer
    after, *_ = contents(model, optimizer)
    assert model.steps == 2 and all(x.equal(before[name]) for name, x in after.items())


def test_a_box_that_is_missing_is_missed(tmp_path, world2):
    """A weight that lies in the files of two ranks is there in part only."""
    world2.run(lambda folder: minipar.save(folder, *trained(mesh=Mesh(dp=2), zero=1)), tmp_path)
    path = minipar.latest(tmp_path)
    first, second = (set(load_file(path / f"shard-0000{i}-model-00001-of-00001.safetensors")) for i in (1, 2))
    key = sorted(key for key in first & second if key.startswith("model/"))[0]
    leave_out(path, "shard-00001-model-00001-of-00001.safetensors", key)
    answer = refused(minipar.load, tmp_path, *trained())
    assert answer.startswith("ValueError: step-000001 is not whole:") and f"elements of {key[6:]!r}" in answer


class Lumpy(torch.optim.SGD):
    """An optimizer that keeps a row for each parameter."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["row"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("optimize", "extra", "said"),
    [
        (sgd, {"x": torch.ones(2)}, "TypeError: 'x' does not come back from JSON as it is"),
        (sgd, {"x": {1: 2}}, "TypeError: 'x' does not come back from JSON as it is"),
        (sgd, {"x": (1, 2)}, "TypeError: 'x' does not come back from JSON as it is: use numbers, strings, lists, and"),
        (sgd, {"keep": 0}, "ValueError: keep=0: a whole number, at least 1"),
        (lambda model: torch.optim.SGD(gpt().parameters(), 0.1), {}, "make it of model.parameters()"),
        (
            lambda model: Lumpy(model.parameters(), 0.1),
            {},
            "ValueError: the state 'row' of 'embed.token.weight' in Lum",
        ),
    ],
)
def test_what_cannot_be_saved_is_refused_in_one_line(optimize, extra, said, tmp_path):
    answer = refused(lambda: minipar.save(tmp_path, *trained(optimize=optimize), **extra))
    assert said in answer and "\n" not in answer
    assert minipar.latest(tmp_path) is None


def test_a_stage_that_fully_shard_has_cut_is_refused(tmp_path, world2):
    def save(folder):
        wrap = lambda stage, device_mesh: fully_shard(stage, mesh=device_mesh["dp"])  # noqa: E731
        model = parallelize(gpt(), Mesh(dp=2), wrap=wrap)
        return refused(minipar.save, folder, model, sgd(model))

    for answer in world2.run(save, tmp_path):
        assert "is a DTensor, such as fully_shard makes: zero=3 shards in a way that can be saved" in answer


def test_a_run_behind_a_checkpoint_does_not_save_over_it(tmp_path):
    model, optimizer = trained()
    take_steps(model, optimizer, 1)
    minipar.save(tmp_path, model, optimizer)
    answer = refused(minipar.save, tmp_path, *trained())
    assert answer.endswith("has step-000002, and this run is at step 1: load it, or choose another")


def test_ranks_that_see_no_fault_fail_with_the_one_that_does(tmp_path, world2):
    """Where a file is missing for one rank only, say on a disk of its own."""

    def load(folder):
        model, optimizer = trained(mesh=Mesh(dp=2))
        minipar.save(folder, model, optimizer)
        if here().rank == 1:
            with patch.object(checkpoint, "_headers", side_effect=ValueError("a file is broken")):
                minipar.load(folder, model, optimizer)
        else:
            minipar.load(folder, model, optimizer)

    with pytest.raises(RankError, match=r"rank 1.*a file is broken"):
        world2.run(load, tmp_path)


# One file.


@pytest.mark.parametrize("tied", [False, True])
def test_one_file_goes_out_and_in_on_any_layout_and_serves_plain_torch(tied, tmp_path, world4):
    config = other(tied=tied)
    file = tmp_path / "model.safetensors"

    def out():
        return minipar.save_weights(file, parallelize(model_of(config), Mesh(dp=2, tp=2), zero=3))

    def back():
        model = parallelize(model_of(config, seed=1), Mesh(pp=2, tp=2))
        minipar.load_weights(file, model)
        return model.full_state_dict()

    assert world4.run(out) == [file] * 4 and list(tmp_path.iterdir()) == [file]
    wanted = model_of(config).state_dict()
    for got in world4.run(back):
        assert got.keys() == wanted.keys() and all(x.equal(wanted[name]) for name, x in got.items())
    assert load_file(file).keys() == wanted.keys() - ({"head.weight"} if tied else set())
    plain = model_of(config, seed=1)
    plain.load_state_dict(load_file(file), strict=not tied)
    assert all(x.equal(wanted[name]) for name, x in plain.state_dict().items())


def test_a_file_that_is_not_the_models_is_refused(tmp_path):
    model = parallelize(gpt(), Mesh())
    file = tmp_path / "model.safetensors"
    assert refused(minipar.load_weights, file, model) == f"FileNotFoundError: there is no file {file}"
    file.write_bytes(b"not one")
    assert "is broken, or no safetensors file" in refused(minipar.load_weights, file, model)
    minipar.save_weights(file, parallelize(model_of(other(depth=3)), Mesh()))
    assert "the state has no 'blocks.3." in refused(minipar.load_weights, file, model)
