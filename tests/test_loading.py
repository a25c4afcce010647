"""Loading: ranks read their own rows of the global batch, go through each epoch once, and go on where they were."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from laws import differences, model_of
from torch import nn
from torch.utils.data import Dataset

from minipar import Config, Loader, Mesh, corpus, data, parallelize

CONFIG = Config(vocab=37, context=8, depth=2, width=12, heads=2)


class Rows(Dataset):
    """Row i says i; `read` says which rows this process has read."""

    def __init__(self, size):
        self.size, self.read = size, Counter()

    def __len__(self):
        return self.size

    def __getitem__(self, row):
        self.read[row] += 1
        return torch.tensor(row), torch.tensor(row) * 10


class Texts(Dataset):
    """Rows of tokens and targets, of which some do not count."""

    def __len__(self):
        return 30

    def __getitem__(self, row):
        draw = torch.Generator().manual_seed(row)
        tokens, targets = torch.randint(CONFIG.vocab, (2, 8), generator=draw)
        return tokens, targets.masked_fill(torch.arange(8) < row % 4, -100)


def seat(index=0, size=1, microbatches=1):
    """What a Loader asks of a model: its data axis, and its microbatches."""
    return SimpleNamespace(dp=SimpleNamespace(name="dp", index=index, size=size), microbatches=microbatches)


def global_batches(size, dp, rows, epochs=1, **options):
    """Per epoch, what the data ranks were given of each batch, side by side."""
    loaders = [Loader(Rows(size), rows, seat(i, dp), **options) for i in range(dp)]
    return [
        [[x.tolist() for x, _ in parts] for parts in zip(*(iter(loader) for loader in loaders), strict=True)]
        for _ in range(epochs)
    ]


def flat(batches):
    return [row for parts in batches for part in parts for row in part]


@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 20), st.integers(0, 3))
def test_every_row_is_read_once_an_epoch_and_every_layout_has_the_same_batches(size, dp, rows, seed):
    if rows < dp or 0 < size % rows < dp or size < dp:
        return
    first, second = global_batches(size, dp, rows, epochs=2, seed=seed)
    assert sorted(flat(first)) == sorted(flat(second)) == list(range(size))
    one = global_batches(size, 1, rows, epochs=2, seed=seed)
    for epoch, alone in zip((first, second), one, strict=True):
        assert [[row for part in parts for row in part] for parts in epoch] == [parts[0] for parts in alone]
        for parts, (whole,) in zip(epoch, alone, strict=True):
            assert parts == [part.tolist() for part in data.rows(torch.tensor(whole), dp)], "as step would cut it"


def test_a_rank_reads_its_own_rows_only():
    datasets = [Rows(51) for _ in range(3)]
    for i, dataset in enumerate(datasets):
        assert len(list(Loader(dataset, 8, seat(i, 3)))) == 7
    assert sum((dataset.read for dataset in datasets), Counter()) == Counter(range(51))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [flat(epoch) for seed in (0, 1, -1) for epoch in global_batches(40, 2, 8, epochs=2, seed=seed)]
    assert len({tuple(order) for order in orders}) == 6
    assert flat(global_batches(40, 2, 8, seed=1)[0]) == orders[2], "and it is the same each time"
    assert [flat(epoch) for epoch in global_batches(40, 2, 8, epochs=2, shuffle=False)] == [list(range(40))] * 2


def test_no_other_seed_and_epoch_have_the_same_digits():
    first, second = Loader(Rows(40), 8, seat(), seed=1), Loader(Rows(40), 8, seat(), seed=11)
    first.epoch, second.epoch = 11, 1
    assert not first.order().equal(second.order())


@pytest.mark.parametrize("workers", [0, 2])
def test_it_goes_on_in_mid_epoch_exactly_whatever_was_prefetched(workers):
    options = {"workers": workers, "prefetch": 3} if workers else {}
    whole = [x.tolist() for x, _ in Loader(Rows(45), 6, seat(), seed=3).batches(20)]
    for stop in (1, 5, 8, 13):
        loader = Loader(Rows(45), 6, seat(), seed=3, **options)
        begun = loader.batches(stop)
        seen = [next(begun)[0].tolist() for _ in range(stop)]
        state = loader.state_dict()
        begun.close()
        other = Loader(Rows(45), 6, seat(), seed=3, **options)
        other.load_state_dict(state)
        seen += [x.tolist() for x, _ in other.batches(20 - stop)]
        assert seen == whole, f"stopped after {stop}"
    assert len(whole[7]) == 3, "the last of an epoch has the rest"


def test_another_layout_goes_on_with_the_rows_that_are_left():
    loader = Loader(Rows(48), 8, seat(0, 2), seed=3)
    begun = loader.batches(4)
    for _ in range(4):
        next(begun)
    used = flat(global_batches(48, 1, 8, seed=3)[0][:4])
    for dp, rows in ((1, 8), (4, 8), (2, 4), (3, 4)):
        loaders = [Loader(Rows(48), rows, seat(i, dp), seed=3) for i in range(dp)]
        left = []
        for other in loaders:
            other.load_state_dict(loader.state_dict())
        for parts in zip(*(iter(other) for other in loaders), strict=True):
            left += [row for x, _ in parts for row in x.tolist()]
        assert used + left == flat(global_batches(48, 1, 8, seed=3)[0]), (dp, rows)


def test_drop_last_leaves_out_what_is_less_than_a_batch():
    (epoch,) = global_batches(45, 2, 8, drop_last=True)
    assert [len(a) + len(b) for a, b in epoch] == [8] * 5 and len(Loader(Rows(45), 8, seat(), drop_last=True)) == 5
    loader = Loader(Rows(45), 8, seat(), drop_last=True)
    loader.load_state_dict(loader.state_dict() | {"row": 40})
    assert (loader.epoch, loader.row) == (1, 0)


def test_the_callers_random_numbers_go_on_undisturbed():
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    list(Loader(Rows(10), 2, seat()))
    assert torch.rand(3).equal(wanted)


# In training.


def wanted_gradients():
    """Of one process that is given the global batches of an epoch: 3 of 8 rows, and the last of 6."""
    found = []
    for first in range(0, len(Texts()), 8):
        some = [Texts()[row] for row in range(first, min(first + 8, len(Texts())))]
        tokens, targets = (torch.stack(x) for x in zip(*some, strict=True))
        model = model_of(CONFIG)
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    return found


def loaded_gradients(layouts):
    """On a rank: of each batch of an epoch, on some layouts."""
    found = []
    for mesh, zero, workers in layouts:
        model = parallelize(model_of(CONFIG), mesh, microbatches=2, zero=zero)
        loader = Loader(Texts(), 8, model, shuffle=False, workers=workers)
        found.append([(model.step(*batch, local=True), model.full_gradients())[1] for batch in loader])
    return found


def test_every_batch_has_the_gradients_of_one_process_the_uneven_last_one_too(world4):
    layouts = [(Mesh(dp=2, pp=2), 0, 0), (Mesh(dp=2, cp=2), 0, 0), (Mesh(dp=2, tp=2), 2, 1)]
    wanted = wanted_gradients()
    for answers in world4.run(loaded_gradients, layouts):
        for layout, got in zip(layouts, answers, strict=True):
            assert len(got) == 4
            for place, (mine, right) in enumerate(zip(got, wanted, strict=True)):
                assert differences(mine, right) == "", f"{layout}, batch {place}"


def test_the_corpus_is_rows_side_by_side():
    windows = corpus.Windows(context=16)
    assert len(windows) == (len(corpus.tokens()) - 1) // 16
    tokens, targets = windows[len(windows) - 1]
    assert tokens.shape == targets.shape == (16,) and tokens[1:].equal(targets[:-1])
    assert torch.cat([windows[0][0], windows[1][0]]).equal(corpus.tokens()[:32])
    even = corpus.Windows(context=15)  # it divides the corpus, so a last row would have no last target
    assert len(corpus.tokens()) % 15 == 0 and even[len(even) - 1][1].shape == (15,)
    with pytest.raises(ValueError, match="context=0 does not fit"):
        corpus.Windows(0)


@pytest.mark.parametrize(
    ("size", "rows", "options", "said"),
    [
        (50, 8, {"size": 2, "microbatches": 2}, "the last batch of 50 rows by 8 has 2, too few for dp=2 x 2 microb"),
        (50, 8, {"size": 2, "microbatches": 2}, "drop_last=True leaves it out, rows=5 or 9 or 10 would fit"),
        (50, 3, {"size": 2, "microbatches": 2}, "batches of 3 rows are too few for dp=2 x 2 microbatches: give at l"),
        (9, 0, {}, "rows=0: a whole number, at least 1"),
        (0, 3, {}, "there is no batch of 3 rows in 0"),
    ],
)
def test_batches_that_step_could_not_take_are_refused_before_the_first(size, rows, options, said):
    with pytest.raises(ValueError) as refusal:
        Loader(Rows(size), rows, seat(**options))
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seed": 4}, "the position is for seed=3, and this loader has 4"),
        ({"shuffle": False}, "the position is for shuffle=True, and this loader has False"),
    ],
)
def test_a_position_in_another_order_is_refused(changed, said):
    state = Loader(Rows(45), 6, seat(), seed=3).state_dict()
    with pytest.raises(ValueError, match=said):
        Loader(Rows(45), 6, seat(), **({"seed": 3} | changed)).load_state_dict(state)
    with pytest.raises(ValueError, match="the position is for size=45, and this loader has 44"):
        Loader(Rows(44), 6, seat(), seed=3).load_state_dict(state)
