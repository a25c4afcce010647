"""A small GPT. It knows nothing of ranks: the same module trains alone and on any mesh."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The shape of the small GPT. The defaults train on a laptop.

    vocab: token ids, context: longest sequence, depth: blocks, width: hidden size, heads: attention heads.
    tied: the head uses the embedding's weight. dropout: probability, on what attention's heads give and on both block
    outputs; not on attention's probabilities, which fused attention never has in memory.
    """

    vocab: int = 512
    context: int = 128
    depth: int = 4
    width: int = 128
    heads: int = 8
    tied: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab", "context", "depth", "width", "heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Config({name}={value!r}): a whole number, at least 1")
        if self.width % self.heads:
            fits = [n for n in range(1, self.width + 1) if self.width % n == 0]
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}; heads can be one of {fits}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"Config(dropout={self.dropout!r}): a probability, 0 <= dropout < 1")


class Attention(nn.Module):
    """Causal self-attention over however many heads its weights hold."""

    def __init__(self, c: Config):
        super().__init__()
        self.head_dim, self.dropout = c.width // c.heads, nn.Dropout(c.dropout)
        self.q, self.k, self.v = (nn.Linear(c.width, c.width) for _ in range(3))
        self.out = nn.Linear(c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        def heads(y: Tensor) -> Tensor:  # (B, T, heads * head_dim) -> (B, heads, T, head_dim)
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q, k, v = heads(self.q(x)), heads(self.k(x)), heads(self.v(x))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(self.dropout(y.transpose(1, 2).flatten(-2)))


class MLP(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.up, self.down = nn.Linear(c.width, 4 * c.width), nn.Linear(4 * c.width, c.width)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(c.width), Attention(c)
        self.norm2, self.mlp = nn.LayerNorm(c.width), MLP(c)
        self.dropout = nn.Dropout(c.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Embedding(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.token, self.position = nn.Embedding(c.vocab, c.width), nn.Embedding(c.context, c.width)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, C)
        if tokens.size(1) > self.position.num_embeddings:
            raise ValueError(f"a row of {tokens.size(1)} tokens is longer than context={self.position.num_embeddings}")
        return self.token(tokens) + self.position.weight[: tokens.size(1)]


class GPT(nn.Module):
    """Token ids (B, T) -> logits (B, T, vocab)."""

    # How the layers may be cut along a tensor axis: layer name -> style, in the names that transformers uses.
    tp_plan = {
        "embed.token": "embedding_rowwise",
        "embed": "sequence_split",
        "blocks.*.norm1": "sequence_parallel",
        "blocks.*.attention.q": "colwise",
        "blocks.*.attention.k": "colwise",
        "blocks.*.attention.v": "colwise",
        "blocks.*.attention.out": "rowwise",
        "blocks.*.norm2": "sequence_parallel",
        "blocks.*.mlp.up": "colwise",
        "blocks.*.mlp.down": "rowwise",
        "norm": "sequence_parallel",
        "head": "colwise_gather_output",
    }

    def __init__(self, c: Config):
        super().__init__()
        self.config = c
        self.embed = Embedding(c)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.depth))
        self.norm, self.head = nn.LayerNorm(c.width), nn.Linear(c.width, c.vocab, bias=False)
        if c.tied:
            self.head.weight = self.embed.token.weight
        self.apply(initialize)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, vocab)
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def initialize(module: nn.Module) -> None:
    """Weights from N(0, 0.02), as in GPT-2; biases zero."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def gpt(config: Config) -> GPT:
    """The small GPT that `config` describes."""
    return GPT(config)
