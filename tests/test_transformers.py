"""Seventeen architectures of transformers, as their users have them: same gradients as one process on every layout."""

import json
import warnings
from contextlib import suppress
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import zoo
from laws import Planted, differences, double_precision, mean_cross_entropy, problems
from safetensors.torch import load_file
from torch import nn
from torch.utils import _pytree as pytree
from zoo import batch, build

import minipar
from minipar import Mesh, RankError, interleaved, interop, parallelize, pipeline, tensor, train, zero_bubble_v
from minipar.collectives import device_mesh

ON_TWO = [
    {"mesh": Mesh(tp=2)},
    {"mesh": Mesh(pp=2), "microbatches": 2},
    {"mesh": Mesh(dp=2)},
    *({"mesh": Mesh(dp=2), "zero": stage} for stage in (1, 2, 3)),
]
ON_FOUR = [
    {"mesh": Mesh(tp=4)},  # more than heads of keys
    {"mesh": Mesh(pp=2, tp=2), "microbatches": 2},
    {"mesh": Mesh(dp=2, tp=2)},
    {"mesh": Mesh(dp=2, pp=2), "microbatches": 2},
]
ON_EIGHT = [{"mesh": Mesh(dp=2, pp=2, tp=2), "microbatches": 2, "zero": stage} for stage in (0, 3)]
CUT, STAGES, SHARES = ON_TWO[0], ON_TWO[1], ON_TWO[-1]


class Precise:
    """A world whose ranks compute in float64 what these models compute in float32 on purpose."""

    def __init__(self, world):
        self.world = world

    def run(self, work, *args):
        def run():
            with double_precision():
                return work(*args)

        return self.world.run(run)


def broken(world, name, layouts, changes=None, data=None, mean=mean_cross_entropy, **options):
    """How a model on these layouts breaks the laws."""
    with double_precision():
        make = partial(build, name, **(changes or {}))
        return problems(Precise(world), layouts, make, *(data or batch(name)), mean=mean, **options)


# -- the laws ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.MODELS)
def test_on_two_ranks(world2, name):
    assert broken(world2, name, ON_TWO) == []


@pytest.mark.parametrize("name", zoo.MODELS)
def test_on_four_ranks(world4, name):
    assert broken(world4, name, ON_FOUR) == []


@pytest.mark.parametrize("name", zoo.MODELS)
def test_on_eight_ranks(world8, name):
    assert broken(world8, name, ON_EIGHT) == []


@pytest.mark.parametrize("name", zoo.MORE)
def test_others_whose_plan_is_known(world2, name):
    assert broken(world2, name, [CUT, STAGES]) == []


@pytest.mark.parametrize("name", zoo.UNCUT)
def test_others_in_stages(world2, name):
    assert broken(world2, name, [STAGES]) == []


def agreement(outputs, targets):
    """A loss over what both towers give of a row."""
    images, texts = outputs.image_embeds.tanh(), outputs.text_embeds.tanh()
    return (images * texts).sum() + texts[:, :5].sum(), len(targets)


def mean_agreement(outputs, targets):
    return agreement(outputs, targets)[0] / len(targets)


@pytest.mark.parametrize("name", zoo.TOWERS)
def test_two_lists_of_blocks_side_by_side(world2, name):
    layouts = [CUT, {"mesh": Mesh(dp=2), "zero": 2}]
    assert broken(world2, name, layouts, mean=mean_agreement, loss=agreement) == []


def test_all_that_is_known_of_a_model_is_tested():
    def types(names):
        return {part.config.model_type for name in names for part in interop.guests(build(name)).values()}

    cut = types(zoo.MODELS | zoo.MORE | zoo.TOWERS)
    assert interop.PLANS.keys() | interop.LEFT_OUT.keys() <= cut
    assert interop.EVERYWHERE.keys() <= cut | types(zoo.UNCUT)


