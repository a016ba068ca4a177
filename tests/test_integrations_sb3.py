import logging
import math
import socket
import threading
import time

import pytest
import torch
from stable_baselines3 import A2C, DDPG, DQN, PPO, SAC, TD3
from stable_baselines3.common.logger import Logger

from deploy.stack.servers import free_port
from esper_telemetry import GradientsCritical, HealthTier, watch
from esper_telemetry.integrations.sb3 import EsperCallback
from esper_telemetry.integrations.sb3_trained import Trained
from esper_telemetry.reference.faults import Fault, FaultInjector
from tests.pages import close_pages, scrape

OFF_POLICY = {"learning_starts": 16, "batch_size": 8, "buffer_size": 100}


@pytest.fixture(autouse=True)
def closed_pages():
    yield
    close_pages()


def agent(algorithm=PPO, env="CartPole-v1", **options):
    model = algorithm("MlpPolicy", env, seed=0, device="cpu", policy_kwargs={"net_arch": [8]}, **options)
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
    assert callback.monitor.snapshot.checks == 3 + 4


class Listening(EsperCallback):
    """Keep every snapshot."""

    def _on_training_start(self):
        super()._on_training_start()
        self.seen = []
        self.monitor.on_check(self.seen.append)


class TestOtherAlgorithms:
    @pytest.mark.parametrize(
        ("algorithm", "env", "options", "parts"),
        [
            (A2C, "CartPole-v1", {}, {"mlp_extractor", "action_net", "value_net"}),
            (DQN, "CartPole-v1", OFF_POLICY, {"q_net"}),
            (SAC, "Pendulum-v1", OFF_POLICY, {"actor", "critic", "log_ent_coef"}),
            (SAC, "Pendulum-v1", {**OFF_POLICY, "ent_coef": 0.1}, {"actor", "critic"}),
            (TD3, "Pendulum-v1", OFF_POLICY, {"actor", "critic"}),
            (DDPG, "Pendulum-v1", OFF_POLICY, {"actor", "critic"}),
        ],
    )
    def test_all_that_is_trained_is_watched_and_nothing_else(self, algorithm, env, options, parts):
        model, callback = agent(algorithm, env, **options), Listening()
        model.learn(32, callback=callback)
        names = callback.seen[-1].layer_names
        assert {name.partition(".")[0] for name in names} == parts
        norms = zip(*(snapshot.layer_norms for snapshot in callback.seen), strict=True)
        assert [name for name, ever in zip(names, norms, strict=True) if set(ever) == {None}] == []
        assert callback.monitor.snapshot.ppo is None

    def test_the_layers_of_ppo_have_the_names_of_the_policy(self):
        model, callback = agent(PPO, "Pendulum-v1", n_steps=32, batch_size=16, n_epochs=1), EsperCallback()
        model.learn(32, callback=callback)
        assert callback.monitor.snapshot.layer_names == tuple(name for name, _ in model.policy.named_parameters())

    @pytest.mark.parametrize("kind", ["inf", "nan"])
    def test_a_bad_entropy_coefficient_is_found(self, kind):
        model, callback, arrivals = agent(SAC, "Pendulum-v1", **OFF_POLICY), Listening(), []

        def spoil(gradient):
            arrivals.append(1)
            return torch.full_like(gradient, getattr(math, kind)) if len(arrivals) == 3 else gradient

        model.log_ent_coef.register_hook(spoil)
        model.learn(20, callback=callback)
        first = next(snapshot for snapshot in callback.seen if snapshot.tier is not HealthTier.HEALTHY)
        assert (first.inf_grad_count, first.nan_grad_count) == (kind == "inf", kind == "nan")
        assert first.origin_layer == "log_ent_coef"

    def test_skip_is_told_of_every_optimizer(self):
        model = agent(SAC, "Pendulum-v1", **OFF_POLICY)
        expected = {model.actor.optimizer, model.critic.optimizer, model.ent_coef_optimizer}
        assert set(Trained.by(model).optimizers) == expected

    def test_what_a_subclass_trains_besides_is_watched_by_a_name_that_tells_where_it_is(self):
        class Curious(PPO):
            def _setup_model(self):
                super()._setup_model()
                self.bonus = torch.nn.Linear(1, 1)
                self.bonus_optimizer = torch.optim.SGD(self.bonus.parameters(), 0.1)
                self.scale = torch.ones(1, requires_grad=True)
                self.hidden = [torch.nn.Linear(1, 2, bias=False)]
                self.hidden_optimizer = torch.optim.SGD([self.scale, *self.hidden[0].parameters()], 0.1)

            def train(self):
                (self.hidden[0](self.bonus(self.scale)) * math.inf).sum().backward()
                super().train()

        model, callback = agent(Curious, n_steps=32, batch_size=16, n_epochs=1), EsperCallback()
        model.learn(32, callback=callback)
        snapshot = callback.monitor.snapshot
        assert snapshot.layer_names[-4:] == ("bonus.weight", "bonus.bias", "scale", "hidden_optimizer.1")
        assert snapshot.inf.elements + snapshot.nan.elements >= 5
        assert snapshot.ppo.update == 1


def test_how_training_goes_is_reported():
    model, callback = small_ppo(), EsperCallback()
    model.learn(96, callback=callback)
    progress = callback.monitor.snapshot.progress
    assert progress.loss == pytest.approx(model.logger.name_to_value["train/loss"])
    assert (progress.learning_rate, progress.step, progress.samples) == (3e-4, 96, 96)


