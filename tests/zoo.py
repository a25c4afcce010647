"""Small models of transformers with random weights in float64, for the tests of the laws. Ranks import it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from typing import Any

import torch
from laws import stirred
from torch import Tensor, nn

VOCABULARY = 51  # odd, as GPT-2's
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
BERT = SIZES | IDS | {"max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LLAMA = SIZES | IDS | {"max_position_embeddings": 32, "num_key_value_heads": 2}
# name -> the class and its configuration
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", BERT),
    "distilbert": (
        "DistilBertForMaskedLM",
        IDS
        | {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
        | {"max_position_embeddings": 32, "dropout": 0.0, "attention_dropout": 0.0},
    ),
    "roberta": ("RobertaForMaskedLM", BERT),
    "gpt2": (
        "GPT2LMHeadModel",
        IDS
        | {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    ),
    "llama": ("LlamaForCausalLM", LLAMA),
    "mistral": ("MistralForCausalLM", LLAMA | {"sliding_window": 6}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 8}),
    "gemma": ("GemmaForCausalLM", LLAMA | {"head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}),
    "phi": ("PhiForCausalLM", LLAMA),
    "phi3": ("Phi3ForCausalLM", LLAMA),
    "olmo2": ("Olmo2ForCausalLM", LLAMA),
    "vit": (
        "ViTForImageClassification",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"image_size": 16, "patch_size": 4, "num_labels": 7},
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        IDS
        | {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
        | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32, "decoder_start_token_id": 1}
        | {"dropout": 0.0},
    ),
    "mixtral": ("MixtralForCausalLM", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        LLAMA
        | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"mlp_only_layers": [1]},
    ),
}

BART = MODELS["whisper"][1] | {"max_position_embeddings": 32, "attention_dropout": 0.0, "activation_dropout": 0.0}
for key in ("num_mel_bins", "max_source_positions", "max_target_positions"):
    BART.pop(key)
T5 = IDS | {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"num_decoder_layers": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0}
GPT_NEO = IDS | {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 48}
GPT_NEO |= {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 32, "window_size": 6}
GPT_NEO |= {"embed_dropout": 0.0, "attention_dropout": 0.0, "resid_dropout": 0.0}
OPT = IDS | {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "dropout": 0.0}
OPT |= {"num_attention_heads": 4, "word_embed_proj_dim": 24, "max_position_embeddings": 32}
DEEPSEEK = LLAMA | {"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 16}
DEEPSEEK |= {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1}
DEEPSEEK |= {"topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "moe_intermediate_size": 24}
DEBERTA = BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
SOUND = SIZES | {"conv_dim": (16, 16), "conv_kernel": (4, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
SOUND |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16, "num_labels": 7}
SOUND |= {"feat_extract_norm": "layer", "apply_spec_augment": False, "layerdrop": 0.0, "hidden_dropout": 0.0}
SOUND |= {"activation_dropout": 0.0, "attention_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0}

# Others whose plans are known, and what they bring that the seventeen do not.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("AlbertForMaskedLM", BERT | {"embedding_size": 24, "num_hidden_groups": 2}),
    "apertus": ("ApertusForCausalLM", LLAMA),  # its own plan leaves out what its activation learns
    "bart": ("BartForConditionalGeneration", BART),  # one embedding for three layers, a bias behind the head
    "bart_causal": ("BartForCausalLM", BART),
    "blenderbot": ("BlenderbotForConditionalGeneration", BART),
    "camembert": ("CamembertForCausalLM", BERT),  # its head is registered first
    "cohere": ("CohereForCausalLM", LLAMA | {"use_qk_norm": True}),  # the same, of norms with a row for each head
    "data2vec-text": ("Data2VecTextForMaskedLM", BERT),
    "deberta-v2": ("DebertaV2ForMaskedLM", DEBERTA | {"norm_rel_ebd": "layer_norm", "share_att_key": True}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", DEEPSEEK),  # latent attention
    "deit": ("DeiTForImageClassification", MODELS["vit"][1]),
    "electra": ("ElectraForMaskedLM", BERT | {"embedding_size": 32}),
    "ernie": ("ErnieForMaskedLM", BERT),
    "gemma3": ("Gemma3ForCausalLM", LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6}),
    "gpt_neo": ("GPTNeoForCausalLM", GPT_NEO),
    "gptj": ("GPTJForCausalLM", MODELS["gpt2"][1] | {"rotary_dim": 4}),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        DEEPSEEK | {"head_dim": 8, "num_key_value_heads": 2, "use_qk_norm": True},
    ),
    "hubert": ("HubertForSequenceClassification", SOUND),  # other lists of layers in front of its blocks
    "m2m_100": ("M2M100ForConditionalGeneration", BART | {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}),
    "marian": ("MarianMTModel", BART),
    "mbart": ("MBartForConditionalGeneration", BART),
    "modernbert": ("ModernBertForMaskedLM", BERT | {"embedding_dropout": 0.0, "mlp_dropout": 0.0}),
    "mpnet": ("MPNetForMaskedLM", BERT),  # all blocks read what a module beside them gives, and it learns
    "mt5": ("MT5ForConditionalGeneration", T5),
    "opt": ("OPTForCausalLM", OPT),  # a projection behind the blocks, registered before
    "pegasus": ("PegasusForConditionalGeneration", BART),
    "roformer": ("RoFormerForMaskedLM", BERT | {"embedding_size": 32}),  # the same, and it does not learn
    "stablelm": ("StableLmForCausalLM", LLAMA),
    "t5": ("T5ForConditionalGeneration", T5),  # the first block makes what all read
    "umt5": ("UMT5ForConditionalGeneration", T5),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", SOUND | {"do_stable_layer_norm": True}),
    "xlm-roberta": ("XLMRobertaForMaskedLM", BERT),
    "xlm-roberta-xl": ("XLMRobertaXLForMaskedLM", BERT),
}

# Two lists of blocks, side by side: for tensor ranks.
TOWER = SIZES | IDS | {"max_position_embeddings": 32, "projection_dim": 16, "attention_dropout": 0.0}
TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (f"{kind}Model", {"text_config": TOWER, "vision_config": TOWER | {"image_size": 16, "patch_size": 4}})
    for name, kind in (("clip", "CLIP"), ("siglip", "Siglip"))
}

# Without a plan: for pipelines.
UNCUT: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": (
        "BloomForCausalLM",
        IDS
        | {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
        | {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "cpmant": (  # all blocks read a table of positions, and a module behind them makes it
        "CpmAntForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48}
        | {"num_hidden_layers": 2, "dropout_p": 0.0, "prompt_types": 4, "prompt_length": 3, "segment_types": 4},
    ),
    "beit": (  # all read a bias of positions, which learns
        "BeitForImageClassification",
        MODELS["vit"][1] | {"use_shared_relative_position_bias": True, "drop_path_rate": 0.0},
    ),
    "data2vec-vision": (
        "Data2VecVisionForImageClassification",
        MODELS["vit"][1] | {"use_shared_relative_position_bias": True, "drop_path_rate": 0.0},
    ),
    "deberta": ("DebertaForMaskedLM", BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "layoutlmv3": (
        "LayoutLMv3ForTokenClassification",
        BERT | {"num_labels": VOCABULARY, "coordinate_size": 6, "shape_size": 4, "visual_embed": False},
    ),
    "led": (  # what its encoder gives has a type of its own
        "LEDForConditionalGeneration",
        BART | {"attention_window": 4, "max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32},
    ),
}


def build(name: str, kind: str = "", **changes: Any) -> nn.Module:
    """A model for training, away from its initial point. kind: another class of this architecture. changes: of its
    configuration."""
    import transformers

    usual_kind, values = (MODELS | MORE | TOWERS | UNCUT)[name]
    kind = kind or usual_kind
    model_type = getattr(transformers, kind)
    config = model_type.config_class(**values | changes)
    config._experts_implementation = "eager"  # the usual one has no float64
    if name == "gemma2" or not model_type._supports_sdpa:
        config._attn_implementation = "eager"
    usual = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        return stirred(model_type(config).double()).train()
    finally:
        torch.set_default_dtype(usual)


def batch(name: str, rows: int = 5, length: int = 12) -> tuple[dict[str, Tensor], Tensor]:
    """Inputs and labels: rows of unequal length where the model takes a mask, and labels for what it keeps."""
    draw = torch.Generator().manual_seed(2)
    if name in ("wav2vec2", "hubert"):
        sound = torch.randn(rows, 100, generator=draw, dtype=torch.float64)
        return {"input_values": sound}, torch.randint(7, (rows,), generator=draw)
    if name in ("vit", "deit", "beit", "data2vec-vision"):
        pixels = torch.randn(rows, 3, 16, 16, generator=draw, dtype=torch.float64)
        return {"pixel_values": pixels}, torch.randint(7, (rows,), generator=draw)
    ids, labels = (torch.randint(3, VOCABULARY, (rows, length), generator=draw) for _ in range(2))
    kept = torch.arange(length) < length - torch.arange(rows)[:, None] * 2 % (length - 2)
    labels = labels.masked_fill(~kept, -100)
    if name == "whisper":
        sound = torch.randn(rows, 8, 32, generator=draw, dtype=torch.float64)
        return {"input_features": sound, "decoder_input_ids": ids}, labels
    if name == "cpmant":
        return {"input_ids": ids.masked_fill(~kept, 0)}, labels
    inputs = {"input_ids": ids.masked_fill(~kept, 0), "attention_mask": kept.long()}
    if name == "layoutlmv3":
        inputs["bbox"] = torch.randint(30, (rows, length, 4), generator=draw).sort(-1).values
    if name in TOWERS:
        inputs["pixel_values"] = torch.randn(rows, 3, 16, 16, generator=draw, dtype=torch.float64)
    if (MORE | UNCUT).get(name, ("",))[0].endswith(("ConditionalGeneration", "MTModel")):
        inputs["decoder_input_ids"] = ids.flip(0)
    return inputs, labels
