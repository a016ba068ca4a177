"""The documentation is built as `make docs` builds it, and its reference holds what the code holds."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from esper_telemetry import __all__ as public
from esper_telemetry.metrics import METRICS

pytestmark = pytest.mark.xdist_group("docs")  # one process, so that the pages are built once
ROOT = Path(__file__).parents[1]
OFFLINE = """
import runpy, socket, sys
def connect(*_): raise AssertionError("the documentation is built without a network")
socket.socket.connect = socket.socket.connect_ex = connect
sys.argv[0] = "sphinx"
runpy.run_module("sphinx", run_name="__main__")
"""


class Text(HTMLParser):
    """Collect what a person reads, and what a browser loads."""

    def __init__(self):
        super().__init__()
        self.words, self.loaded = [], []

    def handle_data(self, data):
        self.words.append(data)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag in ("script", "img", "link", "iframe"):
            self.loaded.append(found.get("src") or found.get("href") or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-c", OFFLINE, "--fail-on-warning", "--quiet", "-c", "docs", ".", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return out


def read(page):
    parsed = Text()
    parsed.feed(page.read_text())
    return parsed


def test_every_metric_is_in_the_reference_with_its_meaning(site):
    text = "".join(read(site / "docs" / "metrics.html").words)
    for metric in METRICS:
        assert metric.name in text
        assert metric.help in text


def test_every_alert_is_in_the_reference(site):
    text = "".join(read(site / "docs" / "alerts.html").words)
    for name in ("rules.yml", "norm.yml"):
        for group in yaml.safe_load((ROOT / "alerts" / name).read_text())["groups"]:
            for rule in group["rules"]:
                assert rule.get("alert", rule.get("record")) in text
                if "alert" in rule:
                    assert " ".join(rule["expr"].split()) in " ".join(text.split())


def test_every_option_is_in_the_reference(site):
    text = "".join(read(site / "docs" / "cli.html").words)
    for option in ("esper ppo", "--inject", "KIND:COUNT@CHECK[:LAYER]", "esper drill", "--ca-file FILE", "-V"):
        assert option in text


def test_every_public_name_is_in_the_reference(site):
    text = (site / "docs" / "api.html").read_text()
    assert not [name for name in public if f'id="esper_telemetry.{name}"' not in text]


def test_a_page_loads_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        assert not [url for url in read(page).loaded if "//" in url], page


def test_the_folder_leads_to_the_first_page(site):
    assert 'url=docs/index.html"' in (site / "index.html").read_text()
    assert (site / "docs" / "index.html").exists()
