"""What one PPO update reports to the monitor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PPOUpdatePayload:
    """Describe one PPO update; the counts have no default, so that none is reported without counting.

    inf_grad_count, nan_grad_count: of the update's worst check, each kind by itself.
    update, episodes: how many there were so far, including this one.
    episode_reward: mean over the last 100 episodes; like the losses, None where nothing was measured.
    update_seconds: wall time of the update's gradient steps.
    """

    inf_grad_count: int
    nan_grad_count: int
    update: int
    episodes: int
    update_seconds: float
    episode_reward: float | None
    policy_loss: float | None
    value_loss: float | None
    entropy: float | None
    approx_kl: float | None
    clip_fraction: float | None
    explained_variance: float | None
