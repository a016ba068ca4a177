"""One rank of a run that does what it is told on standard input, line by line, and answers each line with one of JSON.

check N: make a check that finds N NaN. damage N: let N parameters be NaN. ranks: tell what is known of the ranks.
close: close the monitor.
"""

import json
import os
import sys
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
from torch import nn

from esper_telemetry import start_exporter, watch
from esper_telemetry.ranks import board


def join():
    """Join the run, and return this rank's group of one: what it finds are elements of its own."""
    dist.init_process_group("gloo")
    return [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]


def main():
    board.SILENT_SECONDS = float(os.environ.get("SILENT_SECONDS", board.SILENT_SECONDS))
    late = "--late" in sys.argv
    alone = None if late else join()
    model = nn.Linear(8, 8)
    found = 0

    def before_check(_):
        model.weight.grad.view(-1)[:found] = float("nan")

    monitor = watch(model, before_check=before_check, replicas=lambda name, parameter: alone)
    lingers = "--linger" in sys.argv and dist.get_rank() == 0
    exporter = start_exporter(monitor, "127.0.0.1:0", linger=None if lingers else 0)
    if late:
        alone = join()
    print(exporter.url, flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        answer = None
        if command == "check":
            found = int(arguments[0])
            began = time.perf_counter()
            model.zero_grad()
            model(torch.ones(1, 8)).sum().backward()
            answer = time.perf_counter() - began
        elif command == "damage":
            model.bias.data[: int(arguments[0])] = float("nan")
        elif command == "ranks":
            ranks = monitor.snapshot.ranks
            recent = None if ranks is None else ranks.recent.read(time.monotonic())
            answer = None if ranks is None else asdict(ranks) | {"inf": recent.inf_max, "nan": recent.nan_max}
        elif command == "errors":
            answer = monitor.snapshot.monitor_errors
        elif command == "close":
            monitor.close()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
