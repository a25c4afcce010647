"""The command line: python -m minipar."""

import argparse
import sys
from importlib import import_module
from typing import NoReturn

# Which module adds a command. Only the one that is asked for is imported: grading does not wait for torch twice.
COURSE = dict.fromkeys(("grade", "hint", "solution", "progress"), "course.cli")
HOMES = {"train": "cli", "plan": "cli_plan", "doctor": "doctor", **COURSE}


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the input, in place of the usage and a line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 done, 1 something is not right, 2 bad input, 130 Ctrl-C."""
    about = "Hybrid parallelism for large language models."
    parser: argparse.ArgumentParser = Parser(prog="python -m minipar", description=about)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    arguments = sys.argv[1:] if arguments is None else arguments
    homes = [HOMES[name] for name in arguments[:1] if name in HOMES] or dict.fromkeys(HOMES.values())
    for home in homes:
        try:
            import_module(f".{home}", __package__).add_commands(commands)
        except ModuleNotFoundError as missing:  # a training machine needs no notebooks
            if home != "course.cli":
                raise
            parser.epilog = f"The commands of the course need {missing.name}: pip install 'minipar[course]'"
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