@pytest.mark.parametrize("name", ["gpt2", "whisper", "mixtral"])
def test_with_every_kind_of_schedule(world2, name):
    """Four stages on two ranks; a decoder's begin in the middle."""
    deeper = {"whisper": {"encoder_layers": 3, "decoder_layers": 4}, "gpt2": {"n_layer": 4}}
    changes = deeper.get(name, {"num_hidden_layers": 4})
    layouts = [{"mesh": Mesh(pp=2), "microbatches": 2, "schedule": s} for s in (interleaved, zero_bubble_v)]
    assert broken(world2, name, layouts, changes) == []


@pytest.mark.parametrize(("heads", "keys", "ranks"), [(4, 1, 2), (6, 3, 2), (8, 2, 4), (12, 3, 4)])
def test_heads_of_keys_that_the_axis_does_not_divide(worlds, heads, keys, ranks):
    changes = {"num_attention_heads": heads, "num_key_value_heads": keys, "hidden_size": 8 * heads}
    layouts = [{"mesh": Mesh(tp=ranks)}, {"mesh": Mesh(tp=ranks), "zero": 1}]
    for name in ("qwen2", "qwen3"):  # with biases, and with norms of heads
        assert broken(worlds(ranks), name, layouts, changes) == [], name


class Adapted(nn.Module):
    """A layer that learns no more, and a narrow way past it that does (Hu et al. 2021, LoRA)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.down = nn.Linear(layer.in_features, 4, bias=False, dtype=torch.float64)
        self.up = nn.Linear(4, layer.out_features, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


def adapted():
    model = build("llama").requires_grad_(False)
    torch.manual_seed(1)
    for block in model.model.layers:
        block.self_attn.q_proj = Adapted(block.self_attn.q_proj)
    return model


def test_low_rank_adapters(world2):
    plan = interop.plan_of(adapted())
    del plan["model.layers.*.self_attn.q_proj"]
    plan |= {f"model.layers.*.self_attn.q_proj.{part}": "colwise" for part in ("layer", "up")}
    with double_precision():
        assert problems(Precise(world2), [CUT, STAGES, SHARES], adapted, *batch("llama"), plan=plan) == []


# -- other heads, other losses -----------------------------------------------------------------------------------


CLASSES = {"bert": "BertForSequenceClassification", "gpt2": "GPT2ForSequenceClassification"}
CLASSES |= {"llama": "LlamaForSequenceClassification", "mixtral": "MixtralForSequenceClassification"}


@pytest.mark.parametrize("name", CLASSES)
def test_a_head_that_gives_classes(world2, name):
    data = batch(name)[0], torch.tensor([0, 2, 1, -100, 2])
    assert broken(world2, name, [CUT, STAGES, SHARES], {"kind": CLASSES[name], "num_labels": 3}, data) == []


def spans(outputs, targets):
    """A loss of one's own, over an output that is not just logits."""
    losses = [F.cross_entropy(outputs[f"{end}_logits"], targets[end], reduction="sum") for end in ("start", "end")]
    return sum(losses), 2 * len(targets["start"])


def mean_of_spans(outputs, targets):
    return spans(outputs, targets)[0] / (2 * len(targets["start"]))


def test_a_loss_over_two_outputs(world2):
    targets = {"start": torch.tensor([1, 0, 4, 2, 1]), "end": torch.tensor([5, 2, 4, 3, 2])}
    changes, data = {"kind": "BertForQuestionAnswering"}, (batch("bert")[0], targets)
    layouts = [CUT, STAGES, SHARES]
    assert broken(world2, "bert", layouts, changes, data, mean=mean_of_spans, loss=spans) == []


