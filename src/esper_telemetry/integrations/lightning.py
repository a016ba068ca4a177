"""Lightning: `Trainer(callbacks=[EsperCallback(address="127.0.0.1:19301")])`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from esper_telemetry import arguments
from esper_telemetry.exporters.http import Exporter
from esper_telemetry.integrations.lightning_checkpoints import KeepingCheckpointIO
from esper_telemetry.integrations.run import Runs, stopping
from esper_telemetry.integrations.worst_check import WorstCheck
from esper_telemetry.monitor import GradientMonitor, Policy
from esper_telemetry.monitor.reaction import check_policy

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment, unused-ignore]
    except ImportError as error:
        raise ImportError("Lightning is not installed: pip install 'esper-telemetry[lightning]'") from error

logger = logging.getLogger("esper_telemetry")


class EsperCallback(Callback):
    """Check the gradients before each optimizer step, unscaled and not yet clipped, while `fit()` runs.

    A later `fit()` continues the counters, at the same address.

    address: where to serve the metrics until the process ends. If another process has the port, the next free one is
        used, and an error is logged.
    strict: raise OSError instead.
    log: every `log_every_n_steps`, give the Trainer's loggers the worst counts since the last time, and the norm:
        esper/inf_grad_count, esper/nan_grad_count, esper/grad_norm.
    keep_last_good: keep the last checkpoint of an intact model until there is a newer one, even if a ModelCheckpoint
        wants to remove it or to overwrite it with a damaged one. For strategies that save one file, not for shards.
    on_critical: as in `GradientMonitor`; "halt" drops the step and sets `trainer.should_stop`.
    options: of `GradientMonitor`.
    """

    def __init__(
        self,
        *,
        address: str | int | None = None,
        strict: bool = False,
        log: bool = False,
        keep_last_good: bool = False,
        on_critical: Policy = "continue",
        **options: Any,
    ) -> None:
        self.monitor: GradientMonitor | None = None
        self.exporter: Exporter | None = None
        self._runs = Runs(address, strict)
        self._log = arguments.flag("log", log)
        self._keep_last_good = arguments.flag("keep_last_good", keep_last_good)
        check_policy(on_critical)
        self._on_critical = on_critical
        self._options = options
        self._to_log: WorstCheck | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start watching."""

        def stop() -> None:
            trainer.should_stop = True

        self.monitor = self._runs.begin(
            pl_module,
            lambda: GradientMonitor(
                pl_module,
                optimizer=trainer.optimizers,
                scaler=getattr(trainer.strategy.precision_plugin, "scaler", None),
                on_critical=stopping(self._on_critical, stop),
                **self._options,
            ),
        )
        self.exporter = self._runs.exporter
        if self._keep_last_good:
            trainer.strategy.checkpoint_io = KeepingCheckpointIO(trainer.strategy.checkpoint_io, self.monitor)
        self._to_log = WorstCheck(self.monitor) if self._log else None
        if self._log and not trainer.loggers:
            logger.warning("esper: nothing is logged: log=True needs a Trainer with a logger")

    def on_before_optimizer_step(self, trainer: Trainer, *_: object) -> None:
        """Check."""
        if self.monitor is not None:
            self.monitor.update()
        if _logs_at(trainer, trainer.global_step + 1):
            self._give_to_loggers(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Report training progress."""
        if self.monitor is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if isinstance(loss, Tensor):  # as it was divided for the accumulation of gradients
            waits = not loss.is_cpu and not _logs_at(trainer, trainer.global_step)
            loss = None if waits else loss * trainer.accumulate_grad_batches
        self.monitor.record(
            loss=loss,
            lr=next((group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups), None),
            step=trainer.global_step,
            samples=_samples_in(batch),
        )

    def on_train_end(self, trainer: Trainer, *_: object) -> None:
        """Log what has not been logged yet."""
        if self.monitor is not None:
            self.monitor.flush()
        self._give_to_loggers(trainer)

    def on_fit_end(self, *_: object) -> None:
        """Deliver the last value; not after an exception, because then the run did not end well."""
        if self.monitor is not None:
            self.monitor.close()

    def _give_to_loggers(self, trainer: Trainer) -> None:
        values = {} if self._to_log is None else self._to_log.take_values()
        if values:
            for each in trainer.loggers:
                each.log_metrics(values, step=trainer.global_step)


def _logs_at(trainer: Trainer, step: int) -> bool:
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # its logger connector sets it
    return every > 0 and step % every == 0


def _samples_in(batch: object) -> int | None:
    """Return the length of the first tensor in a batch, None where there is none."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((samples for part in parts if (samples := _samples_in(part)) is not None), None)
