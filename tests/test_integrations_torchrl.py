import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from esper_telemetry import GradientMonitor, HealthTier
from tests.documents import blocks, without_our_lines

CODE = blocks()["TorchRL"]


def run(code, monkeypatch, bad_at=0, value=math.nan):
    """Run the loop of the documentation on made-up transitions; return (snapshots, losses)."""
    torch.manual_seed(0)
    seen, losses, arrivals = [], [], []
    actor = ProbabilisticActor(
        TensorDictModule(nn.Linear(4, 2), ["observation"], ["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    critic = ValueOperator(nn.Linear(4, 1), in_keys=["observation"])
    loss_module = ClipPPOLoss(actor, critic)

    def spoil(gradient):
        arrivals.append(1)
        if len(arrivals) == bad_at:
            gradient = gradient.clone()
            gradient[0, 3] = value
        return gradient

    loss_module.get_parameter("critic_network_params.module.weight").register_hook(spoil)
    loss_module.register_forward_hook(lambda *arguments: losses.append(arguments[2]["loss_objective"].item()))

    def collector():
        for _ in range(6):
            batch = TensorDict({"observation": torch.randn(8, 4)}, [8])
            with torch.no_grad():
                actor(batch)
            done = torch.zeros(8, 1, dtype=torch.bool)
            after = {"observation": torch.randn(8, 4), "reward": torch.randn(8, 1), "done": done, "terminated": done}
            batch["next"] = TensorDict(after, [8])
            yield batch

    init = GradientMonitor.__init__

    def init_and_listen(monitor, *args, **options):
        init(monitor, *args, **options)
        monitor.on_check(seen.append)

    monkeypatch.setattr(GradientMonitor, "__init__", init_and_listen)
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic)
    exec(code, {"torch": torch, "loss_module": loss_module, "collector": collector(), "advantage": advantage})
    return seen, losses


def test_a_healthy_loop_stays_healthy_and_is_bit_equal_without_our_lines(monkeypatch):
    seen, losses = run(CODE, monkeypatch)
    assert [snapshot.tier for snapshot in seen] == [HealthTier.HEALTHY] * 6
    assert run(without_our_lines(CODE), monkeypatch) == ([], losses)


@pytest.mark.parametrize(("kind", "value"), [("inf", math.inf), ("nan", math.nan)])
def test_one_bad_element_is_named_before_the_clip(kind, value, monkeypatch):
    seen, _ = run(CODE, monkeypatch, bad_at=6, value=value)
    assert [snapshot.tier for snapshot in seen] == [HealthTier.HEALTHY] * 5 + [HealthTier.WARNING]
    assert (seen[-1].inf_grad_count, seen[-1].nan_grad_count) == (kind == "inf", kind == "nan")
    assert seen[-1].origin_layer == "critic_network_params.module.weight"