@pytest.mark.parametrize("layout", [CUT, STAGES, {"mesh": Mesh(dp=2)}], ids=str)
def test_forward_gives_what_the_model_gives(world2, layout):
    kinds = {"whisper": "", "gpt2": "", "bert": "BertModel"}  # the last gives no logits, but an output with two fields

    def outputs():
        return [parallelize(build(n, kind), **layout).forward(batch(n)[0]) for n, kind in kinds.items()]

    found = Precise(world2).run(outputs)
    for (name, kind), *on_ranks in zip(kinds.items(), *found, strict=True):
        with double_precision(), torch.no_grad():
            wanted = build(name, kind)(**batch(name)[0])
        for got in on_ranks:
            pairs = [(got.pooler_output, wanted.pooler_output)] if kind else [(got, wanted.logits)]
            assert all((a - b).abs().max() <= 1e-12 * b.abs().max() for a, b in pairs)


@pytest.mark.parametrize(("name", "layout"), [("gpt2", CUT), ("gpt2", STAGES), ("bloom", STAGES)], ids=str)
def test_generate_writes_what_the_model_writes(world2, name, layout):
    """Bloom has no longest context."""
    start = batch(name)[0]["input_ids"][:2, :4]
    with double_precision():
        wanted = build(name).generate(start, max_new_tokens=3, do_sample=False, eos_token_id=[])
    for text in Precise(world2).run(lambda: parallelize(build(name), **layout).generate(start, 3)):
        assert text.equal(wanted)


# -- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "gemma2", "phi3", "whisper", "mixtral"])
def test_recompute(world2, name, how):
    assert broken(world2, name, [CUT, STAGES, SHARES], recompute=how) == []


DROPPING = {
    "bert": {"hidden_dropout_prob": 0.2},
    "gpt2": {"resid_pdrop": 0.2, "embd_pdrop": 0.2},
    "phi3": {"resid_pdrop": 0.2, "embd_pdrop": 0.2},
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_drops_the_same_on_every_layout(world2, name):
    def gradients():
        found = []
        for layout in (CUT, STAGES, SHARES, CUT | {"recompute": "full"}):
            torch.manual_seed(7)
            parallel = parallelize(build(name, **DROPPING[name]), **layout)
            parallel.step(*batch(name))
            found.append(parallel.full_gradients())
        return found

    first, *others = Precise(world2).run(gradients)[0]
    assert [differences(other, first) for other in others] == [""] * 3
    with double_precision():
        model = build(name)
        mean_cross_entropy(model(**batch(name)[0]), batch(name)[1]).backward()
    assert differences(first, {n: p.grad for n, p in model.named_parameters()})  # something was dropped


FUNCTIONAL = {
    "llama": {"attention_dropout": 0.2},
    "bert": {"attention_probs_dropout_prob": 0.2},
    "deberta-v2": {"hidden_dropout_prob": 0.2},  # of positions too, that are whole between cut layers
    "whisper": {"dropout": 0.2, "attention_dropout": 0.2, "activation_dropout": 0.2},
    "mixtral": {"router_jitter_noise": 0.2},
}


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_copies_stay_copies_where_functions_drop(world4, name):
    """Attention drops by a function of torch, which knows no place: tensor ranks draw apart where their heads are
    apart, and alike where they hold copies."""

    def copies():
        parallel = parallelize(build(name, **FUNCTIONAL[name]), Mesh(dp=2, tp=2), recompute="full")
        parallel.step(*batch(name))
        return {n: p.grad for n, p in parallel.named_parameters() if p.shape == parallel.shapes[n] and p.requires_grad}

    first, *others = Precise(world4).run(copies)
    assert len(first) >= 5
    for other in others:
        assert all(first[n].equal(other[n]) for n in first)


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "whisper", "mixtral"])
def test_products_in_16_bits(world2, name):
    """Of a model in 32 bits, and of one whose weights are of 16. The error is that of one process, or about it."""
    inputs, labels = batch(name)
    inputs = {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()}

    def one_step(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=next(model.parameters()).dtype is torch.float32):
            mean_cross_entropy(model(**cast(inputs, model)).logits.float(), labels).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    def cast(inputs, model):
        floats = next(model.parameters()).dtype
        return {key: x.to(floats) if x.is_floating_point() else x for key, x in inputs.items()}

    def error(gradients, exact):
        off = sum((gradients[n].double() - g.double()).square().sum() for n, g in exact.items())
        return (off / sum(g.double().square().sum() for g in exact.values())).sqrt().item()

    def gradients(floats, dtype):
        found = []
        for layout in (CUT, STAGES, SHARES):
            parallel = parallelize(build(name).to(floats), **layout, dtype=dtype)
            parallel.step(cast(inputs, parallel.module), labels)
            found.append(parallel.full_gradients())
        return found

    exact = build(name).float()
    mean_cross_entropy(exact(**inputs), labels).backward()
    exact = {n: p.grad for n, p in exact.named_parameters() if p.requires_grad}
    for floats, dtype in ((torch.float32, torch.bfloat16), (torch.bfloat16, None)):
        usual = error(one_step(build(name).to(floats)), exact)
        assert 1e-3 < usual < 0.2
        for got in world2.run(gradients, floats, dtype)[0]:
            assert all(g.dtype is floats for g in got.values())
            assert error(got, exact) < 2 * usual


