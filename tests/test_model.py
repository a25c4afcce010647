"""What `parallelize` gives: the face of the model, on every layout."""

import copy

import pytest
import torch
from laws import batch_of, differences, model_of
from torch import nn

from minipar import Config, Mesh, gpipe, gpt, one_f_one_b, parallelize

TINY = Config(vocab=19, context=8, depth=4, width=16, heads=4)
LAYOUTS = [
    {"mesh": Mesh(dp=4)},
    {"mesh": Mesh(pp=4), "schedule": gpipe},
    {"mesh": Mesh(dp=2, pp=2), "microbatches": 3},
    {"mesh": Mesh(dp=2, tp=2), "sequence_parallel": True},
    {"mesh": Mesh(pp=2, tp=2), "microbatches": 2},
    {"mesh": Mesh(tp=4)},
]


def tiny(seed=0, **changes):
    return model_of(Config(**{**vars(TINY), **changes}), seed)


def on_all_layouts(world, ask, *args):
    """ask(parallel, *args) for the tiny model on every layout: a list of answers from each rank."""

    def everywhere():
        return [ask(parallelize(tiny(), **layout), *args) for layout in LAYOUTS]

    return [answer for answers in world.run(everywhere) for answer in answers]


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_forward_gives_every_rank_the_logits_of_one_process(world4, rows):
    tokens, _ = batch_of(TINY, rows, 8)
    with torch.no_grad():
        wanted = tiny()(tokens)
    for got in on_all_layouts(world4, lambda parallel: parallel.forward(tokens)):
        assert got.shape == wanted.shape and (got - wanted).abs().max() < 1e-12 * wanted.abs().max()


def test_forward_between_steps_changes_nothing(world4):
    def ask(parallel):
        batch = batch_of(TINY, 9, 8)
        parallel.step(*batch)
        first = parallel.full_gradients()
        parallel.forward(batch[0])
        unchanged = parallel.full_gradients()
        parallel.step(*batch)
        return differences(unchanged, first) + differences(parallel.full_gradients(), first)

    assert set(on_all_layouts(world4, ask)) == {""}


def test_every_layout_writes_the_same_text(world4):
    """Greedy and drawn, past the end of the context, from a start of any length."""

    def alone(start, new):
        model, tokens = tiny(), start
        for _ in range(new):
            with torch.no_grad():
                last = model(tokens[:, -TINY.context :])[:, -1]
            tokens = torch.cat([tokens, last.argmax(-1, keepdim=True)], 1)
        return tokens

    start = batch_of(TINY, 2, 3)[0]
    drawn = on_all_layouts(world4, lambda parallel: parallel.generate(start, 8, temperature=1.0, seed=3))
    assert all(text.equal(drawn[0]) for text in drawn) and drawn[0].shape == (2, 11)
    greedy = alone(start, 8)
    assert not drawn[0].equal(greedy)
    for text in on_all_layouts(world4, lambda parallel: parallel.generate(start, 8)):
        assert text.equal(greedy)


def test_writing_leaves_training_mode_and_random_numbers_alone(world4):
    def ask(parallel):
        torch.manual_seed(5)
        parallel.train()
        parallel.generate(batch_of(TINY, 2, 3)[0], 2, temperature=1.0)
        was_training = all(m.training for m in parallel.module.modules())
        parallel.eval()
        parallel.generate(batch_of(TINY, 2, 3)[0], 1)
        return was_training, any(m.training for m in parallel.module.modules()), torch.rand(1).item()

    torch.manual_seed(5)
    assert set(on_all_layouts(world4, ask)) == {(True, False, torch.rand(1).item())}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("most", [0.01, 1e6])
def test_clipping_is_that_of_torch_in_one_process(world4, most, tied):
    model, (tokens, targets) = tiny(tied=tied), batch_of(TINY, 9, 8)
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), most).item()
    wanted = {name: p.grad for name, p in model.named_parameters()}

    def everywhere():
        answers = []
        for layout in LAYOUTS:
            parallel = parallelize(tiny(tied=tied), **layout)
            parallel.step(tokens, targets)
            answers.append((parallel.clip_gradients(most).item(), parallel.full_gradients()))
        return answers

    for answers in world4.run(everywhere):
        for got, gradients in answers:
            assert got == pytest.approx(norm, rel=1e-12)
            assert differences(gradients, wanted) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_is_summed_in_double_precision(dtype):
    """Squares of small numbers, very many of them: bfloat16 would stop counting at 256 times the first."""
    model = gpt(Config(vocab=64, depth=1, width=32, heads=2)).to(dtype)
    parallel = parallelize(model, Mesh())
    parallel.step(torch.arange(32).view(2, 16), torch.arange(32).view(2, 16))
    wanted = torch.cat([p.grad.double().flatten() for p in parallel.parameters()]).norm().item()
    assert parallel.clip_gradients(1e9).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_go_from_layout_to_layout_bit_for_bit(world4, tied):
    state = tiny(tied=tied).state_dict()

    def around():
        answers, carried = [], state
        for layout in LAYOUTS:
            parallel = parallelize(tiny(seed=1, tied=tied), **layout)  # other weights
            parallel.load_full_state_dict(carried)
            carried = parallel.full_state_dict()
            answers.append(carried)
        return answers

    for answers in world4.run(around):
        for got in answers:
            assert list(got) == list(state)
            assert all(got[key].equal(x) for key, x in state.items())


