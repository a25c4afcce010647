"""The text that every chapter trains on, its tokenizer, and batches of it.

The text is the reference that Python's own `help()` prints: `pydoc_data.topics` of CPython 3.11.7,
frozen here because it differs from one Python to the next. It is under the PSF license, which lies
beside it. The tokenizer is a byte-level BPE of 512 tokens that `train_tokenizer` made from this text:
any text can be encoded.
"""

from collections.abc import Iterator
from functools import cache
from importlib import resources

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import Dataset

VOCAB = 512
SHA256 = "67a721b6bee1195d2096b4f5f100e35eea3ec003ca26ec1b41124ab398cc1f17"
_DATA = resources.files("minipar") / "corpus_data"


@cache
def text() -> str:
    """The corpus: 79 topics in alphabetical order, each under its name; about 465,000 characters."""
    # Bytes, not text mode: a translated newline would change the hash and the tokens.
    return (_DATA / "python_topics.txt").read_bytes().decode()


@cache
def tokenizer() -> Tokenizer:
    """The tokenizer that is shipped with the corpus: byte-level BPE, 512 tokens."""
    return Tokenizer.from_str((_DATA / "tokenizer.json").read_text(encoding="utf-8"))


def train_tokenizer(corpus: str, vocab: int = VOCAB) -> Tokenizer:
    """Train a byte-level BPE with `vocab` tokens, of which the first 256 are the bytes.

    `train_tokenizer(text())` gives the tokenizer that is shipped.
    """
    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    result.train_from_iterator(
        [corpus], trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    )
    return result


@cache
def tokens() -> Tensor:
    """The whole corpus as token ids, 1-d int64. Every call returns the same tensor, so do not write to it."""
    return torch.tensor(tokenizer().encode(text()).ids)


def batches(steps: int, rows: int, context: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Give `steps` pairs (tokens, targets), each (rows, context) int64, where targets are the next tokens.

    The windows start at random places drawn from `seed` alone: every rank that asks with the same
    numbers gets the same global batch, whatever it drew before. Raises ValueError for a context that the
    corpus cannot fill.
    """
    data = tokens()
    _check_context(context)
    if rows < 1:
        raise ValueError(f"rows={rows} does not fit: a batch has at least one row")
    generator = torch.Generator().manual_seed(seed)

    def batch() -> tuple[Tensor, Tensor]:
        position = torch.randint(len(data) - context, (rows, 1), generator=generator) + torch.arange(context)
        return data[position], data[position + 1]

    return (batch() for _ in range(steps))


class Windows(Dataset):
    """The corpus as rows for `minipar.Loader`, side by side: row i is (tokens, targets), each (context,) int64.

    ValueError for a context that the corpus cannot fill.
    """

    def __init__(self, context: int):
        _check_context(context)
        self.context = context

    def __len__(self) -> int:
        return (len(tokens()) - 1) // self.context

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        window = tokens()[row * self.context :][: self.context + 1]
        return window[:-1], window[1:]


def _check_context(context: int) -> None:
    most = len(tokens()) - 1
    if not 0 < context <= most:
        raise ValueError(f"context={context} does not fit: the corpus has {most + 1} tokens, so 1 to {most}")
