"""What watching costs a whole training run."""

from __future__ import annotations

import gc
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from statistics import median
from typing import Any

import gymnasium
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.logger import Logger
from torch import Tensor, nn

from benchmarks.measurement import Section, Tick, alternate
from esper_telemetry import watch
from esper_telemetry.reference.ppo import BATCH_SIZE, EPOCHS, ROLLOUT_STEPS

try:
    import wandb
except ImportError:
    wandb = None

NOTHING = "no monitoring"
CONTROL = "no monitoring, once more"
OURS = "watch()"
NO_VERDICT = "watch(), without the verdict"
WANDB = 'wandb.watch(log="gradients", log_freq=1), offline'
ANOMALY = "torch.autograd.detect_anomaly()"

LOOK_EVERY = signature(watch).parameters["damage_every"].default

_VOCABULARY, _WIDTH, _HEADS, _LAYERS = 4096, 256, 4, 4
_BATCH, _LENGTH = 8, 128
_TIMED_STEPS = 5


@dataclass(frozen=True, slots=True)
class Job:
    """Hold training that is ready to start: the model that is watched, a warm-up, and the part that is timed."""

    model: nn.Module
    warm_up: Callable[[], object]
    train: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Workload:
    """Describe a training run; each sample prepares a new one, which does the same work each time.

    checks: backward passes in what is timed.
    """

    name: str
    title: str
    prepare: Callable[[], Job]
    checks: int


class SmallGPT(nn.Module):
    """Predict the next token, as small as a transformer can be and still look like one."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(_VOCABULARY, _WIDTH)
        self.position = nn.Embedding(_LENGTH, _WIDTH)
        block = nn.TransformerEncoderLayer(_WIDTH, _HEADS, 4 * _WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, _LAYERS, nn.LayerNorm(_WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(_WIDTH, _VOCABULARY, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(_LENGTH))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of each next token."""
        hidden = self.token(tokens) + self.position.weight
        return self.head(self.blocks(hidden, mask=self.mask, is_causal=True))


def _gpt() -> Job:
    torch.manual_seed(0)
    model = SmallGPT()
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(_VOCABULARY, (_BATCH, _LENGTH + 1))

    def step() -> None:
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()

    def train() -> None:
        for _ in range(_TIMED_STEPS):
            step()

    return Job(model, step, train)


def _ppo(total: int, n_steps: int, batch_size: int, n_epochs: int) -> Job:
    env = gymnasium.make("CartPole-v1")
    model = PPO(*("MlpPolicy", env), n_steps=n_steps, batch_size=batch_size, n_epochs=n_epochs, seed=0, device="cpu")
    model.set_logger(Logger(folder=None, output_formats=[]))
    return Job(model.policy, lambda: None, partial(model.learn, total))


WORKLOADS = [
    Workload(
        "sb3",
        "stable-baselines3 PPO on CartPole, its defaults (2,048 steps, batch 64, 10 epochs), one whole learn()",
        partial(_ppo, 2048, 2048, 64, 10),
        10 * 2048 // 64,
    ),
    Workload(
        "sb3-short",
        f"stable-baselines3 PPO on CartPole, short rollouts ({ROLLOUT_STEPS} steps, batch {BATCH_SIZE}, "
        f"{EPOCHS} epochs), one whole learn() of 8 updates",
        partial(_ppo, 8 * ROLLOUT_STEPS, ROLLOUT_STEPS, BATCH_SIZE, EPOCHS),
        8 * EPOCHS * ROLLOUT_STEPS // BATCH_SIZE,
    ),
    Workload(
        "gpt",
        f"small GPT ({_LAYERS} layers, width {_WIDTH}, {_BATCH} x {_LENGTH} tokens), {_TIMED_STEPS} steps of forward, "
        "backward and AdamW after a warm-up step",
        _gpt,
        _TIMED_STEPS,
    ),
]

_OwnClock = Callable[[], float]
_Watcher = Callable[[nn.Module], AbstractContextManager[_OwnClock | None]]


@contextmanager
def _nothing(_: nn.Module) -> Iterator[None]:
    yield


@contextmanager
def _ours(model: nn.Module, looks: list[float] | None = None, **options: Any) -> Iterator[_OwnClock]:
    """Watch; at the end `looks` takes in what one look at parameters, buffers and optimizer state takes."""
    monitor = watch(model, **options)
    try:
        yield lambda: monitor.snapshot.monitor_seconds
        if looks is not None:
            started = time.perf_counter()
            monitor._verdict.look()
            looks.append(time.perf_counter() - started)
    finally:
        monitor.close()


@contextmanager
def _wandb(model: nn.Module) -> Iterator[None]:
    """Watch in a run of its own, so that what is still in its queue is finished outside the time of the next."""
    with tempfile.TemporaryDirectory() as directory:
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True)
        run = wandb.init(mode="offline", dir=directory, settings=settings)
        wandb.watch(model, log="gradients", log_freq=1)
        try:
            yield
        finally:
            wandb.unwatch(model)
            run.finish()


@contextmanager
def _anomaly(_: nn.Module) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it is slow
        with torch.autograd.detect_anomaly():
            yield


def watchers(looks: list[float] | None = None) -> dict[str, _Watcher]:
    """Return name -> a context in which a model is watched; those that can run here."""
    here: dict[str, _Watcher] = {
        NOTHING: _nothing,
        CONTROL: _nothing,
        OURS: partial(_ours, looks=looks),
        NO_VERDICT: partial(_ours, trap=False, damage_every=10**9),
        WANDB: _wandb,
        ANOMALY: _anomaly,
    }
    if wandb is None:
        del here[WANDB]
    return here


def measure_workload(workload: Workload, rounds: int, tick: Tick) -> Section:
    """Train under each watcher by turns."""
    shares: list[float] = []
    looks: list[float] = []
    timed: Mapping[str, Callable[[], float]] = {
        name: partial(_timed, workload, watcher, shares) for name, watcher in watchers(looks).items()
    }
    timed[NOTHING]()  # warms up what is warmed up once per process
    samples = alternate(timed, rounds, tick, often={NOTHING, CONTROL, OURS, NO_VERDICT})
    section = Section(workload.name, workload.title, NOTHING, samples)
    section.notes.append(f"By its own clock {OURS} took {median(shares):.2%} of the run.")
    step = median(samples[NOTHING]) / workload.checks
    look = median(looks)
    section.notes.append(
        f"A look at parameters, buffers and optimizer state took {look * 1e3:.2f} ms; one in {LOOK_EVERY:,} checks is "
        f"{look / LOOK_EVERY / step:.4%} of the run."
    )
    if wandb is None:
        section.skipped[WANDB] = "wandb is not installed"
    return section


def _timed(workload: Workload, watcher: _Watcher, shares: list[float]) -> float:
    job = workload.prepare()
    gc.collect()
    with watcher(job.model) as own_clock:
        job.warm_up()
        before = own_clock() if own_clock else 0.0
        started = time.perf_counter()
        job.train()
        seconds = time.perf_counter() - started
        if own_clock:
            shares.append((own_clock() - before) / seconds)
    return seconds
