"""What was seen of one pass, forward and backward, and where its trouble began."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from esper_telemetry.verdict.extremes import BAD, FINITE, Extremes, tensors_among

_MOST_CALLS = 1 << 14


class Call:
    """Hold one call of a module.

    around: the call within which it was made.
    inputs, outputs: places of what was seen of them; scalars: those of the outputs that are single numbers.
    into, out_of: the nodes of the graph that its outputs come from, and its inputs.
    """

    def __init__(self, name: str, module: nn.Module, around: Call | None) -> None:
        self.name = name
        self.module_id = id(module)
        self.label = name or type(module).__name__
        self.is_loss = isinstance(module, _Loss)
        self.around = around
        self.inputs: list[int] = []
        self.outputs: list[int] = []
        self.scalars: list[int] = []
        self.into: list[int] = []
        self.out_of: list[int] = []

    def owns(self, layer: str) -> bool:
        """Tell whether a parameter is this module's own, or of one within it."""
        return not self.name or layer.startswith(f"{self.name}.")

    @property
    def depth(self) -> int:
        """Return within how many calls it was made."""
        return 0 if self.around is None else 1 + self.around.depth


class Passage:
    """Take notes of the calls of one pass, in the thread that begins it, and judge them when it is over."""

    def __init__(self) -> None:
        self._extremes = Extremes()
        self._thread = threading.get_ident()
        self._under_way: list[Call] = []
        self._calls: list[Call] = []
        self._nodes: dict[int, list[int]] = {}

    @property
    def outermost(self) -> bool:
        """Tell whether no call is under way."""
        return not self._under_way

    def enter(self, name: str, module: nn.Module, inputs: Iterable[Any]) -> None:
        """Take note that a module is called."""
        if self._is_full():
            return
        call = Call(name, module, self._under_way[-1] if self._under_way else None)
        self._under_way.append(call)
        for tensor in tensors_among(inputs):
            call.inputs += self._place_of(tensor)
            call.out_of += self._follow(tensor)

    def leave(self, module: nn.Module, outputs: Any) -> None:
        """Take note that it returns; those that were left by an exception never do."""
        if self._is_full() or not any(call.module_id == id(module) for call in self._under_way):
            return
        while (call := self._under_way.pop()).module_id != id(module):
            pass
        for tensor in tensors_among([outputs]):
            places = self._place_of(tensor)
            call.outputs += places
            if tensor.numel() == 1:
                call.scalars += places
            call.into += self._follow(tensor)
        self._calls.append(call)

    def end(self) -> None:
        """Begin to bring what was seen to the host."""
        self._extremes.send()

    def judge(self, damaged: Collection[str], origin: str | None) -> str | None:
        """Return where the trouble of this pass began; None where that was not seen.

        damaged: parameters and buffers that held a bad element.
        origin: the bad layer that gradients reached first.
        """
        seen = self._extremes.read()
        begun = self._first_bad(seen)
        if begun is None:
            return self._in_backward(seen, origin) or next((f"parameter {name}" for name in damaged), None)
        source = begun
        while any(seen[place] == BAD for place in source.inputs):
            if source.around is None:
                return "input"
            source = source.around
        for name in damaged:
            if source.owns(name):
                return f"parameter {name}"
        return "loss" if _is_loss(source, begun, seen) else f"forward of {source.label}"

    def _first_bad(self, seen: Mapping[int, int]) -> Call | None:
        return next((call for call in self._calls if any(seen[place] == BAD for place in call.outputs)), None)

    def _in_backward(self, seen: Mapping[int, int], origin: str | None) -> str | None:
        """Find the innermost call whose outputs' gradients were finite, and its inputs' or its parameters' were not."""
        suspects = []
        for call in self._calls:
            if self._state(call.into, seen) != FINITE:
                continue
            own = origin is not None and call.owns(origin)
            if own or self._state(call.out_of, seen) == BAD:
                suspects.append(call)
        if suspects:
            return f"backward of {max(reversed(suspects), key=lambda call: call.depth).label}"
        outermost = [call for call in self._calls if call.around is None]
        return "loss" if any(self._state(call.into, seen) == BAD for call in outermost) else None

    def _state(self, nodes: Sequence[int], seen: Mapping[int, int]) -> int | None:
        """Return whether the gradients that reached these nodes were finite; None where there were none."""
        places = [place for node in nodes for place in self._nodes[node]]
        if not places:
            return None
        return FINITE if all(seen[place] == FINITE for place in places) else BAD

    def _is_full(self) -> bool:
        return len(self._calls) >= _MOST_CALLS or threading.get_ident() != self._thread

    def _place_of(self, tensor: Tensor) -> list[int]:
        place = self._extremes.take(tensor)
        return [] if place is None else [place]

    def _follow(self, tensor: Tensor) -> list[int]:
        """Look at the gradients that reach the node which made a tensor; the graph stays as it is."""
        node = tensor.grad_fn
        if node is None:
            return []
        marks = cast(dict[Any, int], node.metadata)  # torch says that it is a method
        number = marks.setdefault(self, len(self._nodes))
        if number not in self._nodes:
            self._nodes[number] = []
            node.register_prehook(partial(self._arrive, number))
        return [number]

    def _arrive(self, number: int, gradients: Sequence[Tensor | None]) -> None:
        for gradient in gradients:
            if gradient is not None:
                self._nodes[number] += self._place_of(gradient)


def _is_loss(source: Call, begun: Call, seen: Mapping[int, int]) -> bool:
    """Tell whether it is the loss alone that is not finite: a loss module, or one number beside finite outputs."""
    if source.is_loss:
        return True
    bad = [place for place in begun.outputs if seen[place] == BAD]
    return source is begun and source.around is None and set(bad) <= set(source.scalars)
