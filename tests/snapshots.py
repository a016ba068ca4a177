"""Snapshots made by hand, for readers."""

from dataclasses import replace

from esper_telemetry.snapshot import RunInfo, Snapshot
from esper_telemetry.snapshot.amp_state import AmpState
from esper_telemetry.snapshot.damage import Damage, GoodCheck
from esper_telemetry.snapshot.heads import WatchedHeads
from esper_telemetry.snapshot.ppo_update import PPOUpdatePayload
from esper_telemetry.snapshot.rank_share import GradScope, LocalCheck
from esper_telemetry.snapshot.ranks import BadRank, DamagedRank, RankPlace, Ranks
from esper_telemetry.snapshot.recent import LayerCounts, RecentWindow
from esper_telemetry.snapshot.train_progress import TrainProgress

RUN = RunInfo(run_id="run-1", rank=0, world_size=1, local_rank=0, attempt=0, host="box", pid=4711)
NOW = 1000.0


class Source:
    """Anything that has a snapshot."""

    def __init__(self, snapshot):
        self.snapshot = snapshot


def fresh():
    """Return what is known before the first check."""
    return Snapshot.before_first_check(RUN, 120.0)


def of_ranks(inf=2, nan=0, timestamp=1.7e9, damaged=()):
    """Return what rank 0 knows of two ranks, of which the other one is bad."""
    return Ranks(
        expected=2,
        reporting=2,
        gone=0,
        silent=(),
        recent=RecentWindow(120.0).after(NOW, (LayerCounts("", inf, nan, 0),), 0),
        exact=True,
        attributed=True,
        bad=(BadRank(1, "gpu-7", inf, nan, "policy.weight", 40, timestamp, NOW, "input"),) if inf or nan else (),
        scanned=True,
        damaged=damaged,
        good=not (inf or nan),
        last_good=GoodCheck(37, timestamp - 3, None) if inf or nan else None,
        places=(RankPlace(0, 0, "box", "10.0.0.1:19301"), RankPlace(1, 0, "gpu-7", "10.0.0.2:19301")),
        leader="http://10.0.0.1:19301",
    )


def bad(inf=2, nan=0, timestamp=1.7e9):
    """Return the snapshot after one check that found something."""
    before = fresh()
    layers = (LayerCounts("policy.weight", inf, nan, 64),)
    return replace(
        before,
        checks=40,
        inf_grad_count=inf,
        nan_grad_count=nan,
        owned_inf_count=inf,
        owned_nan_count=nan,
        local=LocalCheck(0, 0, RecentWindow(120.0)).after(NOW, layers, 1, "policy.weight"),
        scope=GradScope("replica", True, "backward"),
        grad_norm=float("inf") if inf else float("nan"),
        elements=80,
        layers=layers,
        origin_layer="policy.weight",
        timestamp=timestamp,
        layer_names=("policy.weight", "policy.bias", "frozen"),
        layer_norms=(float("inf") if inf else float("nan"), 0.5, None),
        watched_heads=WatchedHeads({"policy": ("policy",), "value": ("frozen",)}).after(layers),
        dead_layers=1,
        exploding_layers=0,
        inf=before.inf.after(inf, timestamp, "policy.weight"),
        nan=before.nan.after(nan, timestamp, "policy.weight"),
        recent=before.recent.after(NOW, layers, 1),
        history=before.history.after(NOW, timestamp, inf, nan, "policy.weight"),
        amp=AmpState(scale=1024.0, skips=3, consecutive_skips=2, warm=True),
        found_damage=Damage(),
        cause="forward of policy",
        last_good_check=GoodCheck(check=38, timestamp=timestamp - 41, step=38),
        skipped_updates={"amp": 3, "intervention": 0, "rewind": 0},
        monitor_seconds=0.25,
        ppo=PPOUpdatePayload(
            inf_grad_count=inf,
            nan_grad_count=nan,
            update=3,
            episodes=9,
            update_seconds=0.125,
            episode_reward=21.5,
            policy_loss=-0.01,
            value_loss=4.5,
            entropy=0.69,
            approx_kl=0.001,
            clip_fraction=0.05,
            explained_variance=None,
        ),
        ranks=of_ranks(inf, nan, timestamp),
        progress=TrainProgress(loss=0.75, learning_rate=3e-4, step=40, samples=640),
    )


def damaged():
    """Return the same of a model that has taken it in."""
    return replace(
        bad(),
        found_damage=Damage(
            parameters=(LayerCounts("policy.weight", 0, 3, 64),),
            optimizer=(LayerCounts("exp_avg of policy.weight", 1, 3, 64),),
        ),
        ranks=of_ranks(damaged=(DamagedRank(1, "gpu-7", "parameters", 3, "policy.weight"),)),
    )
