import re
from pathlib import Path

from esper_telemetry.metrics import METRICS

README = Path(__file__).parents[1] / "README.md"


def test_names_are_unique_and_say_their_type():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert metric.name.startswith("esper_")
        assert metric.name.endswith("_total") == (metric.type == "counter")
        assert metric.name.removesuffix("_total").endswith("_seconds") == (metric.unit == "s")


def test_the_readme_has_the_same_table():
    rows = re.findall(r"^\| `(esper_\w+)` \| (\w+) \| (.*?) \| (.*) \|$", README.read_text(), re.MULTILINE)
    assert rows == [(metric.name, metric.type, ", ".join(metric.labels) or "none", metric.help) for metric in METRICS]