def test_where_losses_are_trained_in_turn_the_critics_is_reported():
    model, callback = agent(SAC, "Pendulum-v1", **OFF_POLICY), EsperCallback()
    model.learn(24, callback=callback)
    progress = callback.monitor.snapshot.progress
    assert progress.loss == pytest.approx(model.logger.name_to_value["train/critic_loss"])
    assert (progress.step, progress.samples) == (24, 24)


class TestRunAfterRun:
    def test_a_second_learn_goes_on_counting_on_the_same_page(self):
        model, callback = small_ppo(), EsperCallback(address="127.0.0.1:0")
        model.learn(32, callback=callback)
        exporter = callback.exporter
        assert scrape(exporter)["esper_checks_total"] == 4
        assert scrape(exporter)["esper_run_ended"] == 1
        model.learn(32, callback=callback)
        assert callback.exporter is exporter
        page = scrape(exporter)
        assert (page["esper_checks_total"], page["esper_ppo_updates_total"], page["esper_run_ended"]) == (8, 2, 1)

    def test_the_next_callback_at_the_address_does_so_too(self):
        first, second = EsperCallback(address="127.0.0.1:0"), EsperCallback(address="127.0.0.1:0")
        small_ppo().learn(32, callback=first)
        small_ppo().learn(64, callback=second)
        assert second.exporter is first.exporter
        page = scrape(first.exporter)
        assert (page["esper_checks_total"], page["esper_ppo_updates_total"]) == (12, 3)
        assert page["esper_ppo_episodes_total"] == second.episodes > first.episodes

    def test_without_an_address_the_same_callback_goes_on_counting(self):
        model, callback = small_ppo(), EsperCallback()
        model.learn(32, callback=callback)
        model.learn(32, callback=callback)
        assert (callback.monitor.snapshot.checks, callback.updates) == (8, 2)

    def test_a_bad_learn_returns_at_once_and_what_it_found_stays_on_the_page(self):
        model = small_ppo()
        callback = EsperCallback(
            address="127.0.0.1:0", on_critical="skip", before_check=FaultInjector(model.policy, [Fault("nan", 7, 4)])
        )
        started = time.monotonic()
        model.learn(32, callback=callback)
        assert time.monotonic() - started < 15  # it was 20 more
        model.learn(32, callback=callback)
        assert scrape(callback.exporter)["esper_nan_grad_recent_max"] == 7

    def test_a_run_that_died_leaves_its_page_and_its_model_to_the_next(self, caplog):
        model = small_ppo()
        injector = FaultInjector(model.policy, [Fault("nan", 7, 3)])
        first = EsperCallback(address="127.0.0.1:0", on_critical=lambda _: 1 / 0, before_check=injector)
        with pytest.raises(ZeroDivisionError):
            model.learn(32, callback=first)
        second = EsperCallback(address="127.0.0.1:0")
        with caplog.at_level(logging.WARNING):
            model.learn(32, callback=second)
        assert second.exporter is first.exporter
        assert scrape(first.exporter)["esper_checks_total"] == 3 + 4
        assert first.monitor.snapshot.checks == 3
        assert "watched already" not in caplog.text

    def test_two_callbacks_in_one_learn_both_see_all_of_it(self):
        model, callbacks = small_ppo(), [EsperCallback(), EsperCallback()]
        model.learn(32, callback=callbacks)
        assert [callback.monitor.snapshot.checks for callback in callbacks] == [4, 4]

    def test_two_at_a_time_have_a_page_each_and_keep_it_and_one_line_says_so(self, caplog):
        address = f"127.0.0.1:{free_port()}"
        both_train = threading.Barrier(2)

        class Meets(EsperCallback):
            def _on_rollout_start(self):
                super()._on_rollout_start()
                both_train.wait(60)

        def train(callback):
            small_ppo().learn(32, callback=callback)
            small_ppo().learn(32, callback=callback)

        callbacks = [Meets(address=address) for _ in range(2)]
        threads = [threading.Thread(target=train, args=[callback]) for callback in callbacks]
        with caplog.at_level(logging.WARNING):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        first, second = sorted((callback.exporter for callback in callbacks), key=lambda exporter: exporter.url)
        assert first.url.endswith(address)
        assert [scrape(exporter)["esper_checks_total"] for exporter in (first, second)] == [8, 8]
        (said,) = caplog.messages
        assert f"{first.url} shows another run of this process that is still training" in said
        assert second.url in said


class TestAPortThatIsTaken:
    @pytest.fixture
    def taken(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            yield f"127.0.0.1:{listener.getsockname()[1]}"

    def test_it_is_an_error_line_and_the_page_is_at_the_next_free_port(self, taken, caplog):
        model, callback = small_ppo(), EsperCallback(address=taken)
        with caplog.at_level(logging.ERROR):
            model.learn(32, callback=callback)
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        assert taken in caplog.text
        assert not callback.exporter.url.endswith(taken)
        exporter = callback.exporter
        model.learn(32, callback=callback)
        assert callback.exporter is exporter
        assert scrape(exporter)["esper_checks_total"] == 8

    def test_strict_raises_and_leaves_the_policy_as_it_was(self, taken):
        model, callback = small_ppo(), EsperCallback(address=taken, strict=True)
        with pytest.raises(OSError, match=taken):
            model.learn(32, callback=callback)
        assert not any(parameter._post_accumulate_grad_hooks for parameter in model.policy.parameters())

    def test_what_is_no_address_is_refused_at_once(self):
        with pytest.raises(ValueError, match="expected HOST:PORT"):
            EsperCallback(address="nowhere")


def test_the_run_is_bit_equal_with_and_without_the_callback():
    weights = []
    for callback in (None, EsperCallback()):
        model = small_ppo()
        model.learn(96, callback=callback)
        weights.append([parameter.tolist() for parameter in model.policy.parameters()])
    assert weights[0] == weights[1]