# -- saving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_saved_folder_gives_the_same_model_to_the_bit(world2, world8, name, tmp_path):
    def save(layouts):
        states = []
        for i, layout in enumerate(layouts):
            parallel = parallelize(build(name), **layout)
            parallel.step(*batch(name))
            torch.optim.SGD(parallel.parameters(), 0.1).step()
            minipar.save_pretrained(tmp_path / f"{len(layouts)} {i}", parallel)
            states.append(parallel.full_state_dict())
        return states

    for world, layouts in ((world2, [CUT, STAGES, SHARES]), (world8, ON_EIGHT[1:])):
        for i, state in enumerate(Precise(world).run(save, layouts)[0]):
            with double_precision(), torch.no_grad():
                model = build(name).eval()
                model.load_state_dict(state)
                folder, attention = tmp_path / f"{len(layouts)} {i}", model.config._attn_implementation
                loaded, info = type(model).from_pretrained(
                    folder, output_loading_info=True, attn_implementation=attention, experts_implementation="eager"
                )
                assert not any(info.values()) and not loaded.training
                assert all(p.equal(state[key]) for key, p in loaded.state_dict().items())
                for p in loaded.parameters():  # out of the mapped file: how a convolution rounds depends on addresses
                    p.data = p.data.clone()
                assert loaded(**batch(name)[0]).logits.equal(model(**batch(name)[0]).logits)
            assert getattr(loaded.config, "use_cache", True), "the configuration is that of the model that was given"


def test_from_pretrained_to_from_pretrained(world2, tmp_path):
    """As a user would: load on every rank, train, save, go on with transformers."""
    from transformers import AutoModelForCausalLM

    build("qwen3").float().save_pretrained(tmp_path / "before")
    (tmp_path / "after").mkdir()
    stay = {"tokenizer.json", "model_before.safetensors", "model.safetensors.bak", "my-model.safetensors"}
    for name in stay | {"model-00001-of-00002.safetensors", "model.safetensors.index.json"}:  # two of an earlier save
        (tmp_path / "after" / name).write_text("{}")

    def train():
        parallel = parallelize(AutoModelForCausalLM.from_pretrained(tmp_path / "before"), Mesh(tp=2))
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-2)
        losses = []
        for _ in range(5):
            losses.append(parallel.step(batch("qwen3")[0] | {"labels": batch("qwen3")[1]}).item())
            optimizer.step()
        minipar.save_pretrained(tmp_path / "after", parallel)
        return losses, parallel.forward(batch("qwen3")[0])

    losses, logits = world2.run(train)[0]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert {file.name for file in (tmp_path / "after").iterdir()} == stay | names
    assert json.loads((tmp_path / "after" / "config.json").read_text())["architectures"] == ["Qwen3ForCausalLM"]
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after")
        assert (loaded(**batch("qwen3")[0]).logits - logits).abs().max() < 1e-5


