"""`python -m minipar train`: the small GPT learns Python's documentation on any mesh."""

import argparse
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing.connection import Client, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import corpus
from .checkpoint import latest, load, save
from .collectives import all_reduce, everyone
from .mesh import Mesh
from .model import Config, gpt
from .rank import here
from .recompute import HOW
from .schedule import SCHEDULES
from .tensor import cross_entropy
from .train import Parallel, parallelize
from .world import RankError, main

if TYPE_CHECKING:
    from argparse import _SubParsersAction

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLOSE = 1e-9  # of the largest gradient; rounding in float64 stays far below, also after many steps
PROMPT, NEW_TOKENS = "The", 48


# -- options ---------------------------------------------------------------------------------------------------


def add_commands(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `train`."""
    parser = commands.add_parser(
        "train",
        help="train the small GPT on any mesh",
        description="Train the small GPT on Python's documentation. The dp x pp x ep x cp x tp ranks are started here, "
        "or are torchrun's: torchrun --nproc-per-node 8 -m minipar train --dp 2 --pp 2 --tp 2",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    whole, real, count = partial(_number, int, 1), partial(_number, float, 0), partial(_number, int, 0)
    shape = Config()

    layout = parser.add_argument_group("layout")
    layout.add_argument("--dp", type=whole, default=1, metavar="N", help="data-parallel ranks")
    layout.add_argument("--pp", type=whole, default=1, metavar="N", help="pipeline stages")
    layout.add_argument("--ep", type=whole, default=1, metavar="N", help="expert-parallel ranks")
    layout.add_argument("--cp", type=whole, default=1, metavar="N", help="context-parallel ranks")
    layout.add_argument("--tp", type=whole, default=1, metavar="N", help="tensor-parallel ranks")
    layout.add_argument("--schedule", choices=SCHEDULES, default="1f1b", help="order of the pipeline's work")
    layout.add_argument("--microbatches", type=whole, default=4, metavar="N", help="parts of a data rank's rows")
    layout.add_argument("--sequence-parallel", action="store_true", help="cut the sequence between tensor layers")
    layout.add_argument("--zero", type=int, choices=range(4), default=0, help="what data ranks share out")
    layout.add_argument("--recompute", choices=HOW, default="none", help="what backward computes again")
    layout.add_argument("--dtype", choices=DTYPES, default="float32", help="what matrix products compute in")
    layout.add_argument("--device", choices=("cpu", "cuda", "auto"), default="auto", help="where the tensors are")

    model = parser.add_argument_group("model")
    model.add_argument("--depth", type=whole, default=shape.depth, metavar="N", help="blocks")
    model.add_argument("--width", type=whole, default=shape.width, metavar="N", help="hidden size")
    model.add_argument("--heads", type=whole, default=shape.heads, metavar="N", help="attention heads")
    model.add_argument("--context", type=whole, default=shape.context, metavar="N", help="tokens in a row")
    model.add_argument("--experts", type=count, default=0, metavar="N", help="in each block; 0 for one MLP")
    model.add_argument("--top", type=whole, default=shape.top, metavar="N", help="experts for each token")
    model.add_argument("--tied", action="store_true", help="the head uses the embedding's weight")
    model.add_argument("--dropout", type=real, default=shape.dropout, metavar="P", help="probability, P < 1")

    run = parser.add_argument_group("run")
    run.add_argument("--steps", type=whole, default=50, metavar="N", help="steps of AdamW")
    run.add_argument("--rows", type=whole, default=16, metavar="N", help="rows of the global batch")
    run.add_argument("--lr", type=real, default=1e-3, metavar="X", help="learning rate")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, batches and dropout")
    run.add_argument("--check", action="store_true", help="compare all gradients with one process, in float64")
    run.add_argument("--trace", type=Path, metavar="FILE", help="write the last step for ui.perfetto.dev")
    run.add_argument("--save", type=Path, metavar="FOLDER", help="write checkpoints there, one at the end in any case")
    run.add_argument("--save-every", type=whole, default=100, metavar="N", help="steps between two checkpoints")
    run.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --save FOLDER, if any")
    parser.set_defaults(run=train)


def _number(kind: type, least: int, text: str) -> Any:
    """An argparse type."""
    with suppress(ValueError):
        if (value := kind(text)) >= least:
            return value
    what = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"{text!r} is not {what}, at least {least}")


# -- the process that is asked ---------------------------------------------------------------------------------


Where = tuple[tuple[str, int], bytes]  # address and key of a listener on this machine


@dataclass(frozen=True)
class Report:
    """What rank 0 tells at the end. difference: of the gradients from one process's; None without --check."""

    losses: list[float]  # of the steps of this start
    before: int  # steps of earlier starts
    tokens_per_second: float  # of the steps alone, whatever else was done between them
    difference: float | None
    text: str  # what the trained model makes of PROMPT


def train(options: argparse.Namespace) -> int:
    """Run the ranks, show their progress and what came of it. Returns the exit code."""
    settings = {name: value for name, value in vars(options).items() if name != "run"}
    key = secrets.token_bytes(16)
    try:
        mesh, config = _shapes(options)
        with Listener(("127.0.0.1", 0), authkey=key) as listener:
            bar = threading.Thread(target=_show_progress, args=(listener, options.steps), daemon=True)
            bar.start()
            seats = {"ranks": mesh.size, "device": options.device, "seed": options.seed}
            answers = main(_train, mesh, config, settings, (listener.address, key), **seats)
            if here().rank:  # under torchrun; rank 0 tells
                return 0
            if isinstance(answers[0], ValueError):
                raise answers[0]
            bar.join()
            return _tell(mesh, answers[0])
    except ValueError as error:
        print(f"python -m minipar train: {error}", file=sys.stderr)
        return 2
    except RankError as error:
        print(error, file=sys.stderr)
        return 1


def _shapes(options: argparse.Namespace) -> tuple[Mesh, Config]:
    """What the options describe. Raises ValueError for what does not fit, before any rank is started."""
    parts = options.dp * options.ep * options.microbatches
    if options.rows < parts:
        what = f"{options.dp * options.ep} data ranks x {options.microbatches} microbatches"
        raise ValueError(f"--rows {options.rows} is too few for {what}: at least {parts}")
    if options.check and options.resume:
        raise ValueError("--check compares from the first step on: it does not go with --resume")
    if options.resume and not options.save:
        raise ValueError("--resume needs --save FOLDER, where the checkpoints are")
    if options.save and options.save.exists() and not options.save.is_dir():
        raise ValueError(f"--save {options.save}: it must be a folder")
    if options.save and not options.resume and (newest := latest(options.save)):
        raise ValueError(
            f"--save {options.save} has {newest.name}: go on from it with --resume, or name another folder"
        )
    if options.check and options.dropout:
        raise ValueError("--check fits --dropout 0 only: one process drops something else")
    if options.check and DTYPES[options.dtype]:
        raise ValueError("--check fits --dtype float32 only: it compares in float64")
    if options.trace and (options.trace.is_dir() or not os.access(options.trace.absolute().parent, os.W_OK)):
        raise ValueError(f"--trace {options.trace}: it must be a file in a folder that can be written to")
    corpus.batches(options.steps, options.rows, options.context)
    names = ("context", "depth", "width", "heads", "tied", "dropout", "experts", "top")
    mesh, shape = ({name: getattr(options, name) for name in some} for some in (Mesh().shape, names))
    return Mesh(**mesh), Config(vocab=corpus.VOCAB, **shape)


def _show_progress(listener: Listener, steps: int) -> None:
    """A bar that rank 0 moves. What ranks print gets here line by line, so a bar cannot be drawn there."""
    with suppress(OSError, EOFError), listener.accept() as rank, _bar(steps) as bar:
        while True:
            step, loss, speed = rank.recv()
            bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
            bar.update(step - bar.n)


def _bar(steps: int) -> tqdm:
    """Without tqdm's own steps a second: with --check they count the comparison, and tokens/s do not."""
    return tqdm(
        total=steps, dynamic_ncols=True, bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    )


def _tell(mesh: Mesh, report: Report) -> int:
    steps, speed = len(report.losses), f"{report.tokens_per_second:,.0f} tokens/s"
    if report.difference is not None:
        speed += " (in float64, the time of the check not counted)"
    when = f"steps {report.before + 1} to {report.before + steps}" if report.before else f"{steps} steps"
    print(f"{mesh}: loss {report.losses[0]:.4f} -> {report.losses[-1]:.4f} in {when}, {speed}")
    print(f"it writes: {report.text}")
    if report.difference is None:
        return 0
    equal = report.difference <= CLOSE
    print(
        f"check: {'equal' if equal else 'NOT EQUAL'}. In {steps} steps no gradient is farther from one "
        f"process's than {report.difference:.1e} of the largest (float64)."
    )
    return 0 if equal else 1


# -- the ranks -------------------------------------------------------------------------------------------------


def _train(mesh: Mesh, config: Config, settings: dict[str, Any], where: Where) -> Report | ValueError | None:
    """On every rank: train. Rank 0 tells how it goes, the others answer nothing; all answer what does not fit."""
    options = argparse.Namespace(**settings)
    alone = gpt(config).to(here().device, torch.float64 if options.check else torch.float32)
    try:
        model = parallelize(
            alone,
            mesh,
            schedule=SCHEDULES[options.schedule],
            microbatches=options.microbatches,
            sequence_parallel=options.sequence_parallel,
            zero=options.zero,
            recompute=options.recompute,
            dtype=DTYPES[options.dtype],
        )
    except ValueError as error:
        return error
    optimizer = torch.optim.AdamW(model.parameters(), options.lr)
    reference = torch.optim.AdamW(alone.parameters(), options.lr)
    batches = {name: getattr(options, name) for name in ("rows", "context", "seed")}
    if options.resume and latest(options.save):
        try:
            _resume(options, model, optimizer, batches)
        except ValueError as error:
            return error
    losses, differences, seconds = [], [], 0.0
    with _progress(where) as tell:
        for tokens, targets in islice(corpus.batches(options.steps, **batches), model.steps, None):
            start = time.perf_counter()
            losses.append(model.step(tokens, targets).item())
            seconds += time.perf_counter() - start
            if options.check:
                gradients = model.full_gradients()
                if here().rank == 0:
                    differences.append(_difference(gradients, alone, tokens, targets))
                    reference.step()
                all_reduce(torch.zeros(1, device=here().device), everyone())  # no rank runs ahead meanwhile
            start = time.perf_counter()
            optimizer.step()
            optimizer.zero_grad()
            seconds += time.perf_counter() - start
            if options.save and (model.steps % options.save_every == 0 or model.steps == options.steps):
                save(options.save, model, optimizer, batches=batches)
            tell((model.steps, losses[-1], len(losses) * tokens.numel() / seconds))
    timeline = model.timeline()
    prompt = torch.tensor([corpus.tokenizer().encode(PROMPT).ids])
    written = model.generate(prompt, NEW_TOKENS, temperature=0.7, seed=options.seed)
    if here().rank:
        return None
    if options.trace:
        timeline.save(options.trace)
    text = " ".join(corpus.tokenizer().decode(written[0].tolist()).split())
    difference = torch.tensor(differences).max().item() if options.check else None
    return Report(losses, model.steps - len(losses), len(losses) * tokens.numel() / seconds, difference, text)


def _resume(
    options: argparse.Namespace, model: Parallel, optimizer: torch.optim.Optimizer, batches: dict[str, int]
) -> None:
    """Take up the newest checkpoint. ValueError if it does not fit these options."""
    kept = load(options.save, model, optimizer)["batches"]
    for name, value in batches.items():
        if kept[name] != value:
            raise ValueError(f"--{name} {value}: the run in {options.save} had --{name} {kept[name]}")
    if model.steps >= options.steps:
        raise ValueError(f"--steps {options.steps}: the run in {options.save} is at step {model.steps} already")


@contextmanager
def _progress(where: Where) -> Iterator[Callable[[Any], None]]:
    """A function that sends to the bar from rank 0, and does nothing on the others."""
    if here().rank:
        yield lambda what: None
    else:
        address, key = where
        with Client(address, authkey=key) as bar:
            yield bar.send


def _difference(gradients: dict[str, Tensor], alone: nn.Module, tokens: Tensor, targets: Tensor) -> float:
    """The largest difference from the gradients of the whole model in this process, over its largest gradient."""
    device = here().device
    total, count = cross_entropy(alone(tokens.to(device)), targets.to(device))
    alone.zero_grad()
    (total / count).backward()
    own = {name: parameter.grad for name, parameter in alone.named_parameters() if parameter.grad is not None}
    # torch's max, not Python's: it does not lose a NaN.
    largest = torch.stack([gradient.abs().max() for gradient in own.values()]).max()
    differences = torch.stack([(gradients[name] - gradient).abs().max() for name, gradient in own.items()])
    return (differences.max() / largest).item()
