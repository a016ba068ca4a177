"""What a check must never do to a training step: wait, allocate, disturb other streams, break a capture."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable
from statistics import median

import torch

from benchmarks.gpu.contenders import Launch
from benchmarks.gpu.step import Size, Training
from esper_telemetry import GradientMonitor, watch

SMALL = Size(vocabulary=4096, width=256, heads=4, layers=4, batch=4, length=128)


def measure_behaviour(device: torch.device, launch: Launch, size: Size, steps: int) -> dict[str, object]:
    """Look at each promise; what fails is told beside what holds."""
    training = Training.of(size, device)
    for _ in range(3):
        training.step()
    facts: dict[str, object] = {}
    for what, look in {
        "synchronisations": lambda: _synchronisations(training, steps),
        "host": lambda: _host(training, steps),
        "allocations": lambda: _allocations(training, steps),
        "streams": lambda: _streams(device, launch),
        "delay": lambda: _delay(training, steps),
        "capture": lambda: _capture(device, launch),
    }.items():
        try:
            facts |= look()
        except Exception as error:
            facts[f"{what}_error"] = f"{type(error).__name__}: {error}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
    return {"kind": "behaviour", "title": "What a check does to a training step", "facts": facts}


def _synchronisations(training: Training, steps: int) -> dict[str, object]:
    """Count those that torch warns of, with and without a monitor; then let them be errors."""
    without = _warnings(training, steps)
    monitor = _warm(training, steps)
    with_monitor = _warnings(training, steps)
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(steps):
        training.step()
    torch.cuda.set_sync_debug_mode("default")
    monitor.flush()
    errors, checks = monitor.snapshot.monitor_errors, monitor.snapshot.checks
    monitor.close()
    return {
        "steps": steps,
        "synchronisations_without": without,
        "synchronisations_with": with_monitor,
        "errors_where_they_are_errors": errors,
        "checks": checks,
    }


def _warnings(training: Training, steps: int) -> int:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in range(steps):
            training.step()
        torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(each.message) for each in caught)


def _host(training: Training, steps: int) -> dict[str, object]:
    """Time `update()` while the device is far behind: whoever waits for it takes as long as it is behind."""
    model = training.model
    training.step()
    monitor = GradientMonitor(model)
    for _ in range(steps):  # as many checks are under way later
        torch.cuda._sleep(1_000_000)
        monitor.update()
    monitor.flush()
    torch.cuda.synchronize()
    behind = _seconds(lambda: (torch.cuda._sleep(400_000_000), torch.cuda.synchronize()))
    torch.cuda._sleep(400_000_000)
    took = [_seconds(monitor.update) for _ in range(steps // 2)]
    published = monitor.snapshot.checks
    monitor.flush()
    checks, errors = monitor.snapshot.checks, monitor.snapshot.monitor_errors
    monitor.close()
    return {
        "update_seconds_behind": max(took),
        "device_seconds_behind": behind,
        "results_published_early": published - steps,
        "results_published_late": checks - steps,
        "errors_behind": errors,
    }


def _allocations(training: Training, steps: int) -> dict[str, object]:
    without = _allocated(training, steps)
    monitor = _warm(training, steps)
    with_monitor = _allocated(training, steps)
    monitor.close()
    return {
        f"{memory}_allocations_per_step": (with_monitor[memory] - count) / steps for memory, count in without.items()
    }


def _allocated(training: Training, steps: int) -> dict[str, int]:
    """Return how often memory of the device, and pinned memory of the host where torch counts it, was asked for."""

    def now() -> dict[str, int]:
        counts = {"device": torch.cuda.memory_stats()["allocation.all.allocated"]}
        pinned = torch.cuda.host_memory_stats() if hasattr(torch.cuda, "host_memory_stats") else {}
        if "allocations.allocated" in pinned:
            counts["pinned"] = pinned["allocations.allocated"]
        return counts

    before = now()
    for _ in range(steps):
        training.step()
    torch.cuda.synchronize()
    return {memory: count - before[memory] for memory, count in now().items()}


def _streams(device: torch.device, launch: Launch) -> dict[str, object]:
    """Let a gradient arrive late on a stream of its own, and check it there."""
    gradient = torch.zeros(1 << 20, device=device)
    launch([gradient]).result()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        launch([gradient]).result()
        torch.cuda._sleep(200_000_000)
        gradient[7:8].fill_(math.inf)
        pending = launch([gradient])
        gradient.zero_()
    early = pending.ready()
    idle = torch.cuda.current_stream().query()
    return {
        "side_stream_counts": list(pending.result().bad.get(0, (0, 0))),
        "side_stream_ready_early": early,
        "side_stream_left_the_current_one_idle": idle,
    }


def _delay(training: Training, steps: int) -> dict[str, object]:
    """Poll a monitor from its check until what it found is published, on a device that has nothing else to do."""
    training.step()
    monitor = GradientMonitor(training.model)
    took = []
    for _ in range(steps * 3):
        torch.cuda.synchronize()
        checks = monitor.snapshot.checks
        started = time.perf_counter()
        monitor.update()
        returned = time.perf_counter()
        while monitor.snapshot.checks == checks:
            pass
        took.append((time.perf_counter() - started, returned - started))
    monitor.close()
    return {
        "publish_seconds": median(total for total, _ in took[steps // 2 :]),
        "publish_seconds_at_most": max(total for total, _ in took[steps // 2 :]),
        "update_seconds": median(call for _, call in took[steps // 2 :]),
    }


def _capture(device: torch.device, launch: Launch) -> dict[str, object]:
    """Check while a graph is captured: the graph is whole, and the check says why it was none."""
    model = torch.nn.Linear(64, 64).to(device)
    model(torch.ones(8, 64, device=device)).sum().backward()
    monitor = GradientMonitor(model)
    monitor.update()
    monitor.flush()
    assert model.weight.grad is not None
    words = ""
    before = model.weight.grad.clone()
    graph = torch.cuda.CUDAGraph()
    logging.getLogger("esper_telemetry").setLevel(logging.CRITICAL)  # it would print the error, as it should
    with torch.cuda.graph(graph):
        model.weight.grad.mul_(2)
        monitor.update()
        try:
            launch([model.weight.grad])
        except RuntimeError as error:
            words = str(error)
    logging.getLogger("esper_telemetry").setLevel(logging.NOTSET)
    graph.replay()
    torch.cuda.synchronize()
    return {
        "capture_refused": words,
        "capture_survived": bool(torch.equal(model.weight.grad, before * 2)),
        "capture_errors_counted": monitor.snapshot.monitor_errors,
    }


def _warm(training: Training, steps: int) -> GradientMonitor:
    """Watch, until every buffer is there that checks under way at once take."""
    monitor = watch(training.model)
    for _ in range(steps):
        training.step()
    monitor.flush()
    torch.cuda._sleep(100_000_000)
    for _ in range(steps):
        training.step()
    monitor.flush()
    torch.cuda.synchronize()
    return monitor


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
