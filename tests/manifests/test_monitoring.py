"""Alerts and dashboard: expressions that Prometheus accepts, on metrics that the trainer exports, of pods that the selectors find."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from promql_parser import VectorSelector, parse, walk

from dmd2.training.exporter import Exporter
from dmd2.training.metrics_log import METRICS
from dmd2.training.spending import Spending
from manifests.__main__ import ROOT
from pipelines.pods import METRICS_PORT
from tests.manifests.policy import Object, of
from tests.manifests.test_policies import one, pod, rendered

FOLDER = ROOT / "components" / "monitoring"
OF_KUEUE = {"kueue_pending_workloads", "kueue_admitted_workloads_total"}
"""Metrics of Kueue 0.19.2 (pkg/metrics/metrics.go) that the alerts use."""
LINE = {
    "step": 2, "critic/dmd": 1, "critic/skipped": 0, "critic/grad_norm": 1, "critic/lr": 1, "student/dmd_grad_l1": 1,
    "student/skipped": 0, "time/data_s": 1, "samples_per_s": 8, "mfu": 0.5, "peak_memory_gb": 1, "eta_s": 1, "checkpoint/fid": 1,
}  # fmt: skip


def rules() -> list[Object]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["spec"]["groups"]
    found: list[Object] = group["rules"]
    return found


def panels() -> list[Object]:
    found: list[Object] = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
    return found


def selectors(expression: str) -> Iterator[VectorSelector]:
    found: list[Any] = []
    walk(parse(expression), lambda node: found.append(node))
    for node in found:
        selector = getattr(node, "vector_selector", node)
        if isinstance(selector, VectorSelector):
            yield selector


EXPRESSIONS = {
    **{rule["alert"]: rule["expr"] for rule in rules()},
    **{f"{one['title']} {each['refId']}": each["expr"] for one in panels() for each in one["targets"]},
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """{name of a metric: its labels}, as the trainer exports them."""
    folder = tmp_path_factory.mktemp("run")
    (folder / METRICS).write_text(json.dumps(LINE) + "\n")
    families = Exporter("r", folder, 10, Spending()).collect()
    return {sample.name: set(sample.labels) for one in families for sample in one.samples}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_an_expression_asks_for_metrics_and_labels_that_are_exported(
    name: str, exported: dict[str, set[str]]
) -> None:
    found = list(selectors(re.sub(r'"\$(recipe|run)"', '".*"', EXPRESSIONS[name])))
    assert found
    for selector in found:
        if selector.name in OF_KUEUE:
            continue
        assert selector.name in exported
        asked = {matcher.name for matcher in selector.matchers.matchers}
        assert asked <= exported[selector.name] | {"run", "pod", "cost_centre"}


def test_every_metric_is_on_the_dashboard(exported: dict[str, set[str]]) -> None:
    shown = {each.name for one in panels() for target in one["targets"] for each in selectors(target["expr"])}
    assert exported.keys() <= shown


def test_every_alert_is_explained_in_the_manual() -> None:
    manual = (ROOT.parent / "docs" / "operations.md").read_text()
    for rule in rules():
        assert f"`{rule['alert']}`" in manual


def test_the_pods_of_trainings_are_found_and_their_port_is_open_to_the_collectors_alone() -> None:
    objects = rendered("gke-a3-ultra+topology+monitoring")
    trainer = pod(objects)["metadata"]["labels"]
    index = {"batch.kubernetes.io/job-completion-index": "0"}  # Kubernetes' own, of an indexed Job
    labels = one(objects, "PodMonitoring", "dmd2-trainjobs")["spec"]["selector"]["matchLabels"]
    assert labels.items() <= (trainer | index).items()
    policy = one(objects, "NetworkPolicy", "metrics")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= trainer.items()
    assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == [METRICS_PORT]
    steps = _steps()
    chosen = one(objects, "PodMonitoring", "dmd2-steps")["spec"]["selector"]["matchLabels"]
    training = {name for name, (labels, env) in steps.items() if "DMD2_METRICS_PORT" in env}
    assert training == {name for name, (labels, env) in steps.items() if chosen.items() <= labels.items()}
    assert training
    assert all(labels["dmd2/cost-centre"] == "none" for labels, _ in steps.values())
    for item in of(objects, "PodMonitoring"):
        assert [endpoint["port"] for endpoint in item["spec"]["endpoints"]] == [METRICS_PORT]


def _steps() -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """{executor of the compiled pipeline: (labels of its pod, its environment)}."""
    spec, platform = yaml.safe_load_all((ROOT.parent / "pipelines" / "compiled" / "distill.yaml").read_text())
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    found = {}
    for name, executor in spec["deploymentSpec"]["executors"].items():
        env = {each["name"]: each["value"] for each in executor["container"].get("env", [])}
        found[name] = executors[name]["podMetadata"]["labels"], env
    return found


def test_with_the_operator_the_same_alerts_are_a_prometheus_rule() -> None:
    objects = rendered("dev+prometheus-operator+reaper+serving")
    assert one(objects, "PrometheusRule")["spec"]["groups"][0]["rules"] == rules()
    assert not of(objects, "PodMonitoring", "ClusterRules")
    policy = one(objects, "NetworkPolicy", "metrics")["spec"]["ingress"][0]["from"]
    assert policy == [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}},
        }
    ]


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not on the PATH: it is of Prometheus")
def test_promtool_sees_each_alert_fire_and_stay_quiet(tmp_path: Path) -> None:
    (group,) = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["spec"]["groups"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [group]}))
    shutil.copy(Path(__file__).parent / "alerts_test.yaml", tmp_path / "test.yaml")
    for command in (
        ["check", "rules", "--lint=all", "--lint-fatal", "rules.yaml"],
        ["test", "rules", "test.yaml"],
    ):
        done = subprocess.run(["promtool", *command], cwd=tmp_path, capture_output=True, text=True)
        assert not done.returncode, done.stdout + done.stderr
