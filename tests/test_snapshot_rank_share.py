"""What one of several ranks made itself is counted per check, and is not known of a check that did not measure it."""

from esper_telemetry.snapshot.rank_share import LocalCheck
from esper_telemetry.snapshot.recent import LayerCounts, RecentWindow

BAD = (LayerCounts("net.0", 2, 5, 8),)
NOW = 100.0


def test_a_good_check_after_a_bad_one_has_none_and_the_recent_maximum_stays():
    good = LocalCheck(0, 0, RecentWindow(120.0)).after(NOW, BAD, 1, "net.0").after(NOW + 1, (), 0, None)
    assert (good.inf_count, good.nan_count, good.origin_layer) == (0, 0, "net.0")
    assert good.recent.read(NOW + 1).nan_max == 5


def test_a_check_that_did_not_measure_it_is_no_calm_zero_and_no_old_count():
    unknown = LocalCheck(0, 0, RecentWindow(120.0)).after(NOW, BAD, 1, "net.0").unmeasured()
    assert (unknown.inf_count, unknown.nan_count) == (None, None)
    assert unknown.recent.read(NOW).inf_max == 2
    measured = unknown.after(NOW + 1, (), 0, None)
    assert (measured.inf_count, measured.nan_count) == (0, 0)
