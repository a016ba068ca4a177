"""stable-baselines3: `model.learn(steps, callback=EsperCallback(address="127.0.0.1:19301"))`."""

from __future__ import annotations

import time
from typing import Any

from esper_telemetry.exporters.http import Exporter
from esper_telemetry.integrations.run import Runs
from esper_telemetry.integrations.sb3_trained import Trained, is_one_of
from esper_telemetry.integrations.worst_check import WorstCheck
from esper_telemetry.monitor import GradientMonitor, watch
from esper_telemetry.snapshot.ppo_update import PPOUpdatePayload

try:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.utils import safe_mean
except ImportError as error:
    raise ImportError("stable-baselines3 is not installed: pip install 'esper-telemetry[ppo]'") from error

_PPO = frozenset({"PPO", "RecurrentPPO", "MaskablePPO"})

_LOSSES = ("train/loss", "train/critic_loss", "train/value_loss")
"""Names under which the loss is looked up, the first that is logged: not every algorithm logs a total loss."""


class EsperCallback(BaseCallback):
    """Watch the gradients of everything that an algorithm trains while `learn()` runs, and report training progress.

    A later `learn()` continues the counters, at the same address.

    monitor: one that is already watching. Default: watch everything in the algorithm's optimizers until `learn()` ends.
    address: where to serve the metrics until the process ends. If another process has the port, the next free one is
        used, and an error is logged.
    strict: raise OSError instead.
    options: of `watch()`, if no monitor is given.
    """

    def __init__(
        self,
        monitor: GradientMonitor | None = None,
        *,
        address: str | int | None = None,
        strict: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if monitor is not None and not isinstance(monitor, GradientMonitor):
            raise ValueError(f"monitor: expected a GradientMonitor, got {type(monitor).__name__}")
        self.monitor = monitor
        self.exporter: Exporter | None = None
        self.episodes = 0
        self.updates = 0
        self._given = monitor
        self._runs = Runs(address, strict)
        self._options = options
        self._is_ppo = False
        self._steps = 0
        self._update: _Update | None = None

    def _on_training_start(self) -> None:
        if self._given is None:
            trained = Trained.by(self.model)
            self.monitor = self._runs.begin(
                self.model, lambda: watch(trained.model, optimizer=trained.optimizers, **self._options)
            )
            ppo = self.monitor.snapshot.ppo
            if ppo is not None and ppo.update > self.updates:  # another callback's, which was at this address before
                self.updates, self.episodes = ppo.update, ppo.episodes
        else:
            self._runs.show(self._given)
        self.exporter = self._runs.exporter
        self._is_ppo = is_one_of(self.model, _PPO)
        self._steps = self.model.num_timesteps
        self._update = None  # one during which a run died

    @property
    def _monitor(self) -> GradientMonitor:
        assert self.monitor is not None
        return self.monitor

    def _on_rollout_start(self) -> None:
        self._report()

    def _on_step(self) -> bool:
        dones = self.locals.get("dones")  # ARS has none
        self.episodes += 0 if dones is None else int(dones.sum())
        return True

    def _on_rollout_end(self) -> None:
        if self._is_ppo:
            self._update = _Update(self._monitor)

    def _on_training_end(self) -> None:
        self._report()
        if self._given is None:
            self._monitor.close()

    def _report(self) -> None:
        """Report what lies between the end of a rollout and now."""
        steps = self.model.num_timesteps
        log = self.logger.name_to_value
        self._monitor.record(
            loss=next((log[name] for name in _LOSSES if name in log), None),
            lr=log.get("train/learning_rate"),
            step=steps,
            samples=steps - self._steps,
        )
        self._steps = steps
        update, self._update = self._update, None
        if update is not None and update.end():
            self._report_update(update)

    def _report_update(self, update: _Update) -> None:
        self.updates += 1
        train = self.logger.name_to_value
        entropy_loss = train.get("train/entropy_loss")
        rewards = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        self._monitor.record_ppo_update(
            PPOUpdatePayload(
                inf_grad_count=update.worst.inf_grad_count,
                nan_grad_count=update.worst.nan_grad_count,
                update=self.updates,
                episodes=self.episodes,
                update_seconds=update.seconds,
                episode_reward=float(safe_mean(rewards)) if rewards else None,
                policy_loss=train.get("train/policy_gradient_loss"),
                value_loss=train.get("train/value_loss"),
                entropy=None if entropy_loss is None else -entropy_loss,
                approx_kl=train.get("train/approx_kl"),
                clip_fraction=train.get("train/clip_fraction"),
                explained_variance=train.get("train/explained_variance"),
            )
        )


class _Update:
    """Follow one PPO update from the end of its rollout to `end()`."""

    def __init__(self, monitor: GradientMonitor) -> None:
        self.worst = WorstCheck(monitor)
        self.seconds = 0.0
        self._monitor = monitor
        self._started = time.perf_counter()

    def end(self) -> bool:
        """Return whether anything was checked."""
        self._monitor.flush()
        self.worst.close()
        self.seconds = time.perf_counter() - self._started
        return self.worst.checks > 0
