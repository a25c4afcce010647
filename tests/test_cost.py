"""Parameters, FLOPs, memory and bytes, against models that are built, papers, and what the engine sends."""

from dataclasses import replace

import pytest
import torch
from laws import batch_of, model_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minipar import Config, Mesh, gpt, ledger, parallelize
from minipar.cost import (
    FP32,
    MEGATRON_2021,
    MIXED,
    TODAY,
    Formats,
    Layout,
    block_activations,
    forward_flops,
    shares,
    stage_memory,
    states,
    step_flops,
    traffic,
)
from minipar.published import (
    korthikanti_hardware_flops,
    korthikanti_model_flops,
    narayanan_flops,
    narayanan_parameters,
    narayanan_seconds,
)
from minipar.schedule import SCHEDULES, in_flight
from minipar.transformer import MODELS, Transformer, find_model, from_config, from_configuration

# -- parameters ----------------------------------------------------------------------------------------------


def test_the_small_gpt_has_as_many_parameters_as_it_has_tensors_for():
    for config in (Config(), Config(tied=True, depth=3, width=24, heads=3, vocab=77), Config(experts=4, top=2)):
        assert from_config(config).parameters == sum(p.numel() for p in gpt(config).parameters())


SMALL = {"vocab_size": 211, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6}
EXPERTS = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GROUPED = SMALL | {"num_key_value_heads": 2, "intermediate_size": 100}


@pytest.mark.parametrize(
    ("family", "shape"),
    [
        ("GPT2", {"vocab_size": 211, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64}),
        ("Llama", GROUPED),
        ("Llama", GROUPED | {"tie_word_embeddings": True, "head_dim": 16}),
        ("Mistral", GROUPED),
        ("Mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("Qwen2", GROUPED),
        ("Qwen3", GROUPED | {"head_dim": 16}),
        ("Qwen3Moe", GROUPED | EXPERTS),
    ],
)  # fmt: skip
def test_a_configuration_of_transformers_gives_the_parameters_of_its_model(family, shape):
    import transformers

    configuration = getattr(transformers, f"{family}Config")(**shape)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(configuration)
    assert from_configuration(configuration).parameters == sum(p.numel() for p in model.parameters())


def test_what_is_not_known_is_refused_by_name():
    import transformers

    with pytest.raises(ValueError, match="model_type 'bert' is not known here"):
        from_configuration(transformers.BertConfig())
    with pytest.raises(ValueError, match="no model 'llama-9b': did you mean llama-8b"):
        find_model("llama-9b")
    with pytest.raises(ValueError, match=r"Transformer\(layers=0\)"):
        Transformer("x", 0, 1, 1, 1)
    with pytest.raises(ValueError, match="kv_heads 3 does not divide heads 8"):
        Transformer("x", 1, 64, 8, 10, kv_heads=3)


# From the releases' own weights: what torch counts when it loads them.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("llama-8b", 8_030_261_248),
        ("llama-70b", 70_553_706_496),
        ("llama-405b", 405_853_388_800),
        ("mixtral-8x7b", 46_702_792_704),
    ],
)
def test_models_of_the_catalogue_have_the_parameters_of_their_weights(name, parameters):
    assert find_model(name).parameters == parameters


# Narayanan et al. 2021, Table 1: every other row. Parameters in billions, as printed.
TABLE_1 = [
    ("megatron-1.7b", 1, 1, 32, 512, 137, 44, 4.4, 1.7),
    ("megatron-7.5b", 4, 1, 128, 512, 142, 46, 18.2, 7.5),
    ("megatron-39b", 8, 2, 512, 1536, 138, 44, 70.8, 39.1),
    ("megatron-145b", 8, 8, 1536, 2304, 148, 47, 227.1, 145.6),
    ("megatron-1t", 8, 64, 3072, 3072, 163, 52, 502.0, 1008),
]


