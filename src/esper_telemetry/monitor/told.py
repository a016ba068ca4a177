"""What a training loop reports to its monitor besides the gradients."""

from __future__ import annotations

from torch import Tensor

from esper_telemetry.monitor.check_maker import CheckMaker
from esper_telemetry.monitor.latest import Latest
from esper_telemetry.monitor.progress import Progress
from esper_telemetry.recorder import BatchId
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.ppo_update import PPOUpdatePayload


class Told:
    """Take what the loop reports; a base of the monitor."""

    _latest: Latest
    _progress: Progress
    _checks: CheckMaker

    @property
    def batch_id(self) -> BatchId:
        """Name the batch of the next backward pass, for the flight recorder."""
        return self._checks.batch_id

    @batch_id.setter
    def batch_id(self, batch_id: BatchId) -> None:
        self._checks.batch_id = batch_id

    def record(
        self,
        *,
        loss: float | Tensor | None = None,
        lr: float | Tensor | None = None,
        step: int | None = None,
        samples: int | None = None,
    ) -> None:
        """Report training progress, to show it beside the gradients; never wait for a device, never raise.

        samples: how many were processed since the last call.
        """
        self._progress.tell(loss=loss, lr=lr, step=step, samples=samples)

    def record_ppo_update(self, payload: PPOUpdatePayload) -> None:
        """Report a PPO update, to show it beside the gradients."""
        self._latest.change(ppo=payload)

    def carry_on(self, before: Snapshot) -> None:
        """Continue the counters of a monitor that ended in this process; call it before the first check."""
        self._checks.carry_on(before)
