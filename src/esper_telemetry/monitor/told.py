"""What a training loop tells its monitor, beside the gradients."""

from __future__ import annotations

from torch import Tensor

from esper_telemetry.monitor.check_maker import CheckMaker
from esper_telemetry.monitor.latest import Latest
from esper_telemetry.monitor.progress import Progress
from esper_telemetry.recorder import BatchId
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.ppo_update import PPOUpdatePayload


class Told:
    """Take in what the loop tells; a monitor is one of these."""

    _latest: Latest
    _progress: Progress
    _checks: CheckMaker

    @property
    def batch_id(self) -> BatchId:
        """Name the batch that makes the gradients to come, for the flight recorder."""
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
        """Report how training goes, to show it beside the gradients; never wait for a device, never raise.

        samples: processed since the last call.
        """
        self._progress.tell(loss=loss, lr=lr, step=step, samples=samples)

    def record_ppo_update(self, payload: PPOUpdatePayload) -> None:
        """Put a PPO update into the snapshot."""
        self._latest.change(ppo=payload)

    def carry_on(self, before: Snapshot) -> None:
        """Go on with the counters of a monitor that has ended in this process; call it before the first check."""
        self._checks.carry_on(before)
