"""A transformer as numbers: what it is made of, and how many parameters that is. No weights, no torch.

Parameters are counted one by one, norms and biases too, so `Transformer.parameters` is exact for the models below.
Narayanan et al. 2021 (arXiv 2104.04473, eq. 2) write the same count for a GPT as 12 l h^2 (1 + 13/(12h) +
(V + s)/(12 l h)): a tied head, and neither the last norm nor anything that is not a GPT.
"""

import difflib
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Transformer:
    """The shape of a decoder-only model.

    layers, hidden, heads, vocabulary: as everywhere.
    kv_heads: heads of keys and values; 0: as many as heads.
    head_dim: 0: hidden / heads.
    mlp: hidden units of a block's MLP, or of each expert; 0: 4 hidden.
    gated: the MLP is down(act(gate(x)) * up(x)), with three matrices in place of two.
    experts: MLPs in each block, 0: one and no router. top: experts that a token goes to.
    positions: learned ones; 0: rotary embeddings, which have no parameters.
    tied: the head uses the embedding's weight.
    biases: of "all" linear layers in blocks but the experts', of q, k and v ("qkv"), or "none".
    norm: numbers a norm has for each hidden unit: 2 with a bias (LayerNorm), 1 without (RMSNorm).
    qk_norm: heads' queries and keys have norms of their own, with head_dim numbers each.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int
    kv_heads: int = 0
    head_dim: int = 0
    mlp: int = 0
    gated: bool = False
    experts: int = 0
    top: int = 1
    positions: int = 0
    tied: bool = False
    biases: str = "all"
    norm: int = 2
    qk_norm: bool = False

    def __post_init__(self) -> None:
        for field in ("layers", "hidden", "heads", "vocabulary"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Transformer({field}={value!r}): a whole number, at least 1")
        if not self.head_dim and self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not divisible by heads {self.heads}: say head_dim=")
        for field, value in (
            ("kv_heads", self.heads),
            ("head_dim", self.hidden // self.heads),
            ("mlp", 4 * self.hidden),
        ):
            object.__setattr__(self, field, getattr(self, field) or value)
        for field in ("kv_heads", "head_dim", "mlp", "top"):
            if not isinstance(getattr(self, field), int) or getattr(self, field) < 1:
                raise ValueError(f"Transformer({field}={getattr(self, field)!r}): a whole number, at least 1")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads {self.kv_heads} does not divide heads {self.heads}")
        if self.experts and not 1 <= self.top <= self.experts:
            raise ValueError(f"top {self.top}: 1 to {self.experts}, the number of experts")
        if self.biases not in ("all", "qkv", "none"):
            raise ValueError(f'biases={self.biases!r}: "all", "qkv" or "none"')

    # -- widths ------------------------------------------------------------------------------------------------

    @property
    def queries(self) -> int:
        """Numbers that all query heads have for a token."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Numbers that all key heads have for a token; the values have as many."""
        return self.kv_heads * self.head_dim

    # -- parameters --------------------------------------------------------------------------------------------

    @property
    def matrices(self) -> int:
        """Weights in a block's matrices, those of one MLP included (of one expert, if there are several)."""
        return self.attention_matrices + self.mlp_matrices

    @property
    def attention_matrices(self) -> int:
        """Weights of q, k, v and the output."""
        return 2 * self.hidden * (self.queries + self.keys)

    @property
    def mlp_matrices(self) -> int:
        """Weights of one MLP, or of one expert."""
        return (3 if self.gated else 2) * self.hidden * self.mlp

    @property
    def router(self) -> int:
        return self.hidden * self.experts

    @property
    def cut_biases(self) -> int:
        """A block's biases of what tensor parallelism cuts by columns: q, k and v, and what goes into the MLP."""
        attention = 0 if self.biases == "none" else self.queries + 2 * self.keys
        mlp = self.biases == "all" and not self.experts
        return attention + ((2 if self.gated else 1) * self.mlp if mlp else 0)

    @property
    def row_biases(self) -> int:
        """... and of what it cuts by rows: attention's output, and what leaves the MLP. Every rank has them."""
        return (1 if self.experts else 2) * self.hidden if self.biases == "all" else 0

    @property
    def norms(self) -> int:
        """Parameters of a block's norms."""
        return 2 * self.norm * self.hidden + (2 * self.head_dim if self.qk_norm else 0)

    @property
    def block(self) -> int:
        """Parameters of one block, all experts included."""
        matrices = self.attention_matrices + max(self.experts, 1) * self.mlp_matrices + self.router
        return matrices + self.cut_biases + self.row_biases + self.norms

    @property
    def embedding(self) -> int:
        """Parameters in front of the first block."""
        return (self.vocabulary + self.positions) * self.hidden

    @property
    def head(self) -> int:
        """Parameters behind the last block: its norm, and the head's weight if it is one of its own."""
        return self.norm * self.hidden + (0 if self.tied else self.vocabulary * self.hidden)

    @property
    def parameters(self) -> int:
        return self.embedding + self.layers * self.block + self.head

    @property
    def active(self) -> int:
        """Parameters that work on one token: of the experts, only `top`."""
        idle = max(self.experts - self.top, 0) * self.mlp_matrices
        return self.parameters - self.layers * idle


