"""Stand-ins for a device: the program runs where there is none, on tiny gradients, and its numbers mean nothing."""

from __future__ import annotations

import contextlib
import time
import types
from collections.abc import Iterator
from unittest import mock

import torch

from esper_telemetry.scan import cuda, dispatch


class _Event:
    def __init__(self, **_: object) -> None:
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return (end._at - self._at) * 1e3


def _memory(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Let Triton's interpreter work on the CPU."""
    replaced = {
        "Event": _Event,
        "device": contextlib.nullcontext,
        "current_stream": lambda *_: types.SimpleNamespace(cuda_stream=0),
        "synchronize": lambda: None,
        "_sleep": lambda _: None,
        "mem_get_info": lambda _: (1 << 40, 1 << 40),
        "is_current_stream_capturing": lambda: False,
        "set_sync_debug_mode": lambda _: None,
    }
    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(cuda, "_pinned", _memory))
        for name, answer in {"_on_cpu": False, "_suit_kernel": True, "_kernel_works": True}.items():
            stack.enter_context(mock.patch.object(dispatch, name, return_value=answer))
        yield
