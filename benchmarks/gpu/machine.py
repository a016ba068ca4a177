"""On what it was measured."""

from __future__ import annotations

import subprocess

import torch
import triton

from benchmarks.machine import machine as host


def machine(device: torch.device) -> dict[str, str]:
    """Return what a reader needs to judge the numbers."""
    described = {**host(), "triton": triton.__version__}
    if device.type != "cuda":
        return {"GPU": "none: a rehearsal, whose numbers mean nothing", **described}
    properties = torch.cuda.get_device_properties(device)
    return {
        "GPU": properties.name,
        "memory of the GPU": f"{properties.total_memory / 2**30:.0f} GiB",
        "multiprocessors": str(properties.multi_processor_count),
        "last cache": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "driver": _driver(),
        "CUDA": str(torch.version.cuda),
        **described,
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not known"
