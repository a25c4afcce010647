"""What this machine offers to minipar, and whether ranks on it can talk."""

import argparse
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import psutil
import torch
import torch.distributed as dist

from .rank import LOOPBACK, cores, here
from .world import World

if TYPE_CHECKING:
    from argparse import _SubParsersAction

RANKS = 4
NUMBERS = 1 << 18  # float32: 1 MiB
LEAST_MEMORY = 2 << 30  # bytes


def add_commands(commands: "_SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `doctor`."""
    parser = commands.add_parser("doctor", help="say what this machine offers and whether ranks on it can talk")
    parser.add_argument(
        "--device", choices=("cpu", "cuda", "auto"), default="auto", help="where the ranks' tensors are"
    )
    parser.set_defaults(run=lambda options: 0 if doctor(options.device) else 1)


def doctor(device: str | None = None) -> bool:
    """Print a line for everything that matters, with advice where something is amiss. True if ranks can work.

    device: where the ranks put their numbers, as in `World`.
    """
    _line("minipar", version("minipar"))
    _line("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in ("torch", "transformers", "jupyterlab"):
        _line(package, _installed(package))
    _line("cores", f"{cores()} for this process, {psutil.cpu_count()} in the machine")
    memory = psutil.virtual_memory()
    _line("memory", f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}")
    if memory.available < LEAST_MEMORY:
        _advise(f"That is little for eight ranks. Close something until {LEAST_MEMORY >> 30} GiB are free.")
    accelerator = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count()
    _line("devices", f"cpu, {count} x {accelerator.type}" if accelerator else "cpu; torch sees no GPU")
    loopback = [name for name, addresses in psutil.net_if_addrs().items() if _is_loopback(addresses)]
    _line("loopback", ", ".join(loopback) or "none")
    if LOOPBACK not in loopback:
        _advise(f"Ranks talk over the interface {LOOPBACK}, and it has no address 127.0.0.1 here.")
    return _ranks_talk(device)


def _ranks_talk(device: str | None) -> bool:
    """Start a world, let its ranks add up numbers, and print how long it took or why it did not work."""
    try:
        ready = []
        for _ in range(2):  # the first also starts the server that the ranks of every later one are forked from
            start = time.perf_counter()
            with World(RANKS, device=device) as world:
                world.run(here)
                ready.append(time.perf_counter() - start)
                answers = world.run(_sum_over_ranks, limit=30)
    except (OSError, RuntimeError, ValueError) as error:
        _line("ranks", f"do not work: {error}")
        _advise("Ranks need loopback connections and shared memory. A sandbox or a firewall may forbid them.")
        return False
    _, _, threads, backend = answers[0]
    _line("ranks", f"{RANKS}, backend {backend}, {threads} thread{'s' * (threads > 1)} each")
    _line("ready in", f"{ready[0]:.2f} s, later worlds in {ready[1]:.2f} s")
    right = all(total == sum(range(RANKS)) for total, *_ in answers)
    milliseconds = 1e3 * max(seconds for _, seconds, *_ in answers)
    _line("all-reduce", f"{'right' if right else 'WRONG'}: {NUMBERS * 4 >> 20} MiB in {milliseconds:.1f} ms")
    if not right:
        _advise("The sum over the ranks is wrong. `make test` tells more.")
    return right


def _sum_over_ranks() -> tuple[float, float, int, str | None]:
    """On a rank: the sum of all rank numbers, seconds of one all-reduce, threads, backend."""
    numbers = torch.empty(NUMBERS, device=here().device)
    for _ in range(3):  # the first calls set up connections
        numbers.fill_(here().rank)
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(numbers)
        total = numbers.mean().item()  # waits for the device, too
        seconds = time.perf_counter() - start
    return total, seconds, torch.get_num_threads(), here().backend


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed; `make setup` installs it"


def _is_loopback(addresses: list) -> bool:
    return any(address.address == "127.0.0.1" for address in addresses)


def _line(name: str, value: str) -> None:
    print(f"{name:13} {value}")


def _advise(sentence: str) -> None:
    print(f"{'':13} -> {sentence}")
