"""Hugging Face Transformers: `Trainer(..., callbacks=[EsperCallback(address="127.0.0.1:19301")])`."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from esper_telemetry.exporters.http import Exporter
from esper_telemetry.integrations.run import serve, stopping
from esper_telemetry.monitor import GradientMonitor, Policy, watch

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("Transformers is not installed: pip install 'esper-telemetry[transformers]'") from error


class EsperCallback(TrainerCallback):
    """Check the gradients at the end of each backward pass, while `train()` runs.

    The Trainer's own hooks come after its clip. Norms are unscaled all the same.

    address: where to serve the metrics meanwhile; a port in use is logged, and training goes on.
    on_critical: as in `watch()`; "halt" drops the step and sets `control.should_training_stop`.
    options: of `watch()`.
    """

    def __init__(self, *, address: str | None = None, on_critical: Policy = "continue", **options: Any) -> None:
        self.monitor: GradientMonitor | None = None
        self.exporter: Exporter | None = None
        self._address = address
        self._on_critical = on_critical
        self._options = options
        self._halted = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trained: Any
    ) -> None:
        """Begin to watch."""
        self.on_train_end()  # one that an exception had ended
        wrapper = trained["optimizer"]  # Accelerate's, which knows the scaler
        optimizer = getattr(wrapper, "optimizer", wrapper)
        self._halted = False
        self.monitor = watch(
            trained["model"],
            optimizer=optimizer if isinstance(optimizer, Optimizer) else None,  # DeepSpeed's is none
            scaler=getattr(wrapper, "scaler", None),
            on_critical=stopping(self._on_critical, self._halt),
            **self._options,
        )
        self.exporter = serve(self.monitor, self._address)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl:
        """Pass on that training is to stop."""
        control.should_training_stop |= self._halted
        return control

    on_step_end = on_substep_end

    def on_train_end(self, *_: object, **__: object) -> None:
        """Deliver the last value."""
        if self.monitor is not None:
            self.monitor.close()
        if self.exporter is not None:
            self.exporter.close()

    def _halt(self) -> None:
        self._halted = True