@pytest.mark.parametrize("row", TABLE_1, ids=lambda row: row[0])
def test_parameters_and_flops_are_those_of_narayanan(row):
    name, _, _, gpus, batch, tflops, percent, petaflops, billions = row
    model = find_model(name)
    digits = 0 if billions > 1000 else 1
    assert round(model.parameters / 1e9, digits) == billions
    formula = narayanan_parameters(model.layers, model.hidden, model.vocabulary, 2048)
    assert model.parameters == pytest.approx(formula + 2 * model.hidden, abs=1)  # theirs leaves out the last norm
    theirs = narayanan_flops(batch, model.layers, model.hidden, model.vocabulary, 2048)
    ours = step_flops(model, batch, 2048, recompute="full")
    assert ours == pytest.approx(theirs, rel=1e-12)
    seconds = theirs / (gpus * tflops * 1e12)
    assert ours / seconds == pytest.approx(petaflops * 1e15, rel=0.01)
    assert tflops / 312 == pytest.approx(percent / 100, abs=0.005)


def test_days_of_training_are_those_of_narayanan():
    day = 86400
    assert narayanan_seconds(300e9, 175e9, 1024, 140e12) / day == pytest.approx(34, rel=0.01)
    assert narayanan_seconds(450e9, 1e12, 3072, 163e12) / day == pytest.approx(84, rel=0.01)
    # Eq. 4 is eq. 3 for s << 6h, V << 16 l h: two percent for GPT-3.
    model = find_model("megatron-175b")
    exact = step_flops(model, 1, 2048, "full") / 2048
    assert exact == pytest.approx(8 * model.parameters, rel=0.03)


# Korthikanti et al. 2022: devices and batch, seconds of an iteration with sequence parallelism and selective
# recomputation, MFU and HFU in percent; A100, 312 TFLOP/s.
@pytest.mark.parametrize(
    ("name", "layers", "hidden", "heads", "gpus", "batch", "seconds", "mfu", "hfu"),
    [("22B", 48, 6144, 64, 8, 4, 1.10, 41.5, 43.7), ("530B", 105, 20480, 128, 280, 280, 37.83, 56.0, 57.0)],
)
def test_utilization_is_that_of_korthikanti(name, layers, hidden, heads, gpus, batch, seconds, mfu, hfu):
    model = Transformer(name, layers, hidden, heads, 51200, positions=2048, tied=True)
    peak = gpus * 312e12 * seconds / 100
    shape = batch, layers, hidden, 51200, 2048
    assert korthikanti_model_flops(*shape) / peak == pytest.approx(mfu, abs=0.5)
    assert korthikanti_hardware_flops(*shape) / peak == pytest.approx(hfu, abs=0.5)
    # Derived, MFU is theirs, and HFU less: four times attention's products where their formula has six.
    assert step_flops(model, batch, 2048) == pytest.approx(korthikanti_model_flops(*shape), rel=1e-12)
    attention = 12 * batch * layers * 2048**2 * hidden
    derived = step_flops(model, batch, 2048, "selective")
    assert derived - step_flops(model, batch, 2048) == pytest.approx(attention / 3)
    assert korthikanti_hardware_flops(*shape) - derived == pytest.approx(attention * 2 / 3)
    assert derived / peak == pytest.approx(hfu, abs=1.5)


# -- FLOPs ---------------------------------------------------------------------------------------------------


def counted(config, rows, length):
    """FLOPs of forward, and of forward and backward, by torch's own counter."""
    model = gpt(config)
    tokens = torch.zeros(rows, length, dtype=torch.long)
    with (
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as forward,
    ):  # it does not know the CPU's fused one
        loss = model(tokens).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("config", [Config(), Config(depth=2, width=48, heads=4, vocab=99, context=64)])
def test_flops_are_those_that_torch_counts(config):
    rows, length = 3, config.context
    forward, backward = counted(config, rows, length)
    assert forward == rows * length * sum(forward_flops(from_config(config), length).values())
    assert forward + backward == step_flops(from_config(config), rows, length)


# -- memory --------------------------------------------------------------------------------------------------


def korthikanti_activations(s, b, h, a, t, how):
    """Table 2 there, bytes of a layer."""
    attention = 5 * a * s / h
    return s * b * h * {
        "none": 34 + attention,
        "tensor": 10 + 24 / t + attention / t,
        "sequence": (34 + attention) / t,
        "selective": 34 / t,
    }[how]  # fmt: skip