# -- from elsewhere ------------------------------------------------------------------------------------------

# What the families of transformers differ in beyond the numbers of their configurations.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {"gated": True, "biases": "none", "norm": 1},
    "mistral": {"gated": True, "biases": "none", "norm": 1},
    "mixtral": {"gated": True, "biases": "none", "norm": 1},
    "qwen2": {"gated": True, "biases": "qkv", "norm": 1},
    "qwen3": {"gated": True, "biases": "none", "norm": 1, "qk_norm": True},
    "qwen3_moe": {"gated": True, "biases": "none", "norm": 1, "qk_norm": True},
}


def from_configuration(configuration: Any) -> Transformer:
    """The shape that a configuration of transformers describes (an object with its attributes).

    ValueError for a family that is not in FAMILIES, or whose blocks differ from each other.
    """

    def first(*names: str, default: Any = 0) -> Any:
        found = (getattr(configuration, name, None) for name in names)
        return next((value for value in found if value is not None), default)

    family = first("model_type", default="")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"model_type {family!r} is not known here ({known}): describe it as a Transformer yourself")
    if first("mlp_only_layers", default=[]) or first("decoder_sparse_step", default=1) != 1:
        raise ValueError(f"this {family} has dense blocks among those with experts: a Transformer has one kind")
    experts = first("num_local_experts", "num_experts")
    width = ("moe_intermediate_size",) if family == "qwen3_moe" else ("intermediate_size", "n_inner")
    return Transformer(
        name=first("name_or_path", default="") or family,
        layers=first("num_hidden_layers", "n_layer"),
        hidden=first("hidden_size", "n_embd"),
        heads=first("num_attention_heads", "n_head"),
        vocabulary=first("vocab_size"),
        kv_heads=first("num_key_value_heads"),
        head_dim=first("head_dim"),
        mlp=first(*width),
        experts=experts,
        top=first("num_experts_per_tok", default=1),
        positions=first("n_positions") if family == "gpt2" else 0,
        tied=bool(first("tie_word_embeddings", default=False)),
        **FAMILIES[family],
    )


def from_config(config: Any) -> Transformer:
    """The shape of the small GPT that a `minipar.Config` describes."""
    return Transformer(
        name="minipar.gpt",
        layers=config.depth,
        hidden=config.width,
        heads=config.heads,
        vocabulary=config.vocab,
        experts=config.experts,
        top=config.top if config.experts else 1,
        positions=config.context,
        tied=config.tied,
    )


def find_model(name: str) -> Transformer:
    """A model of the catalogue. ValueError with the nearest names if there is none of that name."""
    if name.lower() in MODELS:
        return MODELS[name.lower()]
    near = difflib.get_close_matches(name.lower(), MODELS, 3, 0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(MODELS)}"
    raise ValueError(f"no model {name!r}: {hint}")


# -- a catalogue ---------------------------------------------------------------------------------------------

_LLAMA = Transformer("llama", 1, 1, 1, 128256, kv_heads=1, head_dim=128, **FAMILIES["llama"])


def _gpt(name: str, layers: int, hidden: int, heads: int) -> Transformer:
    """Of Narayanan et al. 2021 and Korthikanti et al. 2022: vocabulary 51,200, sequences of 2,048."""
    return Transformer(name, layers, hidden, heads, 51200, positions=2048, tied=True)


def _llama(name: str, layers: int, hidden: int, heads: int, mlp: int, **others: Any) -> Transformer:
    """Of the Llama Team 2024 (arXiv 2407.21783, Table 3) and their releases: 8 heads of keys and values."""
    shape = {"kv_heads": 8, "head_dim": 128} | others
    return replace(_LLAMA, name=name, layers=layers, hidden=hidden, heads=heads, mlp=mlp, **shape)


MODELS = {
    model.name: model
    for model in (
        Transformer("gpt2", 12, 768, 12, 50257, positions=1024, tied=True),
        Transformer("gpt2-xl", 48, 1600, 25, 50257, positions=1024, tied=True),
        Transformer("gpt3-175b", 96, 12288, 96, 50257, positions=2048, tied=True),
        _gpt("megatron-1.7b", 24, 2304, 24),
        _gpt("megatron-7.5b", 36, 4096, 32),
        _gpt("megatron-39b", 48, 8192, 64),
        _gpt("megatron-145b", 80, 12288, 96),
        _gpt("megatron-175b", 96, 12288, 96),
        _gpt("megatron-530b", 105, 20480, 128),
        _gpt("megatron-1t", 128, 25600, 160),
        _llama("llama-1b", 16, 2048, 32, 8192, head_dim=64, tied=True),
        _llama("llama-8b", 32, 4096, 32, 14336),
        _llama("llama-70b", 80, 8192, 64, 28672),
        _llama("llama-405b", 126, 16384, 128, 53248),
        replace(
            _LLAMA, name="mixtral-8x7b", layers=32, hidden=4096, heads=32, vocabulary=32000, kv_heads=8, mlp=14336,
            experts=8, top=2,
        ),
    )
}  # fmt: skip
