import logging
import math

import pytest
import torch
from sb3_contrib import ARS, QRDQN, TQC, TRPO, CrossQ, MaskablePPO, RecurrentPPO
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from stable_baselines3.common.logger import Logger

from esper_telemetry import GradientsCritical, HealthTier, watch
from esper_telemetry.integrations.sb3 import EsperCallback
from esper_telemetry.reference.faults import Fault, FaultInjector
from tests.documents import blocks
from tests.pages import close_pages

CHECKS = 2 * 2 * 2  # two rollouts, two epochs, two batches


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other take minutes over small tensors while other tests run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def closed_pages():
    yield
    close_pages()


def small_agent():
    agent = RecurrentPPO(
        "MlpLstmPolicy",
        "CartPole-v1",
        seed=0,
        device="cpu",
        n_steps=32,
        batch_size=16,
        n_epochs=2,
        policy_kwargs={"lstm_hidden_size": 8, "net_arch": [8]},
    )
    agent.set_logger(Logger(folder=None, output_formats=[]))
    return agent


def with_fault(agent, fault, **options):
    """Watch the agent with a fault to come, and return the callback and every snapshot."""
    monitor = watch(
        agent.policy, optimizer=agent.policy.optimizer, before_check=FaultInjector(agent.policy, [fault]), **options
    )
    seen = []
    monitor.on_check(seen.append)
    return EsperCallback(monitor), seen


def test_what_the_documentation_shows_runs():
    names = {"agent": small_agent()}
    exec(blocks()["stable-baselines3"], names)
    snapshot = names["callback"].monitor.snapshot
    assert (snapshot.checks, snapshot.ended, snapshot.tier) == (CHECKS, True, HealthTier.HEALTHY)
    assert any("lstm_actor" in name for name in snapshot.layer_names)
    assert snapshot.ppo.update == 2
    assert math.isfinite(snapshot.ppo.policy_loss)


@pytest.mark.parametrize("kind", ["inf", "nan"])
def test_one_bad_element_is_named_before_the_clip(kind):
    agent = small_agent()
    callback, seen = with_fault(agent, Fault(kind, 1, 8, "lstm_actor.weight_hh_l0"))
    agent.learn(64, callback=callback)
    bad = [snapshot for snapshot in seen if snapshot.tier is not HealthTier.HEALTHY]
    assert [snapshot.checks for snapshot in bad] == [8]
    assert (bad[0].inf_grad_count, bad[0].nan_grad_count) == (kind == "inf", kind == "nan")
    assert [layer.layer_name for layer in bad[0].layers] == ["lstm_actor.weight_hh_l0"]


def test_the_run_is_bit_equal_with_and_without_the_callback():
    weights = []
    for callback in (None, EsperCallback()):
        agent = small_agent()
        agent.learn(64, callback=callback)
        weights.append([parameter.tolist() for parameter in agent.policy.parameters()])
    assert weights[0] == weights[1]


def test_skip_drops_the_step_and_halt_leaves_learn():
    agent = small_agent()
    callback, _ = with_fault(agent, Fault("nan", 6, 3), on_critical="skip")
    agent.learn(64, callback=callback)
    assert callback.monitor.snapshot.skipped_updates["intervention"] == 1
    assert all(parameter.isfinite().all() for parameter in agent.policy.parameters())
    agent = small_agent()
    callback, _ = with_fault(agent, Fault("nan", 6, 3), on_critical="halt")
    with pytest.raises(GradientsCritical, match="check 3:"):
        agent.learn(64, callback=callback)


OFF_POLICY = {"learning_starts": 16, "batch_size": 8, "buffer_size": 100}


@pytest.mark.parametrize(
    ("algorithm", "env", "options", "parts"),
    [
        (TQC, "Pendulum-v1", OFF_POLICY, {"actor", "critic", "log_ent_coef"}),
        (CrossQ, "Pendulum-v1", OFF_POLICY, {"actor", "critic", "log_ent_coef"}),
        (QRDQN, "CartPole-v1", OFF_POLICY, {"quantile_net"}),
        (MaskablePPO, InvalidActionEnvDiscrete(4), {"n_steps": 16}, {"mlp_extractor", "action_net", "value_net"}),
        (TRPO, "CartPole-v1", {"n_steps": 16}, {"mlp_extractor", "action_net", "value_net"}),
    ],
)
def test_all_that_is_trained_is_watched_and_nothing_else(algorithm, env, options, parts):
    agent, callback = algorithm("MlpPolicy", env, seed=0, device="cpu", **options), EsperCallback()
    agent.set_logger(Logger(folder=None, output_formats=[]))
    agent.learn(32, callback=callback)
    snapshot = callback.monitor.snapshot
    assert {name.partition(".")[0] for name in snapshot.layer_names} == parts
    assert snapshot.checks > 0
    assert (snapshot.ppo is None) == (algorithm is not MaskablePPO)
    assert math.isfinite(snapshot.progress.loss)


@pytest.mark.parametrize(
    ("algorithm", "policy", "options", "line"),
    [
        (ARS, "LinearPolicy", {"n_delta": 1}, "ARS trains without an optimizer, so there are no gradients to measure"),
        (TRPO, "MlpPolicy", {"n_steps": 16}, "TRPO computes its policy's gradients with torch.autograd.grad"),
    ],
)
def test_what_cannot_be_seen_is_said_in_one_line(algorithm, policy, options, line, caplog):
    agent = algorithm(policy, "CartPole-v1", seed=0, device="cpu", **options)
    agent.set_logger(Logger(folder=None, output_formats=[]))
    with caplog.at_level(logging.WARNING):
        agent.learn(16, callback=EsperCallback())
    assert len(caplog.messages) == 1
    assert line in caplog.text
