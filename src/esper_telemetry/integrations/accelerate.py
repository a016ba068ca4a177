"""Hugging Face Accelerate: `EsperWatch(accelerator, model, optimizer, address="127.0.0.1:19301")`."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from esper_telemetry.exporters.http import Exporter
from esper_telemetry.integrations.run import serve
from esper_telemetry.monitor import GradientMonitor, watch
from esper_telemetry.scan.layers import Model, named_roots

try:
    from accelerate import Accelerator  # type: ignore[import-untyped, unused-ignore]
except ImportError as error:
    raise ImportError("Accelerate is not installed: pip install 'esper-telemetry[accelerate]'") from error


class EsperWatch:
    """Check the gradients of a prepared model at the end of each `accelerator.backward()`, until `close()`.

    accelerator: it says which GradScaler is in use.
    model, optimizer: what `accelerator.prepare()` returned, or what it was given.
    address: where to serve the metrics meanwhile; a port in use is logged, and training goes on.
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
        address: str | None = None,
        **options: Any,
    ) -> None:
        self.monitor = watch(
            {
                name: accelerator.unwrap_model(root) if isinstance(root, Module) else root
                for name, root in named_roots(model).items()
            },
            optimizer=optimizer,
            scaler=accelerator.scaler,
            **options,
        )
        self.exporter = serve(self.monitor, address)

    def close(self) -> None:
        """Deliver the last value."""
        self.monitor.close()
        if self.exporter is not None:
            self.exporter.close()

    def __enter__(self) -> EsperWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:  # else the run did not end well
            self.close()
