"""One check: what was known when it was made, and the snapshot that it becomes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esper_telemetry.health import total_norm
from esper_telemetry.monitor.amp import AmpReading
from esper_telemetry.monitor.sharing import Bad, Shared
from esper_telemetry.scan import Scan
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.amp_state import AmpState
from esper_telemetry.snapshot.arrival import by_arrival
from esper_telemetry.snapshot.rank_share import LocalCheck
from esper_telemetry.snapshot.recent import LayerCounts, RecentWindow, worst_first
from esper_telemetry.verdict.passage import Passage


class Check(NamedTuple):
    """Hold what was known when a check was made; its result may come later.

    layers: the gradients, or parameters where there is none; or the shapes of both.
    order: the layers as gradients reached them.
    unmeasured: the layers that could not be measured.
    seen: what the trap has seen of the pass, where it was armed.
    """

    names: Sequence[str]
    layers: Sequence[Tensor | torch.Size]
    order: Sequence[int]
    unmeasured: Sequence[int]
    timestamp: float
    amp: AmpReading | None
    shared: Shared
    seen: Passage | None

    def judge(self, found: Scan) -> Scan:
        """Return what the optimizer would see."""
        return found if self.amp is None else self.amp.judge(found)

    def without_gradients(self) -> Check:
        """Keep the shapes alone, so that the gradients can be freed meanwhile."""
        return self._replace(layers=[each.shape if isinstance(each, Tensor) else each for each in self.layers])

    def publish(self, before: Snapshot, found: Scan, monitor_seconds: float) -> Snapshot:
        """Return the snapshot after this check, which found what was judged."""
        news: dict[str, Any] = {"layers": (), "unmeasured_layers": ()}
        now = time.monotonic()
        if self.amp is not None:
            news |= amp_news(before, self.amp.state)
        if found.bad or self.unmeasured:
            news |= self._trouble(before, found, now)
        news |= self.shared.counts(found) | self._own(before, found, now)
        if found.dead_layers is not None:
            news |= {"dead_layers": found.dead_layers, "exploding_layers": found.exploding_layers}
        return before.but(
            checks=before.checks + 1,
            inf_grad_count=found.inf_count,
            nan_grad_count=found.nan_count,
            grad_norm=total_norm(found.norms),
            elements=found.elements,
            timestamp=self.timestamp,
            layer_names=self.names,
            layer_norms=found.norms,
            history=before.history.after(
                now, self.timestamp, found.inf_count, found.nan_count, news.get("origin_layer")
            ),
            monitor_seconds=monitor_seconds,
            **news,
        )

    def _trouble(self, before: Snapshot, found: Scan, now: float) -> dict[str, Any]:
        names = self.names
        unmeasured = tuple(names[index] for index in self.unmeasured)
        layers = self._layers(found.bad)
        news = {
            "unmeasured_layers": unmeasured,
            "recent": before.recent.after(now, layers, _bits(found.bad), len(unmeasured)),
        }
        if not found.bad:
            return news
        arrived = by_arrival(found.bad, self.order)
        inf_origin = next((names[index] for index in arrived if found.bad[index][0]), None)
        nan_origin = next((names[index] for index in arrived if found.bad[index][1]), None)
        return news | {
            "layers": layers,
            "origin_layer": names[arrived[0]],
            "watched_heads": before.watched_heads and before.watched_heads.after(layers),
            "inf": before.inf.after(found.inf_count, self.timestamp, inf_origin),
            "nan": before.nan.after(found.nan_count, self.timestamp, nan_origin),
        }

    def _own(self, before: Snapshot, found: Scan, now: float) -> dict[str, Any]:
        """Return what this rank's own backward made."""
        bad = self.shared.own_bad(found, () if self.amp is None else self.amp.handled)
        if bad is None:
            return {"local": before.local and before.local.unmeasured()}
        local = before.local or LocalCheck(0, 0, RecentWindow(before.recent.seconds))
        origin = self.names[by_arrival(bad, self.order)[0]] if bad else None
        return {"local": local.after(now, self._layers(bad), _bits(bad), origin)}

    def _layers(self, bad: Bad) -> tuple[LayerCounts, ...]:
        return worst_first(
            LayerCounts(self.names[index], inf, nan, self.layers[index].numel()) for index, (inf, nan) in bad.items()
        )


def _bits(bad: Bad) -> int:
    """Return a number with a bit for each bad layer."""
    return sum(1 << index for index in bad)


def amp_news(before: Snapshot, state: AmpState) -> dict[str, Any]:
    """Return what a scaler's state changes in a snapshot."""
    skips = state.skips - (0 if before.amp is None else before.amp.skips)
    return {"amp": state, "skipped_updates": before.skipped_updates | {"amp": before.skipped_updates["amp"] + skips}}
