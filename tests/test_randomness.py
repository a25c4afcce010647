"""Dropout on a mesh: copies agree, parts differ, nothing is drawn twice, and the caller's numbers go on undisturbed."""

from itertools import combinations

import pytest
import torch
from laws import batch_of, differences, model_of, stirred
from torch import nn

from minipar import Config, Mesh, World, gpipe, one_f_one_b, parallelize
from minipar.schedule import zero_bubble_h1

WIDTH, ROWS, LENGTH = 32, 12, 8


class FromStreams(nn.Module):
    """Dropout that is not nn.Dropout, so it draws from torch's generator as functions do."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        return nn.functional.dropout(x, self.p, self.training)


class Block(nn.Module):
    """Dropout inside the cut region and outside of it, in modules, so that their masks can be looked at."""

    def __init__(self, dropout):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inside, self.outside = dropout(0.5), dropout(0.5)

    def forward(self, x):
        return x + self.outside(self.down(self.inside(torch.tanh(self.up(self.norm(x))) + 2)))


class Model(nn.Module):
    tp_plan = {
        "embed": "sequence_split",
        "blocks.*.norm": "sequence_parallel",
        "blocks.*.up": "colwise",
        "blocks.*.down": "rowwise",
        "norm": "sequence_parallel",
        "head": "colwise_gather_output",
    }

    def __init__(self, dropout=nn.Dropout):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(11, WIDTH), nn.ModuleList(Block(dropout) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 11)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def batch():
    draw = torch.Generator().manual_seed(1)
    return torch.randint(11, (ROWS, LENGTH), generator=draw), torch.randint(11, (ROWS, LENGTH), generator=draw)


def build(dropout=nn.Dropout, **layout):
    torch.manual_seed(0)
    return parallelize(stirred(Model(dropout).double()), **layout)


def watch(parallel):
    """Record the mask of every dropout that is drawn: (name, mask), in the order of drawing."""
    masks = []
    for name, module in parallel.module.named_modules():
        if isinstance(module, nn.Dropout | FromStreams):

            def record(module, args, output, name=name):
                masks.append((name, (output != 0).flatten().tolist()))

            module.register_forward_hook(record)
    return masks


def masks_of_two_steps(dropout=nn.Dropout, **layout):
    parallel = build(dropout, **layout)
    masks = watch(parallel)
    parallel.step(*batch())
    parallel.step(*batch())
    return masks


def of(masks, where):
    return [mask for name, mask in masks if name.endswith(where)]


def distinct(masks):
    """Masks of one length are all different: none is drawn twice."""
    return all(a != b for a, b in combinations(masks, 2))


either = pytest.mark.parametrize("dropout", [nn.Dropout, FromStreams])


@either
def test_tensor_ranks_draw_the_same_outside_the_cut_region_and_their_own_inside(world2, dropout):
    first, second = world2.run(masks_of_two_steps, dropout, mesh=Mesh(tp=2), microbatches=2)
    assert of(first, "outside") == of(second, "outside")
    assert distinct(of(first, "inside") + of(second, "inside"))
    assert distinct(of(first, "outside")), "another mask for each layer, microbatch and step"
    assert len(of(first, "outside")) == 8


def test_no_two_streams_have_one_seed(world4):
    """Masks of unlike sizes cannot be compared, seeds can: the copies outside share theirs, and nothing else does."""

    def seeds():
        parallel, seen = build(mesh=Mesh(dp=2, tp=2), microbatches=2), []
        begin = parallel.streams.begin
        parallel.streams.begin = lambda *both: (seen.append(both), begin(*both))
        parallel.step(*batch())
        return seen

    answers = world4.run(seeds)
    inside = [seed for seen in answers for _, seed in seen]
    outside = [[seed for seed, _ in seen] for seen in answers]
    assert outside[0] == outside[1] and outside[2] == outside[3]
    distinct_outside = outside[0] + outside[2]
    assert len({*inside, *distinct_outside}) == len(inside) + len(distinct_outside) == 12


@either
def test_parts_of_a_sequence_draw_their_own_everywhere(world2, world4, dropout):
    for world, tp in ((world2, 2), (world4, 4)):
        answers = world.run(masks_of_two_steps, dropout, mesh=Mesh(tp=tp), microbatches=2, sequence_parallel=True)
        assert distinct([mask for masks in answers for mask in of(masks, "inside")])
        assert distinct([mask for masks in answers for mask in of(masks, "outside")])


@either
def test_rows_stages_and_microbatches_draw_their_own(world4, dropout):
    answers = world4.run(masks_of_two_steps, dropout, mesh=Mesh(dp=2, pp=2), microbatches=3)
    assert all(len(masks) == 12 for masks in answers)  # 2 dropouts, 3 microbatches, 2 steps
    assert distinct([mask for masks in answers for _, mask in masks])


def backwards(stages, microbatches):
    """GPipe with the last microbatch first."""
    return [[a._replace(microbatch=microbatches - 1 - a.microbatch) for a in p] for p in gpipe(stages, microbatches)]


@either
def test_the_order_of_the_schedule_does_not_change_what_is_drawn(world4, dropout):
    def gradients(schedule):
        parallel = build(dropout, mesh=Mesh(pp=2, tp=2), microbatches=4, schedule=schedule)
        parallel.step(*batch())
        parallel.step(*batch())
        return parallel.full_gradients()

    wanted = world4.run(gradients, gpipe)
    for schedule in (one_f_one_b, backwards):
        for one, other in zip(world4.run(gradients, schedule), wanted, strict=True):
            assert differences(one, other) == ""


def test_the_same_seed_trains_the_same_and_another_does_not(world2):
    def gradients():
        parallel = build(mesh=Mesh(tp=2), microbatches=2)
        parallel.step(*batch())
        return parallel.full_gradients()

    def with_seed(seed):
        torch.manual_seed(0)
        model = stirred(Model().double())
        torch.manual_seed(seed)
        parallel = parallelize(model, Mesh(tp=2), microbatches=2)
        parallel.step(*batch())
        return parallel.full_gradients()

    assert differences(world2.run(gradients)[0], world2.run(gradients)[0]) == ""
    assert differences(world2.run(with_seed, 1)[0], world2.run(with_seed, 2)[0]) != ""


SHAPE = {"vocab": 19, "context": 8, "depth": 4, "width": 16, "heads": 4, "dropout": 0.3}


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_every_layout_drops_the_same(world4, world8, recompute):
    """The gradients of two steps with dropout are those of one rank, whoever computes what."""

    def gradients(layouts, local=False):
        answers = []
        for layout in layouts:
            parallel, (tokens, targets) = (
                parallelize(model_of(Config(**SHAPE)), **layout),
                batch_of(Config(**SHAPE), 9, 8),
            )
            for _ in range(2):
                loss = parallel.step(tokens, targets)
            answers.append((loss.item(), parallel.full_gradients()))
        return answers

    again = {"recompute": recompute}
    layouts = {
        world4: [
            {"mesh": Mesh(dp=4), "microbatches": 2},
            {"mesh": Mesh(dp=2, tp=2), "sequence_parallel": True},
            {"mesh": Mesh(pp=2, tp=2), "microbatches": 3, "schedule": zero_bubble_h1},
            {"mesh": Mesh(cp=2, tp=2), "sequence_parallel": True, "zero": 3},
            {"mesh": Mesh(dp=2, cp=2), "zero": 2, "microbatches": 2},
        ],
        world8: [{"mesh": Mesh(dp=2, pp=2, tp=2), "microbatches": 2, "zero": 1}],
    }
    with World(1) as alone:
        ((loss, wanted),) = alone.run(gradients, [{"mesh": Mesh()}])[0]
    for world, some in layouts.items():
        for answers in world.run(gradients, [layout | again for layout in some]):
            for got, layout in zip(answers, some, strict=True):
                assert abs(got[0] - loss) <= 1e-12 * loss, layout
                assert differences(got[1], wanted) == "", layout


def test_a_layer_that_is_used_twice_draws_twice(world2):
    def masks():
        parallel = parallelize(model_of(Config(**SHAPE)), Mesh(tp=2))
        masks = watch(parallel)
        parallel.step(*batch_of(Config(**SHAPE), 9, 8))
        return of(masks, "blocks.0.dropout")  # behind attention, and behind the MLP

    first, second = world2.run(masks)
    assert first == second and len(first) == 2 and distinct(first)


def test_rows_of_ones_own_are_dropped_as_the_global_batch_would_be(world2):
    def gradients(local):
        parallel = build(mesh=Mesh(dp=2))
        tokens, targets = batch()
        mine = slice(0, 5) if parallel.dp.index == 0 else slice(5, None)
        if local:
            parallel.step(tokens[mine], targets[mine], local=True)
        else:
            parallel.step(tokens, targets)
        return parallel.full_gradients()

    assert differences(world2.run(gradients, True)[0], world2.run(gradients, False)[0]) == ""


def test_the_callers_random_numbers_go_on_undisturbed(world4):
    def numbers(step):
        parallel = build(mesh=Mesh(dp=2, tp=2), microbatches=2)
        torch.manual_seed(7)
        before = torch.rand(3)
        if step:
            parallel.step(*batch())
            parallel.forward(batch()[0])
        return torch.cat([before, torch.rand(3)]).tolist()

    answers = world4.run(numbers, True) + world4.run(numbers, False)
    assert answers == [answers[0]] * 8


def test_there_is_no_dropout_in_eval(world2):
    def outputs():
        parallel = build(mesh=Mesh(tp=2)).eval()
        masks = watch(parallel)
        answer = parallel.forward(batch()[0]), parallel.forward(batch()[0])
        return answer, all(all(mask) for _, mask in masks)

    for (one, other), kept in world2.run(outputs):
        assert one.equal(other) and kept


def test_gradients_are_those_of_the_masks_that_were_drawn(world2):
    """Dropout is linear once its mask is known: replay the masks of both ranks in one process."""

    def ask(sequence):
        parallel = build(mesh=Mesh(tp=2), sequence_parallel=sequence)
        masks = watch(parallel)
        parallel.step(*batch())
        return masks, parallel.full_gradients()

    for sequence in (False, True):
        (first, gradients), (second, _) = world2.run(ask, sequence)
        torch.manual_seed(0)
        model = stirred(Model().double())
        for (name, mine), (_, theirs) in zip(first, second, strict=True):
            module = model.get_submodule(name)
            if name.endswith("inside"):  # shares of the width
                parts = [torch.tensor(m).view(ROWS, LENGTH, WIDTH // 2) for m in (mine, theirs)]
                mask = torch.cat(parts, 2)
            elif sequence:
                mask = torch.cat([torch.tensor(m).view(ROWS, LENGTH // 2, WIDTH) for m in (mine, theirs)], 1)
            else:
                mask = torch.tensor(mine).view(ROWS, LENGTH, WIDTH)
            module.forward = lambda x, mask=mask: x * mask * 2
        tokens, targets = batch()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
        assert differences(gradients, {name: p.grad for name, p in model.named_parameters()}) == ""


@pytest.mark.parametrize("mesh", [Mesh(dp=2), Mesh(cp=2), Mesh(ep=2)], ids=str)
def test_ranks_with_other_tokens_have_streams_of_their_own(world2, mesh):
    def seeds():
        config = Config(**SHAPE, experts=0 if mesh.ep == 1 else 2)
        parallel, seen = parallelize(model_of(config), mesh), []
        begin = parallel.streams.begin
        parallel.streams.begin = lambda *both: (seen.extend(both), begin(*both))
        parallel.step(*batch_of(config, 4, 8))
        return seen

    one, other = world2.run(seeds)
    assert not set(one) & set(other)
