"""A trainer for the end-to-end tests: the two lines of the README around a small loop, and a fault."""

import argparse
import os
import signal
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from esper_telemetry import start_exporter, start_otlp, start_textfile, watch
from esper_telemetry.reference.faults import Fault, FaultInjector

HUGE = 3e38  # finite in float32; the norm of two is not


def batches(workers):
    """Yield batches for ever, loaded by forked workers where there are any."""
    if not workers:
        while True:
            yield torch.randn(4, 8)
    data = TensorDataset(torch.randn(64, 8))
    while True:
        for (batch,) in DataLoader(data, batch_size=4, num_workers=workers, multiprocessing_context="fork"):
            yield batch


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
    parser.add_argument("--otlp-endpoint")
    parser.add_argument("--window", type=float, default=5.0)
    parser.add_argument("--allow-drill", action="store_true")
    parser.add_argument("--huge", type=int, default=0, help="elements of the last layer that are huge at every check")
    parser.add_argument("--leave", action="store_true", help="end without closing the monitor, as scripts do")
    parser.add_argument("--step", type=float, default=0.0, help="learning rate of Adam; 0 takes no steps")
    parser.add_argument("--workers", type=int, default=0, help="load the batches in forked workers")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    inject = FaultInjector(model, options.inject)

    def before_check(check):
        model[2].weight.grad.view(-1)[: options.huge] = HUGE
        inject(check)

    optimizer = torch.optim.Adam(model.parameters(), options.step) if options.step else None
    monitor = watch(
        model,
        optimizer=optimizer,
        on_critical=options.on_critical,
        recent_window_seconds=options.window,
        before_check=before_check,
    )
    exporter = start_exporter(monitor, options.address, allow_drill=options.allow_drill)
    if options.textfile_dir:
        start_textfile(monitor, options.textfile_dir)
    if options.otlp_endpoint:
        start_otlp(monitor, options.otlp_endpoint)
    print(exporter.url, flush=True)
    if options.wait:
        input()
    for check, batch in zip(range(1, options.checks + 1), batches(options.workers), strict=False):
        model.zero_grad()
        model(batch).square().sum().backward()
        if optimizer is not None:
            optimizer.step()
        print(check, flush=True)
        if check == options.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(options.pause)
    if not options.leave:
        monitor.close()


if __name__ == "__main__":
    main()