def test_a_tied_weight_is_saved_once_and_without_a_word(world2, tmp_path):
    def save():
        from transformers.utils import logging

        bars = []
        for switch in (logging.disable_progress_bar, logging.enable_progress_bar):
            switch()
            minipar.save_pretrained(tmp_path, parallelize(build("gpt2"), Mesh(pp=2)))
            bars.append(logging.is_progress_bar_enabled())
        return bars

    assert world2.run(save) == [[False, True]] * 2
    assert load_file(tmp_path / "model.safetensors").keys() == dict(build("gpt2").named_parameters()).keys()


def test_a_model_of_our_own_has_no_such_folder(world2, tmp_path):
    def save():
        minipar.save_pretrained(tmp_path, parallelize(minipar.gpt(minipar.Config()), Mesh(dp=2)))

    with pytest.raises(RankError, match="save_pretrained is for models of transformers, not for GPT: use save_weights"):
        world2.run(save)


# -- an independent witness --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "olmo2", "mixtral"])
def test_transformers_own_tensor_parallelism_gives_the_same_gradients(world2, name):
    def both():
        from transformers.distributed.tensor_parallel import apply_tensor_parallelism

        theirs = build(name)
        apply_tensor_parallelism(theirs, device_mesh(Mesh(tp=2))["tp"], theirs._expand_parallel_plan(theirs.tp_plan))
        mean_cross_entropy(theirs(**batch(name)[0]), batch(name)[1]).backward()
        witness = {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in theirs.named_parameters()}
        ours = parallelize(build(name), Mesh(tp=2))
        ours.step(*batch(name))
        return differences(ours.full_gradients(), witness)

    assert Precise(world2).run(both) == ["", ""]


# -- silent errors -----------------------------------------------------------------------------------------------
#
# Each of these runs, and gives a loss that looks like one. The law tells.


def known(name, **changes):
    """The plan of a model, with some lines changed by the ends of their names, or without them."""
    plan = interop.plan_of(prepared(name))
    for end, style in changes.items():
        (entry,) = {entry for entry in plan if entry.endswith(end)} or {f"transformer.h.*.attn.{end}"}
        plan[entry] = style
    return plan


def prepared(name, **changes):
    model = build(name, **changes)
    interop.prepare(model)
    return model


def only_the_first_argument_enters():
    """Routing weights are read by all ranks, so their gradients add, too."""

    def moe_tp_experts(layer, region, entrance):
        inner = layer.forward
        layer.forward = lambda x, *more: tensor.leave(inner(tensor.enter(x, region.axis), *more), region.axis)

    return patch.dict(tensor.STYLES, {"moe_tp_experts": moe_tp_experts})


def partial_gradients_are_not_summed():
    return patch.object(train.Parallel, "_sum_partial", lambda self: None)


def tied_gradients_are_not_summed():
    return patch.object(train.Parallel, "_sum_tied", lambda self: None)


def an_encoder_learns_nothing_from_later_stages():
    right = pipeline.Window.leave

    def leave(window):
        if window.turn is not None and window.end > window.turn:
            window.memory = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, window.memory)
        return right(window)

    return patch.object(pipeline.Window, "leave", leave)


