"""ZeRO: the gradients of one process from shares, and bytes and memory as the formulas say."""

import gc
from functools import cache, partial
from itertools import product
from unittest.mock import patch

import pytest
import torch
from laws import Case, alone, batch_of, broken_laws, laid_out, model_of
from torch import nn

from minipar import Config, Mesh, World, interleaved, ledger, one_f_one_b, parallelize, zero_bubble_v
from minipar.zero import Unit

CONFIG = Config(vocab=37, context=12, depth=5, width=12, heads=2)
ROWS, LENGTH, WORD = 13, 6, 8  # WORD: bytes of float64
LEVELS = [(1, False), (2, False), (2, True), (3, False), (3, True)]  # zero, whole_gradients
MESHES = [Mesh(dp=4), Mesh(dp=2, pp=2), Mesh(dp=2, tp=2), Mesh(dp=3), Mesh(tp=2)]


# Parity.


def on_a_rank(cases, levels, wanted):
    found = []
    for case, (zero, whole_gradients) in zip(cases, levels, strict=True):
        model = model_of(case.config)
        parallel = case.lay_out(model, zero=zero, whole_gradients=whole_gradients)
        got = laid_out(parallel, *batch_of(case.config, case.rows, case.length))
        laws = broken_laws(parallel, got, wanted, dict(model.named_parameters()))
        after = parallel.full_state_dict()
        off = max((after[name] - x).abs().max().item() for name, x in wanted.after.items())
        if not off <= 1e-12:
            laws["weights"] = f"off by {off}"
        found.append(laws)
    return found


@cache
def every_case(tied):
    config = Config(**{**vars(CONFIG), "tied": tied})
    wanted = alone(model_of(config), *batch_of(config, ROWS, LENGTH))
    broken = []
    for mesh in [m for m in MESHES if tied or m.pp == 1 == m.tp]:
        schedules = [interleaved, zero_bubble_v] if mesh.pp > 1 else [one_f_one_b, zero_bubble_v]
        chosen = list(product(schedules, LEVELS))
        cases = [
            Case(mesh, config, schedule, 2, sequence=tied and mesh.tp > 1, rows=ROWS, length=LENGTH)
            for schedule, _ in chosen
        ]
        with World(mesh.size) as world:
            found = world.run(on_a_rank, cases, [level for _, level in chosen], wanted)
        for rank, answers in enumerate(found):
            for case, (_, level), laws in zip(cases, chosen, answers, strict=True):
                broken += [f"{case}, zero={level}, rank {rank}: {law}: {what}" for law, what in laws.items()]
    return broken


@pytest.mark.parametrize("tied", [False, True])
def test_every_stage_of_zero_computes_what_one_process_computes(tied):
    assert every_case(tied) == []


def test_clipping_counts_every_share_once(world4):
    config = Config(**{**vars(CONFIG), "tied": True})

    def clipped(layouts):
        norms = []
        for layout in layouts:
            parallel = parallelize(model_of(config), microbatches=2, **layout)
            parallel.step(*batch_of(config, ROWS, LENGTH))
            norms.append((parallel.clip_gradients(0.1).item(), parallel.clip_gradients(1e9).item()))
        return norms

    model = model_of(config)
    wanted = alone(model, *batch_of(config, ROWS, LENGTH))
    norm = torch.stack([g.norm() for g in wanted.gradients.values()]).norm().item()
    layouts = [{"mesh": mesh, "zero": zero} for mesh in MESHES if mesh.size == 4 for zero in (1, 2, 3)]
    for answers in world4.run(clipped, layouts):
        for before, after in answers:
            assert before == pytest.approx(norm, rel=1e-10) and after == pytest.approx(0.1, rel=1e-4)


# Bytes.


def units_of(parallel):
    return [unit for shares in parallel.shares.values() for unit in shares.units]


def booked(layout):
    """On a rank: bytes of the first and of the second step by op, and what travels when all units travel once."""
    parallel = parallelize(model_of(CONFIG), **layout)
    sent = []
    for _ in range(2):
        with ledger() as book:
            parallel.step(*batch_of(CONFIG, ROWS, LENGTH))
        sent.append({op: book.bytes("dp", op) for op in ("reduce_scatter", "all_gather")})
    once = sum((unit.axis.size - 1) * unit.share * WORD for unit in units_of(parallel))
    elements = sum(p.numel() for p in parallel.here.values())
    padding = sum(unit.padded for unit in units_of(parallel)) - elements
    return sent, once, padding


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("mesh", [Mesh(dp=4), Mesh(dp=2, pp=2)], ids=str)
def test_every_step_sends_what_the_formula_says_the_first_one_too(world4, mesh, microbatches):
    m = microbatches
    for (zero, whole_gradients), (scatters, gathers) in {
        (1, False): (1, 1),
        (2, False): (m, 1),
        (2, True): (1, 1),
        (3, False): (m, 2 * m),
        (3, True): (1, 2 * m),
    }.items():
        layout = {"mesh": mesh, "microbatches": m, "zero": zero, "whole_gradients": whole_gradients}
        for sent, once, padding in world4.run(booked, layout):
            expected = {"reduce_scatter": scatters * once, "all_gather": gathers * once}
            assert sent == [expected] * 2, (zero, whole_gradients)
            assert 0 <= padding < mesh.dp * 8  # at most d - 1 elements a unit