@pytest.mark.parametrize(("s", "b", "h", "a", "t"), [(2048, 4, 6144, 64, 8), (1024, 1, 1024, 16, 2)])
def test_activations_of_a_block_are_those_of_korthikanti(s, b, h, a, t):
    model = Transformer("x", 1, h, a, 1000, positions=s)
    for how, layout in {
        "none": Layout(Mesh()),
        "tensor": Layout(Mesh(tp=t)),
        "sequence": Layout(Mesh(tp=t), sequence_parallel=True),
        "selective": Layout(Mesh(tp=t), sequence_parallel=True, recompute="selective"),
    }.items():
        got = block_activations(model, layout, b, s, MIXED, MEGATRON_2021)
        assert got == pytest.approx(korthikanti_activations(s, b, h, a, t, how), rel=1e-12), how
    full = block_activations(model, Layout(Mesh(tp=t), recompute="full"), b, s, MIXED, MEGATRON_2021)
    assert full == 2 * s * b * h


def saved(block, x):
    """Bytes that autograd keeps between a block's forward and backward, each storage once, weights not."""
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x)
    return sum(kept.values()), y


@pytest.mark.parametrize("width", [128, 512])
def test_activations_of_the_small_gpt_are_what_autograd_keeps(width):
    """Fused attention in fp32. Beyond the formula there are the statistics of norms and attention."""
    config = Config(width=width, depth=1)
    rows, length = 4, 128
    x = torch.randn(rows, length, width, requires_grad=True)
    kept, _ = saved(gpt(config).blocks[0], x)
    formula = block_activations(from_config(config), Layout(Mesh()), rows, length, FP32, TODAY)
    statistics = rows * length * 4 * (4 + config.heads)
    assert kept == formula + statistics


def test_states_are_those_of_rajbhandari():
    """ZeRO, Figure 1: 7.5B parameters on 64 ranks, in GB."""
    total = [sum(states(7.5e9, 64, zero).values()) / 1e9 for zero in range(4)]
    assert [round(x, 2) for x in total] == [120.0, 31.41, 16.64, 1.88]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("microbatches", [1, 3, 8, 40])
def test_activations_in_flight_are_those_of_the_schedule(name, microbatches):
    model = Transformer("x", 16, 64, 4, 100)
    chunks = 2 if name == "interleaved" else 1
    layout = Layout(Mesh(pp=4), microbatches, name, chunks)
    block = block_activations(model, layout, 1, 32)
    for memory, share, program in zip(
        stage_memory(model, layout, microbatches, 32), shares(model, layout), layout.order(), strict=True
    ):
        assert memory["activations"] == block * in_flight(program) * share.blocks / len(share.stages)


def test_shares_hold_all_parameters_once():
    for model in MODELS.values():
        for layout in (
            Layout(Mesh(pp=2)),
            Layout(Mesh(pp=4), 4, "interleaved", 2),
            Layout(Mesh(pp=3), 1, "zero-bubble-v"),
        ):
            held = sum(share.dense + share.experts for share in shares(model, layout))
            again = model.vocabulary * model.hidden if model.tied else 0  # a tied weight is on both ends
            if layout.schedule == "zero-bubble-v":
                again = 0  # both ends are on the first rank
            assert held == model.parameters + again, (model.name, layout)


# -- traffic -------------------------------------------------------------------------------------------------

SHAPE = Config(vocab=24, context=16, depth=4, width=16, heads=4)
F64 = Formats(8, 8, 16, 8)
ROWS = 8


def sent(cases):
    """On a rank: bytes by axis of a second step, for each case."""
    found = []
    for config, options in cases:
        parallel = parallelize(model_of(config), **options)
        batch = batch_of(config, ROWS, config.context)
        parallel.step(*batch)
        with ledger() as book:
            parallel.step(*batch)
        everything = {axis: book.bytes(axis) for axis in {entry.axis for entry in book.entries}}
        found.append((everything, sum(len(shares.units) for shares in parallel.shares.values())))
    return found


