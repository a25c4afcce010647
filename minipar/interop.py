"""Models of transformers: what has to be known of them beyond what they say themselves.

Most publish a plan of how their layers may be cut (`tp_plan`), and all mark their blocks, so they are laid out as our
own model is. What is left stands here: plans for those that publish none, a first plan for a model that nobody knows
yet, what an encoder hands to its decoder, and what cannot be had on a mesh.
"""

import re
import sys
import warnings
from contextlib import suppress
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .pipeline import Blocks, outermost_lists
from .tensor import IGNORED, pattern

# -- plans ---------------------------------------------------------------------------------------------------


def lines(block: str, styles: dict[str, str]) -> dict[str, str]:
    """A plan for the layers of a block. styles: style -> layers, with blanks between them."""
    return {f"{block}.*.{layer}": style for style, layers in styles.items() for layer in layers.split()}


BERT = {
    "colwise": "attention.self.query attention.self.key attention.self.value intermediate.dense",
    "rowwise": "attention.output.dense output.dense",
}
DISTILBERT = {
    "colwise": "attention.q_lin attention.k_lin attention.v_lin ffn.lin1",
    "rowwise": "attention.out_lin ffn.lin2",
}
MPNET = {
    "divided(num_attention_heads, all_head_size)": "attention.attn",
    "colwise": "attention.attn.q attention.attn.k attention.attn.v intermediate.dense",
    "rowwise": "attention.attn.o output.dense",
}
MODERNBERT = {"packed_colwise(3)": "attn.Wqkv", "packed_colwise": "mlp.Wi", "rowwise": "attn.Wo mlp.Wo"}
GPT2 = {
    "divided(split_size)": "attn",
    "packed_colwise(3)": "attn.c_attn",
    "colwise": "mlp.c_fc",
    "rowwise": "attn.c_proj mlp.c_proj",
}
GPT_NEO = {
    "divided(num_heads)": "attn.attention",
    "colwise": "attn.attention.q_proj attn.attention.k_proj attn.attention.v_proj mlp.c_fc",
    "rowwise": "attn.attention.out_proj mlp.c_proj",
}
GPTJ = {
    "divided(num_attention_heads)": "attn",
    "colwise": "attn.q_proj attn.k_proj attn.v_proj mlp.fc_in",
    "rowwise": "attn.out_proj mlp.fc_out",
}
STABLELM = {
    "divided(num_heads, num_key_value_heads, hidden_size)": "self_attn",
    "colwise": "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.gate_proj mlp.up_proj",
    "rowwise": "self_attn.o_proj mlp.down_proj",
}
ALBERT = {"colwise": "attention.query attention.key attention.value ffn", "rowwise": "attention.dense ffn_output"}
DEBERTA = {
    "divided(num_attention_heads)": "attention.self",
    "colwise": "attention.self.query_proj attention.self.key_proj attention.self.value_proj "
    "attention.self.pos_key_proj attention.self.pos_query_proj intermediate.dense",
    "rowwise": "attention.output.dense output.dense",
    "replicate": "attention.self.pos_dropout",  # of whole embeddings of positions, behind a layer that is cut
}
CLIP = {
    "colwise": "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.fc1",
    "rowwise": "self_attn.out_proj mlp.fc2",
}
WAV2VEC2 = {
    "divided(num_heads)": "attention",
    "colwise": "attention.q_proj attention.k_proj attention.v_proj feed_forward.intermediate_dense",
    "rowwise": "attention.out_proj feed_forward.output_dense",
}
VIT = {
    "colwise": "attention.q_proj attention.k_proj attention.v_proj mlp.fc1",
    "rowwise": "attention.o_proj mlp.fc2",
}
BART = {
    "divided(num_heads)": "self_attn",
    "colwise": "self_attn.q_proj self_attn.k_proj self_attn.v_proj fc1",
    "rowwise": "self_attn.out_proj fc2",
}
CROSS = {style: layers.replace("self_attn", "encoder_attn") for style, layers in BART.items()}
T5 = {
    "divided(n_heads, inner_dim)": "layer.*.SelfAttention layer.*.EncDecAttention",
    "colwise": "layer.*.SelfAttention.q layer.*.SelfAttention.k layer.*.SelfAttention.v layer.*.EncDecAttention.q "
    "layer.*.EncDecAttention.k layer.*.EncDecAttention.v layer.*.DenseReluDense.wi layer.*.DenseReluDense.wi_0 "
    "layer.*.DenseReluDense.wi_1",
    "rowwise": "layer.*.SelfAttention.o layer.*.EncDecAttention.o layer.*.DenseReluDense.wo "
    "layer.*.SelfAttention.relative_attention_bias.weight",  # a column for each head
}

