"""A trainer for the end-to-end tests: the two lines of the README around a small loop, and a fault."""

import argparse
import os
import signal
import time

import torch
from torch import nn

from esper_telemetry import start_exporter, start_textfile, watch
from esper_telemetry.faults import Fault, FaultInjector


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", default="127.0.0.1:0")
    parser.add_argument("--inject", type=Fault.parse, action="append", default=[])
    parser.add_argument("--wait", action="store_true", help="train only after a line on standard input")
    parser.add_argument("--checks", type=int, default=10**9)
    parser.add_argument("--pause", type=float, default=0.02, help="seconds between two steps")
    parser.add_argument("--on-critical", default="continue")
    parser.add_argument("--kill-at", type=int, help="SIGKILL ourselves right after this check")
    parser.add_argument("--textfile-dir")
    parser.add_argument("--window", type=float, default=5.0)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    monitor = watch(
        model,
        on_critical=options.on_critical,
        recent_window_seconds=options.window,
        before_check=FaultInjector(model, options.inject),
    )
    exporter = start_exporter(monitor, options.address)
    if options.textfile_dir:
        start_textfile(monitor, options.textfile_dir)
    print(exporter.url, flush=True)
    if options.wait:
        input()
    for check in range(1, options.checks + 1):
        model.zero_grad()
        model(torch.randn(4, 8)).square().sum().backward()
        print(check, flush=True)
        if check == options.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(options.pause)
    monitor.close()


if __name__ == "__main__":
    main()
