"""What lasts until it is closed, by hand or by the end of a `with` block."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class UntilClosed:
    """Close at the end of a `with` block; after an exception only let go: the run must not look as if it ended well."""

    def close(self) -> None:
        """Deliver the last value."""
        raise NotImplementedError

    def _let_go(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._let_go()