# By model_type, and with names as in the model without a head. Embedding and head are added where they are found.
KNOWN = {
    "bert roberta camembert xlm-roberta xlm-roberta-xl electra ernie data2vec-text": lines("encoder.layer", BERT),
    "albert": lines("encoder.albert_layer_groups.*.albert_layers", ALBERT),
    "deberta-v2": lines("encoder.layer", DEBERTA),
    "distilbert": lines("transformer.layer", DISTILBERT),
    "modernbert": lines("layers", MODERNBERT),
    "gpt2": lines("h", GPT2),
    "gpt_neo": lines("h", GPT_NEO),
    "gptj": lines("h", GPTJ),
    "opt": lines("decoder.layers", BART),
    "stablelm": lines("layers", STABLELM),
    "t5 mt5 umt5": lines("encoder.block", T5) | lines("decoder.block", T5),
    "mpnet": lines("encoder.layer", MPNET) | {"encoder.relative_attention_bias.weight": "rowwise"},  # a column a head
    "roformer": lines("encoder.layer", BERT | {"divided(num_attention_heads, all_head_size)": "attention.self"}),
    "vit deit": lines("layers", VIT),
    "clip_text_model clip_vision_model siglip_text_model siglip_vision_model": lines("encoder.layers", CLIP),
    "wav2vec2 hubert": lines("encoder.layers", WAV2VEC2),
    "whisper bart mbart blenderbot marian pegasus m2m_100": (
        lines("encoder.layers", BART) | lines("decoder.layers", BART) | lines("decoder.layers", CROSS)
    ),
}
# What plans leave out that are published.
LEFT_OUT = {
    "apertus": {"layers.*.mlp.act_fn": "replicated_with_grad_allreduce"},
    "cohere": {f"layers.*.self_attn.{norm}.weight": "colwise" for norm in ("q_norm", "k_norm")},  # a row for each head
    "glm4_moe": {f"layers.*.self_attn.{norm}": "replicated_with_grad_allreduce" for norm in ("q_norm", "k_norm")},
}
PLANS = {model_type: plan for types, plan in KNOWN.items() for model_type in types.split()}
# Modules that are used once, in front of all blocks, and whose result all blocks read.
EVERYWHERE = {
    "beit": "shared_position_bias",
    "cpmant": "position_bias",
    "data2vec-vision": "encoder.relative_position_bias",
    "deberta": "encoder.rel_embeddings",
    "deberta-v2": "encoder.rel_embeddings encoder.LayerNorm",
    "layoutlmv3": "encoder.rel_pos_bias encoder.rel_pos_x_bias encoder.rel_pos_y_bias",
    "mpnet": "encoder.relative_attention_bias",
    "roformer": "encoder.embed_positions",
}
# Settings that leave blocks out at random, so that ranks which are to meet in one would not.
AT_RANDOM = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
# Settings with which more goes from block to block than a stage hands on.
CROSSED = {
    "use_weighted_layer_sum": "reads what every block gives: load it with False",
    "num_kv_shared_layers": "lets blocks read keys and values of earlier ones: use pp=1",
    "pos_embed_rescale": "is drawn apart on each stage: load it with None",
}


def guests(model: nn.Module) -> dict[str, Any]:
    """The models of transformers in a model, by name: it may be one itself, and have others as its parts."""
    if "transformers.modeling_utils" not in sys.modules:
        return {}
    from transformers.modeling_utils import PreTrainedModel

    return {name: part for name, part in model.named_modules() if isinstance(part, PreTrainedModel)}


