"""What watching costs a training step of a small GPT in bfloat16."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu.clock import without_garbage_collection
from esper_telemetry import watch

NOTHING = "no monitoring"
CONTROL = "no monitoring, once more"
OURS = "watch()"

_STEPS = 6


@dataclass(frozen=True, slots=True)
class Size:
    """Say how large a GPT is, and what it is given in a step."""

    vocabulary: int = 32768
    width: int = 1024
    heads: int = 16
    layers: int = 12
    batch: int = 16
    length: int = 1024


TINY = Size(vocabulary=64, width=16, heads=2, layers=1, batch=2, length=8)


class Block(nn.Module):
    """Attend and transform."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm = nn.LayerNorm(size.width)
        self.attention = nn.Linear(size.width, 3 * size.width)
        self.mix = nn.Linear(size.width, size.width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(size.width),
            nn.Linear(size.width, 4 * size.width),
            nn.GELU(),
            nn.Linear(4 * size.width, size.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return what the next block is given."""
        query, key, value = (
            each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in self.attention(self.norm(x)).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).flatten(2))
        return x + self.feed_forward(x)


class GPT(nn.Module):
    """Predict the next token."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.token = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Embedding(size.length, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of each next token."""
        hidden = self.blocks(self.token(tokens) + self.position.weight)
        return F.linear(self.norm(hidden), self.token.weight)


@dataclass(slots=True)
class Training:
    """Hold a GPT that is trained on the same random tokens again and again."""

    model: nn.Module
    step: Callable[[], object]

    @classmethod
    def of(cls, size: Size, device: torch.device) -> Training:
        """Make a GPT and its optimizer."""
        torch.manual_seed(0)
        model = GPT(size).to(device, torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        tokens = torch.randint(size.vocabulary, (size.batch, size.length + 1), device=device)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs).flatten(0, 1), targets).backward()
            optimizer.step()

        return cls(model, step)


def measure_step(device: torch.device, size: Size, seconds: float, rounds: int = 60) -> dict[str, object]:
    """Train with and without a monitor by turns, and without it against itself."""
    training = Training.of(size, device)
    for _ in range(5):
        training.step()
    deadline = time.monotonic() + seconds
    samples: dict[str, list[float]] = {NOTHING: [], CONTROL: [], OURS: []}
    own: list[float] = []
    checks = 0
    for number in range(rounds):
        if number > 2 and time.monotonic() > deadline:
            break
        for name in random.Random(number).sample(list(samples), len(samples)):
            if name != OURS:
                samples[name].append(_seconds(training))
                continue
            monitor = watch(training.model)
            training.step()  # makes its buffers
            monitor.flush()
            before = monitor.snapshot.monitor_seconds
            samples[name].append(_seconds(training))
            monitor.flush()
            own.append((monitor.snapshot.monitor_seconds - before) / _STEPS)
            checks += monitor.snapshot.checks
            assert (monitor.snapshot.monitor_errors, monitor.snapshot.checks) == (0, 1 + _STEPS)
            monitor.close()
    parameters = sum(each.numel() for each in training.model.parameters())
    tensors = len(list(training.model.parameters()))
    return {
        "kind": "step",
        "title": (
            f"Training step of a GPT in bf16: {size.layers} layers, width {size.width}, {parameters:,} parameters in "
            f"{tensors} tensors, {size.batch} x {size.length} tokens, fused AdamW"
        ),
        "steps": _STEPS,
        "samples": samples,
        "host_seconds_per_check": median(own),
        "checks": checks,
    }


def _seconds(training: Training) -> float:
    """Return the device's seconds of one step, among several after one that warms up."""
    with without_garbage_collection():
        training.step()
        torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_STEPS - 1):
            training.step()
        end.record()
        torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / (_STEPS - 1)
