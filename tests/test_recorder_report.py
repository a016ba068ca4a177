import base64
import hashlib
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from esper_telemetry.cli import main
from esper_telemetry.recorder.recording import BadLayer, Element, PastCheck, Recording, read_recording
from esper_telemetry.recorder.report.page import report_page
from esper_telemetry.recorder.report.plot import line_plot
from esper_telemetry.recorder.report.text import report_text, sparkline

ESPER = Path(sys.executable).with_name("esper")


def past(check, **known):
    rest = {"inf_count": 0, "nan_count": 0, "grad_norm": 1.5, "scale": None, "learning_rates": (), "batch_id": None}
    return PastCheck(**{"check": check, "timestamp": 1.7e9 + check, **rest, **known})


RECORDING = Recording(
    run_id="run-1",
    rank=3,
    world_size=8,
    host="box",
    pid=4711,
    devices=("cuda:0 NVIDIA H100",),
    versions={"torch": "2.13.0"},
    check=42,
    timestamp=1.7e9,
    batch_id="shard-7",
    inf_count=6,
    nan_count=1,
    elements=12_345,
    watched_layers=90,
    origin_layer="head.weight",
    clean_before="head.bias",
    clean_after=None,
    layers=(
        BadLayer(
            "head.weight", 6, 0, 64, (8, 8), "bfloat16", (Element((1, 2), 10, "inf"), Element((7, 0), 56, "-inf"))
        ),
        BadLayer("trunk.bias", 0, 1, 8, None, None, None),
    ),
    layers_left_out=7,
    history=(
        *(past(check, learning_rates=(0.1, 0.2), scale=2.0**check, batch_id=f"b{check}") for check in range(30, 42)),
        past(42, inf_count=6, nan_count=1, grad_norm=math.nan, learning_rates=(0.1, None), scale=1024.0),
    ),
    layer_norms={"head.weight": (None, *(float(n) for n in range(1, 12)), math.inf), "head.bias": (0.5,) * 13},
)


class TestText:
    def test_begins_with_what_is_bad_and_where_it_began(self):
        assert report_text(RECORDING).splitlines()[0] == "NaN:1 Inf:6 first in head.weight"

    def test_is_loud_where_it_is_bad_in_a_terminal_that_has_colors(self):
        shown = report_text(RECORDING, color=True)
        assert shown.startswith("\033[1;31mNaN:1\033[0m \033[1;7;31mInf:6\033[0m first in head.weight\n")
        assert "\033" not in report_text(RECORDING)

    def test_has_the_facts(self):
        lines = report_text(RECORDING).splitlines()
        assert "nearest clean  head.bias (nearer the loss), none (after it)" in lines
        assert "check          42, at 2023-11-14 22:13:20 UTC" in lines
        assert "batch          shard-7" in lines
        assert "run            run-1, rank 3 of 8" in lines
        assert "where          box, process 4711, cuda:0 NVIDIA H100" in lines
        assert "covered        12,345 elements in 90 layers" in lines

    def test_has_a_table_of_the_bad_layers(self):
        lines = report_text(RECORDING).splitlines()
        at = next(place for place, line in enumerate(lines) if line.startswith("bad layer"))
        assert lines[at : at + 4] == [
            "bad layer    Inf  NaN  of  first at",
            "head.weight    6    0  64  [1, 2] inf [7, 0] -inf",
            "trunk.bias     0    1   8  unknown: the gradient was gone",
            "and 7 more layers",
        ]

    def test_has_a_sparkline_for_what_was_measured(self):
        lines = report_text(RECORDING).splitlines()
        at = lines.index("norm of head.weight, where it began: 1 to 11, last Inf")
        assert lines[at + 1] == "   ▁▃▄▅▆▆▇▇███!"
        assert any(line.startswith("scale of the GradScaler: ") for line in lines)
        assert any(line.startswith("learning rate of group 1: ") for line in lines)

    def test_ends_with_the_last_checks_in_numbers(self):
        lines = report_text(RECORDING).splitlines()
        assert lines[-9].split() == ["check", "after", "Inf", "NaN", "norm", "learning", "rate", "scale", "batch"]
        assert lines[-2].split() == ["41", "1.000", "s", "0", "0", "1.5", "0.1,", "0.2", "2.199e+12", "b41"]
        assert lines[-1].split() == ["42", "1.000", "s", "6", "1", "NaN", "0.1,", "-", "1024", "-"]

    @pytest.mark.parametrize("width", [70, 80, 400])
    def test_fits_the_terminal(self, width):
        many = tuple(Element((number, number), number, "nan") for number in range(16))
        layers = (replace(RECORDING.layers[0], first_bad=many),)
        lines = report_text(replace(RECORDING, layers=layers), width).splitlines()
        assert [line for line in lines if len(line) > width] == []
        assert next(line for line in lines if line.startswith("head.weight")).endswith("…") == (width < 400)