def plan_of(model: nn.Module) -> dict[str, str]:
    """The plan that a model comes with, or that is known for it here; else an empty one."""
    plan: dict[str, str] = getattr(model, "tp_plan", None) or {}
    parts, names = guests(model), {part: name for name, part in model.named_modules()}
    if not parts:
        return plan
    plan = dict(plan)
    for name, part in parts.items():
        known = (LEFT_OUT if part.tp_plan else PLANS).get(part.config.model_type, {})
        if part.base_model is part:
            plan |= {f"{name}.{layer}".lstrip("."): style for layer, style in known.items()}
        with suppress(NotImplementedError):  # some parts do not say which their embedding is: the whole model does
            embedding, head = part.get_input_embeddings(), part.get_output_embeddings()
            if isinstance(embedding, nn.Embedding) and (known or part.tp_plan):
                tied = [
                    layer for layer in names if isinstance(layer, nn.Embedding) and layer.weight is embedding.weight
                ]
                plan = {pattern(names[layer]): "embedding_rowwise" for layer in tied} | plan
            if isinstance(head, nn.Linear) and (known or part.tp_plan):
                plan.setdefault(pattern(names[head]), "colwise_gather_output")
        rotary = getattr(part.config, "qk_rope_head_dim", None)  # which the style has to know
        plan |= {layer: f"{style}({rotary})" for layer, style in plan.items() if style == "mla_kv_a_proj"}
    there = {pattern(name) for name in (*names.values(), *dict(model.named_parameters(remove_duplicate=False)))}
    # Not every configuration has all layers. local_params is for parameters that are DTensors else, and ours never are.
    return {entry: style for entry, style in plan.items() if entry in there and style != "local_params"}


def draft(model: nn.Module) -> dict[str, str]:
    """A first plan for a model that has none, by the shapes of the layers of its blocks. What brings a token's row back
    to its width is cut by rows: the last layer of an attention, and one that comes from another width. All others are
    cut by columns. It may be wrong: compare gradients with one process."""
    plan: dict[str, str] = {}
    for name, blocks in (_lists(model) if guests(model) else {}).items():
        layers = {n: layer for n, layer in blocks[0].named_modules() if isinstance(layer, nn.Linear)}
        width = next(iter(layers.values())).in_features if layers else 0
        last = {n.split(".")[0]: n for n in layers}  # of each part of a block
        for n, layer in layers.items():
            back = layer.out_features == width and (layer.in_features != width or n in last.values())
            plan[f"{name}.*.{pattern(n)}"] = "rowwise" if back else "colwise"
    return plan


# -- a model on a mesh -----------------------------------------------------------------------------------------


def prepare(model: nn.Module) -> None:
    """Leave out what is of no use on a mesh. ValueError for what cannot be had there."""
    for part in guests(model).values():
        part.config.use_cache = False  # keys and values of the whole forward, which nobody reads
        if getattr(part, "is_quantized", False):
            raise ValueError(f"{type(part).__name__} is quantized: load it with dtype=, without a quantization_config")
        if getattr(part.config, "output_router_logits", False):
            raise ValueError(
                "output_router_logits adds to the loss of transformers, and here the loss is yours: set it False"
            )
        if getattr(part.config, "apply_spec_augment", False):
            raise ValueError(
                "apply_spec_augment draws its masks apart on each rank: set it False, and mask the features"
            )
        for setting in AT_RANDOM:
            if getattr(part.config, setting, 0):
                raise ValueError(f"{setting} leaves out other blocks on each rank: load the model with {setting}=0")
    for name, layer in model.named_modules():
        if getattr(layer, "gradient_checkpointing", False):
            raise ValueError(f"{name or type(model).__name__} checkpoints by itself: use recompute= of parallelize")
        if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
            layer.is_transposed = True  # x @ weight, as GPT-2 has it


