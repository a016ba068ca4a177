"""How training goes, as the loop tells it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """Hold what the loop told last; None is what it never told.

    samples: processed so far.
    """

    loss: float | None = None
    learning_rate: float | None = None
    step: int | None = None
    samples: int | None = None

    def after(
        self, loss: float | None, learning_rate: float | None, step: int | None, samples: int | None
    ) -> TrainProgress:
        """Return the progress after the loop told more; `samples` are added to those before."""
        return TrainProgress(
            loss=self.loss if loss is None else loss,
            learning_rate=self.learning_rate if learning_rate is None else learning_rate,
            step=self.step if step is None else step,
            samples=self.samples if samples is None else (self.samples or 0) + samples,
        )
