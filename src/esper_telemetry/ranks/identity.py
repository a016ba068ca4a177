"""Which run this process belongs to, and which part of it this process is. No torch: it is asked only where it runs."""

from __future__ import annotations

import os
import socket
import sys
import unicodedata
from collections.abc import Mapping
from typing import NamedTuple

from esper_telemetry.ranks.run_name import made_up
from esper_telemetry.snapshot import RunInfo

MAX_RUN_ID = 256

_RANK = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_WORLD_SIZE = ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LOCAL_RANK = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMI_LOCAL_RANK")
_ATTEMPT = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")

_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}


class _Number(NamedTuple):
    """Hold a number, and who said it."""

    value: int
    source: str


def run_info(run_id: object = None, before: RunInfo | None = None) -> RunInfo:
    """Name the run, and this process in it.

    Each number comes from the first that says it: ESPER_RANK, ESPER_WORLD_SIZE and ESPER_LOCAL_RANK; torch.distributed
    once it is initialised; the variables of torchrun, of Slurm inside a job step, of Open MPI, of PMI. If nothing
    says otherwise, it is rank 0 of 1. A local rank that is not given is the rank.

    run_id: anything, converted to a string; see `given_run_id`. Without one, all ranks make one up together.
    before: what was known before torch.distributed was initialised.

    Raise ValueError when one of these is invalid.
    """
    said = _variables()
    rank = _number(said, "ESPER_RANK", "get_rank", _RANK) or _Number(0, "rank")
    world_size = _number(said, "ESPER_WORLD_SIZE", "get_world_size", _WORLD_SIZE, at_least=1)
    if rank.value >= (1 if world_size is None else world_size.value):
        size = "a world size too" if world_size is None else f"less than {world_size.source}={world_size.value}"
        raise ValueError(f"{rank.source}: expected {size}, got {rank.value}")
    return RunInfo(
        run_id=given_run_id(run_id) or made_up(None if before is None else before.run_id),
        rank=rank.value,
        world_size=1 if world_size is None else world_size.value,
        local_rank=(_number(said, "ESPER_LOCAL_RANK", None, _LOCAL_RANK) or rank).value,
        attempt=(_number(said, None, None, _ATTEMPT) or _Number(0, "attempt")).value,
        host=socket.gethostname(),
        pid=os.getpid(),
    )


def given_run_id(run_id: object = None) -> str | None:
    """Return the run's given name, the same on all ranks, or None if it has none.

    It is the argument, ESPER_RUN_ID, torchrun's unless that is "none", or the number of the Slurm job.

    Raise ValueError when it is empty, holds control characters, or is longer than 256 characters.
    """
    if run_id is not None:
        return _checked("run_id", run_id)
    said = _variables()
    if "ESPER_RUN_ID" in said:
        return _checked("ESPER_RUN_ID", said["ESPER_RUN_ID"])
    if said.get("TORCHELASTIC_RUN_ID", "none") != "none":
        return _checked("TORCHELASTIC_RUN_ID", said["TORCHELASTIC_RUN_ID"])
    job, step = said.get("SLURM_JOB_ID"), said.get("SLURM_STEP_ID", "0")
    return job if job is None or step == "0" else f"{job}.{step}"  # steps may run side by side; mostly there is one


def _variables() -> Mapping[str, str]:
    """Return the environment without what is empty, and without Slurm's word where it is about another process."""
    said = {name: text for name, text in os.environ.items() if text}
    if _in_job_step(said):
        return said
    return {name: text for name, text in said.items() if not name.startswith("SLURM_")}


def _in_job_step(said: Mapping[str, str]) -> bool:
    """Tell whether Slurm started this process as one task of a step, and its number is a rank."""
    if "SLURM_PROCID" not in said:
        return False  # the shell of salloc
    tasks = said.get("SLURM_STEP_NUM_TASKS", said.get("SLURM_NTASKS", "1"))
    if "SLURM_PTY_PORT" in said and tasks == "1":
        return False  # a shell for a person, in which one run follows another
    if "SLURM_STEP_ID" not in said and "SLURMD_NODENAME" in said:
        return False  # a batch script, which is task 0 of as many as its steps will have
    started_by_mpi = said.get("OMPI_COMM_WORLD_SIZE", said.get("PMI_SIZE", tasks))
    return started_by_mpi == tasks  # else Slurm started mpirun's daemons, one a host, and they the ranks


def _number(
    said: Mapping[str, str], own: str | None, of_torch: str | None, others: tuple[str, ...], at_least: int = 0
) -> _Number | None:
    if own is not None and own in said:
        return _whole(own, said[own], at_least)
    dist = sys.modules.get("torch.distributed")
    if of_torch is not None and dist is not None and dist.is_available() and dist.is_initialized():
        return _Number(getattr(dist, of_torch)(), "torch.distributed")
    return next((_whole(name, said[name], at_least) for name in others if name in said), None)


def _whole(name: str, text: str, at_least: int) -> _Number:
    if not (text.isascii() and text.isdigit() and int(text) >= at_least):
        raise ValueError(f"{name}: expected a whole number of at least {at_least}, got {text!r}")
    return _Number(int(text), name)


def _checked(name: str, given: object) -> str:
    try:
        text = str(given)
    except Exception as error:
        raise ValueError(f"{name}: expected something with a name, got {type(given).__name__}: {error!r}") from None
    if not text.strip() or len(text) > MAX_RUN_ID:
        shown = repr(text) if len(text) <= MAX_RUN_ID else f"{len(text)} characters"
        raise ValueError(f"{name}: expected 1 to {MAX_RUN_ID} characters, got {shown}")
    if any(unicodedata.category(character) in _UNPRINTABLE for character in text):
        raise ValueError(f"{name}: expected no control characters, got {text!r}")
    return text
