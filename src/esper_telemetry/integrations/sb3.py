"""stable-baselines3: `model.learn(steps, callback=EsperCallback(address="127.0.0.1:19301"))`."""

from __future__ import annotations

import time
from typing import Any

from torch.optim import Optimizer

from esper_telemetry.exporters.http import Exporter
from esper_telemetry.integrations.run import serve
from esper_telemetry.monitor import GradientMonitor, watch
from esper_telemetry.snapshot import Snapshot
from esper_telemetry.snapshot.ppo_update import PPOUpdatePayload

try:
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.utils import safe_mean
except ImportError as error:
    raise ImportError("stable-baselines3 is not installed: pip install 'esper-telemetry[ppo]'") from error


class EsperCallback(BaseCallback):
    """Watch the policy's gradients while `learn()` runs, and report each PPO update.

    monitor: one that watches the policy already; without it the policy is watched until `learn()` ends.
    address: where to serve the metrics meanwhile; a port in use is logged, and training goes on.
    options: of `watch()`, for a policy that this callback watches.
    """

    def __init__(
        self,
        monitor: GradientMonitor | None = None,
        *,
        address: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.monitor = monitor
        self.exporter: Exporter | None = None
        self.episodes = 0
        self.updates = 0
        self._given = monitor
        self._address = address
        self._options = options

    def _on_training_start(self) -> None:
        self._end()  # one that an exception had ended
        if self._given is None:
            policy = self.model.policy
            parts = [part for module in policy.modules() for part in vars(module).values()]
            self.monitor = watch(
                policy,
                optimizer=[part for part in parts if isinstance(part, Optimizer)],
                **self._options,
            )
        self.exporter = serve(self._monitor, self._address)
        self._worst: _WorstCheck | None = None

    @property
    def _monitor(self) -> GradientMonitor:
        assert self.monitor is not None
        return self.monitor

    def _on_rollout_start(self) -> None:
        self._report_update()

    def _on_step(self) -> bool:
        self.episodes += int(self.locals["dones"].sum())
        return True

    def _on_rollout_end(self) -> None:
        self._worst = _WorstCheck(self._monitor)

    def _on_training_end(self) -> None:
        self._report_update()
        self._end()

    def _end(self) -> None:
        if self._given is None and self.monitor is not None:
            self.monitor.close()
        if self.exporter is not None:
            self.exporter.close()

    def _report_update(self) -> None:
        """Report the update that lies between the end of a rollout and now."""
        worst, self._worst = self._worst, None
        if worst is None or not worst.close():
            return
        self.updates += 1
        train = self.logger.name_to_value
        entropy_loss = train.get("train/entropy_loss")
        rewards = [episode["r"] for episode in self.model.ep_info_buffer or ()]
        self._monitor.record_ppo_update(
            PPOUpdatePayload(
                inf_grad_count=worst.inf_grad_count,
                nan_grad_count=worst.nan_grad_count,
                update=self.updates,
                episodes=self.episodes,
                update_seconds=worst.seconds,
                episode_reward=float(safe_mean(rewards)) if rewards else None,
                policy_loss=train.get("train/policy_gradient_loss"),
                value_loss=train.get("train/value_loss"),
                entropy=None if entropy_loss is None else -entropy_loss,
                approx_kl=train.get("train/approx_kl"),
                clip_fraction=train.get("train/clip_fraction"),
                explained_variance=train.get("train/explained_variance"),
            )
        )


class _WorstCheck:
    """Keep the largest counts of the checks between its making and `close()`."""

    def __init__(self, monitor: GradientMonitor) -> None:
        self.inf_grad_count = 0
        self.nan_grad_count = 0
        self.seconds = 0.0
        self._started = time.perf_counter()
        self._checks = 0
        self._monitor = monitor
        self._stop = monitor.on_check(self._see)

    def _see(self, snapshot: Snapshot) -> None:
        self._checks += 1
        self.inf_grad_count = max(self.inf_grad_count, snapshot.inf_grad_count)
        self.nan_grad_count = max(self.nan_grad_count, snapshot.nan_grad_count)

    def close(self) -> bool:
        """Stop looking, and return whether anything was checked."""
        self._monitor.flush()
        self._stop()
        self.seconds = time.perf_counter() - self._started
        return self._checks > 0
