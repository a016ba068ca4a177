"""How a model is spread over ranks, and what that makes of a check."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from esper_telemetry.monitor.watched import Watched
from esper_telemetry.ranks.shares import WHOLE, Local, Replicas, Share, list_shares
from esper_telemetry.ranks.wrappers import DTENSOR, class_of, joined
from esper_telemetry.scan import PendingScan, Scan
from esper_telemetry.snapshot.rank_share import GradScope

Early = Mapping[int, Scan | PendingScan]
Bad = Mapping[int, tuple[int, int]]


class Sharing:
    """Follow how the parameters of a model are spread, from the moment at which torch.distributed is initialised.

    attribution: whether what this rank's own backward made is measured.
    replicas: the group over which plain parameters are replicated, where nothing else says so.
    on_join: called once, before the first pass in which this process is one of a group.
    """

    def __init__(self, watched: Watched, attribution: bool, replicas: Replicas, on_join: Callable[[], None]) -> None:
        self._watched = watched
        self._attribution = attribution
        self._replicas = replicas
        self._on_join = on_join
        self._joined = False
        self._names: Sequence[str] | None = None
        self._shares: list[Share] = []

    @property
    def hops(self) -> int:
        """Return how often the end of a pass is put off, so that all that reduces its gradients is done by then."""
        return 2 if self._joined else 0

    def refresh(self) -> None:
        """Look again where something has changed; quick where nothing has."""
        if not self._joined:
            if not joined():
                return
            self._joined = True
            self._on_join()
        if self._names is not self._watched.names or self._watched.wrapped:
            self._list()

    def of(self, gradients: Sequence[Tensor | None], own: Early, when: str) -> Shared:
        """Return what is known of the ranks at a check of these gradients.

        own: what this rank's backward made, by layer, where that was measured apart.
        """
        if len(self._shares) != len(gradients):
            return Shared((), None, when)
        if (dtensor := class_of(DTENSOR)) is not None:
            for index, gradient in enumerate(gradients):
                if type(gradient) is dtensor:
                    self._shares[index] = self._shares[index].seen_in(gradient)
        return Shared(self._shares, own if self._attributes else None, when)

    @property
    def _attributes(self) -> bool:
        return self._attribution and not any(share is WHOLE or share.local is Local.UNSEEN for share in self._shares)

    def _list(self) -> None:
        self._watched.wrapped = False
        parameters = self._watched.parameters()
        self._names = self._watched.names
        self._shares = list_shares(self._names, parameters, self._replicas)
        for tag, share in zip(self._watched.tags, self._shares, strict=True):
            tag.reduced = share.local is Local.ARRIVING
            if tag.reduced:
                tag.early = self._attributes


class Shared(NamedTuple):
    """Hold what was known of the ranks when a check was made.

    shares: by layer; none where this process is the whole run.
    own: what this rank's backward made, by layer; None where that is not asked for.
    """

    shares: Sequence[Share]
    own: Early | None
    when: str

    def counts(self, found: Scan) -> dict[str, Any]:
        """Return what a snapshot says of whose the bad elements are."""
        owned: tuple[int | None, int | None] = found.inf_count, found.nan_count
        if self.shares and found.bad:
            bad = [(self.shares[index].owned, *counts) for index, counts in found.bad.items()]
            owned = None, None
            if all(each is not None for each, *_ in bad):
                owned = sum(inf for each, inf, _ in bad if each), sum(nan for each, _, nan in bad if each)
        return {"owned_inf_count": owned[0], "owned_nan_count": owned[1], "scope": self._scope()}

    def own_bad(self, found: Scan, handled: Collection[int]) -> dict[int, tuple[int, int]] | None:
        """Return which layers this rank's own backward made bad; None where that was not measured.

        handled: overflows of which a scaler takes care.
        """
        if self.own is None:
            return None
        apart = {index: _result(each) for index, each in self.own.items()}
        bad = {index: each.bad[0] for index, each in apart.items() if each.bad and index not in handled}
        same = (index for index in found.bad if self.shares[index].local is Local.SAME)
        return dict(sorted((bad | {index: found.bad[index] for index in same}).items()))

    def _scope(self) -> GradScope:
        if not self.shares:
            return _WHOLE[self.when]
        scopes = {share.scope for share in self.shares}
        exact = all(share.owned is not None for share in self.shares)
        return GradScope(scopes.pop() if len(scopes) == 1 else "mixed", exact, self.when)


_WHOLE = {when: GradScope("whole", True, when) for when in ("backward", "update", "step")}


def _result(found: Scan | PendingScan) -> Scan:
    return found if isinstance(found, Scan) else found.result()
