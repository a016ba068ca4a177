"""What a receiver is told, in whatever order checks and deliveries come."""

from dataclasses import replace
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper_telemetry.health import HealthTier
from esper_telemetry.notify.alerts import Alerts, fingerprint, for_alertmanager, message
from esper_telemetry.snapshot.recent import LayerCounts
from tests.snapshots import RUN, fresh

WINDOW = 120.0


def checked(snapshot, now, inf=0, nan=0):
    """Return the snapshot after one more check, as a monitor would make it."""
    layers = (LayerCounts("policy.weight", inf, nan, 64),) if inf or nan else ()
    return replace(
        snapshot,
        inf_grad_count=inf,
        nan_grad_count=nan,
        inf=snapshot.inf.after(inf, now, "policy.weight"),
        nan=snapshot.nan.after(nan, now, "policy.weight"),
        recent=snapshot.recent.after(now, layers, 1) if layers else snapshot.recent,
    )


class Receiver:
    """Know what a receiver of these messages would know."""

    def __init__(self):
        self.firing = {}

    def take(self, body):
        assert body["status"] == (
            "firing" if any(each["status"] == "firing" for each in body["alerts"]) else "resolved"
        )
        for alert in body["alerts"]:
            key = alert["labels"]["alertname"], alert["labels"]["severity"]
            if alert["status"] == "firing":
                self.firing[key] = alert
            else:
                assert alert["fingerprint"] == self.firing.pop(key)["fingerprint"], "told of the end alone"


def deliver(alerts, *receivers):
    """Deliver until there is nothing left to say."""
    for _ in range(3):
        if alerts.pending():
            body = message(alerts.to_send(), RUN)
            for receiver in receivers:
                receiver.take(body)
            alerts.sent()
    assert not alerts.pending()


def test_a_message_is_in_version_4_of_alertmanagers_format():
    alerts = Alerts()
    alerts.see(checked(fresh(), 1.7e9, nan=7), 1.7e9, 1.7e9)
    body = message(alerts.to_send(), RUN)
    [alert] = body["alerts"]
    assert {key: body[key] for key in ("version", "groupKey", "status", "truncatedAlerts")} == {
        "version": "4",
        "groupKey": '{}:{run="run-1"}',
        "status": "firing",
        "truncatedAlerts": 0,
    }
    assert (body["receiver"], body["externalURL"], body["groupLabels"]) == ("esper", "", {"run": "run-1"})
    assert body["commonLabels"] == alert["labels"]
    assert body["commonAnnotations"] == alert["annotations"]
    assert alert["labels"] == {
        "alertname": "EsperNaNGradients",
        "severity": "critical",
        "job": "esper/esper-telemetry",
        "instance": "run-1:0",
        "run": "run-1",
        "run_id": "run-1",
        "rank": "0",
        "host": "box",
    }
    assert alert["annotations"]["summary"] == "7 NaN in the gradient of run-1:0"
    assert "It began in layer policy.weight." in alert["annotations"]["description"]
    assert (alert["startsAt"], alert["endsAt"]) == ("2023-11-14T22:13:20.000Z", "0001-01-01T00:00:00Z")
    assert for_alertmanager(alerts.to_send()) == [{key: alert[key] for key in ("labels", "annotations", "startsAt")}]


def test_the_all_clear_says_since_when_until_when():
    alerts, snapshot = Alerts(), checked(fresh(), 1000.0, inf=2)
    alerts.see(snapshot, 1000.0, 1000.0)
    alerts.sent()
    alerts.see(snapshot, 1000.0 + WINDOW, 1000.0 + WINDOW)
    assert not alerts.pending()
    alerts.see(snapshot, 1010.0 + WINDOW, 1010.0 + WINDOW)
    [alert] = message(alerts.to_send(), RUN)["alerts"]
    assert alert["status"] == "resolved"
    assert (moment(alert["startsAt"]), moment(alert["endsAt"])) == (1000, 1130)


def test_what_came_and_went_while_the_receiver_was_away_is_told_in_order():
    alerts, snapshot, receiver = Alerts(), checked(fresh(), 1000.0, inf=6), Receiver()
    alerts.see(snapshot, 1000.0, 1000.0)
    alerts.see(snapshot, 2000.0, 2000.0)
    receiver.take(message(alerts.to_send(), RUN))
    alerts.sent()
    assert list(receiver.firing) == [("EsperInfGradients", "critical")]
    receiver.take(message(alerts.to_send(), RUN))
    alerts.sent()
    assert not receiver.firing
    assert not alerts.pending()


@pytest.mark.parametrize(("last", "fires"), [(0, False), (3, True)])
def test_at_the_end_the_last_check_has_the_last_word(last, fires):
    alerts, snapshot, receiver = Alerts(), checked(fresh(), 1000.0, nan=6), Receiver()
    snapshot = checked(snapshot, 1001.0, nan=last)
    alerts.see(snapshot, 1001.0, 1001.0)
    alerts.see_last(snapshot, 1001.0)
    deliver(alerts, receiver)
    assert bool(receiver.firing) == fires


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from([1.0, 50.0, 200.0]), st.booleans()), min_size=1
    )
)
def test_the_receiver_knows_what_the_recent_window_holds(steps):
    alerts, receiver, snapshot, now = Alerts(), Receiver(), fresh(), 1000.0
    for inf, nan, pause, answers in steps:
        snapshot = checked(snapshot, now, inf, nan)
        alerts.see(snapshot, now, now)
        now += pause
        if answers:
            deliver(alerts, receiver)
        assert len(alerts.to_send()) <= 4
    alerts.see(snapshot, now, now)
    deliver(alerts, receiver)
    recent = snapshot.recent.read(now)
    tiers = {"EsperInfGradients": HealthTier.of(recent.inf_max), "EsperNaNGradients": HealthTier.of(recent.nan_max)}
    assert set(receiver.firing) == {
        (name, tier.value) for name, tier in tiers.items() if tier is not HealthTier.HEALTHY
    }


def test_a_fingerprint_is_of_the_labels_in_order():
    assert fingerprint({}) == "cbf29ce484222325"
    assert fingerprint({"b": "1", "a": "2"}) == fingerprint({"a": "2", "b": "1"}) != fingerprint({"a": "1", "b": "2"})


def moment(text):
    return datetime.fromisoformat(text).timestamp()
