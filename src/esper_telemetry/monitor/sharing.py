"""How a model is spread over ranks, and what that makes of a check."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from esper_telemetry import arguments
from esper_telemetry.monitor.tags import Tag
from esper_telemetry.monitor.watched import Watched
from esper_telemetry.ranks.shares import Local, Replicas, Share, list_shares
from esper_telemetry.ranks.wrappers import DTENSOR, Wrappers, class_of, joined
from esper_telemetry.scan import PendingScan, Scan
from esper_telemetry.snapshot.rank_share import GradScope

Own = Mapping[int, Sequence[Scan | PendingScan]]
Bad = Mapping[int, tuple[int, int]]


class Sharing:
    """Follow how the parameters of a model are spread, from the moment at which torch.distributed is initialised.

    attribution: whether what this rank's own backward made is measured.
    replicas: the group over which plain parameters are replicated, where nothing else says so.
    on_join: called once, before the first pass in which this process is one of a group.
    """

    def __init__(self, watched: Watched, attribution: bool, replicas: Replicas, on_join: Callable[[], None]) -> None:
        self._watched = watched
        self._attribution = arguments.flag("attribution", attribution)
        self._replicas = replicas
        self._on_join = on_join
        self._joined = False
        self._names: Sequence[str] | None = None
        self._shares: list[Share] = []
        self._ids: list[int] = []

    @property
    def hops(self) -> int:
        """Return how many times to put off the end of a pass, until all that reduces its gradients is done."""
        return 2 if self._joined else 0

    def refresh(self) -> Wrappers | None:
        """Look again where something has changed, and return what was found; quick where nothing has."""
        if not self._joined:
            if not joined():
                return None
            self._joined = True
            self._on_join()
        if self._names is self._watched.names and not self._watched.wrapped:
            return None
        return self._list()

    def tags(self) -> dict[int, Tag]:
        """Return the tags of the layers whose own gradients are measured, by the ids of their parameters as listed."""
        tags = zip(self._ids, self._watched.tags, strict=True)
        return {each: tag for each, tag in tags if tag.own is not None}

    def of(self, gradients: Sequence[Tensor | None], when: str) -> Shared:
        """Return what is known of the ranks at a check of these gradients."""
        if len(self._shares) != len(gradients):
            return Shared((), None, when)
        if (dtensor := class_of(DTENSOR)) is not None:
            for index, gradient in enumerate(gradients):
                if type(gradient) is dtensor:
                    self._shares[index] = self._shares[index].seen_in(gradient)
        return Shared(tuple(self._shares), self._take_own(gradients), when)

    def _take_own(self, gradients: Sequence[Tensor | None]) -> Own | None:
        """Return what was measured of this rank's own gradients since the last check; None where some was not."""
        if not self._attributes:
            return None
        own = {}
        for index, (tag, gradient) in enumerate(zip(self._watched.tags, gradients, strict=True)):
            if tag.own and gradient is not None:
                own[index], tag.own = tag.own, []
        whole = [index for index, share in enumerate(self._shares) if share.local is Local.UNSHARDED]
        return own if not whole or any(index in own for index in whole) else None

    @property
    def _attributes(self) -> bool:
        alone = all(share.scope == "whole" for share in self._shares)
        return self._attribution and not alone and all(share.local is not Local.UNSEEN for share in self._shares)

    def _list(self) -> Wrappers:
        self._watched.wrapped = False
        parameters = self._watched.parameters()
        self._names = self._watched.names
        self._ids = list(map(id, parameters))
        wrappers = Wrappers.around(parameters)
        self._shares = list_shares(self._names, parameters, wrappers, self._replicas)
        attributes = self._attributes
        for tag, share in zip(self._watched.tags, self._shares, strict=True):
            tag.reduced = share.local in (Local.ARRIVING, Local.FLEETING, Local.UNSEEN)
            tag.own = [] if attributes and share.local not in (Local.SAME, Local.UNSEEN) else None
            tag.fleeting = share.local is Local.FLEETING
        return wrappers


class Shared(NamedTuple):
    """Hold what was known of the ranks when a check was made.

    shares: by layer; none where this process is the whole run.
    own: what this rank's backward made, by layer; None where that is not asked for.
    """

    shares: Sequence[Share]
    own: Own | None
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
        worst = {index: _worst(scans) for index, scans in self.own.items() if index not in handled}
        bad = {index: counts for index, counts in worst.items() if any(counts)}
        same = (index for index in found.bad if self.shares[index].local is Local.SAME)
        return dict(sorted((bad | {index: found.bad[index] for index in same}).items()))

    def _scope(self) -> GradScope:
        if not self.shares:
            return _WHOLE[self.when]
        scopes = {share.scope for share in self.shares}
        exact = all(share.owned is not None for share in self.shares)
        return GradScope(scopes.pop() if len(scopes) == 1 else "mixed", exact, self.when)


_WHOLE = {when: GradScope("whole", True, when) for when in ("backward", "update", "step")}


def _worst(scans: Sequence[Scan | PendingScan]) -> tuple[int, int]:
    """Return the most Inf and NaN elements that one of these scans of one gradient found."""
    found = [each if isinstance(each, Scan) else each.result() for each in scans]
    bad = [each.bad[0] for each in found if each.bad]
    return max((inf for inf, _ in bad), default=0), max((nan for _, nan in bad), default=0)
