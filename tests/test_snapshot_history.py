import time

import torch
from torch import nn

from esper_telemetry import watch
from esper_telemetry.snapshot.history import SLOTS, History, Slot


def after(history, *checks):
    """Apply checks of (time, Inf, NaN); the unix clock runs 1,000,000 ahead."""
    for now, inf, nan in checks:
        history = history.after(now, 1e6 + now, inf, nan, "layer")
    return history


def test_the_worst_check_of_a_slot_stays_and_a_slot_without_a_check_is_none():
    history = after(History(120.0), (1000, 0, 0), (1001, 2, 0), (1009, 1, 7), (1031, 0, 0))
    assert history.read(1035)[-4:] == [Slot(100, 2, 7), None, None, Slot(103, 0, 0)]


def test_fifteen_minutes_are_read_and_what_is_older_is_not():
    history = after(History(120.0), (1000, 7, 0))
    assert history.read(1899)[0] == Slot(100, 7, 0)
    assert history.read(1900) == [None] * SLOTS


def test_a_healthy_check_in_a_slot_that_exists_makes_nothing_new():
    history = after(History(120.0), (1000, 3, 0))
    assert history.after(1009.0, 1.0, 0, 0, None) is history


def test_it_stays_bounded():
    history = after(History(120.0), *((step * 5.0, step % 3, 0) for step in range(2000)))
    assert len(history.slots) == SLOTS


def test_trouble_remembers_its_first_check_until_a_quiet_window():
    history = History(120.0).after(0.0, 1e6, 2, 0, "head").after(100.0, 1e6 + 100, 0, 9, "trunk")
    assert (history.trouble.since, history.trouble.origin_layer, history.trouble.checks) == (1e6, "head", 2)
    history = history.after(221.0, 1e6 + 221, 1, 0, "bias")
    assert (history.trouble.since, history.trouble.origin_layer, history.trouble.checks) == (1e6 + 221, "bias", 1)


def test_a_run_without_pauses_stalls_after_a_minute():
    assert History(120.0).stalled_seconds == 60
    assert after(History(120.0), *((step * 1.0, 0, 0) for step in range(100))).stalled_seconds == 60


def test_a_run_with_long_pauses_stalls_after_three_of_them():
    assert after(History(120.0), (0, 0, 0), (5, 0, 0), (305, 0, 0), (310, 0, 0)).stalled_seconds == 900


def test_checks_that_are_rarer_than_what_is_shown_still_tell_their_pause():
    assert after(History(120.0), (0, 0, 0), (3600, 0, 0), (7200, 0, 0)).stalled_seconds == 3 * 3600


def test_a_monitor_keeps_it():
    model = nn.Linear(2, 1)
    monitor = watch(model)
    model(torch.ones(1, 2)).sum().backward()
    model(torch.full((1, 2), float("inf"))).sum().backward()
    snapshot = monitor.snapshot
    assert max(slot.inf_max for slot in snapshot.history.read(time.monotonic()) if slot) == 2
    assert snapshot.history.trouble.origin_layer == "weight"
    assert snapshot.history.trouble.since == snapshot.timestamp
    assert snapshot.history.began < snapshot.timestamp
