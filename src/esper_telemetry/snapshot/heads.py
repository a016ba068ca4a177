"""Heads: parts of a model, such as the policy and the value head, whose gradients are looked at separately."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from esper_telemetry.health import total_norm
from esper_telemetry.snapshot.recent import LayerCounts

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Head:
    """Describe one head.

    norm: L2 norm of its gradient at the last check; None while it has none.
    inf_latched, nan_latched: whether any check of this run found an element of that kind in it.
    """

    norm: float | None
    inf_latched: bool
    nan_latched: bool


@dataclass(frozen=True, slots=True)
class WatchedHeads:
    """Know which layers are in which head, and what was ever found there; healthy checks cost nothing.

    modules: head -> names of the modules or layers in it.
    inf, nan: the heads in which that kind was found.
    """

    modules: Mapping[str, tuple[str, ...]]
    inf: frozenset[str] = frozenset()
    nan: frozenset[str] = frozenset()

    @classmethod
    def of(
        cls,
        heads: Mapping[str, str | Sequence[str]] | None,
        layer_names: Iterable[str],
        aliases: Mapping[str, str] = MappingProxyType({}),
    ) -> WatchedHeads:
        """Build the heads of a model with these layers; raise ValueError when one has no layer there.

        aliases: other names of the layers, by which a head can be given too.
        """
        if not isinstance(heads or {}, Mapping):
            raise ValueError(f"heads: expected a dict of head -> module name, got {type(heads).__name__}")
        names = list(layer_names)
        watched = {head: _modules(given) for head, given in (heads or {}).items()}
        for head, modules in watched.items():
            for module in modules or ("",):
                if not any(_is_in(name, module) for name in (*names, *aliases)):
                    raise ValueError(f"heads: expected one of {_known_modules(names)} for {head!r}, got {module!r}")
            meant = [name for alias, name in aliases.items() if any(_is_in(alias, module) for module in modules)]
            watched[head] = tuple(dict.fromkeys((*modules, *meant)))
        return cls(watched)

    def after(self, bad_layers: Iterable[LayerCounts]) -> WatchedHeads:
        """Return the heads after a check that found these bad layers."""
        if not self.modules:
            return self
        layers = tuple(bad_layers)
        return replace(
            self,
            inf=self.inf | self._heads_of(layer.layer_name for layer in layers if layer.inf_count),
            nan=self.nan | self._heads_of(layer.layer_name for layer in layers if layer.nan_count),
        )

    def read(self, layer_names: Sequence[str], layer_norms: Sequence[float | None]) -> dict[str, Head]:
        """Return each head, with its norm from those of all layers."""
        layers = list(zip(layer_names, layer_norms, strict=True))
        heads = {}
        for head, modules in self.modules.items():
            is_in = _is_in_any(modules)
            norms = [norm for name, norm in layers if norm is not None and is_in(name)]
            heads[head] = Head(total_norm(norms) if norms else None, head in self.inf, head in self.nan)
        return heads

    def _heads_of(self, layer_names: Iterable[str]) -> set[str]:
        names = list(layer_names)
        return {head for head, modules in self.modules.items() if any(map(_is_in_any(modules), names))}


def _modules(given: str | Iterable[str]) -> tuple[str, ...]:
    modules = (given,) if isinstance(given, str) or not isinstance(given, Iterable) else tuple(given)
    for module in modules:
        if not isinstance(module, str):
            raise ValueError(f"heads: expected names of modules, got {type(module).__name__}")
    return modules


def _is_in(layer_name: str, module: str) -> bool:
    return layer_name == module or layer_name.startswith(module + ".")


def _is_in_any(modules: tuple[str, ...]) -> Callable[[str], bool]:
    """Return a test for names of layers that is quick for thousands of them."""
    prefixes = tuple(f"{module}." for module in modules)
    return lambda layer_name: layer_name in modules or layer_name.startswith(prefixes)


def _known_modules(layer_names: Iterable[str]) -> str:
    """List the innermost modules; the last ones, because heads come last."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in layer_names))
    return ", ".join((["..."] if len(modules) > _SHOWN else []) + modules[-_SHOWN:])