def look_at_labels(model: Any, inputs: Any) -> None:
    """Labels are taken as they are. A causal model of transformers shifts them, but only in its own loss."""
    causal = "" in guests(model) and model.can_generate() and not model.config.is_encoder_decoder
    if not causal or not isinstance(inputs, dict) or not {"input_ids", "labels"} <= inputs.keys():
        return
    ids, labels = inputs["input_ids"], inputs["labels"]
    counts = labels != IGNORED
    if ids.shape == labels.shape and bool(((labels == ids) | ~counts).all() & counts.any()):
        warnings.warn(
            "labels are the tokens themselves, so each position learns to give its own token. Shift them: "
            "labels = ids.roll(-1, 1), with -100 for the last of a row",
            stacklevel=3,
        )


def check_saves_itself(model: nn.Module) -> None:
    if "" not in guests(model):
        raise TypeError(
            f"save_pretrained is for models of transformers, not for {type(model).__name__}: use save_weights"
        )


def save_itself(model: Any, config: Any, state: dict[str, Tensor], folder: Path) -> None:
    """Have a model write its own files, with this configuration and these weights in place of what it holds."""
    from transformers.utils import logging

    whole, bar = copy(model), logging.is_progress_bar_enabled()
    whole.config = deepcopy(config)
    logging.disable_progress_bar()
    try:
        whole.save_pretrained(folder, state_dict=state)
    finally:
        if bar:
            logging.enable_progress_bar()


def blocks_of(model: Any) -> Blocks | None:
    """The blocks of a model of transformers, which marks most of them: one list, or that of an encoder and that of its
    decoder. None for anything else."""
    if not guests(model):
        return None
    lists, crossed = _lists(model), _crossed(model)
    beside = _beside(model, lists)
    if len(lists) == 2 and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return Blocks(lists, beside, encoder=model.get_encoder(), crossed=crossed)
    return Blocks(lists, beside, _everywhere(model), crossed=crossed) if len(lists) == 1 else None


CONVOLUTIONS = re.compile(r"(^|[._])conv([._]|$)")


def _lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of blocks, but not of the convolutions that stand in front of them where sound comes in."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = outermost_lists(model, GradientCheckpointingLayer) or outermost_lists(model)
    return {name: blocks for name, blocks in found.items() if not CONVOLUTIONS.search(name)}


def _everywhere(model: nn.Module) -> tuple[str, ...]:
    """What each stage runs, by its names in this model."""
    names = {
        f"{name}.{module}".lstrip(".")
        for name, part in guests(model).items()
        for module in EVERYWHERE.get(part.config.model_type, "").split()
        if part.base_model is part
    }
    return tuple(name for name, _ in model.named_modules() if name in names)  # not every configuration has all


def _crossed(model: nn.Module) -> str:
    """What goes from block to block past any cut, and what to do about it; "" if nothing does."""
    for part in guests(model).values():
        for setting, why in CROSSED.items():
            if value := getattr(part.config, setting, None):
                return f"{setting}={value} {why}"
    return ""


BEHIND = re.compile(r"\.(\w*_)?(final|out|head|classifier|score)(_|$)|StableLayerNorm\.layer_norm$")
BEFORE = re.compile(r"\.(\w*embed(?!\w*norm)|conv$)")


def _beside(model: nn.Module, lists: dict[str, nn.ModuleList]) -> dict[str, int]:
    """Modules beside the blocks by their names, and a block of their stage. Most are registered in the order in which
    they are used, but some register their head first (CamemBERT), or a norm of embeddings last (BART)."""
    found, start = {}, 0
    for name, blocks in lists.items():
        while name:
            parent, _, own_name = name.rpartition(".")
            module = model.get_submodule(parent)
            for child, _ in module.named_children():
                called = f"{type(module).__name__}.{child}"
                if child != own_name and (BEHIND.search(called) or BEFORE.search(called)):
                    place = start + len(blocks) - 1 if BEHIND.search(called) else start
                    found[f"{parent}.{child}".lstrip(".")] = place
            name = parent
        start += len(blocks)
    return found
