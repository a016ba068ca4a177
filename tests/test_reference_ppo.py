import re
import socket

import pytest
from torch.distributions import Distribution

from esper_telemetry.reference.faults import Fault
from esper_telemetry.reference.ppo import Options, PPOJob


@pytest.fixture(autouse=True)
def _validated_distributions(monkeypatch):
    """Let torch check what a policy predicts, as in a new process: torch.compile and TorchRL end that for good."""
    monkeypatch.setattr(Distribution, "_validate_args", True)


class Silent:
    def progress(self, episodes, snapshot):
        self.last = episodes, snapshot

    def close(self):
        pass


def run(**options):
    """Run a job and return (summary, last snapshot)."""
    job = PPOJob(Options(listen_address="127.0.0.1:0", **options))
    try:
        return job.train(Silent()), job.monitor.snapshot
    finally:
        job.exporter.close(linger=0)


def test_ten_episodes_give_at_least_100_checks():
    summary, snapshot = run(episodes=10)
    assert summary.checks == snapshot.checks >= 100
    assert snapshot.ppo.episodes >= 10
    assert (summary.bad_checks, summary.first_bad_layer) == (0, None)
    assert 0 < summary.monitor_seconds < summary.seconds


def test_one_episode_is_trained_on_too():
    summary, _ = run(episodes=1)
    assert summary.checks >= 40


@pytest.mark.parametrize(("kind", "count", "counts"), [("inf", 2, (2, 0)), ("nan", 1, (0, 1))])
def test_the_kind_and_the_count_are_kept_although_the_job_clips_right_after(kind, count, counts):
    checks = []
    job = PPOJob(Options(listen_address="127.0.0.1:0", inject=[Fault(kind, count, 40)]))
    job.monitor.on_check(lambda snapshot: checks.append((snapshot.inf_grad_count, snapshot.nan_grad_count)))
    summary = job.train(Silent())
    job.exporter.close(linger=0)
    assert checks[38:40] == [(0, 0), counts]
    # One bad element is the end of the run: its weights are NaN, and torch refuses what they predict.
    assert summary.died.startswith("ValueError: Expected parameter logits")
    assert (summary.checks, summary.bad_checks) == (len(checks), 1)


def test_a_skipped_critical_check_leaves_the_rest_of_the_run_healthy():
    summary, snapshot = run(inject=[Fault("inf", 6, 41, "value_net.weight")], on_critical="skip")
    assert (summary.bad_checks, summary.worst_inf, summary.first_bad_check) == (1, 6, 41)
    assert summary.first_bad_layer == "value_net.weight"
    assert snapshot.skipped_updates["intervention"] == 1


def test_halt_ends_the_run_and_says_why():
    summary, snapshot = run(inject=[Fault("nan", 7, 41, "action_net.weight")], on_critical="halt")
    assert summary.checks == 41
    assert "check 41: Inf 0, NaN 7" in summary.halted
    assert "first in action_net.weight" in summary.halted
    assert (snapshot.ppo.update, snapshot.ppo.nan_grad_count) == (2, 7)


def test_a_fault_that_the_run_did_not_reach_is_told():
    fault = Fault("inf", 1, 1800)
    summary, _ = run(episodes=3, inject=[fault])
    assert summary.missed == (fault,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 0}, "--episodes: expected at least 1, got 0"),
        ({"linger": -1.0}, "--linger: expected seconds of at least 0, got -1.0"),
        ({"env": "Nowhere-v0"}, "--env: expected a Gymnasium environment such as CartPole-v1, got 'Nowhere-v0'"),
        ({"listen_address": "nowhere"}, "--listen-address: expected HOST:PORT"),
        ({"inject": [Fault("inf", 1, 1, "x")]}, "--inject: expected one of the layers mlp_extractor"),
        ({"inject": [Fault("inf", 1, 10**9)]}, "--inject: expected a check from 1 to 6280, the last one in reach"),
    ],
)
def test_bad_input_begins_with_the_option(options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        PPOJob(Options(**{"listen_address": "127.0.0.1:0"} | options))
    assert "\n" not in str(error.value)


def test_a_port_in_use_is_an_error_at_set_up():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"^--listen-address: .*{address}: Address already in use$"):
            PPOJob(Options(listen_address=address))


def test_a_run_that_goes_back_learns_as_if_it_had_never_seen_the_bad_gradient():
    summary, snapshot = run(episodes=20, inject=[Fault("nan", 7, 40)], on_critical="rewind")
    assert (summary.died, summary.halted, summary.bad_checks) == (None, None, 1)
    assert snapshot.skipped_updates == {"amp": 0, "intervention": 0, "rewind": 1}
    assert snapshot.damage == "intact"
    assert snapshot.ppo.episode_reward > 40, "it has learned; it began at 25"


def test_a_warning_that_damages_the_policy_is_undone_too():
    summary, snapshot = run(episodes=10, inject=[Fault("nan", 1, 40)], on_critical="rewind")
    assert (summary.died, summary.bad_checks) == (None, 1)
    assert snapshot.skipped_updates["rewind"] == 1


@pytest.mark.parametrize(("option", "name"), [("rewind_every", "--rewind-every"), ("max_rewinds", "--max-rewinds")])
def test_numbers_that_are_none_are_refused_by_the_name_of_their_option(option, name):
    with pytest.raises(ValueError, match=f"^{name}: expected at least 1, got 0"):
        run(on_critical="rewind", **{option: 0})
