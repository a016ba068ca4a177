"""Lightning: `Trainer(callbacks=[EsperCallback(address="127.0.0.1:19301")])`."""

from __future__ import annotations

from typing import Any

from esper_telemetry.exporters.http import Exporter
from esper_telemetry.integrations.run import serve, stopping
from esper_telemetry.monitor import GradientMonitor, Policy

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment, unused-ignore]
    except ImportError as error:
        raise ImportError("Lightning is not installed: pip install 'esper-telemetry[lightning]'") from error


class EsperCallback(Callback):
    """Check the gradients before each optimizer step, unscaled and not yet clipped, while `fit()` runs.

    address: where to serve the metrics meanwhile; a port in use is logged, and training goes on.
    on_critical: as in `GradientMonitor`; "halt" drops the step and sets `trainer.should_stop`.
    options: of `GradientMonitor`.
    """

    def __init__(self, *, address: str | None = None, on_critical: Policy = "continue", **options: Any) -> None:
        self.monitor: GradientMonitor | None = None
        self.exporter: Exporter | None = None
        self._address = address
        self._on_critical = on_critical
        self._options = options

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch."""
        self.on_fit_end()  # one that an exception had ended

        def stop() -> None:
            trainer.should_stop = True

        self.monitor = GradientMonitor(
            pl_module,
            optimizer=trainer.optimizers,
            scaler=getattr(trainer.strategy.precision_plugin, "scaler", None),
            on_critical=stopping(self._on_critical, stop),
            **self._options,
        )
        self.exporter = serve(self.monitor, self._address)

    def on_before_optimizer_step(self, *_: object) -> None:
        """Check."""
        if self.monitor is not None:
            self.monitor.update()

    def on_fit_end(self, *_: object) -> None:
        """Deliver the last value; not after an exception, for then the run did not end well."""
        if self.monitor is not None:
            self.monitor.close()
        if self.exporter is not None:
            self.exporter.close()
