"""Train a small GPT on text that it makes, on as many ranks as torchrun starts, with DDP or FSDP2.

    torchrun --nproc-per-node 2 examples/ddp_gpt.py --inject nan:7@40:rank=1

Every rank serves its metrics; http://127.0.0.1:19301/ shows the run, /api/v1/targets lists its ranks for Prometheus.
A fault is written into what the rank's own backward pass makes, before any reduction.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
import time
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from esper_telemetry import start_exporter, watch

CONTEXT, WIDTH, HEADS, LAYERS = 32, 64, 4, 2
WORDS = ["the", "loss", "of", "a", "run", "that", "is", "well", "falls", "slowly", "gradient", "stays", "small"]
LETTERS = sorted({letter for word in WORDS for letter in word} | {" "})


class Fault(NamedTuple):
    """Hold what is written into the gradient of a weight, at which step, on which rank."""

    kind: str
    count: int
    step: int
    rank: int

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read KIND:COUNT@STEP:rank=RANK; raise ValueError on anything else."""
        match = re.fullmatch(r"(inf|nan):([1-9]\d*)@([1-9]\d*):rank=(\d+)", text)
        if match is None:
            raise ValueError(f"expected KIND:COUNT@STEP:rank=RANK such as nan:7@40:rank=1, got {text!r}")
        return cls(match[1], *map(int, match.groups()[1:]))


class Spoil(torch.autograd.Function):
    """Hand a weight on, and write bad elements into the middle of its gradient, where two shards meet."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, kind: str, count: int) -> Tensor:
        ctx.fault = kind, count
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        kind, count = ctx.fault
        bad = gradient.clone()
        middle = bad.numel() // 2
        bad.view(-1)[middle - (count + 1) // 2 : middle + count // 2] = float(kind)
        return bad, None, None


class Linear(nn.Linear):
    """A layer that can be spoiled for one backward pass."""

    fault: Fault | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        weight = self.weight
        if self.fault is not None:
            weight = Spoil.apply(weight, self.fault.kind, self.fault.count)
        return F.linear(inputs, weight, self.bias)


class Block(nn.Module):
    """Attention and a perceptron, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.norm(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """Predict the next letter."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(len(LETTERS), WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(LETTERS))

    def forward(self, letters: Tensor) -> Tensor:
        x = self.letters(letters) + self.places.weight[: letters.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make_batch(random_words: random.Random, size: int = 16) -> Tensor:
    """Return letters of text that has not been there before, one more than a context long."""
    texts = (" ".join(random_words.choices(WORDS, k=CONTEXT))[: CONTEXT + 1] for _ in range(size))
    return torch.tensor([[LETTERS.index(letter) for letter in text] for text in texts])


def parallel(model: GPT, strategy: str) -> nn.Module:
    """Spread the model over the ranks."""
    if strategy == "ddp":
        return DistributedDataParallel(model)
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a small GPT on several ranks, with a fault on purpose.")
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pause", type=float, default=0.0, metavar="SECONDS", help="between two steps, to watch it")
    parser.add_argument("--inject", type=Fault.parse, metavar="KIND:COUNT@STEP:rank=RANK")
    parser.add_argument(
        "--listen-address",
        metavar="HOST:PORT",
        help="of a host's first rank, the others take free ports there; without it 127.0.0.1:19301 and those after it",
    )
    parser.add_argument("--on-critical", choices=("continue", "skip", "halt"), default="continue")
    parser.add_argument("--linger", type=float, metavar="SECONDS", help="at the end, to be scraped once more")
    return parser.parse_args()


def address_of(given: str | None) -> str | None:
    """Return where this rank listens; None for the default, which has a port for each local rank."""
    if given is None or os.environ.get("LOCAL_RANK", "0") == "0":
        return given
    return f"{given.rpartition(':')[0]}:0"


def train(options: argparse.Namespace) -> None:
    """Train, and say now and then how it goes."""
    torch.manual_seed(0)
    rank, fault = dist.get_rank(), options.inject
    gpt = GPT()
    model = parallel(gpt, options.strategy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    needed = {} if options.on_critical == "continue" else {"optimizer": optimizer}
    with watch(model, on_critical=options.on_critical, **needed) as monitor:
        exporter = start_exporter(monitor, address_of(options.listen_address), linger=options.linger)
        print(f"rank {rank}: {exporter.url}", flush=True)
        words = random.Random(rank)
        for step in range(1, options.steps + 1):
            gpt.blocks[-1].up.fault = fault if fault and (fault.step, fault.rank) == (step, rank) else None
            batch = make_batch(words)
            logits = model(batch[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.record(loss=loss, step=step, samples=len(batch))
            if rank == 0 and step % 20 == 0:
                print(f"step {step}: loss {loss.item():.3f}", flush=True)
            time.sleep(options.pause)


def main() -> int:
    """Train on every rank that torchrun started."""
    options = parse_options()
    dist.init_process_group("gloo")
    try:
        train(options)
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
