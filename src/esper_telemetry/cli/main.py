"""The `esper` command."""

from __future__ import annotations

import argparse
import io
import logging
import os
import shutil
import sys
import threading
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeAlias

from esper_telemetry.cli import drill
from esper_telemetry.exporters.address import DEFAULT_PORT, default_address
from esper_telemetry.metrics import KINDS
from esper_telemetry.monitor import POLICIES
from esper_telemetry.recorder.recording import read_recording
from esper_telemetry.recorder.report.page import report_page
from esper_telemetry.recorder.report.text import report_text
from esper_telemetry.reference.faults import Fault

if TYPE_CHECKING:
    from esper_telemetry.reference.ppo import PPOJob, Summary

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_HALTED = 3
EXIT_INTERRUPTED = 130

_Commands: TypeAlias = "argparse._SubParsersAction[_Parser]"

_ESPER = "Numerical health of PyTorch gradients, from param.grad to the on-call phone."
_PPO = "Train a PPO agent with its gradients watched, and serve what is measured at /metrics."
_DRILL = (
    "Make a running exporter, started with --allow-drill, show a made-up value that is labelled as a drill all the way "
    "to the page; report when it arrives at each station; then clear it."
)

_REPORT = "Show a recording of the flight recorder: what was bad, where it began, and the checks before."


