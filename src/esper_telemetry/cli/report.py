"""`esper report`: show a recording of the flight recorder."""

from __future__ import annotations

import argparse
import io
import os
import shutil
import sys
from pathlib import Path

from esper_telemetry.cli.parser import EXIT_USAGE, Commands

_REPORT = "Show a recording of the flight recorder: what was bad, where it began, and the checks before it."


def add_report(commands: Commands) -> None:
    """Add the command."""
    command = commands.add_parser("report", help="show a recording of the flight recorder", description=_REPORT)
    command.set_defaults(run=_report)
    command.add_argument("file", metavar="FILE", type=Path, help="a recording, from the folder given as record_dir")
    command.add_argument("--html", metavar="OUT", type=Path, help="also write a self-contained HTML page with plots")


def _report(options: argparse.Namespace) -> int:
    from esper_telemetry.recorder.recording import read_recording
    from esper_telemetry.recorder.report.page import report_page
    from esper_telemetry.recorder.report.text import report_text

    try:
        recording = read_recording(options.file)
        if options.html is not None:
            options.html.write_text(report_page(recording), "utf-8")
    except ValueError as error:
        print(f"esper report: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"esper report: {error.filename}: {error.strerror}", file=sys.stderr)
        return EXIT_USAGE
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the bars of a sparkline are not in every terminal's alphabet
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(report_text(recording, shutil.get_terminal_size().columns, color))
    if options.html is not None:
        print(f"\nwritten to {options.html}")
    return 0
