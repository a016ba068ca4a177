"""One look at the whole state of a model: count Inf and NaN exactly, per tensor."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Size

from esper_telemetry.scan import PendingScan, Scan, Scanner
from esper_telemetry.snapshot.damage import PARTS, Damage
from esper_telemetry.snapshot.recent import LayerCounts, worst_first
from esper_telemetry.verdict.state import Held, without_grad


class _Seen(NamedTuple):
    """Hold what is needed of a tensor when the result arrives."""

    part: str
    name: str
    shape: Size
    may_be_meant: bool


_Part = tuple[PendingScan | Scan, Sequence[_Seen]]


class _Launched(NamedTuple):
    """Hold one look: what is on the host, and what is on devices."""

    parts: Sequence[_Part]
    mark: bool

    def ready(self) -> bool:
        """Tell whether all of it has arrived."""
        return all(isinstance(found, Scan) or found.ready() for found, _ in self.parts)


class Looks:
    """Look at the state of a model; results that are on a device arrive later, in their order.

    Inf that was in a buffer or a frozen parameter at the first look is taken as intended, as in an attention mask: it
    is not damage while it stays unchanged. NaN is never intended, nor is Inf in running statistics.

    on_result: called with what each look found, and its mark.
    """

    def __init__(self, on_result: Callable[[Damage, bool], None]) -> None:
        self._scan = Scanner()
        self._launched: deque[_Launched] = deque()
        self._meant: dict[tuple[str, Size], int] = {}
        self._on_result = on_result

    @property
    def pending(self) -> bool:
        """Tell whether results are still on a device."""
        return bool(self._launched)

    def launch(self, state: Sequence[Held], mark: bool) -> None:
        """Look now, in the order of the stream; where nothing is on a device, the result is there at once.

        mark: given on with the result.
        """
        if not state:
            self._on_result(Damage(), mark)
            return
        # Apart, since optimizers keep their step counts on the host: to scan these with the others is to wait.
        places = [[each for each in state if each.tensor.is_cuda is on_cuda] for on_cuda in (False, True)]
        self._launched.append(_Launched([self._scan_all(each) for each in places if each], mark))
        self.settle()

    def settle(self, wait: bool = False) -> None:
        """Take in the results that have arrived, or all of them."""
        while self._launched and (wait or self._launched[0].ready()):
            parts, mark = self._launched.popleft()
            self._on_result(self._damage(parts), mark)

    def forget(self) -> None:
        """Give up results that never arrive."""
        self._launched.clear()

    def _scan_all(self, state: Sequence[Held]) -> _Part:
        seen = [_Seen(each.part, each.name, each.tensor.shape, each.may_be_meant) for each in state]
        return self._scan(without_grad([each.tensor for each in state])), seen

    def _damage(self, parts: Sequence[_Part]) -> Damage:
        damaged: dict[str, list[LayerCounts]] = {part: [] for part in PARTS}
        for found, seen in parts:
            scan = found if isinstance(found, Scan) else found.result()
            for index, each in enumerate(seen):
                inf, nan = scan.bad.get(index, (0, 0))
                if each.may_be_meant and inf == self._meant.setdefault((each.name, each.shape), inf):
                    inf = 0
                if inf or nan:
                    damaged[each.part].append(LayerCounts(each.name, inf, nan, each.shape.numel()))
        return Damage(**{part: tuple(worst_first(layers)) for part, layers in damaged.items()})
