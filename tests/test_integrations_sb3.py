import logging
import math

import pytest
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.logger import Logger

from esper_telemetry import GradientsCritical, watch
from esper_telemetry.integrations.sb3 import EsperCallback
from esper_telemetry.reference.faults import Fault, FaultInjector


def agent(algorithm=PPO, **options):
    model = algorithm("MlpPolicy", "CartPole-v1", seed=0, device="cpu", **options)
    model.set_logger(Logger(folder=None, output_formats=[]))
    return model


def small_ppo():
    return agent(n_steps=32, batch_size=16, n_epochs=2)


def with_fault(model, *faults):
    """Watch the policy with faults to come, and return (callback, payloads)."""
    monitor = watch(
        model.policy,
        optimizer=model.policy.optimizer,
        on_critical="skip",
        before_check=FaultInjector(model.policy, faults),
    )
    payloads = []
    record = monitor.record_ppo_update
    monitor.record_ppo_update = lambda payload: (payloads.append(payload), record(payload))
    return EsperCallback(monitor), payloads


def test_one_line_watches_every_gradient_step_before_the_clip():
    model, callback = small_ppo(), EsperCallback()
    model.learn(96, callback=callback)
    snapshot = callback.monitor.snapshot
    assert snapshot.checks == 3 * 2 * 2
    assert snapshot.elements == sum(parameter.numel() for parameter in model.policy.parameters())
    assert snapshot.ended


def test_each_update_gives_a_payload_with_its_numbers():
    callback, payloads = with_fault(model := small_ppo())
    model.learn(96, callback=callback)
    assert [payload.update for payload in payloads] == [1, 2, 3]
    last = payloads[-1]
    assert callback.monitor.snapshot.ppo is last
    assert last.episodes == callback.episodes > 0
    assert last.episode_reward >= 1
    assert last.update_seconds > 0
    for number in ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "explained_variance"):
        assert math.isfinite(getattr(last, number))
    assert 0 < last.entropy <= math.log(2) + 1e-6


def test_a_payload_has_the_counts_of_the_worst_check_of_its_own_update():
    # 4 checks an update: 5 to 8 belong to the second.
    callback, payloads = with_fault(model := small_ppo(), Fault("inf", 7, 6), Fault("nan", 8, 6), Fault("inf", 9, 7))
    model.learn(96, callback=callback)
    assert [(payload.inf_grad_count, payload.nan_grad_count) for payload in payloads] == [(0, 0), (9, 8), (0, 0)]


def test_skip_keeps_the_policy_finite():
    callback, _ = with_fault(model := small_ppo(), Fault("nan", 6, 2))
    model.learn(64, callback=callback)
    assert callback.monitor.snapshot.skipped_updates["intervention"] == 1
    assert callback.monitor.snapshot.nan.critical_checks == 1
    assert all(parameter.isfinite().all() for parameter in model.policy.parameters())


def test_the_callback_finds_the_optimizer_whose_steps_it_is_to_skip():
    model, callback = small_ppo(), EsperCallback(on_critical="skip")
    model.learn(32, callback=callback)
    assert callback.monitor.snapshot.checks == 4


def test_halt_leaves_learn_with_an_exception():
    model = small_ppo()
    monitor = watch(model.policy, on_critical="halt", before_check=FaultInjector(model.policy, [Fault("inf", 6, 3)]))
    with pytest.raises(GradientsCritical):
        model.learn(64, callback=EsperCallback(monitor))
    assert monitor.snapshot.checks == 3


def test_learning_again_after_a_halt_watches_once():
    model = small_ppo()
    callback = EsperCallback(on_critical="halt", before_check=FaultInjector(model.policy, [Fault("inf", 6, 3)]))
    with pytest.raises(GradientsCritical):
        model.learn(32, callback=callback)
    halted = callback.monitor
    model.learn(32, callback=callback)
    assert (halted.snapshot.checks, halted.snapshot.ended) == (3, True)
    assert callback.monitor.snapshot.checks == 4


@pytest.mark.parametrize("algorithm", [A2C, DQN])
def test_other_algorithms_are_watched_too(algorithm):
    options = {"learning_starts": 16} if algorithm is DQN else {}
    model, callback = agent(algorithm, **options), EsperCallback()
    model.learn(64, callback=callback)
    assert callback.monitor.snapshot.checks > 0
    assert callback.monitor.snapshot.elements > 0


def test_a_port_in_use_is_logged_and_training_goes_on(caplog):
    first = EsperCallback(address="127.0.0.1:0")
    model = small_ppo()
    first.init_callback(model)
    first.on_training_start({}, {})
    second = EsperCallback(address=first.exporter.url.removeprefix("http://"))
    with caplog.at_level(logging.WARNING):
        model.learn(32, callback=second)
    first.on_training_end()
    assert second.monitor.snapshot.checks > 0
    assert "training goes on without an exporter" in caplog.text


def test_the_run_is_bit_equal_with_and_without_the_callback():
    weights = []
    for callback in (None, EsperCallback()):
        model = small_ppo()
        model.learn(96, callback=callback)
        weights.append([parameter.tolist() for parameter in model.policy.parameters()])
    assert weights[0] == weights[1]
