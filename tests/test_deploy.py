"""What cannot run without a container engine or a cluster is parsed, and checked against the files it names."""

from __future__ import annotations

import configparser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.kubernetes import prometheusrule
from deploy.stack import configs, servers
from esper_telemetry.cli import main
from esper_telemetry.exporters.address import DEFAULT_PORT
from esper_telemetry.exporters.otlp import environment
from esper_telemetry.exporters.scrapers import LONGEST_WAIT
from tests.kubectl import kustomize

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
PORT = str(DEFAULT_PORT)
COLLECTOR: dict[str, Any] = yaml.safe_load((DEPLOY / "otel-collector.yaml").read_text())
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
MANIFESTS = {path.name: yaml.safe_load(path.read_text()) for path in KUBERNETES.glob("*.yaml")}
JOB: dict[str, Any] = yaml.safe_load((KUBERNETES / "demo" / "job.yaml").read_text())


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([servers.find("promtool"), *arguments], capture_output=True, text=True, check=False)


def test_prometheus_takes_the_shipped_file_with_its_alerts() -> None:
    done = promtool("check", "config", str(configs.PROMETHEUS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 rule files found" in done.stdout


def test_the_optional_alerts_are_named_and_off() -> None:
    assert "  # - ../../alerts/norm.yml" in configs.PROMETHEUS.read_text().splitlines()
    assert (ROOT / "alerts" / "norm.yml").exists()


def test_prometheus_takes_the_rendered_file(tmp_path: Path) -> None:
    rendered = configs.prometheus_config(
        tmp_path, "http://127.0.0.1:9093", trainers=["127.0.0.1:19301"], interval="1s", replica="b"
    )
    done = promtool("check", "config", str(rendered))
    assert done.returncode == 0, done.stdout + done.stderr
    config = yaml.safe_load(rendered.read_text())
    expected = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    assert config["global"] == {**expected, "external_labels": {"replica": "b"}}
    assert config["alerting"]["alertmanagers"] == [{"static_configs": [{"targets": ["127.0.0.1:9093"]}]}]
    assert json.loads((tmp_path / "targets" / "trainers.json").read_text()) == [{"targets": ["127.0.0.1:19301"]}]


def test_a_window_that_the_rules_do_not_have_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no window to replace: '7h'"):
        configs.rules(tmp_path, {"7h": "1s"})
    assert "[5m]" not in configs.rules(tmp_path, {"5m": "10s"}).read_text()


def test_two_prometheus_servers_send_the_same_labels() -> None:
    config = yaml.safe_load(configs.PROMETHEUS.read_text())
    dropped = [rule["regex"] for rule in config["alerting"]["alert_relabel_configs"] if rule["action"] == "labeldrop"]
    assert dropped == list(config["global"]["external_labels"])


def test_every_listed_target_is_a_service_that_listens_there() -> None:
    listed = [
        target
        for file in (DEPLOY / "prometheus" / "targets").glob("*.json")
        for group in json.loads(file.read_text())
        for target in group["targets"]
    ]
    assert listed == [f"trainer:{PORT}"]
    assert f"0.0.0.0:{PORT}" in SERVICES["trainer"]["command"]


def mounts() -> list[tuple[str, Path]]:
    """Return each service's mounted file or folder, with the default where a variable may replace it."""
    found = []
    for name, service in SERVICES.items():
        for volume in service.get("volumes", ()):
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            if source.startswith("."):
                found.append((name, DEPLOY / source))
    return found


@pytest.mark.parametrize(("service", "path"), mounts())
def test_every_mounted_file_exists(service: str, path: Path) -> None:
    assert path.exists(), f"{service} mounts {path}"


def test_every_named_volume_is_declared() -> None:
    named = {v.split(":")[0] for s in SERVICES.values() for v in s.get("volumes", ()) if v[0] not in "./$"}
    assert named == set(COMPOSE["volumes"])


def test_compose_publishes_on_loopback_alone() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(published) == 4
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_the_containers_find_the_alerts_where_prometheus_looks_for_them() -> None:
    inside = {mount.split(":")[1]: mount.split(":")[0] for mount in SERVICES["prometheus"]["volumes"]}
    assert (inside["/etc/prometheus"], inside["/alerts"]) == ("./prometheus", "../alerts")
    config = yaml.safe_load(configs.PROMETHEUS.read_text())
    assert config["rule_files"] == ["../../alerts/rules.yml"], "/etc/prometheus/../../alerts is /alerts"


def test_every_service_that_alertmanager_and_prometheus_name_exists() -> None:
    text = configs.ALERTMANAGER.read_text() + configs.PROMETHEUS.read_text()
    assert set(re.findall(r"(?://|\[)([a-z]+):\d+", text)) == {"pager", "alertmanager"} <= set(SERVICES)


def test_every_key_that_alertmanager_reads_has_an_example() -> None:
    read = re.findall(r"_file: /etc/alertmanager/secrets/(\w+)", configs.ALERTMANAGER.read_text())
    assert sorted(read) == sorted(path.name for path in (DEPLOY / "alertmanager" / "secrets.example").iterdir())


def test_the_image_copies_what_exists_runs_as_nobody_and_serves_the_default_port() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.M) for name in line.split()]
    assert copied == ["pyproject.toml", "README.md", "LICENSE", "src", "alerts", "grafana", "deploy"]
    allowed = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert all((ROOT / name).exists() and f"!{name}" in allowed for name in copied)
    assert re.findall(r"^USER (\d+):\d+$", text, re.M) == ["10001"]
    assert re.findall(r"^EXPOSE (\d+)$", text, re.M) == [PORT]