# Memory.


def held(zero, whole_gradients):
    """On a rank, in elements: weights and gradients between steps, optimizer states, and the most that the weights of
    blocks took during a step."""
    parallel = parallelize(model_of(CONFIG), Mesh(dp=4), microbatches=2, zero=zero, whole_gradients=whole_gradients)
    optimizer = torch.optim.Adam(parallel.parameters())
    units, most = units_of(parallel), 0
    blocks = [unit for unit in units if any(name.startswith("blocks") for name in unit.parameters)]

    def resident(unit):
        return unit.whole.untyped_storage().nbytes() // WORD

    gather = Unit.start_gather

    def watched(unit):
        nonlocal most
        gather(unit)
        most = max(most, sum(map(resident, blocks)))

    Unit.start_gather = watched
    try:
        parallel.step(*batch_of(CONFIG, ROWS, LENGTH))
    finally:
        Unit.start_gather = gather
    optimizer.step()
    states = sum(x.numel() for state in optimizer.state.values() for x in state.values() if x.dim())
    weights = sum(resident(unit) + (0 if unit.weights_stay else unit.own.numel()) for unit in units)
    gradients = sum(unit.gradient.numel() or unit.own_gradient.numel() for unit in units)
    loose = sum(p.grad.numel() for p in parallel.here.values() if p.grad is not None and not unit_has(units, p.grad))
    whole = sum(unit.padded for unit in units)
    return weights, gradients + loose, states, most, whole, max(unit.padded for unit in blocks)


def unit_has(units, gradient):
    return any(gradient.untyped_storage().data_ptr() == unit.gradient.untyped_storage().data_ptr() for unit in units)


