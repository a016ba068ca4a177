from hypothesis import given
from hypothesis import strategies as st

from esper_telemetry.snapshot.recent import MAX_LAYERS, LayerCounts, RecentWindow


def layer(number, inf=0, nan=0):
    return LayerCounts(f"layer{number}", inf, nan, 100)


def after(window, now, *layers):
    return window.after(now, layers, sum(1 << int(each.layer_name[5:]) for each in layers))


@given(
    checks=st.lists(
        st.tuples(st.floats(0.01, 30), st.integers(0, 9), st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=80
    ),
    later=st.floats(0, 150),
)
def test_a_maximum_lasts_the_window_and_at_most_a_bucket_longer(checks, later):
    window, now, seen = RecentWindow(120.0), 0.0, []
    for wait, inf, nan, number in checks:
        now += wait
        window = after(window, now, layer(number, inf, nan))
        seen.append((now, inf, nan))
    now += later
    read = window.read(now)
    surely = [check for check in seen if now - check[0] <= 120]
    perhaps = [check for check in seen if now - check[0] <= 125]
    for shown, kind in ((read.inf_max, 1), (read.nan_max, 2)):
        assert max((check[kind] for check in surely), default=0) <= shown
        assert shown <= max((check[kind] for check in perhaps), default=0)


def test_it_stays_bounded_in_a_long_bad_run():
    window = RecentWindow(120.0)
    for step in range(5000):
        window = after(window, step * 0.1, *(layer(number, inf=step % 7 + 1) for number in range(0, 200, 2)))
    assert len(window.buckets) <= 26
    assert all(len(bucket.layers) <= MAX_LAYERS for bucket in window.buckets)


def test_the_worst_layers_are_shown_and_the_rest_counted():
    window = after(RecentWindow(120.0), 0.0, *(layer(number, nan=200 - number) for number in range(70)))
    window = after(window, 60.0, layer(69, nan=500), layer(3, inf=1))
    read = window.read(60.0)
    assert read.layers[0] == layer(69, nan=500)
    assert [each.layer_name for each in read.layers[1:3]] == ["layer0", "layer1"]
    assert len(read.layers) == MAX_LAYERS
    assert read.layers_dropped == 20


def test_a_window_without_a_bad_check_shows_none():
    read = RecentWindow(120.0).read(1e9)
    assert (read.inf_max, read.nan_max, read.layers, read.layers_dropped) == (0, 0, (), 0)


def test_layers_that_could_not_be_measured_stay_for_the_window_and_are_no_bad_layers():
    window = RecentWindow(120.0).after(0.0, (), 0, unmeasured=3).after(1.0, (), 0, unmeasured=2)
    read = window.read(120.0)
    assert (read.unmeasured_max, read.inf_max, read.layers, read.layers_dropped) == (3, 0, (), 0)
    assert window.read(200.0).unmeasured_max == 0
