"""Hugging Face Accelerate: `EsperWatch(accelerator, model, optimizer, address="127.0.0.1:19301")`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from esper_telemetry import arguments
from esper_telemetry.exporters.http import Exporter
from esper_telemetry.integrations.run import Runs
from esper_telemetry.integrations.safe import may_save
from esper_telemetry.monitor import GradientMonitor, watch
from esper_telemetry.monitor.steps import one_or_several
from esper_telemetry.scan.layers import Model, named_roots

try:
    from accelerate import Accelerator  # type: ignore[import-untyped, unused-ignore]
except ImportError as error:
    raise ImportError("Accelerate is not installed: pip install 'esper-telemetry[accelerate]'") from error


class EsperWatch:
    """Check the gradients of a prepared model at the end of each `accelerator.backward()`, until `close()`.

    A later EsperWatch at the same address continues the counters. Step and learning rate are read from the first
    optimizer; the loop reports loss and samples: `watch.monitor.record(loss=loss)`.

    accelerator: tells which GradScaler is in use.
    model, optimizer: what `accelerator.prepare()` returned, or what it was given.
    address: where to serve the metrics until the process ends. If another process has the port, the next free one is
        used, and an error is logged.
    strict: raise OSError instead.
    keep_last_good: let `accelerator.save_state()` save nothing, and return None, from a bad check until the model was
        seen intact, so that `total_limit` does not rotate the last good checkpoint away.
    options: of `watch()`.
    """

    monitor: GradientMonitor
    exporter: Exporter | None

    def __init__(
        self,
        accelerator: Accelerator,
        model: Model,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        *,
        address: str | int | None = None,
        strict: bool = False,
        keep_last_good: bool = False,
        **options: Any,
    ) -> None:
        if not callable(getattr(accelerator, "unwrap_model", None)):
            raise ValueError(f"accelerator: expected an Accelerator, got {type(accelerator).__name__}")
        arguments.flag("keep_last_good", keep_last_good)
        runs = Runs(address, strict)
        roots = {
            name: accelerator.unwrap_model(root) if isinstance(root, Module) else root
            for name, root in named_roots(model).items()
        }
        modules = [root for root in roots.values() if isinstance(root, Module)]
        optimizers = one_or_several(optimizer)
        self.monitor = runs.begin(
            modules[0] if modules else self,
            lambda: watch(roots, optimizer=optimizers, scaler=accelerator.scaler, **options),
        )
        self.exporter = runs.exporter
        self._step = 0
        self._stop_holding_back = _hold_back(accelerator, self.monitor) if keep_last_good else None
        self._hooks = [
            getattr(each, "optimizer", each).register_step_post_hook(self._report) for each in optimizers[:1]
        ]

    def close(self) -> None:
        """Deliver the last value."""
        self.__exit__(None, None, None)

    def __enter__(self) -> EsperWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._stop_holding_back is not None:
            self._stop_holding_back()
            self._stop_holding_back = None
        self.monitor.__exit__(kind, error, trace)  # after an error the run did not end well

    def _report(self, optimizer: Optimizer, *_: object) -> None:
        self._step += 1
        self.monitor.record(lr=optimizer.param_groups[0]["lr"], step=self._step)


def _hold_back(accelerator: Accelerator, monitor: GradientMonitor) -> Callable[[], None]:
    """Let an accelerator save only what is worth keeping; return a function that stops this."""
    save = accelerator.save_state

    def save_state(*args: Any, **options: Any) -> Any:
        return save(*args, **options) if may_save(monitor) else None

    def stop() -> None:
        if vars(accelerator).get("save_state") is save_state:
            del accelerator.save_state

    accelerator.save_state = save_state
    return stop