@pytest.mark.parametrize(("zero", "whole_gradients"), LEVELS)
def test_a_rank_holds_what_the_formula_says(world4, zero, whole_gradients):
    elements = sum(p.numel() for p in model_of(CONFIG).parameters())
    answers = world4.run(held, zero, whole_gradients)
    for weights, gradients, _, most, whole, block in answers:
        assert elements <= whole < 1.01 * elements
        assert weights == (whole // 4 if zero == 3 else whole)
        assert gradients == (whole // 4 if zero > 1 and not whole_gradients else whole)
        if zero == 3:
            assert most == 2 * block  # the one that computes and the next
    assert sum(states for _, _, states, *_ in answers) == 2 * elements  # Adam's two, each on one rank only
    assert max(states for _, _, states, *_ in answers) <= 2 * whole // 4


def test_gradients_travel_while_backward_runs_and_of_two_units_at_most(world2):
    def events():
        """What happens in a step: a gradient is there, or a unit starts to travel, as one of how many."""
        parallel, seen = parallelize(model_of(CONFIG), Mesh(dp=2), zero=3), []
        for parameter in parallel.here.values():
            parameter.register_post_accumulate_grad_hook(lambda _: seen.append("gradient"))
        start = Unit.start_reduce

        def watched(unit):
            start(unit)
            seen.append(sum(len(other.reducing) for other in units_of(parallel)))

        with patch.object(Unit, "start_reduce", watched):
            parallel.step(*batch_of(CONFIG, ROWS, LENGTH))
        return seen

    behind = [name for name, _ in model_of(CONFIG).named_parameters() if name.startswith(("blocks.4.", "norm", "head"))]
    for seen in world2.run(events):
        assert seen.index(1) <= len(behind) < seen.count("gradient") / 3  # the last block's go first
        assert max(x for x in seen if x != "gradient") == 2


# What else a reader meets.


def test_shares_have_the_names_of_the_model_and_their_optimizer_sees_new_gradients(world2):
    def names():
        parallel = parallelize(model_of(CONFIG), Mesh(dp=2), zero=3)
        before = {name: p for name, p in parallel.named_parameters()}
        for _ in range(2):
            parallel.step(*batch_of(CONFIG, ROWS, LENGTH))
        assert all(p is before[name] and p.grad is not None and p.dim() == 1 for name, p in parallel.named_parameters())
        return set(before)

    every = {name for name, _ in model_of(CONFIG).named_parameters()}
    assert set.union(*world2.run(names)) == every


def test_inference_and_generation_see_the_updated_weights(world4):
    def outputs(zero):
        parallel = parallelize(model_of(CONFIG), Mesh(dp=2, tp=2), zero=zero)
        tokens, targets = batch_of(CONFIG, ROWS, LENGTH)
        parallel.step(tokens, targets)
        torch.optim.SGD(parallel.parameters(), 0.3).step()
        return parallel.forward(tokens), parallel.generate(tokens[:2, :3], 3)

    logits, text = world4.run(outputs, 0)[0]
    for zero in (1, 2, 3):
        for got, written in world4.run(outputs, zero):
            torch.testing.assert_close(got, logits, rtol=0, atol=1e-10)
            assert written.equal(text)


def test_stage_3_without_blocks_is_refused_and_stages_1_and_2_need_none(world2):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(37, 8), nn.Linear(8, 37)

        def forward(self, ids):
            return self.head(self.embed(ids))

    def lay_out(zero):
        torch.manual_seed(0)
        try:
            parallelize(Flat(), Mesh(dp=2), zero=zero).step(*batch_of(CONFIG, ROWS, LENGTH))
        except ValueError as error:
            return str(error)
        return ""

    assert world2.run(lay_out, 2) == world2.run(lay_out, 1) == ["", ""]
    assert all("list of blocks" in message for message in world2.run(lay_out, 3))


def test_frozen_parameters_stay_and_cost_no_gradient(world2):
    def train(zero):
        model = model_of(CONFIG)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("mlp" in name or name.startswith("blocks.0.norm"))
        parallel = parallelize(model, Mesh(dp=2), microbatches=2, zero=zero)
        parallel.step(*batch_of(CONFIG, ROWS, LENGTH))
        torch.optim.SGD([p for p in parallel.parameters() if p.requires_grad], 0.3).step()
        parallel.step(*batch_of(CONFIG, ROWS, LENGTH))
        return parallel.full_gradients()

    wanted = world2.run(train, 0)[0]
    for zero in (1, 2, 3):
        for got in world2.run(train, zero):
            assert got.keys() == wanted.keys()
            for name, gradient in got.items():
                torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-12)


def test_zero_that_is_none_of_the_stages_is_refused():
    with pytest.raises(ValueError, match="zero=4: 0, 1, 2 or 3"):
        partial(parallelize, model_of(CONFIG), Mesh(), zero=4)()


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.single, self.head = nn.Embedding(19, 8).double(), nn.Linear(8, 8), nn.Linear(8, 19).double()

    def forward(self, ids):
        return self.head(self.single(self.embed(ids).float()).double())


def test_shares_keep_their_dtype(world2):
    def mixed(zero):
        torch.manual_seed(0)
        parallel = parallelize(Mixed(), Mesh(dp=2), zero=zero)
        parallel.step(*batch_of(Config(vocab=19), ROWS, 7))
        return parallel.full_gradients()

    wanted = world2.run(mixed, 0)[0]
    for zero in (1, 2):
        got = world2.run(mixed, zero)[0]
        assert {name: g.dtype for name, g in got.items()} == {name: g.dtype for name, g in wanted.items()}
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_frozen_parameters_are_loaded_too(world2, zero):
    def loaded():
        model = model_of(CONFIG, seed=1)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("mlp" in name)
        parallel = parallelize(model, Mesh(dp=2), zero=zero)
        parallel.load_full_state_dict(state := model_of(CONFIG).state_dict())
        return all(x.equal(state[name]) for name, x in parallel.full_state_dict().items())

    assert world2.run(loaded) == [True, True]


@pytest.mark.parametrize("mesh, zero", [(Mesh(dp=2), 0), (Mesh(dp=2), 1), (Mesh(dp=2), 3), (Mesh(tp=2), 0)])
def test_a_model_that_nobody_holds_any_more_leaves_nothing_behind(world2, mesh, zero):
    def left():
        before = {id(x) for x in gc.get_objects()}
        parallel = parallelize(model_of(CONFIG), mesh, zero=zero)
        parallel.step(*batch_of(CONFIG, ROWS, LENGTH))
        del parallel
        gc.collect()
        names = ("Parallel", "Gradients", "Shares", "Unit", "Parameter")
        return [type(x).__name__ for x in gc.get_objects() if id(x) not in before and type(x).__name__ in names]

    assert world2.run(left) == [[], []]