@pytest.mark.parametrize(
    "arguments",
    [
        SERVICES["trainer"]["command"],
        JOB["spec"]["template"]["spec"]["containers"][0]["args"],
        json.loads(re.findall(r"^CMD (.*)$", (DEPLOY / "Dockerfile").read_text(), re.M)[0]),
    ],
    ids=["compose", "job", "image"],
)
def test_esper_takes_the_arguments_it_is_given(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--seed", "refused"])
    assert capsys.readouterr().err == "esper ppo: --seed: expected a whole number, got 'refused'\n"


def test_kustomize_names_every_manifest() -> None:
    files = set(MANIFESTS["kustomization.yaml"]["resources"]) - {"../../grafana"}
    assert {*files, "kustomization.yaml"} == set(MANIFESTS)
    assert (KUBERNETES / "../../grafana/kustomization.yaml").exists()


@pytest.mark.parametrize(
    ("folder", "kinds"), [("", ["ConfigMap", "PodMonitor", "PrometheusRule"]), ("demo", ["Job"])], ids=["all", "demo"]
)
def test_kubectl_takes_the_folder(folder: str, kinds: list[str]) -> None:
    assert [manifest["kind"] for manifest in kustomize(KUBERNETES / folder)] == kinds


def test_the_unit_waits_for_the_last_word_and_names_the_run() -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "systemd" / "esper-trainer@.service")
    service = unit["Service"]
    environment = dict(word.split("=") for word in service["Environment"].split())
    assert environment["ESPER_RUN_ID"] == "%i"
    assert environment["ESPER_LISTEN_ADDRESS"] == f"127.0.0.1:{PORT}"
    assert int(service["TimeoutStopSec"]) > LONGEST_WAIT
    assert service["Restart"] == "no"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on PATH")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "systemd" / "esper-trainer@.service").read_text()
    unit = tmp_path / "esper-trainer@run.service"
    unit.write_text(text.replace("/opt/training/venv/bin/python", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_prometheus_rule_holds_the_alerts() -> None:
    manifest = MANIFESTS["prometheusrule.yaml"]
    assert manifest["spec"] == yaml.safe_load(configs.RULES.read_text())
    assert prometheusrule.MANIFEST.read_text() == prometheusrule.render(), (
        "run python -m deploy.kubernetes.prometheusrule"
    )


def test_prometheus_takes_the_rules_of_the_manifest(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yml"
    rules.write_text(yaml.safe_dump(MANIFESTS["prometheusrule.yaml"]["spec"]))
    done = promtool("check", "rules", str(rules))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pod_monitor_sees_the_jobs_pods_and_drops_finished_ones() -> None:
    pod = JOB["spec"]["template"]
    monitor = MANIFESTS["podmonitor.yaml"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
    [endpoint] = monitor["podMetricsEndpoints"]
    [port] = pod["spec"]["containers"][0]["ports"]
    assert (endpoint["port"], str(port["containerPort"])) == (port["name"], PORT)
    [drop] = [rule for rule in endpoint["relabelings"] if rule.get("action") == "drop"]
    assert drop["sourceLabels"] == ["__meta_kubernetes_pod_phase"]
    finished = [phase for phase in ("Pending", "Running", "Succeeded", "Failed") if re.fullmatch(drop["regex"], phase)]
    assert finished == ["Succeeded", "Failed"]


def test_the_job_runs_as_nobody() -> None:
    spec = JOB["spec"]["template"]["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["restartPolicy"] == "Never"


def test_the_collector_uses_what_it_configures() -> None:
    (pipeline,) = COLLECTOR["service"]["pipelines"].values()
    for kind in ("receivers", "exporters"):
        assert pipeline[kind] == list(COLLECTOR[kind])
    assert {"otlp", "prometheus", "prometheusremotewrite"} == {*COLLECTOR["receivers"], *COLLECTOR["exporters"]}


def test_the_collector_listens_on_loopback_where_trainers_push_by_default() -> None:
    received = COLLECTOR["receivers"]["otlp"]["protocols"]["http"]["endpoint"]
    assert received == environment.DEFAULT_ENDPOINT.replace("http://localhost", "127.0.0.1")
    assert COLLECTOR["exporters"]["prometheus"]["endpoint"].startswith("127.0.0.1:")


def test_the_collector_gives_metrics_the_names_that_the_rules_know() -> None:
    exporters = COLLECTOR["exporters"]
    assert exporters["prometheus"]["translation_strategy"] == "UnderscoreEscapingWithSuffixes"
    assert exporters["prometheusremotewrite"]["add_metric_suffixes"]


def test_the_collector_shows_a_trainer_between_two_pushes_and_no_longer_than_prometheus_would() -> None:
    expiration = COLLECTOR["exporters"]["prometheus"]["metric_expiration"]
    standard_interval, lookback = 60, 300
    assert max(environment.INTERVAL_SECONDS, standard_interval) < 60 * int(expiration.removesuffix("m")) < lookback


def test_prometheus_keeps_the_names_of_trainers_behind_a_collector() -> None:
    jobs = {job["job_name"]: job for job in yaml.safe_load(configs.PROMETHEUS.read_text())["scrape_configs"]}
    assert jobs["otel-collector"]["honor_labels"]
    (relabel,) = jobs["otel-collector"]["metric_relabel_configs"]
    assert relabel["action"] == "labeldrop"
    assert re.fullmatch(relabel["regex"], "otel_scope_name")
