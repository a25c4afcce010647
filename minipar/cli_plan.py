"""The plan command: which layout for a model on a cluster."""

import argparse
import json
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from .cost import MEGATRON_2021, TODAY
from .hardware import CLUSTERS, Cluster, load_cluster
from .planner import Plan, bill, plan
from .transformer import MODELS, Transformer, find_model, from_configuration

if TYPE_CHECKING:
    from argparse import _SubParsersAction

TOKENS_OF_A_STEP = 1 << 22  # about what Llama 2 took; four times that for more than 100B parameters, as Llama 3 did


def add_commands(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `plan`."""
    parser = commands.add_parser(
        "plan",
        help="rank the layouts of a model on a cluster, by predicted time",
        description="Price every layout that fits, and say why the best ones are best. Nothing is run. "
        f"Models: {', '.join(MODELS)}. Clusters: {', '.join(CLUSTERS)}.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="of the list above, or a config.json of transformers")
    add("--gpus", required=True, type=_whole, metavar="N", help="devices")
    add("--cluster", default="h100", metavar="NAME", help="of the list above, or a JSON file that Cluster.save wrote")
    add("--sequence", type=_whole, default=4096, metavar="N", help="tokens in a row")
    add("--batch", type=_whole, metavar="ROWS", help="rows of a step; by default 4M tokens' worth, 16M above 100B")
    add("--top", type=_whole, default=10, metavar="N", help="how many to show")
    add("--kernels", choices=("today", "2021"), default="today", help="with fused attention and overlap, or without")
    add("--picture", type=Path, metavar="FILE", help="draw the parts of the best ones' steps as a PNG")
    add("--tokens", type=_positive, metavar="X", help="of the whole run, 15e12 for instance: say what it costs")
    add("--price", type=_positive, default=2.0, metavar="X", help="of a device for an hour, in any currency")
    add("--power-factor", type=_positive, default=1.0, metavar="X", help="a cluster's power over its devices' own")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan. Returns the exit code."""
    try:
        model, cluster = _model(options.model), _cluster(options.cluster).of(options.gpus)
        tokens = TOKENS_OF_A_STEP * (4 if model.parameters > 100e9 else 1)
        batch = options.batch or max(tokens // options.sequence, 1)
        kernels = MEGATRON_2021 if options.kernels == "2021" else TODAY
        if options.picture and (options.picture.is_dir() or not options.picture.absolute().parent.is_dir()):
            raise ValueError(f"--picture {options.picture}: a file in a folder that is there")
        found = plan(model, cluster, batch, options.sequence, kernels=kernels)
    except (ValueError, OSError) as error:
        print(f"python -m minipar plan: {error}", file=sys.stderr)
        return 2
    print(found.text(options.top))
    if options.tokens:
        cost = bill(found.best, options.tokens, options.price, options.power_factor)
        print(f"\n{options.tokens:.3g} tokens: {cost}")
    if options.picture:
        _draw(found, options.top, options.picture)
    return 0


def _model(name: str) -> Transformer:
    if not name.endswith(".json"):
        return find_model(name)
    try:
        return from_configuration(SimpleNamespace(**json.loads(Path(name).read_text(encoding="utf-8"))))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{name} is not a configuration: {error}") from None


def _cluster(name: str) -> Cluster:
    if name.endswith(".json"):
        return load_cluster(name)
    if name not in CLUSTERS:
        raise ValueError(f"no cluster {name!r}: there are {', '.join(CLUSTERS)}, or name a JSON file")
    return CLUSTERS[name]


def _draw(found: Plan, top: int, file: Path) -> None:
    from . import viz  # matplotlib takes a while

    drawing = viz.draw_bars(*found.bars(top), unit="seconds a step", title=f"{found.model.name}, the best layouts")
    file.write_bytes(viz.png(drawing))


def _whole(text: str) -> int:
    return _number(int, text, "a whole number, at least 1")


def _positive(text: str) -> float:
    return _number(float, text, "a number above 0")


def _number(kind: type, text: str, what: str) -> Any:
    with suppress(ValueError):
        if 0 < (value := kind(text)) < float("inf"):
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
