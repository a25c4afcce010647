"""A test of the tests: well-known bugs, planted one at a time, each break some law."""

from unittest.mock import patch

import pytest
import torch.nn.functional as F
from laws import Planted, batch_of, model_of, problems
from test_randomness import FromStreams, distinct, masks_of_two_steps, of
from torch import nn

from minipar import Config, Mesh, data, gpipe, pipeline, randomness, tensor, train
from minipar.schedule import Op
from minipar.tensor import cross_entropy
from minipar.transport import Done, Pending
from minipar.world import here

PLAIN = Config(vocab=19, context=8, depth=4, width=16, heads=4)
TIED = Config(vocab=19, context=8, depth=4, width=16, heads=4, tied=True)
DATA = {"mesh": Mesh(dp=4), "microbatches": 2}
TENSOR = {"mesh": Mesh(dp=2, tp=2)}
SEQUENCE = {"mesh": Mesh(dp=2, tp=2), "sequence_parallel": True}
STAGES = {"mesh": Mesh(pp=4), "microbatches": 4, "schedule": gpipe}


def do(op, action):
    """Another method for one kind of action."""
    return patch.dict(pipeline.Executor.DO, {op: action})


def loss_of_each_microbatch_counts_whole():
    def loss(executor, action):
        pipeline.Executor.loss(executor, action)
        for gradients in executor.gradients.values():
            gradients[0] = gradients[0] * len(executor.inputs)

    return do(Op.LOSS, loss)


def gradients_are_not_reduced_over_data():
    return patch.object(data, "start_all_reduce", lambda x, axis: Pending(Done(), x))


def gradients_are_averaged_though_the_loss_was():
    whole = data.Gradients.finish

    def finish(self):
        whole(self)
        self.flat.div_(self.axis.size)

    return patch.object(data.Gradients, "finish", finish)


def gradients_are_reduced_after_the_first_microbatch():
    whole = data.Gradients.attach

    def attach(self):
        whole(self)
        self.arm()

    def start(self):  # and at once, else it depends on luck how much of the second microbatch is in it
        begin(self)
        self.pending[-1].wait()

    begin = data.Gradients._start
    return patch.multiple(data.Gradients, attach=attach, _start=start)


def tied_weights_are_not_synchronized():
    return patch.object(train.Parallel, "_sum_tied", lambda self: None)


def norms_of_a_cut_sequence_are_not_reduced():
    return patch.object(train.Parallel, "_sum_partial", lambda self: None)


def two_microbatches_change_places_on_the_way_back():
    def send(executor, action):
        if action.microbatch == 1:
            for microbatch in (1, 0):
                pipeline.Executor.send_gradient(executor, action._replace(microbatch=microbatch))
        elif action.microbatch > 1:
            pipeline.Executor.send_gradient(executor, action)

    return do(Op.SEND_GRADIENT, send)


def labels_belong_to_another_microbatch():
    def loss(executor, action):
        inner = executor.conclude
        with patch.object(executor, "conclude", lambda y, m: inner(y, (m + 1) % len(executor.inputs))):
            pipeline.Executor.loss(executor, action)

    return do(Op.LOSS, loss)


def the_row_bias_is_added_on_every_rank():
    def rowwise(layer, region, entrance):
        tensor.rowwise(layer, region, entrance)
        layer.forward = lambda x: region.leave(F.linear(x, layer.weight, layer.bias))

    return patch.dict(tensor.STYLES, {"rowwise": rowwise})


def queries_keys_and_values_enter_without_an_all_reduce():
    return patch.object(tensor.Region, "enter", lambda self, x: x)


def rows_of_the_embedding_are_not_summed():
    return patch.object(tensor, "leave", lambda x, axis: x)


def the_largest_logit_is_not_everyones():
    """The loss subtracts its own rank's largest logit before it adds the exponentials of all."""

    def only_sums(x, axis, op="sum"):
        return x if op == "max" else train.all_reduce(x, axis)

    return patch.object(tensor, "all_reduce", only_sums)


def mean_of_means():
    def mean(logits, targets):
        total, count = cross_entropy(logits, targets)
        return total / count.clamp(min=1), 1

    return patch.object(train.Parallel, "_loss", lambda self, given: setattr(self, "given_loss", mean) or mean)


BUGS = [
    (loss_of_each_microbatch_counts_whole, PLAIN, DATA),
    (loss_of_each_microbatch_counts_whole, PLAIN, STAGES),
    (gradients_are_not_reduced_over_data, PLAIN, DATA),
    (gradients_are_averaged_though_the_loss_was, PLAIN, DATA),
    (gradients_are_reduced_after_the_first_microbatch, PLAIN, DATA),
    (tied_weights_are_not_synchronized, TIED, STAGES),
    (norms_of_a_cut_sequence_are_not_reduced, PLAIN, SEQUENCE),
    (two_microbatches_change_places_on_the_way_back, PLAIN, STAGES),
    (labels_belong_to_another_microbatch, PLAIN, STAGES),
    (the_row_bias_is_added_on_every_rank, PLAIN, TENSOR),
    (queries_keys_and_values_enter_without_an_all_reduce, PLAIN, TENSOR),
    (rows_of_the_embedding_are_not_summed, PLAIN, TENSOR),
    (the_largest_logit_is_not_everyones, PLAIN, TENSOR),
    (mean_of_means, PLAIN, DATA),
]
LAYOUTS = [(PLAIN, DATA), (PLAIN, TENSOR), (PLAIN, SEQUENCE), (PLAIN, STAGES), (TIED, STAGES)]


def laws_broken_by(world, config, layout):
    return problems(world, [layout], lambda: model_of(config), *batch_of(config, 8, 8))


@pytest.mark.parametrize(("bug", "config", "layout"), BUGS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_planted_bug_breaks_a_law(world4, bug, config, layout):
    assert laws_broken_by(Planted(world4, bug), config, layout) != []


@pytest.mark.parametrize(("config", "layout"), LAYOUTS, ids=lambda x: str(x["mesh"]) if isinstance(x, dict) else "")
def test_without_a_bug_no_law_is_broken(world4, config, layout):
    assert laws_broken_by(Planted(world4, None), config, layout) == []


def one_stream():
    return patch.object(randomness.Streams, "go", lambda self, inside: None)


def own_stream():
    whole = randomness.Streams.begin
    return patch.object(randomness.Streams, "begin", lambda self, outside, inside: whole(self, inside, inside))


def own_masks():
    whole = randomness.Masks.begin
    return patch.object(randomness.Masks, "begin", lambda self, step, rows: whole(self, (*step, here().rank), rows))


@pytest.mark.parametrize(
    ("bug", "dropout"), [(one_stream, nn.Dropout), (one_stream, FromStreams), (None, nn.Dropout), (None, FromStreams)]
)
def test_one_mask_for_all_tensor_ranks_is_found(world2, bug, dropout):
    answers = Planted(world2, bug).run(masks_of_two_steps, dropout, mesh=Mesh(tp=2))
    assert distinct([mask for masks in answers for mask in of(masks, "inside")]) is (bug is None)


@pytest.mark.parametrize(
    ("bug", "dropout"), [(own_masks, nn.Dropout), (own_stream, FromStreams), (None, nn.Dropout), (None, FromStreams)]
)
def test_a_mask_that_is_not_everyones_is_found(world2, bug, dropout):
    first, second = Planted(world2, bug).run(masks_of_two_steps, dropout, mesh=Mesh(tp=2))
    assert (of(first, "outside") == of(second, "outside")) is (bug is None)