class _Parser(argparse.ArgumentParser):
    """Say what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message.removeprefix('argument ')}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `esper` and return its exit code."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    code: int = options.run(options)
    return code


def _parser() -> _Parser:
    parser = _Parser("esper", description=_ESPER)
    parser.add_argument("--version", action="version", version=f"esper-telemetry {version('esper-telemetry')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_ppo(commands)
    _add_drill(commands)
    _add_report(commands)
    return parser


def _add_ppo(commands: _Commands) -> None:
    ppo = commands.add_parser("ppo", help="train PPO with its gradients watched", description=_PPO)
    ppo.set_defaults(run=_ppo)
    ppo.add_argument("--episodes", type=_whole, default=10, help="episodes to train for (default: 10)")
    ppo.add_argument("--env", default="CartPole-v1", help="Gymnasium environment (default: CartPole-v1)")
    ppo.add_argument("--seed", type=_whole, default=0, help="seed of environment and policy (default: 0)")
    ppo.add_argument(
        "--listen-address",
        metavar="HOST:PORT",
        default=default_address(),
        help="where to serve /metrics; port 0 picks a free one (default: %(default)s)",
    )
    ppo.add_argument(
        "--inject",
        metavar="KIND:COUNT@CHECK[:LAYER]",
        type=_fault,
        action="append",
        default=[],
        help="write COUNT bad elements (inf or nan) into the gradient at that check; may be repeated",
    )
    ppo.add_argument(
        "--on-critical",
        choices=POLICIES,
        default="continue",
        help="what to do when a check finds more than 5 bad elements of a kind: go on, skip that optimizer step, or "
        "halt with exit code 3 (default: continue)",
    )
    ppo.add_argument(
        "--linger",
        metavar="SECONDS",
        type=_seconds,
        default=20.0,
        help="at exit, stay up this long at most until the last bad check was scraped (default: 20)",
    )
    ppo.add_argument(
        "--textfile-dir",
        metavar="DIR",
        help="also write the metrics to a file in DIR, for node_exporter's textfile collector",
    )
    ppo.add_argument(
        "--otlp-endpoint",
        metavar="URL",
        help="also push the metrics to an OpenTelemetry receiver, such as http://127.0.0.1:4318; OTEL_* variables hold",
    )
    ppo.add_argument(
        "--record-dir",
        metavar="DIR",
        help="record the first bad check of each episode of trouble in a file in DIR, for `esper report`",
    )
    ppo.add_argument(
        "--web.config.file",
        dest="web_config_file",
        metavar="FILE",
        help="serve with TLS and passwords as FILE says, in the format that Prometheus's exporters share",
    )
    ppo.add_argument("--allow-drill", action="store_true", help="let `esper drill` on this host show a made-up value")
    ppo.add_argument("--hold", action="store_true", help="after training, keep serving until Ctrl-C")


def _add_drill(commands: _Commands) -> None:
    command = commands.add_parser("drill", help="see a made-up bad gradient reach Alertmanager", description=_DRILL)
    command.set_defaults(run=_drill)
    for server, port in (("exporter", DEFAULT_PORT), ("prometheus", 9090), ("alertmanager", 9093)):
        url = f"http://127.0.0.1:{port}"
        command.add_argument(f"--{server}", metavar="URL", default=url, help=f"the {server} (default: {url})")
    command.add_argument("--kind", choices=KINDS, default="inf", help="what the made-up check found (default: inf)")
    command.add_argument("--count", type=_whole, default=6, help="how many elements; 6 and more page (default: 6)")
    command.add_argument("--timeout", metavar="SECONDS", type=_seconds, default=120.0, help="limit (default: 120)")


def _add_report(commands: _Commands) -> None:
    command = commands.add_parser("report", help="show what the flight recorder wrote", description=_REPORT)
    command.set_defaults(run=_report)
    command.add_argument("file", metavar="FILE", type=Path, help="a recording, from the folder given as record_dir")
    command.add_argument("--html", metavar="OUT", type=Path, help="also write a page with plots, complete in one file")


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected seconds, got {text!r}") from None


def _fault(text: str) -> Fault:
    try:
        return Fault.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _ppo(options: argparse.Namespace) -> int:
    try:
        from esper_telemetry.reference.ppo import Options, PPOJob

        job = PPOJob(
            Options(
                episodes=options.episodes,
                env=options.env,
                seed=options.seed,
                listen_address=options.listen_address,
                inject=options.inject,
                on_critical=options.on_critical,
                linger=options.linger,
                textfile_dir=options.textfile_dir,
                record_dir=options.record_dir,
                otlp_endpoint=options.otlp_endpoint,
                web_config_file=options.web_config_file,
                allow_drill=options.allow_drill,
            )
        )
    except (ImportError, ValueError) as error:
        print(f"esper ppo: {error}", file=sys.stderr)
        return EXIT_USAGE
    try:
        return _train(job, options)
    except KeyboardInterrupt:
        print("esper ppo: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        job.close()


def _train(job: PPOJob, options: argparse.Namespace) -> int:
    from esper_telemetry.reference.terminal import open_display

    print(f"esper ppo: {options.env}, metrics at {job.exporter.url}/metrics", flush=True)
    display = open_display(options.episodes)
    try:
        summary = job.train(display)
    finally:
        display.close()
    _print_summary(summary)
    if options.hold:
        _hold(job.exporter.url)
    return _exit_code(summary)


def _exit_code(summary: Summary) -> int:
    if summary.halted is not None:
        print(f"esper ppo: halted: {summary.halted}", file=sys.stderr)
        return EXIT_HALTED
    if summary.died is not None:
        print(f"esper ppo: training died after bad check {summary.first_bad_check}: {summary.died}", file=sys.stderr)
        return EXIT_FAILED
    if summary.missed:
        print(f"esper ppo: not injected, the run ended before: {', '.join(map(str, summary.missed))}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _hold(url: str) -> None:
    print(f"training is over; {url} stays up until Ctrl-C", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print()


def _print_summary(summary: Summary) -> None:
    share = summary.monitor_seconds / summary.seconds if summary.seconds else 0.0
    first = f"{summary.first_bad_layer}, at check {summary.first_bad_check}" if summary.bad_checks else "none"
    print(
        f"checks           {summary.checks}\n"
        f"bad checks       {summary.bad_checks}\n"
        f"worst check      Inf {summary.worst_inf}, NaN {summary.worst_nan}\n"
        f"first bad layer  {first}\n"
        f"measuring        {summary.monitor_seconds:.3f} s, {share:.1%} of the {summary.seconds:.1f} s run",
        flush=True,
    )


def _drill(options: argparse.Namespace) -> int:
    asked = drill.Options(
        exporter=options.exporter.rstrip("/"),
        prometheus=options.prometheus.rstrip("/"),
        alertmanager=options.alertmanager.rstrip("/"),
        kind=options.kind,
        count=options.count,
        timeout=options.timeout,
    )
    print(f"esper drill: {asked.kind} {asked.count} at {asked.exporter}", flush=True)
    reached = False
    try:
        for station in drill.run_drill(asked):
            reached = station.seconds is not None
            when = f"after {station.seconds:.1f} s" if reached else f"NOT within {asked.timeout:g} s"
            print(f"{station.name:<22} {when}", flush=True)
    except ValueError as error:
        print(f"esper drill: {error}", file=sys.stderr)
        return EXIT_USAGE
    print("the drill is cleared; its page resolves by itself", flush=True)
    return 0 if reached else EXIT_FAILED


def _report(options: argparse.Namespace) -> int:
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