TRAFFIC = [
    (Mesh(dp=4), {}),
    (Mesh(dp=2, tp=2), {"microbatches": 2}),
    (Mesh(dp=2, tp=2), {"microbatches": 2, "sequence_parallel": True}),
    (Mesh(dp=2, pp=2), {"microbatches": 2}),
    (Mesh(pp=2, tp=2), {"microbatches": 4, "sequence_parallel": True}),
    (Mesh(dp=2, pp=2), {"microbatches": 2, "schedule": "interleaved", "chunks": 2}),
    (Mesh(pp=4), {"microbatches": 4, "schedule": "zero-bubble-h1"}),
    (Mesh(pp=2, dp=2), {"microbatches": 2, "schedule": "zero-bubble-v"}),
    (Mesh(dp=4), {"zero": 1}),
    (Mesh(dp=4), {"zero": 2, "microbatches": 2}),
    (Mesh(dp=4), {"zero": 3, "microbatches": 2}),
    (Mesh(dp=2, tp=2), {"zero": 3, "microbatches": 2, "whole_gradients": True}),
    (Mesh(cp=4), {}),
    (Mesh(dp=2, cp=2), {"microbatches": 2}),
    (Mesh(cp=2, tp=2), {"microbatches": 2}),
    (Mesh(cp=2, tp=2), {"sequence_parallel": True}),
    (Mesh(pp=2, cp=2), {"microbatches": 2}),
]


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_sends_the_bytes_that_are_computed(world4, tied):
    """Not counted are the sums of loss and count, and a ZeRO unit's padding."""
    config = replace(SHAPE, tied=tied)
    layouts = [Layout(mesh, **options) for mesh, options in TRAFFIC]
    answers = world4.run(sent, [(config, {"mesh": layout.mesh, **layout.options()}) for layout in layouts])
    for rank, found in enumerate(answers):
        for layout, (booked, units) in zip(layouts, found, strict=True):
            index = layout.mesh.coordinate(rank)["pp"]
            wanted = traffic(from_config(config), layout, ROWS, config.context, F64)[index]
            small = 3 * 2 * 2 * F64.gradients
            for axis in ("tp", "pp"):
                assert 0 <= booked.pop(axis, 0) - wanted.pop(axis) <= small, (layout, rank, axis)
            padding = 3 * layout.microbatches * units * layout.replicas * F64.weights
            assert 0 <= sum(booked.values()) - sum(wanted.values()) <= small + padding, (layout, rank, booked, wanted)


# -- worked by hand ------------------------------------------------------------------------------------------

# Grouped heads and a gate: h 8, q 8, k and v 4 each, f 20. Per token and block, in numbers:
#   copies that tensor ranks have whole: two norms' inputs and outputs         4 x 8
#   what they share: q, k, v, attention's output, gate, up, their product     8 + 2 x 4 + 8 + 3 x 20
GATED = Transformer("gated", 2, 8, 4, 100, kv_heads=2, mlp=20, gated=True, biases="none", norm=1)


@pytest.mark.parametrize(
    ("layout", "numbers"),
    [
        (Layout(Mesh()), 32 + 84),
        (Layout(Mesh(tp=2)), 32 + 42),
        (Layout(Mesh(tp=2), sequence_parallel=True), 16 + 42),
        (Layout(Mesh(cp=2)), (32 + 84) / 2),
        (Layout(Mesh(), recompute="full"), 8),
        (Layout(Mesh(tp=2), sequence_parallel=True, recompute="full"), 4),
        # A block's input and what its two halves add to it; no product of gate and up.
        (Layout(Mesh(), recompute="selective"), 24 + 64),
        (Layout(Mesh(tp=2), recompute="selective"), 24 + 32),
    ],
)
def test_activations_of_a_gated_block_are_those_counted_by_hand(layout, numbers):
    assert block_activations(GATED, layout, 3, 10) == 3 * 10 * numbers * MIXED.activations
    plain = replace(GATED, gated=False)
    products = {"none": 20, "selective": 20, "full": 0}[layout.recompute] * 3 * 10 / layout.mesh.cp / layout.mesh.tp
    less = block_activations(GATED, layout, 3, 10) - block_activations(plain, layout, 3, 10)
    assert less == products * MIXED.activations


