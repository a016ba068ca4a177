"""The simulation of many ranks works with real rows in a real store, and its page tells all of it."""

from benchmarks.rank_rows import LINES, draw, measure_store, measure_training, report
from benchmarks.rank_rules import page_of


def test_a_small_run_is_measured_and_told(tmp_path):
    runs = {str(ranks): measure_store(ranks) for ranks in (2, 16)}
    results = {"machine": "here", "training": measure_training(), "runs": runs}
    page = report(results)
    assert "| | 2 ranks | 16 ranks |" in page
    assert all(label in page for label in LINES.values())
    assert runs["16"]["leaders"] == 2
    draw(results, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").stat().st_size > 1000


def test_the_series_grow_with_the_ranks_and_those_of_rank_0_do_not():
    lines = [page_of(ranks).count(b"\n") for ranks in (10, 20)]
    assert lines[1] - lines[0] == 10 * 11
    assert b'esper_global_nan_grad_recent_max{job="esper",instance="gpu0:19301",run="llama"} 7' in page_of(10)