class TestSparkline:
    @pytest.mark.parametrize(
        ("values", "line"),
        [
            ([1, 2, 3, 4, 5, 6, 7, 8], "▁▂▃▄▅▆▇█"),
            ([1, 10, 100, 1000], "▁▃▆█"),
            ([None, 1, math.inf, 2, math.nan], " ▁!█!"),
            ([0, 0, 6], "▁▁█"),
            ([3, 3], "▅▅"),
            ([math.nan], "!"),
        ],
    )
    def test_draws(self, values, line):
        assert sparkline(values, 20) == line

    def test_keeps_the_worst_of_what_falls_together_and_the_last_by_itself(self):
        values = [1.0] * 255 + [math.inf]
        line = sparkline(values, 64)
        assert len(line) == 64
        assert line.endswith("▅!")
        assert "!" in sparkline([1.0] * 100 + [math.nan] + [1.0] * 155, 30)


@example([1.1e307, 1.7e308], 1)
@example([5e-324, 1.0], 1)
@example([-1.7e308, 1.7e308], 1)
@given(st.lists(st.none() | st.floats(), min_size=1, max_size=40), st.integers(1, 60))
def test_whatever_was_measured_can_be_drawn(values, width):
    assert len(sparkline(values, width)) <= width
    drawing = ElementTree.fromstring(line_plot(range(len(values)), values, "norm"))
    _, _, right, bottom = map(float, drawing.attrib["viewBox"].split())
    places = [
        tuple(map(float, place.split(",")))
        for line in drawing.iter("polyline")
        for place in line.attrib["points"].split()
    ]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    assert len(places) == len(finite)
    assert all(0 <= x <= right and 0 <= y <= bottom for x, y in places)
    bad = [mark for mark in drawing.iter("circle") if mark.attrib["class"] == "bad"]
    assert len(bad) == len([value for value in values if value is not None]) - len(finite)


