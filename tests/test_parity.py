"""Every layout of a model computes what one process computes: the same loss, gradients, step."""

from functools import cache, partial
from itertools import product

import pytest
import torch
from laws import (
    Case,
    alone,
    batch_of,
    broken_laws,
    differences,
    laid_out,
    mean_cross_entropy,
    model_of,
    problems,
    stirred,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from minipar import (
    Config,
    Mesh,
    World,
    gpipe,
    interleaved,
    one_f_one_b,
    parallelize,
    zero_bubble_h1,
    zero_bubble_h2,
    zero_bubble_v,
)
from minipar.schedule import Action, Op

MESHES = [Mesh(dp=dp, pp=pp, tp=tp) for dp, pp, tp in product(range(1, 9), repeat=3) if dp * pp * tp <= 8]
MICROBATCHES = {1: 2, 2: 3, 3: 4}  # by pp: enough that 1F1B has a steady phase; deeper pipelines get 3


def case_of(mesh, schedule, sequence, tied):
    """Uneven wherever the law allows it: vocabulary over tp, blocks over pp, rows over dp and microbatches."""
    heads = mesh.tp * (2 if mesh.tp in (1, 2, 3) else 1)
    config = Config(vocab=37, context=12, depth=min(mesh.pp + 1, 8), width=4 * heads, heads=heads, tied=tied)
    microbatches = MICROBATCHES.get(mesh.pp, 3)
    length = {4: 8, 5: 5, 7: 7, 8: 8}.get(mesh.tp, 6)
    return Case(mesh, config, schedule, microbatches, sequence, rows=mesh.dp * microbatches + 1, length=length)


@cache
def one_process(config, rows, length):
    return alone(model_of(config), *batch_of(config, rows, length))


def on_a_rank(cases, wanted):
    found = []
    for case, answer in zip(cases, wanted, strict=True):
        model = model_of(case.config)
        parallel = case.lay_out(model)
        whole = case.config.tied  # in half of the cases: putting gradients together costs as much as the step
        got = laid_out(parallel, *batch_of(case.config, case.rows, case.length), whole=whole)
        found.append(broken_laws(parallel, got, answer, dict(model.named_parameters()), whole))
    return found


def every_layout(ranks):
    """Law -> the cases that break it, over all ranks and all layouts of so many ranks."""
    cases = [
        case_of(mesh, *choice)
        for mesh in MESHES
        if mesh.size == ranks
        for choice in product([gpipe, one_f_one_b], [False, True], [False, True])
    ]
    wanted = [one_process(case.config, case.rows, case.length) for case in cases]
    with World(ranks) as world:
        found = world.run(on_a_rank, cases, wanted)
    broken = {"loss": [], "gradients": [], "step": []}
    for rank, answers in enumerate(found):
        for case, laws in zip(cases, answers, strict=True):
            for law, what in laws.items():
                broken[law].append(f"{case}, rank {rank}: {what}")
    return broken


@pytest.mark.parametrize("ranks", range(8, 0, -1))
def test_every_layout_gives_the_loss_the_gradients_and_the_step_of_one_process(ranks):
    assert every_layout(ranks) == {"loss": [], "gradients": [], "step": []}


def test_these_are_all_the_layouts_and_their_batches_are_uneven():
    assert len(MESHES) == len(set(MESHES)) == 38
    for mesh in MESHES:
        case = case_of(mesh, gpipe, False, False)
        counts = (batch_of(case.config, case.rows, case.length)[1] != -100).sum(1)
        assert case.rows % (mesh.dp * case.microbatches) and counts.unique().numel() > 1
        assert case.config.vocab % mesh.tp or mesh.tp == 1
        assert case.config.depth % mesh.pp or mesh.pp in (1, 8)


# Other schedules.


def every_schedule(tied):
    """Law -> the cases that break it, over schedules and meshes of 4 ranks, with blocks that stages share unevenly."""
    schedules = [interleaved, partial(interleaved, chunks=3), zero_bubble_h1, zero_bubble_h2, zero_bubble_v]
    config = Config(vocab=37, context=12, depth=14, width=8, heads=2, tied=tied)
    places = [(Mesh(dp=4), 2), (Mesh(dp=2, pp=2), 5), (Mesh(pp=2, tp=2), 2), (Mesh(pp=4), 1), (Mesh(pp=4), 5)]
    cases = [
        Case(mesh, config, schedule, microbatches, sequence=tied and mesh.tp > 1, rows=11, length=6)
        for (mesh, microbatches), schedule in product(places, schedules)
    ]
    with World(4) as world:
        found = world.run(on_a_rank, cases, [one_process(config, 11, 6)] * len(cases))
    return {
        law: [f"{cases[i]}: {broken[law]}" for rank in found for i, broken in enumerate(rank) if law in broken]
        for law in ("loss", "gradients", "step")
    }


@pytest.mark.parametrize("tied", [False, True])
def test_every_schedule_computes_what_one_process_computes(tied):
    assert every_schedule(tied) == {"loss": [], "gradients": [], "step": []}


def stage_0_before_stage_1(ranks, microbatches):
    """Two stages on each rank, and the weight gradients of the first one before all of the second's."""
    f, i, w = ([[Action(op, s, m) for m in range(microbatches)] for s in (0, 1)] for op in (Op.F, Op.I, Op.W))
    return [[*f[0], *f[1], *i[1], *i[0], *w[0], *w[1]]]


def test_a_tied_weight_waits_for_the_last_of_its_stages(world4):
    """All weight gradients of stage 0 before those of stage 1: a schedule of one's own may do that."""

    def make():
        return model_of(Config(vocab=19, context=8, depth=2, width=16, heads=4, tied=True))

    for zero in (0, 1, 2, 3):
        layouts = [{"mesh": Mesh(dp=4), "schedule": stage_0_before_stage_1, "microbatches": 2, "zero": zero}] * 3
        assert problems(world4, layouts, make, *batch_of(TINY, 11, 8)) == []


# Other models, other batches.

LAYOUTS = [
    {"mesh": Mesh(dp=4), "microbatches": 2},
    {"mesh": Mesh(dp=2, pp=2), "microbatches": 3, "schedule": gpipe},
    {"mesh": Mesh(dp=2, pp=2), "microbatches": 3},
    {"mesh": Mesh(pp=4), "microbatches": 5},
    {"mesh": Mesh(dp=2, pp=2), "microbatches": 3, "schedule": interleaved},
    {"mesh": Mesh(dp=2, pp=2), "microbatches": 3, "schedule": zero_bubble_v},
    {"mesh": Mesh(pp=4), "microbatches": 5, "schedule": zero_bubble_h2},
    {"mesh": Mesh(dp=4), "microbatches": 2, "zero": 2},
    {"mesh": Mesh(dp=2, pp=2), "microbatches": 3, "zero": 1},
    {"mesh": Mesh(dp=2, pp=2), "microbatches": 3, "zero": 3},
]
CUT_LAYOUTS = [  # for models with a plan
    {"mesh": Mesh(dp=2, tp=2), "microbatches": 3},
    {"mesh": Mesh(dp=2, tp=2), "sequence_parallel": True},
    {"mesh": Mesh(pp=2, tp=2), "microbatches": 3},
    {"mesh": Mesh(tp=4), "sequence_parallel": True},
    {"mesh": Mesh(pp=2, tp=2), "microbatches": 3, "schedule": interleaved, "sequence_parallel": True},
    {"mesh": Mesh(pp=2, tp=2), "microbatches": 3, "schedule": zero_bubble_h1},
    {"mesh": Mesh(pp=2, tp=2), "microbatches": 3, "schedule": zero_bubble_v},
    {"mesh": Mesh(dp=2, tp=2), "microbatches": 2, "zero": 3, "sequence_parallel": True},
]
TINY = Config(vocab=19, context=8, depth=4, width=16, heads=4)


def tiny():
    return model_of(TINY)


def test_a_batch_may_be_a_dict_with_its_labels(world4):
    def together(parallel, inputs, targets):
        return {"tokens": inputs, "labels": targets}, None

    tokens, targets = batch_of(TINY, 11, 8)
    assert problems(world4, LAYOUTS + CUT_LAYOUTS, tiny, tokens, targets, prepare=together) == []


def test_a_loss_of_your_own_sees_whole_logits(world4):
    def squares(logits, targets):  # needs all logits of a token; counts rows
        return ((logits.softmax(-1) - targets[:, None, None]) ** 2).sum(), len(targets)

    def mean(logits, targets):
        return squares(logits, targets)[0] / len(targets)

    tokens, targets = batch_of(TINY, 11, 8)[0], torch.linspace(-1, 2, 11, dtype=torch.float64)
    assert problems(world4, LAYOUTS + CUT_LAYOUTS, tiny, tokens, targets, mean=mean, loss=squares) == []


def test_data_ranks_may_bring_unequal_rows_of_their_own(world4):
    def own_rows(parallel, inputs, targets):
        edges = {1: [0, 11], 2: [0, 3, 11], 4: [0, 3, 5, 9, 11]}[parallel.dp.size]
        mine = slice(edges[parallel.dp.index], edges[parallel.dp.index + 1])
        return inputs[mine], targets[mine], {"local": True}

    tokens, targets = batch_of(TINY, 11, 8)
    layouts = [layout | {"microbatches": 2} for layout in LAYOUTS[:3] + CUT_LAYOUTS]
    assert problems(world4, layouts, tiny, tokens, targets, prepare=own_rows) == []


class Mixing(nn.Module):
    """A block that passes a dict with a tuple, and ids that are no floats; it reads a mask from the side."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, state, *, mask):
        x, (ids, means) = state["x"], state["more"]
        y = self.second(torch.tanh(self.first(x))) * mask.unsqueeze(-1)
        return {"x": x + y, "more": (ids + 1, means + y.mean(-1))}


class Inner(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.embed = nn.Embedding(19, width)
        self.steps = nn.ModuleList(Mixing(width) for _ in range(5))

    def forward(self, ids, mask):
        state = {"x": self.embed(ids), "more": (ids, torch.zeros(ids.shape, dtype=torch.float64))}
        for step in self.steps:
            state = step(state, mask=mask)
        return state


class Outer(nn.Module):
    """Its blocks are inside another module, and some of its parameters are frozen or never used."""

    def __init__(self, frozen=()):
        super().__init__()
        self.inner, self.head, self.unused = Inner(8), nn.Linear(8, 19), nn.Linear(2, 2)
        for name in frozen:
            self.get_parameter(name).requires_grad_(False)

    def forward(self, ids, mask):
        state = self.inner(ids, mask)
        ids, means = state["more"]
        return self.head(state["x"]) * (1 + means + ids / 19).unsqueeze(-1)


def outer(*frozen):
    torch.manual_seed(0)
    return stirred(Outer(frozen).double())


MASK = (torch.arange(7) < 1 + torch.arange(11)[:, None] % 7).double()
DEEP = [*LAYOUTS, {"mesh": Mesh(dp=4), "microbatches": 1}]
OUTER_PLAN = {"inner.steps.*.first": "colwise", "inner.steps.*.second": "rowwise", "inner.embed": "embedding_rowwise"}


def outer_batch():
    tokens, targets = batch_of(TINY, 11, 7)
    return {"ids": tokens, "mask": MASK}, targets


def test_blocks_may_pass_dicts_and_tuples_and_read_a_mask(world4):
    assert problems(world4, DEEP, outer, *outer_batch()) == []


class Biased(nn.Module):
    """A block that is called by names. It gives what the first one made for all of them, and None."""

    def __init__(self, width, first):
        super().__init__()
        self.linear, self.bias = nn.Linear(width, width), nn.Parameter(torch.ones(width)) if first else None

    def forward(self, *, state, bias):
        bias = torch.exp(self.bias) if self.bias is not None else bias
        return state + torch.tanh(self.linear(state) + bias), bias, None


class Handing(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(19, 8)
        self.blocks = nn.ModuleList(Biased(8, first=i == 0) for i in range(5))
        self.head = nn.Linear(8, 19)

    def forward(self, tokens):
        state, bias = self.embed(tokens), None
        for block in self.blocks:
            state, bias, _ = block(state=state, bias=bias)
        return self.head(state)


def test_blocks_may_be_called_by_names_and_hand_on_what_the_first_one_made(world4):
    def make():
        torch.manual_seed(0)
        return stirred(Handing().double())

    assert problems(world4, DEEP, make, *batch_of(TINY, 11, 7)) == []


def test_any_model_may_be_cut_with_a_plan_of_its_own(world4):
    layouts = [layout for layout in CUT_LAYOUTS if "sequence_parallel" not in layout]
    assert problems(world4, [*layouts, {"mesh": Mesh(tp=4)}], outer, *outer_batch(), plan=OUTER_PLAN) == []


@pytest.mark.parametrize(
    "frozen",
    [
        ["inner.embed.weight"],
        ["head.weight", "head.bias", "unused.weight", "unused.bias"],
        [name for name, _ in Outer().named_parameters() if not name.startswith(("head", "inner.steps.4"))],
    ],
    ids=["embedding", "head", "all but the last block and the head"],
)
def test_frozen_parameters_stay_frozen(world4, frozen):
    assert problems(world4, DEEP, partial(outer, *frozen), *outer_batch()) == []


def test_a_step_sets_gradients_and_does_not_add(world4):
    def steps(layouts, tokens, targets):
        found = []
        for layout in layouts:
            parallel = parallelize(tiny(), **layout)
            optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
            gradients = []
            for clear in (lambda: None, optimizer.zero_grad, partial(optimizer.zero_grad, set_to_none=False)):
                parallel.step(tokens, targets)
                gradients.append(parallel.full_gradients())
                clear()
            parallel.step(tokens, targets)
            gradients.append(parallel.full_gradients())
            found += [layout for later in gradients[1:] if differences(later, gradients[0])]
            optimizer.zero_grad()
            if any(g.any() for g in parallel.full_gradients().values()):
                found.append(layout)
        return found

    assert world4.run(steps, LAYOUTS + CUT_LAYOUTS, *batch_of(TINY, 11, 8)) == [[]] * 4


def test_training_goes_on_as_in_one_process(world4):
    """Four steps of AdamW, other rows in each, gradients clipped, and a scheduler: weights and losses agree."""

    def train(model, step, parameters, clip):
        optimizer = torch.optim.AdamW(parameters, 0.05)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
        losses = []
        for rows in (9, 11, 8, 13):
            losses.append(step(model, *batch_of(TINY, rows, 8)))
            clip(model, 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return losses

    def on_ranks(layouts):
        found = []
        for layout in layouts:
            model = parallelize(tiny(), **layout)
            losses = train(
                model,
                lambda model, *batch: model.step(*batch).item(),
                model.parameters(),
                lambda model, norm: model.clip_gradients(norm),
            )
            found.append((losses, model.full_state_dict()))
        return found

    def one_step(model, tokens, targets):
        loss = mean_cross_entropy(model(tokens), targets)
        loss.backward()
        return loss.item()

    model = tiny()
    losses = train(
        model,
        one_step,
        model.parameters(),
        lambda model, norm: nn.utils.clip_grad_norm_(model.parameters(), norm),
    )
    weights = model.state_dict()
    for answers in world4.run(on_ranks, LAYOUTS + CUT_LAYOUTS):
        for got, state in answers:
            assert got == pytest.approx(losses, rel=1e-10)
            # AdamW divides by the root of squared gradients: where those are near nothing, rounding is not.
            assert max((state[name] - x).abs().max().item() for name, x in weights.items()) < 1e-6


class Sharing(nn.Module):
    """A block with weights of its own and some that all blocks share."""

    def __init__(self, shared):
        super().__init__()
        self.own, self.shared = nn.Linear(8, 8), shared

    def forward(self, x):
        return x + torch.tanh(self.shared(self.own(x)))


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        shared = nn.Linear(8, 8)
        self.embed = nn.Embedding(19, 8)
        self.blocks = nn.ModuleList(Sharing(shared) for _ in range(4))
        self.head = nn.Linear(8, 19)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def sharing():
    torch.manual_seed(0)
    return stirred(Shared().double())


def test_a_weight_that_all_blocks_share_gets_the_sum_of_their_gradients(world4):
    assert problems(world4, DEEP, sharing, *batch_of(TINY, 11, 7)) == []


def test_a_shared_weight_may_be_cut(world4):
    """Its gradient is put off four times in a backward, and the data axis must wait for the last."""
    layouts = [{"mesh": Mesh(tp=4)}, {"mesh": Mesh(dp=2, tp=2), "microbatches": 2}, {"mesh": Mesh(pp=2, tp=2)}]
    plan = {"blocks.*.own": "colwise", "blocks.*.shared": "rowwise"}
    assert problems(world4, layouts, sharing, *batch_of(TINY, 11, 7), plan=plan) == []


class Recomputing(Sharing):
    """Its inside is computed again in backward."""

    def forward(self, x):
        return x + checkpoint(lambda x: torch.tanh(self.shared(self.own(x))), x, use_reentrant=False)


def test_a_block_may_compute_its_inside_again(world4):
    def make():
        torch.manual_seed(0)
        model = Shared()
        model.blocks = nn.ModuleList(Recomputing(nn.Linear(8, 8)) for _ in range(8))
        return stirred(model.double())

    plan = {"blocks.*.own": "colwise", "blocks.*.shared": "rowwise"}
    assert problems(world4, DEEP, make, *batch_of(TINY, 11, 7)) == []
    layouts = [layout for layout in CUT_LAYOUTS if "sequence_parallel" not in layout]
    assert problems(world4, layouts, make, *batch_of(TINY, 11, 7), plan=plan) == []


class Mixed(nn.Module):
    """float32 in the middle of float64, in one stage."""

    def __init__(self):
        super().__init__()
        self.embed, self.single, self.head = nn.Embedding(19, 8).double(), nn.Linear(8, 8), nn.Linear(8, 19).double()

    def forward(self, ids):
        return self.head(self.single(self.embed(ids).float()).double())


def test_a_stage_may_hold_several_dtypes(world4):
    def mixed():
        torch.manual_seed(0)
        model = parallelize(Mixed(), Mesh(dp=4))
        model.step(*batch_of(TINY, 11, 7))
        return model.full_gradients()

    torch.manual_seed(0)
    wanted = alone(Mixed(), *batch_of(TINY, 11, 7)).gradients
    for got in world4.run(mixed):
        assert {name: g.dtype for name, g in got.items()} == {name: g.dtype for name, g in wanted.items()}
        for name, g in got.items():
            torch.testing.assert_close(g, wanted[name], rtol=1e-4, atol=1e-6)


def test_copies_of_a_shared_weight_stay_equal(world4):
    def train():
        parallel = parallelize(sharing(), Mesh(pp=4), microbatches=2)
        optimizer = torch.optim.Adam(parallel.parameters(), 0.1)
        for _ in range(3):
            parallel.step(*batch_of(TINY, 11, 7))
            optimizer.step()
        return dict(parallel.named_parameters())["blocks.0.shared.weight"].detach()

    first, *others = world4.run(train)
    assert all(other.equal(first) for other in others)


class NoBlocks(nn.Module):
    """Two lists of blocks: it cannot be cut into stages, and need not be."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(19, 8), nn.Linear(8, 19)
        self.up, self.down = (nn.ModuleList(nn.Linear(8, 8) for _ in range(2)) for _ in range(2))

    def forward(self, ids):
        x = self.embed(ids)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return self.head(x)


def without_blocks():
    torch.manual_seed(0)
    return stirred(NoBlocks().double())


def test_a_model_of_any_shape_is_laid_out_over_data_and_tensor_ranks(world4):
    plan = {"embed": "embedding_rowwise", "head": "colwise_gather_output"}
    layouts = [{"mesh": Mesh(dp=4), "microbatches": 2}, {"mesh": Mesh(dp=2, tp=2), "plan": plan}]
    assert problems(world4, layouts, without_blocks, *batch_of(TINY, 11, 7)) == []


def test_a_plan_may_cut_layers_that_stand_alone(world4):
    """Inputs that are whole are split, and a layer inside a cut region adds up its gradients."""

    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.first, self.second = nn.Embedding(19, 8), nn.Linear(8, 12), nn.Linear(12, 19)

        def forward(self, ids):
            return self.second(torch.tanh(self.first(self.embed(ids))))

    def make():
        torch.manual_seed(0)
        return stirred(Alone().double())

    layouts = [{"mesh": Mesh(tp=4)}, {"mesh": Mesh(dp=2, tp=2), "microbatches": 2}]
    for plan in (
        {"second": "rowwise_split_input"},
        {"first": "colwise_gather_output", "second": "rowwise_split_input"},
        {"first": "colwise", "second": "rowwise"},
        {"first": "colwise_gather_output", "second": "colwise_gather_output", "embed": "embedding_rowwise"},
    ):
        assert problems(world4, layouts, make, *batch_of(TINY, 11, 7), plan=plan) == [], plan
