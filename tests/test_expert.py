"""Experts: the mixture is what its formulas say, and every mesh gives the gradients of one process."""

from dataclasses import replace
from functools import partial
from math import ceil
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from laws import Planted, alone, batch_of, differences, mean_cross_entropy, model_of, problems, weighed
from torch import Tensor

import minipar
from minipar import Config, Mesh, connect, context, expert, ledger, model, parallelize, tensor, train
from minipar.model import MoE, initialize

CONFIG = Config(vocab=19, context=8, depth=2, width=16, heads=4, experts=4, capacity=0.8, balance=0.5)
DEEP = replace(CONFIG, depth=4)
ROWS, LENGTH, WORD = 9, 8, 8  # WORD: bytes of float64


def mixtures(module):
    return [layer for layer in module.modules() if isinstance(layer, MoE)]


def drawn(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


# One process: the mixture itself.


def mixture_of(**changes):
    torch.manual_seed(3)
    layer = MoE(replace(CONFIG, **changes)).apply(initialize).double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(20)
    return layer


def by_hand(layer: MoE, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """What the docstring says, token by token: the output, the mean of the terms of balance, and choices dropped."""
    experts, length, dropped = layer.experts.up.size(0), x.size(1), 0
    room = ceil(layer.capacity * layer.top * length / experts) if layer.training else length
    rows, terms = [], []
    for row in x:
        probabilities = [torch.softmax(layer.router.weight @ token, 0) for token in row]
        fell, out = [0] * experts, []
        for token, probability in zip(row, probabilities, strict=True):
            y = torch.zeros_like(token)
            for e in sorted(range(experts), key=lambda e: -probability[e].item())[: layer.top]:
                if fell[e] < room:
                    hidden = F.gelu(token @ layer.experts.up[e])
                    y = y + probability[e] * (hidden @ layer.experts.down[e])
                else:
                    dropped += 1
                fell[e] += 1
            out.append(y)
        load = torch.tensor(fell, dtype=x.dtype) / (layer.top * length)
        terms += [experts * load @ probability for probability in probabilities]
        rows.append(torch.stack(out))
    return torch.stack(rows), torch.stack(terms).mean(), dropped


def with_gradients(layer, x, loss):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(layer, x), [x, *layer.parameters()])


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("top", [1, 2, 3])
@pytest.mark.parametrize("capacity", [0.5, 1.0, 1.3])
def test_a_mixture_is_what_a_slow_loop_computes(top, capacity, training):
    layer, x, toward = mixture_of(top=top, capacity=capacity).train(training), drawn(3, 7, 16), drawn(7, 16)
    y = layer(x)
    wanted, balance, dropped = by_hand(layer, x)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    assert layer.dropped.item() == pytest.approx(dropped / (3 * 7 * top)) and (dropped == 0 or training)
    assert dropped or capacity > 1 or not training  # or nothing is tested
    assert layer.balance_loss.item() == pytest.approx(balance.item(), rel=1e-12)
    assert layer.load.sum().item() == pytest.approx(1)

    def explicit(layer, x):  # the terms of balance in plain sight
        y, balance, _ = by_hand(layer, x)
        return (y * toward).sum() + layer.balance * balance

    got = with_gradients(layer, x, lambda layer, x: (layer(x) * toward).sum())
    for mine, other in zip(got, with_gradients(layer, x, explicit), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-11, atol=1e-12)


def test_what_a_token_gets_depends_on_no_other_row_and_on_no_later_token():
    layer, x = mixture_of(capacity=0.5), drawn(3, 8, 16)
    y = layer(x)
    assert layer.dropped > 0.2
    later, other = x.clone(), x.clone()
    later[:, 5:] = later[:, 5:].flip(1) * 3
    other[1:] *= -2
    assert layer(later)[:, :5].equal(y[:, :5]) and not layer(later)[:, 5:].equal(y[:, 5:])
    assert layer(other)[0].equal(y[0]) and not layer(other)[1:].equal(y[1:])


def test_evaluation_has_room_for_all_and_padding_behind_changes_nothing():
    layer, x = mixture_of(capacity=0.1).eval(), drawn(2, 6, 16)
    y = layer(x)
    assert layer.dropped == 0
    torch.testing.assert_close(layer(F.pad(x, (0, 0, 0, 5)))[:, :6], y, rtol=1e-12, atol=1e-12)


def test_the_loss_of_balance_is_one_for_equal_loads_and_larger_for_one_busy_expert():
    layer = mixture_of(top=1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(16)[:4] * 50)
    layer(torch.eye(16, dtype=torch.float64)[:4].repeat(2, 2, 1))
    assert layer.balance_loss.item() == pytest.approx(1) and layer.load.tolist() == [0.25] * 4
    layer(torch.eye(16, dtype=torch.float64)[:1].repeat(2, 8, 1))
    assert layer.balance_loss.item() == pytest.approx(4) and layer.load.tolist() == [1, 0, 0, 0]


def test_training_with_the_loss_of_balance_spreads_the_load(world2):
    """From a router that prefers one expert. Without the loss it goes on doing so."""

    def imbalance(balance):
        gpt = model_of(replace(CONFIG, balance=balance, capacity=1.25))
        tokens, targets = batch_of(CONFIG, 16, 8)
        with torch.no_grad():
            for block in gpt.blocks:
                block.norm2.bias.fill_(1)
                block.mlp.router.weight[0] += 0.1
        parallel = parallelize(gpt, Mesh(ep=2), microbatches=2)
        optimizer = torch.optim.SGD(parallel.parameters(), 0.03)
        found = []
        for _ in range(10):
            parallel.step(tokens, targets)
            optimizer.step()
            found.append(sum(layer.balance_loss.item() for layer in parallel.mixtures) / 2)
        return found[0], found[-1]

    # 1 is an even load.
    for (first, last), (same, without) in zip(world2.run(imbalance, 1.0), world2.run(imbalance, 0.0), strict=True):
        assert first == pytest.approx(same)
        assert last - 1 < 0.3 * (first - 1) and without - 1 > 0.9 * (first - 1), (first, last, without)


# A mesh: the slots' way.


def test_slots_go_to_their_expert_in_the_order_of_ranks_and_come_back(world4):
    def sent():
        axis = connect(Mesh(ep=4))["ep"]
        here = torch.stack([torch.arange(8), torch.full((8,), axis.index), torch.full((8,), 2)], 1)
        slots = here.unsqueeze(1).repeat(1, 3, 1)  # (E, N, 3): expert, whose row, place
        slots[:, :, 2] = torch.arange(3)
        arrived = expert.dispatch(slots, axis)
        return arrived.tolist(), expert.combine(arrived, axis).equal(slots)

    for index, (arrived, back) in enumerate(world4.run(sent)):
        mine = (2 * index, 2 * index + 1)
        assert arrived == [[[e, whose, place] for whose in range(4) for place in range(3)] for e in mine] and back


# A mesh: parity.


def moe(config=CONFIG):
    return weighed(model_of(config), batch_of(config, ROWS, LENGTH)[1])


LAYOUTS = {
    "world2": [
        {"mesh": Mesh(ep=2)},
        {"mesh": Mesh(ep=2), "microbatches": 4, "zero": 3},
        {"mesh": Mesh(ep=2), "microbatches": 2, "recompute": "selective"},
        {"mesh": Mesh(dp=2), "microbatches": 2, "zero": 2},
        {"mesh": Mesh(tp=2)},
        {"mesh": Mesh(tp=2), "sequence_parallel": True, "recompute": "full"},
        {"mesh": Mesh(cp=2), "microbatches": 2},
        {"mesh": Mesh(pp=2), "microbatches": 3, "schedule": minipar.zero_bubble_v},
    ],
    "world4": [
        {"mesh": Mesh(ep=4)},
        {"mesh": Mesh(ep=4), "microbatches": 2, "zero": 3, "whole_gradients": True},
        {"mesh": Mesh(dp=2, ep=2)},
        {"mesh": Mesh(dp=2, ep=2), "zero": 1},
        {"mesh": Mesh(dp=2, ep=2), "microbatches": 2, "zero": 2},
        {"mesh": Mesh(dp=2, ep=2), "microbatches": 2, "zero": 3, "recompute": "full"},
        {"mesh": Mesh(ep=2, tp=2), "microbatches": 2},
        {"mesh": Mesh(ep=2, tp=2), "sequence_parallel": True},
        {"mesh": Mesh(ep=2, tp=2), "sequence_parallel": True, "zero": 3},
        {"mesh": Mesh(ep=2, cp=2), "microbatches": 2},
        {"mesh": Mesh(ep=2, cp=2), "zero": 2},
        {"mesh": Mesh(cp=2, tp=2), "sequence_parallel": True},
        {"mesh": Mesh(pp=2, ep=2), "microbatches": 3},
        {"mesh": Mesh(pp=2, ep=2), "microbatches": 4, "schedule": minipar.zero_bubble_h1, "zero": 2},
        {"mesh": Mesh(pp=2, ep=2), "microbatches": 2, "schedule": minipar.zero_bubble_v, "zero": 3},
    ],
    "world8": [
        {"mesh": Mesh(dp=2, ep=2, tp=2), "microbatches": 2, "sequence_parallel": True, "zero": 3},
        {"mesh": Mesh(pp=2, ep=2, tp=2), "microbatches": 2, "schedule": minipar.interleaved},
        {"mesh": Mesh(ep=2, cp=2, tp=2), "sequence_parallel": True},
        {"mesh": Mesh(dp=2, pp=2, ep=2), "microbatches": 2, "schedule": minipar.zero_bubble_h2, "zero": 1},
    ],
}


@pytest.mark.parametrize("world", LAYOUTS)
def test_every_layout_gives_the_gradients_of_one_process(request, world):
    """9 rows: ranks and microbatches have unlike numbers of them. Choices are dropped, and labels are ignored."""
    gpt, batch = moe(DEEP), batch_of(DEEP, ROWS, LENGTH)
    gpt(batch[0])
    assert all(layer.dropped > 0.1 for layer in mixtures(gpt))
    assert problems(request.getfixturevalue(world), LAYOUTS[world], lambda: moe(DEEP), *batch) == []


@pytest.mark.parametrize("changes", [{"top": 1}, {"top": 3, "capacity": 2.0, "tied": True}], ids=str)
def test_a_mean_over_all_tokens_needs_no_weight(world4, changes):
    """In one process MoE weighs tokens by itself then."""
    config, layouts = replace(CONFIG, **changes), [{"mesh": Mesh(ep=4)}, {"mesh": Mesh(ep=2, cp=2), "microbatches": 2}]
    tokens, _ = batch_of(config, ROWS, LENGTH)
    assert problems(world4, layouts, lambda: model_of(config), tokens, tokens.roll(-1, 1)) == []


def test_ranks_may_bring_rows_of_their_own_in_unlike_numbers(world4):
    def own(parallel, inputs, targets):
        mine = slice(*[[0, 1], [1, 5], [5, 7], [7, 9]][parallel.dp.index])
        return inputs[mine], targets[mine], {"local": True}

    layouts = [{"mesh": Mesh(ep=4)}, {"mesh": Mesh(dp=2, ep=2), "zero": 2}]
    assert problems(world4, layouts, moe, *batch_of(CONFIG, ROWS, LENGTH), prepare=own) == []


EXPERTS = {"mesh": Mesh(dp=2, ep=2)}
TENSOR = {"mesh": Mesh(ep=2, tp=2)}
SEQUENCE = {"mesh": Mesh(ep=2, tp=2), "sequence_parallel": True}
CONTEXT = {"mesh": Mesh(ep=2, cp=2)}


def gradients_of_experts_are_summed_over_ep():
    return patch.object(train.Parallel, "_replicas", lambda self, parameter: self.replicas)


def other_gradients_are_not_summed_over_ep():
    return patch.object(train.Parallel, "_replicas", lambda self, parameter: self.replicas_of_experts)


def slots_come_back_to_another_expert():
    whole = expert.combine
    return patch.object(expert, "combine", lambda slots, axis: whole(slots, axis).roll(1, 0))


def gradients_of_slots_stay_where_they_are():
    def exchange(x, axis):
        return expert.Collective.apply(x, axis, expert.all_to_all, lambda g, axis: g)

    return patch.object(expert, "_exchange", exchange)


def each_rank_weighs_its_tokens_by_itself():
    whole = MoE.forward

    def forward(self, x):
        self.token_weight = None
        return whole(self, x)

    return patch.object(MoE, "forward", forward)


def the_loss_of_balance_is_forgotten():
    return patch.object(model._AlsoInLoss, "apply", lambda y, term: y)


def capacity_is_of_a_part_of_a_row():
    return patch.dict(tensor.STYLES, {"sequence_gather": lambda layer, region, entrance: None})


def slots_enter_without_an_all_reduce():
    return patch.object(tensor, "enter", lambda x, axis, meanwhile: x)


def what_experts_give_is_not_summed_over_tensor_ranks():
    return patch.object(tensor, "leave", lambda x, axis: x)


def context_ranks_do_not_know_the_whole_row():
    def only_experts(self, plan):
        for layer in tensor.layers_of_style(self.module, self.module.tp_plan, "moe_tp_experts"):
            train.cut_experts(layer, self.ep)

    return patch.object(train.Parallel, "_share_experts", only_experts)


def places_in_the_row_are_taken_in_the_order_of_shares():
    return patch.object(context, "_in_order", lambda x, axis, dim: x)


BUGS = [
    (gradients_of_experts_are_summed_over_ep, EXPERTS),
    (gradients_of_experts_are_summed_over_ep, EXPERTS | {"zero": 2}),
    (other_gradients_are_not_summed_over_ep, EXPERTS),
    (slots_come_back_to_another_expert, EXPERTS),
    (gradients_of_slots_stay_where_they_are, EXPERTS),
    (each_rank_weighs_its_tokens_by_itself, EXPERTS),
    (the_loss_of_balance_is_forgotten, EXPERTS),
    (capacity_is_of_a_part_of_a_row, SEQUENCE),
    (slots_enter_without_an_all_reduce, TENSOR),
    (what_experts_give_is_not_summed_over_tensor_ranks, TENSOR),
    (context_ranks_do_not_know_the_whole_row, CONTEXT),
    (places_in_the_row_are_taken_in_the_order_of_shares, CONTEXT),
]


@pytest.mark.parametrize(("bug", "layout"), BUGS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_planted_bug_breaks_a_law(world4, bug, layout):
    assert problems(Planted(world4, bug), [layout], moe, *batch_of(CONFIG, ROWS, LENGTH)) != []


def test_without_a_bug_no_law_is_broken(world4):
    layouts = [EXPERTS, EXPERTS | {"zero": 2}, TENSOR, SEQUENCE, CONTEXT]
    assert problems(Planted(world4, None), layouts, moe, *batch_of(CONFIG, ROWS, LENGTH)) == []


# A mesh: what else a reader meets.

MESHES = [Mesh(ep=4), Mesh(dp=2, ep=2), Mesh(ep=2, tp=2), Mesh(ep=2, cp=2), Mesh(pp=2, ep=2)]


def test_forward_and_generate_give_what_one_process_gives(world4):
    """Also where ranks pad what has been written so far, and with fewer rows than ranks."""
    tokens, _ = batch_of(CONFIG, ROWS, LENGTH)

    def answers():
        found, training = [], moe()
        reference = moe().eval()
        for mesh in MESHES:
            parallel = parallelize(moe(), mesh, sequence_parallel=mesh.tp > 1)
            off = [(parallel(tokens) - training(tokens)).abs().max().item()]
            parallel.eval()
            off += [(parallel(some) - reference(some)).abs().max().item() for some in (tokens, tokens[:1])]
            found.append((max(off), parallel.generate(tokens[:3, :3], 4)))
        return found

    wanted = tokens[:3, :3]
    for _ in range(4):
        wanted = torch.cat([wanted, moe().eval()(wanted)[:, -1].argmax(-1, keepdim=True)], 1)
    for answer in world4.run(answers):
        assert all(off < 1e-11 and text.equal(wanted) for off, text in answer)


def test_a_state_goes_from_any_layout_to_any_other(world4):
    layouts = [{"mesh": mesh, "zero": zero} for mesh, zero in zip(MESHES, (0, 3, 0, 1, 2), strict=True)]

    def moved():
        state, same = moe().state_dict(), []
        for layout in layouts:
            parallel = parallelize(model_of(CONFIG, seed=5), **layout)
            parallel.load_full_state_dict(state)
            state = parallel.full_state_dict()
            loss = parallel.step(*batch_of(CONFIG, ROWS, LENGTH)).item()
            same.append((all(x.equal(state[name]) for name, x in moe().state_dict().items()), loss))
        return same

    tokens, targets = batch_of(CONFIG, ROWS, LENGTH)
    loss = mean_cross_entropy(moe()(tokens), targets).item()
    for answer in world4.run(moved):
        assert all(equal and got == pytest.approx(loss, rel=1e-12) for equal, got in answer)


def test_clipping_counts_every_expert_once(world4):
    gradients = alone(moe(), *batch_of(CONFIG, ROWS, LENGTH)).gradients
    norm = torch.stack([g.norm() for g in gradients.values()]).norm().item()

    def clipped():
        norms = []
        for mesh in MESHES:
            for zero in (0, 2):
                parallel = parallelize(moe(), mesh, zero=zero)
                parallel.step(*batch_of(CONFIG, ROWS, LENGTH))
                before, after = parallel.clip_gradients(0.1).item(), parallel.full_gradients()
                factor = 0.1 / (before + 1e-6)
                norms.append((before, differences(after, {name: g * factor for name, g in gradients.items()})))
        return norms

    for answer in world4.run(clipped):
        assert all(before == pytest.approx(norm, rel=1e-10) and same == "" for before, same in answer)


@pytest.mark.parametrize("mesh", [Mesh(ep=4), Mesh(dp=2, ep=2), Mesh(ep=2, tp=2)], ids=str)
def test_a_step_sends_what_the_formula_says(world4, mesh):
    """For each layer and microbatch 4 all-to-alls of (n-1)/n E N C numbers, and an agreement on N: as many slots as the
    rank with the most rows has."""
    n, microbatches, room = mesh.ep, 2, 4  # ceil(0.8 * 2 * 8 / 4)

    def sent():
        parallel = parallelize(moe(), mesh, microbatches=microbatches)
        with ledger() as book:
            parallel.step(*batch_of(CONFIG, ROWS, LENGTH))
        agreed = [e.bytes for e in book.select("ep", "all_reduce") if e.bytes == 2 * WORD * (n - 1) // n]
        return book.calls("ep", "all_to_all"), book.bytes("ep", "all_to_all"), len(agreed)

    def cut(size, parts, i):
        return size * (i + 1) // parts - size * i // parts

    shares = mesh.dp * n
    rows = [[cut(cut(ROWS, shares, i), microbatches, m) for i in range(shares)] for m in range(microbatches)]
    assert any(len(set(some)) > 1 for some in rows)
    for rank, (calls, bytes, agreements) in enumerate(world4.run(sent)):
        first = mesh.coordinate(rank)["dp"] * n
        slots = sum(max(some[first : first + n]) for some in rows) * room
        assert calls == CONFIG.depth * microbatches * 4 and agreements == CONFIG.depth * microbatches
        assert bytes == CONFIG.depth * 4 * (n - 1) * CONFIG.experts * slots * CONFIG.width * WORD // n


def test_a_rank_holds_its_share_of_the_experts(world4):
    def held(mesh, zero):
        parallel = parallelize(moe(), mesh, zero=zero)
        weights = [p for layer in parallel.mixtures for p in layer.experts.parameters()]
        own = [p for name, p in parallel.named_parameters() if ".experts." in name]
        return sum(p.untyped_storage().nbytes() for p in weights if zero == 0), sum(p.numel() for p in own)

    whole = CONFIG.depth * CONFIG.experts * 2 * 4 * CONFIG.width**2
    for mesh, parts in ((Mesh(dp=4), 1), (Mesh(ep=4), 4), (Mesh(dp=2, ep=2), 2), (Mesh(ep=2, tp=2), 4)):
        assert world4.run(held, mesh, 0) == [(whole // parts * WORD, whole // parts)] * 4
    owned = [own for _, own in world4.run(held, Mesh(dp=2, ep=2), 3)]
    assert sum(owned) == whole and max(owned) <= whole // 4


def test_half_precision_routes_and_trains(world4):
    """Where experts compute in 16 bits, gradients are as near as 16 bits are: the loss of float16 is scaled, and that
    of balance with it. Routers compute in 32."""

    def far(mesh, dtype):
        parallel, dtypes = parallelize(moe().float(), mesh, dtype=dtype), set()
        for layer in parallel.mixtures:
            layer.router.register_forward_hook(lambda layer, args, output: dtypes.add(output.dtype))
        parallel.step(*batch_of(CONFIG, ROWS, LENGTH))
        got = parallel.full_gradients()["blocks.1.mlp.router.weight"]
        return ((got - exact).norm() / exact.norm()).item(), dtypes

    exact = alone(moe(), *batch_of(CONFIG, ROWS, LENGTH)).gradients["blocks.1.mlp.router.weight"]
    for mesh in (Mesh(ep=4), Mesh(ep=2, tp=2)):
        for dtype, near in ((None, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 0.1)):
            for off, dtypes in world4.run(far, mesh, dtype):
                assert off < near and dtypes == {torch.float32}, (mesh, dtype, off, dtypes)


def test_a_wrapper_of_torchs_that_would_sum_experts_over_ep_is_refused(world2):
    with pytest.raises(Exception, match="wrap needs zero=0, cp=1, ep=1"):
        world2.run(partial(parallelize, moe(), Mesh(ep=2), wrap=lambda stage, device_mesh: stage))
