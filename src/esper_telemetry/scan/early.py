"""Scans of single gradients that were made before the rest, because they may be gone by then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from esper_telemetry.scan.result import PendingScan, Scan


def with_early(late: Scan | PendingScan, early: Mapping[int, Scan | PendingScan]) -> Scan | PendingScan:
    """Merge a scan with those of single gradients that were made before, index -> scan of that gradient alone.

    A layer in both is as bad as it was in the earlier one, or in the later where that one found nothing: other code may
    take bad elements away or make them. Dead and exploding layers are not known of the merged scan.
    """
    together = PendingTogether(late, early)
    return together.result() if isinstance(late, Scan) and together.ready() else together


@dataclass(frozen=True, slots=True)
class PendingTogether:
    """Hold scans that may still be on their way, to be one."""

    late: Scan | PendingScan
    early: Mapping[int, Scan | PendingScan]

    def ready(self) -> bool:
        """Tell whether `result()` would return at once; never wait."""
        return all(isinstance(each, Scan) or each.ready() for each in (self.late, *self.early.values()))

    def result(self) -> Scan:
        """Return what was found; wait for it when it is not there yet."""
        late = _result(self.late)
        norms, bad, elements = list(late.norms), dict(late.bad), late.elements
        for index, each in self.early.items():
            one = _result(each)
            if norms[index] is None:
                elements += one.elements
            if one.bad:
                bad[index] = one.bad[0]
            if one.bad or index not in bad:
                norms[index] = one.norms[0]
        return replace(
            late, norms=norms, bad=dict(sorted(bad.items())), elements=elements, dead_layers=None, exploding_layers=None
        )


def _result(found: Scan | PendingScan) -> Scan:
    return found if isinstance(found, Scan) else found.result()
