import io

import pytest
from rich.console import Console

from esper_telemetry.reference.terminal import LineDisplay, TerminalDisplay, banner
from tests.snapshots import NOW, bad, fresh


def test_a_healthy_run_has_no_banner():
    assert not banner(0, 0)


@pytest.mark.parametrize(
    ("inf", "nan", "text", "styles"),
    [
        (2, 1, "NaN:1 Inf:2", ["bold red", "bold red"]),
        (6, 0, "Inf:6", ["bold red reverse"]),
        (5, 6, "NaN:6 Inf:5", ["bold red reverse", "bold red"]),
    ],
)
def test_the_banner_is_red_from_1_and_reversed_above_5_each_kind_by_itself(inf, nan, text, styles):
    shown = banner(inf, nan)
    assert shown.plain == text
    assert [str(span.style) for span in shown.spans] == styles


def test_lines_show_each_update_once_with_its_worst_check(capsys):
    display = LineDisplay(10)
    display.progress(0, fresh())
    display.progress(9, bad(inf=2, nan=7))
    display.progress(9, bad(inf=2, nan=7))
    assert capsys.readouterr().out == "update 3  episodes 9/10  reward 21.5  checks 40  NaN:7 Inf:2\n"


def test_a_terminal_shows_bar_and_banner(monkeypatch):
    monkeypatch.setattr("esper_telemetry.reference.terminal.time.monotonic", lambda: NOW)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    display = TerminalDisplay(10, console)
    display.progress(9, bad(inf=6))
    display.close()
    shown = console.file.getvalue()
    assert "episodes 9/10" in shown
    assert "checks 40" in shown
    assert "\x1b[1;7;31mInf:6" in shown
