"""Hugging Face Transformers: `Trainer(..., callbacks=[EsperCallback(address="127.0.0.1:19301")])`."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from esper_telemetry import arguments
from esper_telemetry.exporters.http import Exporter
from esper_telemetry.integrations.run import Runs, stopping
from esper_telemetry.integrations.safe import may_save
from esper_telemetry.integrations.worst_check import WorstCheck
from esper_telemetry.monitor import GradientMonitor, Policy, watch
from esper_telemetry.monitor.reaction import check_policy

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("Transformers is not installed: pip install 'esper-telemetry[transformers]'") from error


class EsperCallback(TrainerCallback):
    """Check the gradients at the end of each backward pass, while `train()` runs.

    The Trainer's callbacks run after its clip, so checks do not wait for them. Norms are unscaled all the same. A later
    `train()` continues the counters, at the same address.

    address: where to serve the metrics until the process ends. If another process has the port, the next free one is
        used, and an error is logged.
    strict: raise OSError instead.
    log: add the worst counts since the last log, and the norm, to what the Trainer logs: esper/inf_grad_count,
        esper/nan_grad_count, esper/grad_norm. They reach `state.log_history` and the callbacks after this one; the
        callbacks of `report_to` run before it.
    keep_last_good: save no checkpoint from a bad check until the model was seen intact, so that `save_total_limit` does
        not rotate the last good one away. `save_strategy="best"` decides later, and is not held back.
    on_critical: as in `watch()`; "halt" drops the step and sets `control.should_training_stop`.
    options: of `watch()`.
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
        self._halted = False
        self._steps = 0
        self._to_log: WorstCheck | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trained: Any
    ) -> None:
        """Start watching."""
        wrapper = trained["optimizer"]  # Accelerate's, which knows the scaler
        optimizer = getattr(wrapper, "optimizer", wrapper)
        self._halted = False
        self._steps = state.global_step
        self.monitor = self._runs.begin(
            trained["model"],
            lambda: watch(
                trained["model"],
                optimizer=optimizer if isinstance(optimizer, Optimizer) else None,  # DeepSpeed's is none
                scaler=getattr(wrapper, "scaler", None),
                on_critical=stopping(self._on_critical, self._halt),
                **self._options,
            ),
        )
        self.exporter = self._runs.exporter
        self._to_log = WorstCheck(self.monitor) if self._log else None

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl:
        """Pass on a request to stop."""
        control.should_training_stop |= self._halted
        return control

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl:
        """Report the progress in full batches, and pass on a request to stop."""
        if self.monitor is not None:
            batch_size = state.train_batch_size or args.train_batch_size
            samples = (state.global_step - self._steps) * args.gradient_accumulation_steps * batch_size
            self._steps = state.global_step
            self.monitor.record(step=state.global_step, samples=samples)
        self.on_epoch_end(args, state, control)
        return self.on_substep_end(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl:
        """Hold back a checkpoint that is not worth keeping."""
        if self._keep_last_good and control.should_save:
            control.should_save = may_save(self.monitor)
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: object,
    ) -> None:
        """Report the loss and the learning rate, which the Trainer has just fetched from the device."""
        if self.monitor is None or logs is None:
            return
        self.monitor.record(loss=logs.get("loss"), lr=logs.get("learning_rate"))
        if self._to_log is not None:
            self.monitor.flush()
            values = self._to_log.take_values()
            logs |= values
            state.log_history[-1] |= values

    def on_train_end(self, *_: object, **__: object) -> None:
        """Deliver the last value."""
        if self.monitor is not None:
            self.monitor.close()

    def _halt(self) -> None:
        self._halted = True
