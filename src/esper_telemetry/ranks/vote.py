"""A vote of all ranks before a step: they act together, or none of them goes on."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

SECONDS = 300.0
"""How long a rank waits for the others, in a vote and in the making of its group. It bounds what a rank may do between
the end of its backward pass and its step: at that end all ranks were together."""

_AGE = 4096


class VoteFailed(RuntimeError):
    """Training was stopped: the ranks could not agree on what to do before a step, so none of them may take it."""


class Found(NamedTuple):
    """Sum what ranks found: the elements that each owns, and how many are critical by what they alone know."""

    inf: int
    nan: int
    critical: int


class Vote:
    """Vote in a group of its own, on the CPU; to make one is a collective of all ranks.

    Raise VoteFailed where they do not come together in time.
    """

    def __init__(self) -> None:
        self._failed = False
        try:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=SECONDS))
        except Exception as error:
            raise VoteFailed(
                "on_critical: expected every rank of the job to make this monitor with an on_critical other than "
                f"'continue', but not all did within {SECONDS:.0f} s: {error}"
            ) from error

    def add_up(self, found: Found, check: int) -> Found:
        """Return what all ranks found at the check of this number.

        Raise VoteFailed where a rank is gone, late or at another check.
        """
        age = check % _AGE  # its square is summed over ranks, and has to fit
        *total, ages, squares = self._reduce([*found, age, age * age], dist.ReduceOp.SUM)
        if dist.get_world_size() * squares != ages * ages:  # the variance is 0 only where all are the same
            raise VoteFailed(f"ranks are at different checks (this one at {check}), so they cannot agree on a step")
        return Found(*total)

    def strongest(self, wish: int) -> int:
        """Return the largest number that a rank has said; raise VoteFailed where one is gone or late."""
        return self._reduce([wish], dist.ReduceOp.MAX)[0]

    def _reduce(self, numbers: list[int], how: Any) -> list[int]:
        if self._failed:  # what came late may have gone through elsewhere: nothing that follows would be in step
            raise VoteFailed("an earlier vote of the ranks failed")
        said = torch.tensor(numbers, dtype=torch.int64)
        try:
            dist.all_reduce(said, how, group=self._group)
        except Exception as error:
            self._failed = True
            raise VoteFailed(f"a rank is gone, or did not reach this step within {SECONDS:.0f} s: {error}") from error
        return list(map(int, said.tolist()))
