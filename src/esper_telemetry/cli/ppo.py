"""`esper ppo`: train the reference job with its gradients watched."""

from __future__ import annotations

import argparse
import sys
import threading
from typing import TYPE_CHECKING

from esper_telemetry.cli.parser import EXIT_FAILED, EXIT_HALTED, EXIT_INTERRUPTED, EXIT_USAGE, Commands, seconds, whole
from esper_telemetry.exporters.address import DEFAULT_PORT
from esper_telemetry.health import POLICIES

if TYPE_CHECKING:
    from esper_telemetry.reference.faults import Fault
    from esper_telemetry.reference.ppo import PPOJob, Summary

_PPO = "Train a PPO agent with its gradients watched, and serve the metrics at /metrics."


def add_ppo(commands: Commands) -> None:
    """Add the command."""
    ppo = commands.add_parser("ppo", help="train PPO with its gradients watched", description=_PPO)
    ppo.set_defaults(run=_ppo)
    ppo.add_argument("--episodes", type=whole, default=10, help="episodes to train for (default: 10)")
    ppo.add_argument("--env", default="CartPole-v1", help="Gymnasium environment (default: CartPole-v1)")
    ppo.add_argument("--seed", type=whole, default=0, help="seed of environment and policy (default: 0)")
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
        help="what to do when a check finds more than 5 Inf or NaN elements: go on, skip that optimizer step, "
        "halt with exit code 3, or restore the last good state when the model is damaged (default: continue)",
    )
    ppo.add_argument(
        "--rewind-every",
        metavar="CHECKS",
        type=whole,
        default=100,
        help="with --on-critical rewind, good checks between two copies of the last good state (default: 100)",
    )
    ppo.add_argument(
        "--max-rewinds",
        metavar="TIMES",
        type=whole,
        default=3,
        help="with --on-critical rewind, how many times to go back before the run is halted (default: 3)",
    )
    _add_serving(ppo)
    _add_exports(ppo)


def _add_serving(ppo: argparse.ArgumentParser) -> None:
    ppo.add_argument(
        "--listen-address",
        "--web.listen-address",
        dest="listen_address",
        metavar="HOST:PORT",
        help="where to serve /metrics; port 0 picks a free one (default: ESPER_LISTEN_ADDRESS, or "
        f"127.0.0.1:{DEFAULT_PORT} plus the local rank)",
    )
    ppo.add_argument(
        "--linger",
        metavar="SECONDS",
        type=seconds,
        help="at exit, wait at most this long for the last state to be scraped (default: ESPER_LINGER_SECONDS, or one "
        "and a half scrape intervals, at most 90 s)",
    )
    ppo.add_argument("--hold", action="store_true", help="after training, keep serving until Ctrl-C")
    ppo.add_argument(
        "--web.config.file",
        dest="web_config_file",
        metavar="FILE",
        help="serve with TLS and passwords, as configured in FILE (the web config file of Prometheus's exporters)",
    )
    ppo.add_argument("--allow-drill", action="store_true", help="let `esper drill` on this host show a made-up value")


def _add_exports(ppo: argparse.ArgumentParser) -> None:
    ppo.add_argument(
        "--textfile-dir",
        metavar="DIR",
        help="also write the metrics to a file in DIR, for node_exporter's textfile collector",
    )
    ppo.add_argument(
        "--otlp-endpoint",
        metavar="URL",
        help="also push the metrics to an OpenTelemetry receiver such as http://127.0.0.1:4318; obeys OTEL_* variables",
    )
    ppo.add_argument(
        "--record-dir",
        metavar="DIR",
        help="write a recording of the first bad check of each episode to DIR, for `esper report`",
    )


def _fault(text: str) -> Fault:
    from esper_telemetry.reference.faults import Fault

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
                rewind_every=options.rewind_every,
                max_rewinds=options.max_rewinds,
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
        missed = ", ".join(map(str, summary.missed))
        print(f"esper ppo: not injected, because the run ended first: {missed}", file=sys.stderr)
        return EXIT_FAILED
    return 0


def _hold(url: str) -> None:
    try:
        print(f"training is over; {url} stays up until Ctrl-C", flush=True)
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