class _Page(HTMLParser):
    """Note every tag, and that each is closed where it was opened."""

    VOID = frozenset({"meta"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self._open = [], [], "", []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.words += data


class TestPage:
    def test_says_the_same_as_the_terminal(self):
        page = _Page(report_page(RECORDING))
        for words in ("NaN:1", "Inf:6", "head.weight", "rank 3 of 8", "[7, 0] -inf", "shard-7", "And 7 more layers."):
            assert words in page.words
        assert page.tags.count("svg") == page.tags.count("figure") == 8

    def test_each_point_can_be_read(self):
        assert "<title>check 41: 1.5</title>" in report_page(RECORDING)
        assert "<title>check 42: NaN</title>" in report_page(RECORDING)

    def test_needs_nothing_from_anywhere_and_runs_nothing(self):
        text = report_page(RECORDING)
        page = _Page(text)
        assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
        assert not [name for name, _ in page.attributes if name in ("src", "href", "style") or name.startswith("on")]
        style = re.search(r"<style>(.*)</style>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        assert f"content=\"default-src 'none'; style-src 'sha256-{digest}'\"" in text
        assert "url(" not in style
        assert "prefers-color-scheme: dark" in style

    def test_a_name_is_a_name_and_no_markup(self):
        name = '<script>alert("1")</script>&'
        layers = (replace(RECORDING.layers[0], layer_name=name),)
        hostile = replace(
            RECORDING, run_id=name, host=name, origin_layer=name, layers=layers, layer_norms={name: (1.0,) * 13}
        )
        page = _Page(report_page(hostile))
        assert "script" not in page.tags
        assert page.words.count(name) >= 5


class TestCommand:
    def write(self, folder, **changes):
        path = folder / "recording.json"
        replace(RECORDING, **changes).write(path)
        return path

    def test_prints_the_report(self, tmp_path, capsys):
        assert main(["report", str(self.write(tmp_path))]) == 0
        shown = capsys.readouterr()
        assert shown.out.startswith("NaN:1 Inf:6 first in head.weight\n")
        assert shown.err == ""

    def test_writes_the_page_too(self, tmp_path, capsys):
        page = tmp_path / "report.html"
        assert main(["report", str(self.write(tmp_path)), "--html", str(page)]) == 0
        assert capsys.readouterr().out.endswith(f"\n\nwritten to {page}\n")
        assert page.read_text() == report_page(RECORDING)

    def test_a_file_cannot_move_the_cursor(self, tmp_path, capsys):
        main(["report", str(self.write(tmp_path, origin_layer="a\033[2Jb\nc", host="\r\x9b"))])
        shown = capsys.readouterr().out
        assert "first in a?[2Jb?c\n" in shown
        assert shown.isprintable() or set(re.findall(r"[^\x20-\x7e▁-█…]", shown)) == {"\n"}

    @pytest.mark.parametrize(
        ("file", "message"),
        [
            ("nowhere.json", "nowhere.json: No such file or directory"),
            (".", ".: Is a directory"),
            (__file__, f"expected a recording, got {__file__!r}: "),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, capsys, file, message):
        assert main(["report", file]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.startswith(f"esper report: {message}")
        assert len(shown.err.splitlines()) == 1

    def test_a_page_that_cannot_be_written_is_one_line_too(self, tmp_path, capsys):
        page = tmp_path / "nowhere" / "report.html"
        assert main(["report", str(self.write(tmp_path)), "--html", str(page)]) == 2
        assert capsys.readouterr().err == f"esper report: {page}: No such file or directory\n"

    def test_a_terminal_without_bars_gets_the_rest(self, tmp_path):
        run = subprocess.run(
            [ESPER, "report", self.write(tmp_path)],
            capture_output=True,
            env={"PYTHONIOENCODING": "ascii", "PATH": ""},
            timeout=120,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert b"norm of head.weight, where it began: 1 to 11, last Inf\n   ?" in run.stdout


def test_from_a_bad_element_in_a_ppo_run_to_the_report(tmp_path, capsys):
    arguments = ["--listen-address", "127.0.0.1:0", "--linger", "0", "--record-dir", tmp_path / "recordings"]
    run = subprocess.run(
        [ESPER, "ppo", *arguments, "--inject", "nan:2@41:action_net.weight"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    (path,) = (tmp_path / "recordings").iterdir()
    assert f"esper: check 41 found Inf 0, NaN 2, first in action_net.weight; recorded in {path}" in run.stderr
    recording = read_recording(path)
    assert [each.index for each in recording.layers[0].first_bad] == [(0, 0), (0, 1)]
    assert {each.learning_rates for each in recording.history} == {(0.0003,)}
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out.startswith("NaN:2 first in action_net.weight\n")


def test_a_folder_that_cannot_be_written_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "file").touch()
    run = subprocess.run(
        [ESPER, "ppo", "--listen-address", "127.0.0.1:0", "--record-dir", tmp_path / "file"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 2
    expected = f"--record-dir: expected a writable folder, got '{tmp_path / 'file'}': File exists"
    assert run.stderr == f"esper ppo: {expected}\n"