class Counting(nn.Module):
    """A block with a buffer that its forward changes."""

    def __init__(self, start):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("seen", torch.tensor(float(start)))

    def forward(self, x):
        return self.linear(x) + self.seen


class Stack(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.blocks = nn.ModuleList(Counting(start + i) for i in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_buffers_are_part_of_the_state_wherever_they_live(world4):
    wanted = Stack(start=10).state_dict()

    def around():
        parallel = parallelize(Stack(start=0), Mesh(dp=2, pp=2))
        first = parallel.full_state_dict()
        parallel.load_full_state_dict(wanted)
        return first["blocks.0.seen"].item(), first["blocks.3.seen"].item(), parallel.full_state_dict()

    for first, last, state in world4.run(around):
        assert (first, last) == (0, 3)
        assert list(state) == list(wanted) and all(state[key].equal(x) for key, x in wanted.items())


def test_the_callers_module_is_left_alone(world4):
    def everywhere():
        found = []
        for layout in LAYOUTS:
            model = tiny(tied=True)
            state, module_of = copy.deepcopy(model.state_dict()), dict(model.named_modules())
            tokens, targets = batch_of(TINY, 9, 8)
            logits = model(tokens).detach()
            parallel = parallelize(model, **layout)
            parallel.step(tokens, targets)
            torch.optim.SGD(parallel.parameters(), 1.0).step()
            changed = [key for key, x in model.state_dict().items() if not x.equal(state[key])]
            marked = [name for name, p in model.named_parameters() if vars(p) or p.grad is not None]
            replaced = [name for name, m in model.named_modules() if m is not module_of[name] or "forward" in vars(m)]
            hooked = [name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks]
            found.append(changed + marked + replaced + hooked + ["output"] * (not model(tokens).equal(logits)))
        return found

    assert [found for answers in world4.run(everywhere) for found in answers if found] == []


def test_the_first_weights_are_those_of_the_callers_module(world4):
    wanted = tiny().state_dict()
    for state in on_all_layouts(world4, lambda parallel: parallel.full_state_dict()):
        assert all(state[key].equal(x) for key, x in wanted.items())


def test_ranks_hold_their_share_of_the_parameters_and_no_more(world4):
    """Each axis but dp divides what a rank holds; what is not cut, is small."""
    whole = sum(p.numel() for p in gpt(Config()).parameters())

    def held():
        sizes = []
        for mesh in (Mesh(dp=4), Mesh(pp=4), Mesh(tp=4), Mesh(pp=2, tp=2)):
            parallel = parallelize(gpt(Config()), mesh)
            memory = {
                p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parallel.module.parameters()
            }
            sizes.append((sum(p.numel() for p in parallel.parameters()), sum(memory.values()) / 4))
        return sizes

    for layout, answers in enumerate(zip(*world4.run(held), strict=True)):
        for parameters, memory in answers:
            assert parameters < whole * (1.01 if layout == 0 else 0.36)
            assert memory < 1.01 * parameters + 100
    for answers in world4.run(held)[:1]:
        assert answers[0][0] == whole


def test_no_rank_ever_holds_the_whole_logits_in_training(world2):
    def widths(sequence):
        parallel = parallelize(tiny(), Mesh(tp=2), sequence_parallel=sequence)
        seen = []
        parallel.module.head.register_forward_hook(lambda layer, args, output: seen.append(output.shape[-1]))
        parallel.step(*batch_of(TINY, 9, 8))
        parallel.forward(batch_of(TINY, 9, 8)[0])
        return seen

    for sequence in (False, True):
        assert world2.run(widths, sequence) == [[9, 19], [10, 19]]


def test_float32_is_as_close_as_float32_is(world4):
    model, (tokens, targets) = tiny().float(), batch_of(TINY, 9, 8)
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    loss.backward()
    largest = max(p.grad.abs().max().item() for p in model.parameters())

    def everywhere():
        answers = []
        for layout in LAYOUTS:
            parallel = parallelize(tiny().float(), **layout)
            answers.append((parallel.step(tokens, targets), parallel.full_gradients()))
        return answers

    for answers in world4.run(everywhere):
        for got, gradients in answers:
            assert got.dtype == torch.float32 and got.shape == () and not got.requires_grad
            assert got.item() == pytest.approx(loss.item(), rel=1e-6)
            for name, p in model.named_parameters():
                assert gradients[name].dtype == torch.float32
                assert (gradients[name] - p.grad).abs().max() < 1e-5 * largest


def test_names_are_those_of_the_whole_model(world4):
    """Together, the ranks of a pipeline update every parameter, under its own name; tied ones once on each side."""
    names = [name for name, _ in tiny(tied=True).named_parameters()]

    def own():
        parallel = parallelize(tiny(tied=True), Mesh(pp=4))
        return [name for name, _ in parallel.named_parameters()], len(list(parallel.parameters()))

    answers = world4.run(own)
    assert all(len(mine) == count for mine, count in answers)
    assert set().union(*(mine for mine, _ in answers)) == set(names)
    assert ["embed.token.weight" in mine for mine, _ in answers] == [True, False, False, True]


def test_one_rank_is_a_mesh_like_any_other():
    """No World: the process itself."""
    model, (tokens, targets) = tiny(), batch_of(TINY, 9, 8)
    parallel = parallelize(model, Mesh(), microbatches=4, schedule=one_f_one_b)
    loss = parallel.step(tokens, targets)
    wanted = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert differences(parallel.full_gradients(), {name: p.grad for name, p in model.named_parameters()}) == ""


class Padded(nn.Module):
    """An embedding whose padding row gets no gradient."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8, padding_idx=5), nn.Linear(8, 9)

    def forward(self, ids):
        return self.head(self.embed(ids))


def test_the_padding_row_of_a_cut_embedding_gets_no_gradient(world2):
    ids = torch.arange(9).repeat(4, 2)

    def gradients(mesh):
        torch.manual_seed(0)
        parallel = parallelize(Padded().double(), mesh, plan={"embed": "embedding_rowwise"})
        parallel.step(ids, ids)
        return parallel.full_gradients()["embed.weight"]

    whole, *_ = world2.run(gradients, Mesh(dp=2))
    for cut in world2.run(gradients, Mesh(tp=2)):
        assert not whole[5].any() and (cut - whole).abs().max() < 1e-15


class Times(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x, scale):
        return torch.tanh(self.layer(x)) * scale


class Scaling(nn.Module):
    """A buffer outside of the blocks, which all of them use."""

    def __init__(self, scale):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        self.blocks = nn.ModuleList(Times() for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x, self.scale)
        return x


@pytest.mark.parametrize("mesh", [Mesh(dp=2), Mesh(pp=2)], ids=str)
def test_every_stage_loads_a_buffer_that_its_blocks_use(world2, mesh):
    def apart():
        torch.manual_seed(0)
        other, x = Scaling(3.0).double(), torch.randn(4, 4).double()
        parallel = parallelize(Scaling(1.0).double(), mesh)
        parallel.load_full_state_dict(other.state_dict())
        return (parallel(x) - other(x)).abs().max().item()

    assert all(x <= 1e-12 for x in world2.run(apart))


def test_a_state_that_does_not_fit_changes_nothing(world2):
    """Also where the tensor that does not fit is another stage's."""

    def unchanged(key):
        parallel = parallelize(tiny(), Mesh(pp=2))
        before, state = parallel.full_state_dict(), tiny(seed=1).state_dict()
        state[key] = torch.zeros(3)
        with pytest.raises(ValueError, match=f"'{key}' has shape .3,. in the state"):
            parallel.load_full_state_dict(state)
        return all(x.equal(before[name]) for name, x in parallel.full_state_dict().items())

    for key in ("embed.token.weight", "head.weight"):
        assert world2.run(unchanged, key) == [True, True]


def test_generate_leaves_each_layer_in_its_mode(world2):
    def modes():
        parallel = parallelize(tiny(), Mesh(dp=2))
        parallel.module.blocks[1].eval()
        before = [layer.training for layer in parallel.module.modules()]
        parallel.generate(torch.zeros(1, 2, dtype=torch.long), 2)
        return before == [layer.training for layer in parallel.module.modules()] and len(set(before)) == 2

    assert world2.run(modes) == [True, True]