def heads_of_keys_are_taken_in_turn():
    """Rank 0 reads the first head, rank 1 the second, and so on, whatever its queries read."""
    right = tensor._few_heads

    def few_heads(name, attention, styles, axis):
        size = tensor._head_size(attention)
        found = right(name, attention, styles, axis)
        turn = (torch.arange(len(next(iter(found.values())))) // size + axis.index) % 2 if found else None
        return {n: turn * size + torch.arange(len(turn)) % size for n in found}

    return patch.object(tensor, "_few_heads", few_heads)


SILENT = {
    "c_attn cut as one section": ("gpt2", CUT, {"c_attn": "colwise"}, None),
    "c_attn cut as two sections": ("gpt2", CUT, {"c_attn": "packed_colwise"}, None),
    "gate and up cut as one section": ("mixtral", CUT, {"gate_up_proj": "colwise"}, None),
    "the sum of q_norm left out": ("qwen3", CUT, {"q_norm": "replicate"}, None),
    "the sum of k_norm left out": ("qwen3_moe", CUT, {"k_norm": "replicate"}, None),
    "routing weights": ("mixtral", CUT, {}, only_the_first_argument_enters),
    "norms of heads": ("qwen3", CUT, {}, partial_gradients_are_not_summed),
    "few heads": ("llama", ON_FOUR[0], {}, partial_gradients_are_not_summed),
    "the wrong heads": ("llama", ON_FOUR[0], {}, heads_of_keys_are_taken_in_turn),
    "a tied embedding": ("gpt2", STAGES, {}, tied_gradients_are_not_summed),
    "the memory of an encoder": ("whisper", {"mesh": Mesh(pp=4)}, {}, an_encoder_learns_nothing_from_later_stages),
}


@pytest.mark.parametrize("what", SILENT)
def test_a_silent_error_breaks_a_law(worlds, what):
    name, layout, lines, bug = SILENT[what]
    plan = known(name, **lines) if lines else None
    changes = {"encoder_layers": 1, "decoder_layers": 3} if name == "whisper" else {}
    assert broken(worlds(layout["mesh"].size), name, [layout], changes) == []
    wrong = broken(Planted(worlds(layout["mesh"].size), bug), name, [layout], changes, plan=plan)
    assert any("gradients" in line and "nan" not in line for line in wrong)


def test_packed_layers_of_phi3_may_be_cut_too(world2):
    """Its own plan gathers what they give. Cut by sections, it is right; as one section, wrong without a word."""
    gathered = {"gate_up_proj": "packed_colwise", "down_proj": "rowwise"}
    assert broken(world2, "phi3", [CUT], plan=known("phi3", **gathered)) == []
    assert (
        broken(world2, "phi3", [CUT], plan=known("phi3", **gathered | {"gate_up_proj": "packed_colwise(48, 48)"})) == []
    )
    assert broken(world2, "phi3", [CUT], plan=known("phi3", **gathered | {"gate_up_proj": "colwise"}))


# -- what is refused, and how ------------------------------------------------------------------------------------


class Unknown(nn.Module):
    """A model of transformers that publishes no plan."""

    def __new__(cls):
        from transformers import BertForMaskedLM

        model = build("bert")
        model.config.model_type = "a model of tomorrow"
        assert isinstance(model, BertForMaskedLM)
        return model


def without(name, *ends):
    return {entry: style for entry, style in known(name).items() if not entry.endswith(ends)}


REFUSED = {
    "an unknown style": (
        lambda: parallelize(build("llama"), Mesh(tp=2), plan=known("llama") | {"lm_head": "colwise_new"}),
        ["'lm_head' cannot be 'colwise_new', only colwise, packed_colwise"],
    ),
    "an unknown style of a parameter": (
        lambda: parallelize(build("mixtral"), Mesh(tp=2), plan=known("mixtral", gate_up_proj="moe_tp_experts")),
        ["'model.layers.*.mlp.experts.gate_up_proj' cannot be 'moe_tp_experts', only colwise, packed_colwise, rowwise"],
    ),
    "sections that are not all of a layer": (
        lambda: parallelize(build("gpt2"), Mesh(tp=2), plan=known("gpt2", c_attn="packed_colwise(32, 32)")),
        ["32, 32", "64 together", "96"],
    ),
    "a norm of heads that the plan leaves out": (
        lambda: parallelize(build("qwen3"), Mesh(tp=2), plan=without("qwen3", "k_norm")),
        ["'model.layers.*.self_attn.k_norm' is left out", "'replicated_with_grad_allreduce'", "'replicate'"],
    ),
    "a head that the plan leaves out": (
        lambda: parallelize(build("gpt2"), Mesh(tp=2), plan=without("gpt2", "lm_head")),
        ["'lm_head' has the weight of a layer that is cut"],
    ),
    "an activation with a number of its own": (
        lambda: parallelize(build("apertus"), Mesh(tp=2), plan=without("apertus", "act_fn")),
        ["'model.layers.*.mlp.act_fn' is left out", "'replicated_with_grad_allreduce'"],
    ),
    "experts that are summed and not cut": (
        lambda: parallelize(build("mixtral"), Mesh(tp=2), plan=without("mixtral", "down_proj")),
        ["does not cut their 'down_proj'"],
    ),
    "heads that tp does not divide": (
        lambda: parallelize(build("llama", num_attention_heads=3, num_key_value_heads=3, hidden_size=24), Mesh(tp=2)),
        ["tp=2 does not divide the 3 heads of model.layers.0.self_attn", "[1, 3]"],
    ),
    "a count that tp does not divide": (
        lambda: parallelize(build("opt", num_attention_heads=1), Mesh(tp=2)),
        ["tp=2 does not divide", "1"],
    ),
    "a model that checkpoints by itself": (
        lambda: parallelize(checkpointing("llama"), Mesh(dp=2)),
        ["checkpoints by itself: use recompute="],
    ),
    "numbers of few bits": (
        lambda: parallelize(marked("bert", is_quantized=True), Mesh(dp=2)),
        ["BertForMaskedLM is quantized", "load it with dtype="],
    ),
    "a loss of its own": (
        lambda: parallelize(build("mixtral", output_router_logits=True), Mesh(dp=2)),
        ["output_router_logits", "set it False"],
    ),
    "masks from numpy": (
        lambda: parallelize(build("whisper", apply_spec_augment=True), Mesh(dp=2)),
        ["apply_spec_augment", "set it False"],
    ),
    "experts over ep": (
        lambda: parallelize(build("mixtral"), Mesh(ep=2)),
        ["ep takes experts that map slots to slots, and MixtralExperts takes", "ep=1"],
    ),
    "context": (lambda: parallelize(build("llama"), Mesh(cp=2)), ["cp needs a plan", "sequence_split"]),
    "sequence parallelism": (
        lambda: parallelize(build("llama"), Mesh(tp=2), sequence_parallel=True),
        ["sequence_parallel=True needs a plan", "sequence_split"],
    ),
    "layers in a layer that is to be cut": (
        lambda: parallelize(adapted(), Mesh(tp=2)),
        ["Adapted has a forward of its own", "the layers in it, layer, down, up"],
    ),
    "blocks of an encoder left out at random": (
        lambda: parallelize(build("whisper", encoder_layerdrop=0.1), Mesh(dp=2), zero=3),
        ["encoder_layerdrop leaves out other blocks on each rank", "with encoder_layerdrop=0"],
    ),
    "blocks of a decoder left out at random": (
        lambda: parallelize(build("whisper", decoder_layerdrop=0.1), Mesh(dp=2)),
        ["with decoder_layerdrop=0"],
    ),
    "blocks left out at random": (
        lambda: parallelize(build("wav2vec2", layerdrop=0.1), Mesh(dp=2)),
        ["layerdrop leaves out other blocks on each rank", "with layerdrop=0"],
    ),
    "what every block gives": (
        lambda: parallelize(build("hubert", use_weighted_layer_sum=True), Mesh(pp=2)),
        ["pp=2 stages take each block once", "use_weighted_layer_sum=True reads what every block gives"],
    ),
    "keys of earlier blocks": (
        lambda: parallelize(build("llama", num_kv_shared_layers=1), Mesh(pp=2)),
        ["num_kv_shared_layers=1 lets blocks read keys and values of earlier ones: use pp=1"],
    ),
    "positions that are drawn": (
        lambda: parallelize(build("vit", pos_embed_rescale=2.0), Mesh(pp=2)),
        ["pos_embed_rescale=2.0 is drawn apart on each stage: load it with None"],
    ),
    "two lists of blocks side by side": (
        lambda: parallelize(build("clip"), Mesh(pp=2)),
        ["need a model with one list of blocks", "has 2: text_model.encoder.layers, vision_model.encoder.layers"],
    ),
    "more stages than blocks": (
        lambda: parallelize(build("whisper", encoder_layers=1, decoder_layers=0), Mesh(pp=2)),
        ["pp=2 stages need 2 blocks"],
    ),
    "no head and no loss": (
        lambda: parallelize(build("bert", "BertModel"), Mesh(dp=2)).step(*batch("bert")),
        ["BaseModelOutputWithPoolingAndCrossAttentions without logits", "a head for its task, or loss=f"],
    ),
    "to write with a decoder alone": (
        lambda: parallelize(build("whisper"), Mesh(dp=2)).generate(torch.ones(2, 4, dtype=torch.long), 2),
        ["generate", "save_pretrained"],
    ),
}


def marked(name, **marks):
    model = build(name)
    vars(model).update(marks)
    return model


def checkpointing(name):
    model = build(name)
    model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_is_refused_with_what_would(world2, what):
    attempt, told = REFUSED[what]

    def refusal():
        try:
            attempt()
        except (TypeError, ValueError) as error:
            return str(error)
        return "not refused"

    first, second = world2.run(refusal)
    assert first == second
    assert [part for part in told if part not in first] == [], first
    assert "\n" not in first and len(first) < 300


def test_what_all_blocks_read_is_asked_for_before_it_is_nan(world2):
    def step():
        with patch.dict(interop.EVERYWHERE, clear=True):
            parallelize(build("layoutlmv3"), Mesh(pp=2)).step(*batch("layoutlmv3"))

    with pytest.raises(RankError, match=r"block \d is given NaN beside the state"):
        world2.run(step)


def test_a_model_that_nobody_knows_gets_lines_to_begin_with(world2):
    with pytest.raises(RankError) as refused:
        world2.run(lambda: parallelize(Unknown(), Mesh(tp=2)))
    assert "BertForMaskedLM has no tp_plan; give plan={layer: style}" in str(refused.value)
    assert "'bert.encoder.layer.*.attention.output.dense': 'rowwise'," in str(refused.value)
    assert "Compare gradients before you trust it" in str(refused.value)


@pytest.mark.parametrize("name", ["bert", "distilbert", "roberta", "vit", "llama", "qwen3", "phi", "bart", "clip"])
def test_these_lines_are_those_of_plans_that_are_known(name):
    plan = interop.plan_of(prepared(name))
    of_layers = {entry: style for entry, style in plan.items() if style in ("colwise", "rowwise")}
    assert interop.draft(prepared(name)) == of_layers


LABELS = {  # of ids and a mask -> is it said that they are the tokens themselves?
    "the tokens": ("llama", lambda ids, mask: ids, True),
    "the tokens, and none for padding": ("llama", lambda ids, mask: ids.masked_fill(mask == 0, -100), True),
    "the tokens that follow": ("llama", lambda ids, mask: ids.roll(-1, 1), False),
    "none": ("llama", lambda ids, mask: torch.full_like(ids, -100), False),
    "the tokens an encoder reads": ("bart", lambda ids, mask: ids, False),
}


@pytest.mark.parametrize("what", LABELS)
def test_labels_that_are_the_tokens_are_noticed(world2, what):
    name, label, noticed = LABELS[what]

    def warned():
        inputs = batch(name)[0]
        labels = label(inputs["input_ids"], inputs["attention_mask"])
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            with suppress(ValueError):  # no label counts
                parallelize(build(name), Mesh(dp=2)).step(inputs | {"labels": labels})
        return sum("Shift them" in str(x.message) for x in seen)

    assert world2.run(warned) == [noticed, noticed]
