"""What an algorithm of stable-baselines3 trains."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from esper_telemetry.scan.layers import parameters_of

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

logger = logging.getLogger("esper_telemetry")

_Part = nn.Module | Tensor


class Trained(NamedTuple):
    """What is in an algorithm's optimizers: modules and tensors, by name, and the optimizers.

    The policy's parts have no prefix: `action_net`, `critic`. Target networks are in no optimizer.
    """

    model: dict[str, _Part]
    optimizers: list[Optimizer]

    @classmethod
    def by(cls, algorithm: BaseAlgorithm) -> Trained:
        """Look through the algorithm, and the modules in it.

        Where it trains without gradients, or takes some in a way that nobody can see, one line says so.
        """
        own = {name: part for name, part in vars(algorithm).items() if isinstance(part, _Part) and name != "policy"}
        parts: dict[str, _Part] = {"": algorithm.policy, **own}
        modules = [module for part in parts.values() if isinstance(part, nn.Module) for module in part.modules()]
        optimizers = {
            part: name
            for owner in (algorithm, *modules)
            for name, part in vars(owner).items()
            if isinstance(part, Optimizer)
        }
        left = {
            id(parameter): (f"{name}.{number}", parameter)
            for optimizer, name in optimizers.items()
            for number, parameter in enumerate(parameters_of(optimizer))
        }
        trained = frozenset(left)
        model: dict[str, _Part] = {}
        for name, part in parts.items():
            model.update(_find(name, part, trained, left))
        model.update(left.values())  # in no attribute of the algorithm: called by optimizer and place
        _say_what_is_not_seen(algorithm, bool(optimizers))
        return cls(model or {"": algorithm.policy}, list(optimizers))


def is_one_of(algorithm: BaseAlgorithm, names: frozenset[str]) -> bool:
    """Tell whether an algorithm is one of these or made from one; sb3-contrib need not be there."""
    return any(each.__name__ in names for each in type(algorithm).__mro__)


def _find(
    name: str, part: _Part, trained: frozenset[int], left: dict[int, tuple[str, Tensor]]
) -> Iterator[tuple[str, _Part]]:
    """Yield the largest parts of which all is trained, and take what is in them from what is left."""
    own = {id(parameter) for parameter in (part.parameters() if isinstance(part, nn.Module) else [part])}
    if own.isdisjoint(left):
        return
    if own <= trained:
        for each in own:
            left.pop(each, None)
        yield name, part
    elif isinstance(part, nn.Module):
        children: dict[str, _Part | None] = {**part._parameters, **part._modules}
        for child, inner in children.items():
            if inner is not None:
                yield from _find(f"{name}.{child}" if name else child, inner, trained, left)


def _say_what_is_not_seen(algorithm: BaseAlgorithm, has_optimizers: bool) -> None:
    name = type(algorithm).__name__
    if not has_optimizers:
        logger.warning("esper: %s trains without an optimizer, so there are no gradients to measure", name)
    elif is_one_of(algorithm, frozenset({"TRPO"})):
        logger.warning(
            "esper: %s computes its policy's gradients with torch.autograd.grad, where they cannot be seen; "
            "only its value network is measured",
            name,
        )
