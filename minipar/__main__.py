"""The command line: python -m minipar."""

import argparse
import sys
from typing import NoReturn

from . import cli, doctor


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the input, in place of the usage and a line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 done, 1 something is not right, 2 bad input, 130 Ctrl-C."""
    about = "Hybrid parallelism for large language models."
    parser: argparse.ArgumentParser = Parser(prog="python -m minipar", description=about)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    cli.add_commands(commands)
    doctor.add_commands(commands)
    try:
        from .course.cli import add_commands
    except ModuleNotFoundError as missing:  # a training machine needs no notebooks
        parser.epilog = f"The commands of the course need {missing.name}: pip install 'minipar[course]'"
    else:
        add_commands(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
