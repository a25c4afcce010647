"""What does not fit is refused in one line, on every rank, with the value and what would fit."""

import pytest
import torch
from torch import nn

from minipar import Config, Mesh, RankError, connect, gpipe, gpt, parallelize, simulate
from minipar.schedule import Action, Op
from minipar.tensor import _VocabularyParallel

TINY = Config(vocab=13, context=8, depth=2, width=8, heads=2)
TOKENS = torch.arange(32).view(4, 8) % 13


def lay_out(model=None, mesh=None, **options):
    return parallelize(model or gpt(TINY), mesh or Mesh(dp=2), **options)


def refusal(attempt):
    """Called on a rank: the error that the attempt ends with."""
    try:
        attempt()
    except Exception as error:
        return type(error), str(error)
    return None, "not refused"


class TwoLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = (nn.ModuleList([nn.Linear(2, 2)]) for _ in range(2))


class SameBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2)] * 2)


def stuck(stages, microbatches):
    """Complete, but each rank waits for the other."""
    f, b = ([[Action(op, s, m) for m in (0, 1)] for s in (0, 1)] for op in (Op.F, Op.B))
    return [[f[0][0], b[0][0], f[0][1], b[0][1]], [*f[1], *b[1]]]


# attempt -> the error, and what a reader must find in its message: the value, and what would fit
def frozen_late():
    parallel = lay_out()
    next(parallel.parameters()).requires_grad_(False)
    parallel.step(torch.zeros(4, 4, dtype=torch.long), torch.zeros(4, 4, dtype=torch.long))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(2), nn.Linear(2, 3)

    def forward(self, x):
        return self.head(self.norm(x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))

    def forward(self, x):
        for block in [*self.blocks, *self.blocks]:
            x = block(x)
        return x


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = OwnForward(2, 4)


def other_weights():
    torch.manual_seed(torch.distributed.get_rank())
    return lay_out(gpt(TINY))


def other_order():
    rows = torch.arange(16).view(4, 4).roll(torch.distributed.get_rank(), 0)
    lay_out(mesh=Mesh(tp=2)).step(rows, rows)


def without_gradients():
    with torch.no_grad():
        lay_out().step(torch.zeros(4, 4, dtype=torch.long), torch.zeros(4, 4, dtype=torch.long))


