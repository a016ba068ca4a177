"""`esper assets` writes files that Prometheus, Alertmanager, Grafana and Kubernetes take, with one's own addresses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from deploy.stack import servers
from esper_telemetry.assets import writing
from esper_telemetry.assets.filling import PLACEHOLDERS, filled
from esper_telemetry.assets.shipped import shipped
from esper_telemetry.assets.site import Site
from esper_telemetry.assets.writing import write
from esper_telemetry.cli import main
from tests.kubectl import kustomize

ROOT = Path(__file__).parent.parent
MINE = {
    "--grafana-url": "https://grafana.my.org/on-call",
    "--runbook-url": "https://wiki.my.org/runbooks/",
    "--alertmanager-url": "https://alerts.my.org",
}
OPTIONS = [word for pair in MINE.items() for word in pair]


def esper_assets(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = main(["assets", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def accepted(program: str, *arguments: str | Path) -> str:
    done = subprocess.run([servers.find(program), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    folder = tmp_path / "esper"
    labels = ["--label", "release=kube-prometheus-stack", "--label", "my.org/team="]
    code, _, error = esper_assets(capsys, folder, *OPTIONS, *labels, "--namespace", "training")
    assert (code, error) == (0, "")
    return folder


def test_every_address_is_filled_in(written: Path) -> None:
    texts = tree(written)
    assert len(texts) > 30
    assert [name for name, text in texts.items() if "example.com" in text] == []
    rules = texts["alerts/rules.yml"]
    assert "runbook_url: https://wiki.my.org/runbooks/EsperNaNGradients.md\n" in rules
    assert "https://grafana.my.org/on-call/d/esper?" in rules
    assert "https://alerts.my.org/#/alerts?filter=" in texts["deploy/alertmanager/esper.tmpl"]
    assert '"https://wiki.my.org/runbooks/${__value.text}.md"' in texts["grafana/dashboards/esper.json"]


def test_promtool_takes_the_rules_and_the_whole_file(written: Path) -> None:
    accepted("promtool", "check", "rules", written / "alerts" / "rules.yml", written / "alerts" / "norm.yml")
    prometheus = written / "deploy" / "prometheus" / "prometheus.yml"
    assert "1 rule files found" in accepted("promtool", "check", "config", prometheus)
    [alertmanager] = yaml.safe_load(prometheus.read_text())["alerting"]["alertmanagers"]
    assert alertmanager == {"scheme": "https", "static_configs": [{"targets": ["alerts.my.org:443"]}]}


def test_amtool_takes_the_routes_and_the_templates(written: Path) -> None:
    assert "1 templates" in accepted("amtool", "check-config", written / "deploy" / "alertmanager" / "alertmanager.yml")


def test_kubectl_takes_the_manifests_with_labels_and_namespace(written: Path) -> None:
    manifests = {each["kind"]: each for each in kustomize(written / "deploy" / "kubernetes")}
    assert {each["metadata"]["namespace"] for each in manifests.values()} == {"training"}
    own = {"app.kubernetes.io/name": "esper-telemetry", "release": "kube-prometheus-stack", "my.org/team": ""}
    assert [manifests[kind]["metadata"]["labels"] for kind in ("PodMonitor", "PrometheusRule")] == [own, own]
    assert manifests["PrometheusRule"]["spec"] == yaml.safe_load((written / "alerts" / "rules.yml").read_text())
    dashboard = manifests["ConfigMap"]["data"]["esper.json"]
    assert json.loads(dashboard) == json.loads((written / "grafana" / "dashboards" / "esper.json").read_text())
    [demo] = kustomize(written / "deploy" / "kubernetes" / "demo")
    assert (demo["kind"], demo["metadata"]["namespace"]) == ("Job", "training")


def test_manifests_by_themselves_say_the_same_as_the_kustomization(written: Path) -> None:
    for name in ("podmonitor", "prometheusrule"):
        metadata = yaml.safe_load((written / "deploy" / "kubernetes" / f"{name}.yaml").read_text())["metadata"]
        assert metadata["namespace"] == "training"
        assert metadata["labels"]["release"] == "kube-prometheus-stack"


def test_without_options_links_lead_to_this_machine_and_to_the_written_runbooks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / 'it\'s # odd: "quoted"'
    assert esper_assets(capsys, folder)[0] == 0
    accepted("promtool", "check", "config", folder / "deploy" / "prometheus" / "prometheus.yml")
    groups = yaml.safe_load((folder / "alerts" / "rules.yml").read_text())["groups"]
    links = {rule["annotations"]["runbook_url"] for group in groups for rule in group["rules"] if "alert" in rule}
    assert len(links) > 10
    for link in links:
        assert Path(url2pathname(link.removeprefix("file://"))).is_file()
    provider = yaml.safe_load((folder / "grafana" / "provisioning" / "dashboards" / "esper.yml").read_text())
    assert provider["providers"][0]["options"]["path"] == str(folder / "grafana" / "dashboards")
    metadata = yaml.safe_load((folder / "deploy" / "kubernetes" / "podmonitor.yaml").read_text())["metadata"]
    assert "namespace" not in metadata


def test_it_says_what_to_do_next_with_paths_that_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "esper"
    _, said, _ = esper_assets(capsys, folder, "--grafana-url", "https://grafana.my.org")
    named = [Path(path) for path in re.findall(rf"{re.escape(str(folder))}[\w./@-]*", said)]
    assert len(named) > 5
    assert [path for path in named if not path.exists()] == []
    assert "https://grafana.my.org" in said
    assert f"esper assets: {len(tree(folder))} files in {folder}\n" in said


def test_what_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = tmp_path / "alerts" / "own.yml"
    own.parent.mkdir()
    own.write_text("mine")
    code, out, error = esper_assets(capsys, tmp_path)
    assert (code, out) == (2, "")
    assert error == (
        f"esper assets: {own.parent} already exists, and nothing is overwritten; move it, or choose another folder\n"
    )
    assert tree(tmp_path) == {"alerts/own.yml": "mine"}


def test_a_folder_with_other_things_in_it_is_fine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README").write_text("mine")
    assert esper_assets(capsys, tmp_path)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README", "alerts", "deploy", "grafana"]


@pytest.mark.parametrize("fails_at", ["write", "move"])
def test_what_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str) -> None:
    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    rename = Path.rename

    def fail_at_the_second(path: Path, to: Path) -> Path:
        return rename(path, to) if to.name == "alerts" else Path(full())

    if fails_at == "write":
        monkeypatch.setattr(writing, "filled", full)
    else:
        monkeypatch.setattr(Path, "rename", fail_at_the_second)
    (tmp_path / "there").mkdir()
    for folder in ("there", "new/below"):
        with pytest.raises(OSError, match="No space left"):
            write(tmp_path / folder, Site())
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    code, _, error = esper_assets(capsys, tmp_path / "esper")
    assert (code, error) == (2, f"esper assets: {tmp_path / 'esper'}: Permission denied\n")


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "esper").write_text("")
    code, _, error = esper_assets(capsys, tmp_path / "esper")
    assert code == 2
    assert re.fullmatch(rf"esper assets: {re.escape(str(tmp_path))}/esper\S*: \w+ .*\n", error)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--grafana-url", "grafana.my.org"], "--grafana-url: expected a URL such as https://grafana.my.org, got "),
        (["--runbook-url", "https://a b"], "--runbook-url: expected a URL"),
        (["--alertmanager-url", "http://x:99999"], "--alertmanager-url: expected a URL"),
        (["--alertmanager-url", 'http://x"'], "--alertmanager-url: expected a URL"),
        (["--label", "release"], "--label: expected KEY=VALUE, got 'release'"),
        (["--label", "a b=c"], "--label: expected a label such as release=kube-prometheus-stack, got 'a b=c'"),
        (["--label", "a=1", "--label", "a=2"], "--label: a is given twice"),
        (["--label", "app.kubernetes.io/name=x"], "--label: app.kubernetes.io/name is already set to esper-telemetry"),
        (["--namespace", "Training"], "--namespace: expected a name such as monitoring, got 'Training'"),
    ],
)
def test_what_is_wrong_is_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], error: str
) -> None:
    code, out, said = esper_assets(capsys, tmp_path / "esper", *arguments)
    assert (code, out, said.count("\n")) == (2, "", 1)
    assert said.startswith(f"esper assets: {error}")
    assert list(tmp_path.iterdir()) == []


URL_TEXT = st.from_regex(r"\Ahttps?://[a-z0-9.\[\]:%/@'\"{}$&#?=+~_ -]{1,20}\Z")


@given(url=URL_TEXT, value=st.text("ab-_.:\"'\n ", max_size=8))
def test_whatever_is_taken_stays_yaml_and_json_with_that_in_it(url: str, value: str) -> None:
    try:
        site = Site(grafana=url, alertmanager=url, runbooks=url, labels={"key": value})
    except ValueError:
        return
    text: dict[str, Any] = {
        name: filled(name, shipped()[name].read_text(), site, Path("/esper"))
        for name in (
            "deploy/kubernetes/podmonitor.yaml",
            "deploy/prometheus/prometheus.yml",
            "grafana/provisioning/datasources/prometheus.yml",
            "alerts/norm.yml",
        )
    }
    podmonitor, prometheus, sources, rules = (yaml.safe_load(each) for each in text.values())
    assert podmonitor["metadata"]["labels"]["key"] == value
    assert sources["datasources"][1]["url"] == url.rstrip("/")
    assert prometheus["alerting"]["alertmanagers"][0]["scheme"] == url.partition(":")[0]
    alerts = [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    assert alerts[0]["annotations"]["runbook_url"] == f"{url.rstrip('/')}/EsperGradNormHigh.md"


def test_the_placeholders_are_those_of_the_repository() -> None:
    assert yaml.safe_load((ROOT / "deploy" / "addresses.yml").read_text()) == PLACEHOLDERS


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [path] = out.iterdir()
    return zipfile.ZipFile(path)


def test_the_wheel_holds_what_a_checkout_writes_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    prefix = "esper_telemetry/assets/files/"
    held = {name.removeprefix(prefix): wheel.read(name) for name in wheel.namelist() if name.startswith(prefix)}
    assert held == {name: path.read_bytes() for name, path in shipped().items()}


def test_from_an_installed_wheel_the_same_is_written(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    code = "import sys; from esper_telemetry.cli import main; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-c", code, "assets", "out", *OPTIONS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "installed").mkdir()
    (tmp_path / "out").rename(tmp_path / "installed" / "out")
    site = Site(MINE["--grafana-url"], MINE["--alertmanager-url"], MINE["--runbook-url"])
    write(tmp_path / "out", site)
    assert tree(tmp_path / "installed" / "out") == tree(tmp_path / "out")
