"""A small GPT. It knows nothing of ranks: the same module trains alone and on any mesh."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """The shape of the small GPT. The defaults train on a laptop.

    vocab: token ids, context: longest sequence, depth: blocks, width: hidden size, heads: attention heads.
    tied: the head uses the embedding's weight. dropout: probability, on what attention's heads give and on both block
    outputs; not on attention's probabilities, which fused attention never has in memory.

    experts: in place of each block's one MLP; 0 for none. top: experts for each token. capacity: how many times an even
    share of a row's choices an expert takes, in training. balance: weight of the loss that keeps experts equally busy.
    See `MoE`.
    """

    vocab: int = 512
    context: int = 128
    depth: int = 4
    width: int = 128
    heads: int = 8
    tied: bool = False
    dropout: float = 0.0
    experts: int = 0
    top: int = 2
    capacity: float = 1.25
    balance: float = 0.01

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
        if not isinstance(self.experts, int) or self.experts < 0:
            raise ValueError(f"Config(experts={self.experts!r}): a whole number, 0 for none")
        if not isinstance(self.top, int) or (self.experts and not 1 <= self.top <= self.experts):
            raise ValueError(f"Config(top={self.top!r}): a whole number of the {self.experts} experts, at least 1")
        if not self.capacity > 0:
            raise ValueError(f"Config(capacity={self.capacity!r}): a number above 0, of which 1 is an even share")
        if not self.balance >= 0:
            raise ValueError(f"Config(balance={self.balance!r}): a number, at least 0")


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


class Experts(nn.Module):
    """Several MLPs without biases, side by side, each with its own slots for tokens: (E, N, C) -> (E, N, C).

    A slot that stays empty holds zeros, and zeros come out of it. The weights get their values from `initialize`.
    """

    def __init__(self, c: Config):
        super().__init__()
        self.up = nn.Parameter(torch.empty(c.experts, c.width, 4 * c.width))
        self.down = nn.Parameter(torch.empty(c.experts, 4 * c.width, c.width))

    def forward(self, slots: Tensor) -> Tensor:  # (E, N, C) -> (E, N, C)
        return F.gelu(slots @ self.up) @ self.down


class MoE(nn.Module):
    """A mixture of experts: each token goes to the `top` experts that its router finds likeliest, and gets the sum of
    what they give, weighted by the router's probabilities (Shazeer et al. 2017). These are taken as they are (Fedus et
    al. 2021, Switch Transformers): scaled to a sum of 1, they would tell the router nothing where top is 1. They are
    computed in the router's own dtype, also where all else computes in 16 bits (2.4 there).

    Capacity. In training an expert takes at most ceil(capacity * top * T / experts) choices of a row of T tokens, in
    the order of the tokens, a token's likeliest expert first. A choice that finds no room is dropped: that expert adds
    nothing. So what a token gets depends on its row alone, and on no later token. In eval() there is room for all.

    Balance. The loss over which a model trains gets, for each token t of a row, the term

        balance * weight * experts * sum over e of load[e] * probability[t, e]

    where load[e] is the share of the row's choices, dropped ones too, that fell on expert e; it has no gradient. With
    equal loads the sum is 1 / experts. This is the loss of Fedus et al. 2021 (2.2), row by row. `token_weight` is what
    one token weighs in the loss: None is 1 / (B T), which is right for a mean over all tokens of this forward. The
    terms reach the gradients in backward; they are not in what the model returns, nor in a loss that is made of it.

    load (E,), dropped: shares of all choices that fell on each expert, and that found no room. balance_loss: the mean
    of the terms, without `balance`; 1 if loads are equal. All three of the last forward, without a gradient.
    whole_row, own_tokens: (B, T of them here, ...) -> (B, T, ...) and back, for whoever shares rows out over ranks.
    """

    load: Tensor
    dropped: Tensor
    balance_loss: Tensor

    def __init__(self, c: Config):
        super().__init__()
        self.router = nn.Linear(c.width, c.experts, bias=False)
        self.experts = Experts(c)
        self.top, self.capacity, self.balance = c.top, c.capacity, c.balance
        self.token_weight: float | None = None
        self.whole_row: Callable[[Tensor], Tensor] = _same
        self.own_tokens: Callable[[Tensor], Tensor] = _same

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        with torch.autocast(x.device.type, enabled=False):
            probabilities = self.router(x.to(self.router.weight.dtype)).softmax(-1)  # (B, T, E)
        weights, choices = probabilities.topk(self.top)  # (B, T, top)
        places, fell, room = self.queue(choices)
        kept = places < room
        row, token, _ = kept.nonzero(as_tuple=True)  # (kept choices,) each
        slot = choices[kept], row * room + places[kept]
        slots = x.new_zeros(fell.size(-1), len(x) * room, x.size(-1)).index_put(slot, x[row, token])
        given = self.experts(slots)[slot] * weights[kept].unsqueeze(-1)
        y = given.new_zeros(x.shape).index_put((row, token), given, accumulate=True)
        load = fell.to(probabilities.dtype) / fell.sum(-1, keepdim=True)  # (B, E)
        terms = load.size(-1) * (load.unsqueeze(1) * probabilities).sum(-1)  # (B, T)
        self.load, self.dropped, self.balance_loss = load.mean(0), 1 - kept.double().mean(), terms.detach().mean()
        weight = 1 / terms.numel() if self.token_weight is None else self.token_weight
        return _AlsoInLoss.apply(y, self.balance * weight * terms.sum())

    def queue(self, choices: Tensor) -> tuple[Tensor, Tensor, int]:
        """choices (B, T, top), experts by number -> how many of its row came before each at the same expert, of the
        same shape; how many of the row fell on each (B, E); and the room that each has for a row."""
        whole = self.whole_row(choices)
        length, experts = whole.size(1), self.router.out_features
        so_far = F.one_hot(whole.flatten(1), experts).cumsum(1)  # (B, T top, E)
        places = so_far.gather(2, whole.flatten(1).unsqueeze(-1)).view_as(whole) - 1
        even = self.top * length / experts
        room = min(length, ceil(self.capacity * even)) if self.training else length
        return self.own_tokens(places), so_far[:, -1], room


def _same(x: Tensor) -> Tensor:
    return x


class _AlsoInLoss(torch.autograd.Function):
    """y as it is. Backward is as if `term` were added to the loss."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, term: Tensor) -> Tensor:
        ctx.dtype = term.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], gradients[0].new_ones((), dtype=ctx.dtype)


class Block(nn.Module):
    def __init__(self, c: Config):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(c.width), Attention(c)
        self.norm2, self.mlp = nn.LayerNorm(c.width), MoE(c) if c.experts else MLP(c)
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
        if c.experts:
            dense = {"blocks.*.mlp.up", "blocks.*.mlp.down"}
            self.tp_plan = {layer: style for layer, style in self.tp_plan.items() if layer not in dense} | {
                "blocks.*.mlp": "sequence_gather",
                "blocks.*.mlp.experts": "moe_tp_experts",
                "blocks.*.mlp.experts.up": "rowwise",  # of a parameter it cuts the last dim, colwise that before
                "blocks.*.mlp.experts.down": "colwise",
            }
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
    if isinstance(module, Experts):
        for weight in module.parameters():
            nn.init.normal_(weight, std=0.02)


def gpt(config: Config) -> GPT:
    """The small GPT that `config` describes."""
    return GPT(config)
