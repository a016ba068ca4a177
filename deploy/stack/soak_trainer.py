"""A small trainer for `deploy.stack.soak`: one bad check, whose time it prints."""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import nn

from esper_telemetry import start_exporter, watch
from esper_telemetry.reference.faults import Fault, FaultInjector

PAUSE_SECONDS = 0.02
LAST_SECONDS = 2.5  # two scrapes, which see that the run has ended


def main() -> None:
    """Print the exporter's URL, wait for a line, train up to the bad check, and exit or go on until input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--inject", type=Fault.parse, required=True)
    parser.add_argument("--exit", action="store_true", help="exit right after the bad check")
    options = parser.parse_args()

    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    monitor = watch(model, before_check=FaultInjector(model, [options.inject]))
    exporter = start_exporter(monitor, options.address)
    print(exporter.url, flush=True)
    sys.stdin.readline()
    for check in range(1, options.inject.check + 1):
        if check > 1:
            time.sleep(PAUSE_SECONDS)
        model.zero_grad()
        loss = model(torch.randn(4, 8)).square().sum()
        now = time.time()
        loss.backward()
    monitor.close() if options.exit else monitor.flush()
    print(now, flush=True)
    if not options.exit:
        sys.stdin.read()
        monitor.close()
        time.sleep(LAST_SECONDS)


if __name__ == "__main__":
    main()
