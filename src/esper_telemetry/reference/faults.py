"""Faults on purpose: write bad elements into real gradients, to see them come out at the other end."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from esper_telemetry.scan.layers import Model, layers_by_name, list_layers

logger = logging.getLogger("esper_telemetry")

_FORM = re.compile(r"(?P<kind>inf|nan):(?P<count>\d+)@(?P<check>\d+)(?::(?P<layer>.+))?")


@dataclass(frozen=True, slots=True)
class Fault:
    """Say how many elements of which kind go into which layer at which check; no layer means the largest."""

    kind: str
    count: int
    check: int
    layer: str | None = None

    @classmethod
    def parse(cls, text: str) -> Fault:
        """Read KIND:COUNT@CHECK[:LAYER], for example inf:6@40; raise ValueError on anything else."""
        match = _FORM.fullmatch(text)
        if match is None or int(match["count"]) < 1 or int(match["check"]) < 1:
            raise ValueError(
                f"expected KIND:COUNT@CHECK[:LAYER] such as inf:6@40 or nan:1@7:value_net.bias, got {text!r}"
            )
        return cls(match["kind"], int(match["count"]), int(match["check"]), match["layer"])


class FaultInjector:
    """Write faults into a model's gradients; give it to a monitor as `before_check`.

    Raise ValueError for a layer that does not exist or that has too few elements.
    """

    def __init__(self, model: Model, faults: Sequence[Fault]) -> None:
        layers = layers_by_name(model)
        largest = max(list_layers(model), key=lambda layer: layer.parameter.numel()).name
        self.missed = list(faults)
        self._places: dict[Fault, tuple[Tensor, int]] = {}
        used: dict[tuple[int, str], int] = defaultdict(int)
        for fault in faults:
            asked = fault.layer or largest
            if asked not in layers:
                known = ", ".join(layer.name for layer in list_layers(model))
                raise ValueError(f"expected one of the layers {known}, got {asked!r}")
            name, parameter, _ = layers[asked]
            start = used[fault.check, name]
            used[fault.check, name] += fault.count
            if used[fault.check, name] > parameter.numel():
                raise ValueError(f"expected at most the {parameter.numel()} elements of {name}, got {fault.count}")
            self._places[fault] = parameter, start

    @torch.no_grad()
    def __call__(self, check: int) -> None:
        """Write the faults of this check."""
        for fault in [fault for fault in self.missed if fault.check == check]:
            parameter, start = self._places[fault]
            if parameter.grad is None:
                logger.warning("esper: %s was not injected: the layer has no gradient at that check", fault)
                continue
            place = torch.arange(start, start + fault.count, device=parameter.device)
            parameter.grad.put_(place, parameter.grad.new_full((fault.count,), getattr(math, fault.kind)))
            self.missed.remove(fault)
