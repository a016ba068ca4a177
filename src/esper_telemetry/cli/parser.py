"""How the commands read their arguments."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn, TypeAlias

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_HALTED = 3
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Say what is wrong in one line, and take no option by half its name."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message.removeprefix('argument ')}\n")


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class Version(argparse.Action):
    """Print the version, which takes a moment to look up, when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from importlib.metadata import version

        print(f"esper-telemetry {version('esper-telemetry')}")
        parser.exit()


class Completion(argparse.Action):
    """Print a script that completes the command in a shell."""

    def __call__(
        self, parser: argparse.ArgumentParser, _: object, shell: str | Sequence[Any] | None, *__: object
    ) -> NoReturn:
        import shtab

        known = {"FILE": shtab.FILE, "OUT": shtab.FILE, "DIR": shtab.DIRECTORY}
        for action in _actions(parser):
            if action.metavar in known:
                action.complete = known[str(action.metavar)]  # type: ignore[attr-defined]
        print(shtab.complete(parser, str(shell)))
        parser.exit()


def whole(text: str) -> int:
    """Read a whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def seconds(text: str) -> float:
    """Read a number of seconds."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected seconds, got {text!r}") from None


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """List the actions of a parser and of its commands."""
    found = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                found += _actions(command)
    return found
