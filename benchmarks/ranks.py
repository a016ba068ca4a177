"""What a healthy check costs on each of two ranks, against one process, and what a vote costs.

`python -m benchmarks.ranks` writes RANKS.md; about 2 minutes. The model is a small GPT; each process has one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from benchmarks.machine import machine
from esper_telemetry import watch
from esper_telemetry.ranks.vote import Found, Vote

WIDTH, DEPTH, VOCABULARY, LENGTH, BATCH = 512, 8, 4096, 128, 2
STEPS, VOTES = 4, 200
SET_UPS = ("one process", "DDP", "FSDP2", "DDP without (a)", "FSDP2 without (a)")


class Block(nn.Module):
    """A transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.read, self.write = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, given: Tensor) -> Tensor:
        """Attend, then think."""
        batch, length, _ = given.shape
        heads = self.read(self.before_attention(given)).view(batch, length, 3, 8, WIDTH // 8).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*heads, is_causal=True)
        given = given + self.write(attended.transpose(1, 2).reshape(given.shape))
        return given + self.mlp(self.before_mlp(given))


def gpt() -> nn.Sequential:
    """Return a GPT without positions: what is measured does not depend on them."""
    torch.manual_seed(0)
    blocks = [Block() for _ in range(DEPTH)]
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY))


def measure(set_up: str) -> dict[str, float]:
    """Train with and without a monitor in turns; return the medians in seconds."""
    model = gpt()
    elements = sum(parameter.numel() for parameter in model.parameters())
    trained: nn.Module = model
    if set_up.startswith("DDP"):
        trained = DistributedDataParallel(model)
    if set_up.startswith("FSDP2"):
        for block in model[1:-2]:
            fully_shard(block)
        trained = fully_shard(model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1))

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        guessed = trained(tokens[:, :-1])
        functional.cross_entropy(guessed.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        return time.perf_counter() - started

    step()
    bare = [step() for _ in range(STEPS)]
    with watch(trained, attribution="without" not in set_up, trap=False) as monitor:
        step(), step()  # the first passes are looked at twice
        checks = []
        for _ in range(STEPS):
            before = monitor.snapshot.monitor_seconds
            step()
            checks.append(monitor.snapshot.monitor_seconds - before)
        assert monitor.snapshot.checks == STEPS + 2
    return {"step": statistics.median(bare), "check": statistics.median(checks), "elements": elements}


def vote() -> dict[str, float]:
    """Return the median of a vote in seconds."""
    held, votes = Vote(), []
    for number in range(VOTES):
        dist.barrier()
        started = time.perf_counter()
        held.add_up(Found(0, 0, 0), number)
        votes.append(time.perf_counter() - started)
    return {"vote": statistics.median(votes)}


def as_rank(ranks: int) -> dict[str, dict[str, float]]:
    """Measure everything that so many ranks can, as one of them."""
    torch.set_num_threads(1)
    if ranks == 1:
        return {"one process": measure("one process")}
    dist.init_process_group("gloo")
    return {what: measure(what) for what in SET_UPS[1:]} | {"vote": vote()}


def run(ranks: int) -> dict[str, dict[str, float]]:
    """Measure in so many processes; return what the slowest rank says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", "benchmarks.ranks", "--as-rank-of", str(ranks)]
    started = [
        subprocess.Popen(command, env=environ | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    said = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    return {
        what: {key: max(each[what][key] for each in said) for key in measured} for what, measured in said[0].items()
    }


def report(results: dict[str, dict[str, float]], described: Any) -> str:
    """Return the results as a page."""
    one, held = results["one process"], results["vote"]["vote"]
    lines = [
        "# Two ranks",
        "",
        f"Measured by `make bench-ranks`: a GPT of {one['elements'] / 1e6:.0f} M elements, {BATCH} x {LENGTH} tokens,",
        "one thread in each process, medians of the slowest rank. (a) is what a rank's own backward made, (b) what its",
        "optimizer sees.",
        "",
        "| set-up | step without | a check, (a) and (b) | of a step | against one process |",
        "|---|---|---|---|---|",
    ]
    for name in SET_UPS:
        found = results[name]
        share, ratio = found["check"] / found["step"], found["check"] / one["check"]
        lines.append(
            f"| {name} | {found['step'] * 1e3:.0f} ms | {found['check'] * 1e3:.1f} ms | {share:.1%} | {ratio:.2f} x |"
        )
    lines += ["", f"A vote of two ranks on gloo: {held * 1e3:.2f} ms.", ""]
    lines += [f"Machine: {'; '.join(f'{name} {value}' for name, value in described.items())}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measure as a rank, or start all of them."""
    parser = argparse.ArgumentParser("benchmarks.ranks", description=__doc__)
    parser.add_argument("--as-rank-of", type=int, help="measure as one of so many ranks, and print what was measured")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("RANKS.md"))
    options = parser.parse_args()
    if options.as_rank_of is not None:
        print(json.dumps(as_rank(options.as_rank_of)))
        return
    page = report(run(1) | run(2), machine())
    options.output.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