def test_a_token_keeps_what_each_of_its_experts_computes():
    one, two = (replace(GATED, experts=4, top=top) for top in (1, 2))
    kept = [block_activations(model, Layout(Mesh()), 1, 10) for model in (GATED, one, two)]
    assert kept[0] == kept[1] and kept[2] - kept[1] == 10 * 3 * 20 * MIXED.activations


def test_selective_recompute_of_the_small_gpt_keeps_eleven_sixteenths():
    none, selective = (
        block_activations(from_config(Config()), Layout(Mesh(), recompute=how), 1, 1, FP32)
        for how in ("none", "selective")
    )
    assert selective / none == 11 / 16


def test_without_dropout_scores_that_are_not_fused_are_kept_once():
    kernels = replace(MEGATRON_2021, dropout=False)
    model = Transformer("x", 1, 64, 4, 100, positions=10)
    fused, not_fused = (block_activations(model, Layout(Mesh(tp=2)), 3, 10, MIXED, k) for k in (TODAY, kernels))
    assert not_fused - fused == 3 * 10 * (4 * 10) * MIXED.activations / 2


def test_states_are_shared_out_over_the_ranks_that_have_the_same_parameters():
    """A mixture: attention, router, norms and both ends over dp x ep x cp, experts over dp x cp."""
    model = replace(GATED, experts=4, top=2)
    mesh = Mesh(dp=2, ep=2, cp=3, tp=2)
    attention, expert, router, norms = 8 * (8 + 4 + 4) + 8 * 8, 3 * 8 * 20, 8 * 4, 2 * 8
    dense = 2 * (attention / 2 + router + norms) + 100 * 8 / 2 + 8 + 100 * 8 / 2
    experts = 2 * 4 * expert / (2 * 2)
    (share,) = shares(model, Layout(mesh))
    assert (share.dense, share.experts) == (dense, experts)
    for zero, divided in {
        0: (),
        1: ("optimizer",),
        2: ("optimizer", "gradients"),
        3: ("optimizer", "gradients", "weights"),
    }.items():
        (memory,) = stage_memory(model, Layout(mesh, zero=zero), 4, 12)
        for what in ("weights", "gradients", "optimizer"):
            over = (12, 6) if what in divided else (1, 1)
            assert memory[what] == pytest.approx((dense / over[0] + experts / over[1]) * getattr(MIXED, what)), (
                zero,
                what,
            )
    (kept,) = stage_memory(model, Layout(mesh, zero=2, whole_gradients=True), 4, 12)
    assert kept["gradients"] == pytest.approx((dense + experts) * MIXED.gradients)


def test_what_is_whole_for_a_while_is_counted():
    """Two blocks' weights under ZeRO-3, their gradients under ZeRO-2; a block's activations while it is made again; the
    logits of a microbatch and their gradient in 32 bits, cut by tp and cp."""
    mesh = Mesh(dp=2, cp=2, tp=2)
    memory = {zero: stage_memory(GATED, Layout(mesh, zero=zero), 2, 12)[0]["gathered"] for zero in range(4)}
    (share,) = shares(GATED, Layout(mesh))
    assert memory[0] == memory[1] == 0
    assert memory[2] == 2 * share.dense / 2 * MIXED.gradients and memory[3] == 2 * share.dense / 2 * MIXED.weights
    (full,) = stage_memory(GATED, Layout(mesh, recompute="full"), 2, 12)
    inputs = block_activations(GATED, Layout(mesh, recompute="full"), 1, 12)
    assert full["activations"] == 2 * inputs + block_activations(GATED, Layout(mesh), 1, 12)
    assert full["logits"] == 2 * 4 * 1 * 12 / 2 * 100 / 2
    first, last = stage_memory(GATED, Layout(Mesh(pp=2), 2), 2, 12)
    assert first["logits"] == 0 and last["logits"] == 2 * 4 * 12 * 100
