"""Which parameters are watched, and what they are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

Model = nn.Module | Mapping[str, nn.Module]


def named_layers(model: Model) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (layer name, parameter) once per parameter; a mapping's names become prefixes.

    The wrapper that `torch.compile` puts around a module is not part of a name.
    """
    seen: set[int] = set()
    for prefix, module in named_modules(model).items():
        for name, parameter in module.named_parameters(prefix):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield name.replace("_orig_mod.", ""), parameter


def named_modules(model: Model) -> dict[str, nn.Module]:
    """Return the model as prefix -> module, or raise ValueError when it is neither a module nor such a mapping."""
    modules = {"": model} if isinstance(model, nn.Module) else dict(model) if isinstance(model, Mapping) else {}
    for module in modules.values():
        if not isinstance(module, nn.Module):
            raise ValueError(f"model: expected torch.nn.Module values, got {type(module).__name__}")
    if not modules:
        raise ValueError(f"model: expected a torch.nn.Module or a dict of them, got {type(model).__name__}")
    return modules
