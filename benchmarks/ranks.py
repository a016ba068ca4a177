"""What a healthy check costs on each of two ranks, against one process, and what a vote costs.

`python -m benchmarks.ranks` writes RANKS.md; about 5 minutes. The model is a small GPT; each process has one thread.
Two processes share caches and memory, so a check of two ranks is compared with that of two processes which train side
by side and know nothing of each other.
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
ROUNDS, STEPS, VOTES = 5, 4, 200
ALONE, CONTROL = "one process, alone", "one process of two"
SHARED = ("DDP", "FSDP2", "DDP without (a)", "FSDP2 without (a)")

Measured = dict[str, dict[str, float]]


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


def as_rank(ranks: int) -> Measured:
    """Measure everything that so many ranks can, as one of them."""
    torch.set_num_threads(1)
    if ranks == 1:
        return {CONTROL: measure(CONTROL)}
    dist.init_process_group("gloo")
    return {what: measure(what) for what in SHARED} | {"vote": vote()}


def run(processes: int, ranks: int) -> Measured:
    """Measure in so many processes, each one of so many ranks; return what the slowest says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    command = [sys.executable, "-m", "benchmarks.ranks", "--as-rank-of", str(ranks)]
    started = [
        subprocess.Popen(command, env=environ | {"RANK": str(process % ranks)}, stdout=subprocess.PIPE, text=True)
        for process in range(processes)
    ]
    said = [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]
    return {
        what: {key: max(each[what][key] for each in said) for key in measured} for what, measured in said[0].items()
    }


def run_round() -> Measured:
    """Measure all set-ups once."""
    return {ALONE: run(1, 1)[CONTROL]} | run(2, 1) | run(2, 2)


def report(rounds: list[Measured], described: Any) -> str:
    """Return the results as a page."""
    elements = rounds[0][ALONE]["elements"]
    lines = [
        "# Two ranks",
        "",
        f"Measured by `make bench-ranks`: a GPT of {elements / 1e6:.0f} M elements, {BATCH} x {LENGTH} tokens, one",
        f"thread in each process. Medians of the slower process over {len(rounds)} rounds, with the lowest and the",
        "highest. (a) counts what a rank's own backward made, (b) what its optimizer sees. `one process of two` trains",
        "beside another that it knows nothing of: it has as little of the caches and of the memory as a rank.",
        "",
        "| set-up | step without | a check, (a) and (b) | of a step | against one process of two |",
        "|---|---|---|---|---|",
    ]
    for name in (ALONE, CONTROL, *SHARED):
        found = [each[name] for each in rounds]
        ratios = [each[name]["check"] / each[CONTROL]["check"] for each in rounds]
        step, check = (statistics.median(each[key] for each in found) for key in ("step", "check"))
        share = statistics.median(each["check"] / each["step"] for each in found)
        ratio = f"{statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {name} | {step * 1e3:.0f} ms | {check * 1e3:.1f} ms | {share:.1%} | {ratio} |")
    held = statistics.median(each["vote"]["vote"] for each in rounds)
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
    described = machine()
    page = report([run_round() for _ in range(ROUNDS)], described)
    options.output.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
