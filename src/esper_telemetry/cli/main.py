"""The `esper` command. What a command needs is imported when it runs: help and completion need next to nothing."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from esper_telemetry.cli.assets import add_assets
from esper_telemetry.cli.drill import add_drill
from esper_telemetry.cli.parser import EXIT_INTERRUPTED, Completion, Parser, Version
from esper_telemetry.cli.ppo import add_ppo
from esper_telemetry.cli.report import add_report

_ESPER = "Numerical health of PyTorch gradients, from param.grad to the on-call phone."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `esper` and return its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        code: int = options.run(options)
    except KeyboardInterrupt:
        print(f"esper {options.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code


def _parser() -> Parser:
    parser = Parser("esper", description=_ESPER)
    parser.add_argument("-V", "--version", action=Version, nargs=0, help="show the version and exit")
    parser.add_argument(
        "--print-completion",
        action=Completion,
        choices=("bash", "zsh", "tcsh"),
        help="print a completion script for that shell and exit",
    )
    commands = parser.add_subparsers(title="commands", required=True, dest="command", metavar="COMMAND")
    add_ppo(commands)
    add_assets(commands)
    add_drill(commands)
    add_report(commands)
    return parser
