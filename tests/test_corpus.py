"""The text is the frozen one, its tokenizer is what training gives, and batches depend on the seed alone."""

import hashlib

import pytest
import torch

from minipar import corpus


def test_the_text_is_the_frozen_one():
    assert hashlib.sha256(corpus.text().encode()).hexdigest() == corpus.SHA256
    assert 460_000 < len(corpus.text()) < 470_000


def test_the_license_lies_beside_the_text():
    license_text = (corpus._DATA / "LICENSE.txt").read_text(encoding="utf-8")
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in license_text


def test_training_again_gives_the_shipped_tokenizer():
    assert corpus.train_tokenizer(corpus.text()).to_str() == corpus.tokenizer().to_str()
    assert corpus.tokenizer().get_vocab_size() == corpus.VOCAB == 512


@pytest.mark.parametrize("text", ["def f(x): return x\n", "  两个 ranks 🙂\r\n", "\x00"])
def test_any_text_comes_back_from_its_tokens(text):
    assert corpus.tokenizer().decode(corpus.tokenizer().encode(text).ids) == text


def test_tokens_are_the_whole_text():
    tokens = corpus.tokens()
    assert tokens.dtype == torch.int64 and tokens.dim() == 1
    assert corpus.tokenizer().decode(tokens.tolist()) == corpus.text()


def test_targets_are_the_next_tokens():
    for tokens, targets in corpus.batches(3, rows=4, context=16):
        assert tokens.shape == targets.shape == (4, 16)
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        joined = torch.cat((tokens, targets[:, -1:]), 1)
        windows = corpus.tokens().unfold(0, 17, 1)
        for row in joined:
            assert (windows == row).all(1).any(), "a row and its last target are one stretch of the corpus"


def test_batches_depend_on_the_seed_alone():
    def draw(seed: int) -> torch.Tensor:
        return torch.stack([tokens for tokens, _ in corpus.batches(3, rows=4, context=16, seed=seed)])

    first = draw(1)
    torch.manual_seed(99)
    assert torch.equal(draw(1), first)
    assert not torch.equal(draw(2), first)
    assert not torch.equal(first[0], first[1])
    state = torch.get_rng_state()
    draw(1)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are its own"


@pytest.mark.parametrize(
    ("rows", "context", "named"), [(4, 10**9, "context=1000000000"), (4, 0, "context=0"), (0, 8, "rows=0")]
)
def test_a_batch_that_the_corpus_cannot_fill_is_refused(rows, context, named):
    with pytest.raises(ValueError, match=named):
        corpus.batches(1, rows, context)