ONES, LABELS = torch.ones(4, 2), torch.zeros(4, dtype=torch.long)
CLASSES = ["targets have 13", "from 0 to 12", "-100"]
REFUSED = {
    "a layer with a forward of its own": (
        lambda: lay_out(Scaled(), Mesh(tp=2), plan={"up": "colwise"}),
        ValueError,
        ["OwnForward", "nn.Linear"],
    ),
    "other weights on each rank": (other_weights, ValueError, ["different initial weights", "seed every rank alike"]),
    "the same rows in another order": (other_order, ValueError, ["different batches", "the same order", "local=True"]),
    "a step without gradients": (without_gradients, RuntimeError, ["no_grad", "forward"]),
    "a batch that is a list": (lambda: lay_out().step([1, 2], LABELS), TypeError, ["list", "dict of tensors"]),
    "a parameter frozen after parallelize": (frozen_late, ValueError, ["embed.token.weight is frozen since", "again"]),
    "batch statistics of a part": (
        lambda: lay_out(Normed()).step(torch.ones(4, 2), torch.zeros(4, dtype=torch.long)),
        ValueError,
        ["norm (BatchNorm1d)", "whole batch", "LayerNorm"],
    ),
    "a mesh of another size": (
        lambda: lay_out(mesh=Mesh(dp=2, tp=2)),
        ValueError,
        ["Mesh(dp=2, tp=2)", "4 ranks", "2 are running", "World(4)"],
    ),
    "an axis without ranks": (lambda: Mesh(dp=0), ValueError, ["dp=0", "at least 1"]),
    "an axis that does not exist": (lambda: Mesh(dp=2).line("data", 0), ValueError, ["'data'", "dp, pp, ep, cp, tp"]),
    "a rank that is not on the mesh": (lambda: Mesh(dp=2).coordinate(2), ValueError, ["rank 2", "0 to 1"]),
    "an axis this model cannot use": (
        lambda: lay_out(mesh=Mesh(ep=2)),
        ValueError,
        ["ep=2", "no layer", "Config(experts=)"],
    ),
    "experts that ep does not divide": (
        lambda: lay_out(gpt(Config(experts=3)), Mesh(ep=2)),
        ValueError,
        ["ep=2", "3 experts", "[1, 3]"],
    ),
    "more choices than experts": (lambda: Config(experts=2, top=3), ValueError, ["top=3", "2 experts"]),
    "a part of an expert": (lambda: Config(experts=2.5), ValueError, ["experts=2.5", "whole number"]),
    "experts without room": (lambda: Config(experts=4, capacity=0), ValueError, ["capacity=0", "above 0"]),
    "a loss that wants no balance": (lambda: Config(experts=4, balance=-1), ValueError, ["balance=-1", "at least 0"]),
    "heads that tp does not divide": (
        lambda: lay_out(gpt(Config(width=9, heads=3)), Mesh(tp=2)),
        ValueError,
        ["tp=2", "3 heads", "blocks.0.attention", "[1, 3]"],
    ),
    "a width that heads do not divide": (lambda: Config(width=10, heads=3), ValueError, ["10", "3", "[1, 2, 5, 10]"]),
    "a dropout that is no probability": (lambda: Config(dropout=1.5), ValueError, ["dropout=1.5", "0 <= dropout < 1"]),
    "a depth of nothing": (lambda: Config(depth=0), ValueError, ["depth=0", "at least 1"]),
    "fewer blocks than stages": (
        lambda: lay_out(gpt(Config(depth=1)), Mesh(pp=2)),
        ValueError,
        ["pp=2", "has 1", "pp <= 1"],
    ),
    "fewer rows than microbatches": (
        lambda: lay_out(microbatches=3).step(TOKENS, TOKENS),
        ValueError,
        ["4 rows", "dp=2 x 3 microbatches", "at least 6 rows"],
    ),
    "fewer own rows than microbatches": (
        lambda: lay_out(microbatches=3).step(TOKENS[:2], TOKENS[:2], local=True),
        ValueError,
        ["2 rows", "3 microbatches", "at least 3 rows"],
    ),
    "rows that differ": (lambda: lay_out().step(TOKENS, TOKENS[:3]), ValueError, ["[4, 3] rows", "the same number"]),
    "a number of microbatches that is none": (lambda: lay_out(microbatches=0), ValueError, ["=0", "at least 1"]),
    "an option that does not exist": (
        lambda: lay_out(microbatch=3),
        TypeError,
        ["no option microbatch", "microbatches", "sequence_parallel"],
    ),
    "a style that does not exist": (
        lambda: lay_out(mesh=Mesh(tp=2), plan={"blocks.*.mlp.up": "columnwise"}),
        ValueError,
        ["'columnwise'", "'blocks.*.mlp.up'", "colwise, "],
    ),
    "a plan that matches no layer": (
        lambda: lay_out(mesh=Mesh(tp=2), plan={"blocks.*.mlp.upp": "colwise"}),
        ValueError,
        ["'blocks.*.mlp.upp'", "matches no layer", "blocks.*.mlp.up"],
    ),
    "no plan": (lambda: lay_out(nn.Linear(2, 2), Mesh(tp=2)), ValueError, ["tp=2", "Linear", "plan="]),
    "no labels": (lambda: lay_out().step(TOKENS), ValueError, ["targets", '"labels"']),
    "no labels among the inputs": (lambda: lay_out().step({"tokens": TOKENS}), ValueError, ["targets", '"labels"']),
    "a target that is no class": (lambda: lay_out().step(TOKENS, TOKENS * 0 + 13), ValueError, CLASSES),
    "a target that is no class of a cut head": (
        lambda: lay_out(mesh=Mesh(tp=2)).step(TOKENS, TOKENS * 0 + 13),
        ValueError,
        CLASSES,
    ),
    "a target below all classes": (
        lambda: lay_out().step(TOKENS, TOKENS * 0 - 1),
        ValueError,
        ["have -1", *CLASSES[1:]],
    ),
    "a target between classes": (lambda: lay_out().step(TOKENS, TOKENS * 0 + 0.5), ValueError, ["0.5", *CLASSES[1:]]),
    "fewer targets than tokens": (
        lambda: lay_out(mesh=Mesh(tp=2)).step(TOKENS, TOKENS[:, 1:]),
        ValueError,
        ["targets (4, 7)", "logits (4, 8, 13)", "one target"],
    ),
    "labels that are all ignored": (
        lambda: lay_out().step(TOKENS, torch.full_like(TOKENS, -100)),
        ValueError,
        ["no label counts", "count of 0"],
    ),
    "two lists of blocks": (lambda: lay_out(TwoLists(), Mesh(pp=2)), ValueError, ["one list", "2: encoder, decoder"]),
    "no list of blocks": (lambda: lay_out(nn.Linear(2, 2), Mesh(pp=2)), ValueError, ["one list", "Linear has none"]),
    "a block that is used twice": (
        lambda: lay_out(SameBlock(), Mesh(pp=2)),
        ValueError,
        ["blocks has one block several times", "2 blocks of their own"],
    ),
    "a timeline of nothing": (lambda: lay_out().timeline(), ValueError, ["before the first step"]),
    "a schedule that leaves something out": (
        lambda: lay_out(mesh=Mesh(pp=2), schedule=lambda p, m: [program[:-1] for program in gpipe(p, m)]),
        ValueError,
        ["leaves out B0", "stage 0"],
    ),
    "an empty schedule": (lambda: simulate(gpipe(2, 0)), ValueError, ["empty", "one stage and one microbatch"]),
    "a schedule for another number of ranks": (
        lambda: lay_out(mesh=Mesh(pp=2), schedule=lambda p, m: gpipe(3, m)),
        ValueError,
        ["3 ranks", "pp=2"],
    ),
    "a schedule that is no function": (
        lambda: lay_out(mesh=Mesh(pp=2), schedule="1f1b"),
        TypeError,
        ["'1f1b'", "one_f_one_b"],
    ),
    "a sequence that cannot be cut": (
        lambda: lay_out(mesh=Mesh(tp=2), sequence_parallel=True).step(TOKENS[:, :7], TOKENS[:, :7]),
        ValueError,
        ["length 7", "tp=2", "pad"],
    ),
    "a plan that does not cut the sequence": (
        lambda: lay_out(mesh=Mesh(tp=2), sequence_parallel=True, plan={"blocks.*.mlp.up": "colwise"}),
        ValueError,
        ["sequence_parallel=True", "sequence_split"],
    ),
    "a row that is too long": (
        lambda: lay_out(mesh=Mesh(tp=2)).step(TOKENS.repeat(1, 2), TOKENS.repeat(1, 2)),
        ValueError,
        ["16 tokens", "context=8"],
    ),
    "a loss that is one number": (
        lambda: lay_out(loss=lambda logits, targets: logits.sum()).step(TOKENS, TOKENS),
        TypeError,
        ["loss gave a Tensor", "(sum, count)"],
    ),
    "no module": (lambda: parallelize(TINY, Mesh(dp=2)), TypeError, ["not Config", "a module and a Mesh"]),
    "a state without a parameter": (lambda: lay_out().load_full_state_dict({}), ValueError, ["the state has no"]),
    "a state with something else": (
        lambda: lay_out().load_full_state_dict(gpt(TINY).state_dict() | {"other": TOKENS}),
        ValueError,
        ["the model has no 'other'"],
    ),
    "a state of another shape": (
        lambda: lay_out().load_full_state_dict({k: x[..., :1] for k, x in gpt(TINY).state_dict().items()}),
        ValueError,
        ["(13, 1)", "(13, 8)", "embed.token.weight"],
    ),
    "no loss": (lambda: lay_out(loss=None), TypeError, ["loss=None", "(sum, count)"]),
    "a loss that is not summed": (
        lambda: lay_out(loss=lambda y, t: (y.sum(-1), t.numel())).step(TOKENS, TOKENS),
        TypeError,
        ["(2, 8)", "one number"],
    ),
    "microbatches that are a truth": (lambda: lay_out(microbatches=True), ValueError, ["microbatches=True"]),
    "what modules have": (
        lambda: lay_out().state_dict(),
        AttributeError,
        ["state_dict: full_state_dict()", "minipar.save"],
    ),
    "what nothing has": (lambda: lay_out().setp(TOKENS), AttributeError, ["has no setp"]),
    "a single row to go on from": (lambda: lay_out().generate(TOKENS[0], 2), ValueError, ["(8,)", "(rows, length)"]),
    "nothing to go on from": (lambda: lay_out().generate(TOKENS[:, :0], 2), ValueError, ["(4, 0)", "(rows, length)"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_in_one_line_on_every_rank(world2, what):
    attempt, kind, told = REFUSED[what]
    answers = world2.run(refusal, attempt)
    assert answers[0] == answers[1]
    error, message = answers[0]
    assert error is kind, message
    assert [part for part in told if part not in message] == [], message
    assert "\n" not in message and len(message) < 300


def test_a_schedule_that_deadlocks_is_refused_with_who_waits_for_whom(world2):
    for _, message in world2.run(refusal, lambda: lay_out(mesh=Mesh(pp=2), microbatches=2, schedule=stuck)):
        first, second = message.splitlines()[1:]
        assert first.startswith("rank 0 waits at B0") and first.endswith("rank 1")
        assert second.startswith("rank 1 waits at F1") and second.endswith("rank 0")


def test_an_id_that_is_on_no_share_of_the_vocabulary_raises(world2):
    high = TOKENS.clone()
    high[0, 0] = 13

    def look_up():  # as on a GPU, where no target is looked at before
        axis = connect(Mesh(tp=2))["tp"]
        _VocabularyParallel.apply(torch.zeros(32, [6, 7][axis.index]), high.flatten(), axis, 6 * axis.index, 13)

    for attempt in (lambda: lay_out(mesh=Mesh(tp=2)).step(high, TOKENS), look_up):
        for error, _ in world2.run(refusal, attempt):
            assert error in (IndexError, RuntimeError)


def test_blocks_that_are_used_twice_are_named(world2):
    with pytest.raises(RankError, match="block 0 runs where block 2 should: a pipeline takes each once"):
        world2.run(lambda: lay_out(Twice(), Mesh(pp=2)).step(ONES, LABELS))


class AddsAfterBlocks(nn.Module):
    """Uses what an early block gave behind all blocks: no later stage has it."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))

    def forward(self, x):
        early = x = self.blocks[0](x)
        for block in self.blocks[1:]:
            x = block(x)
        return x + early


def test_what_another_stage_computed_is_nan_and_not_a_wrong_number(world2):
    assert all(x.isnan() for x in world2.run(lambda: lay_out(AddsAfterBlocks(), Mesh(pp=2)).step(ONES, LABELS)))
