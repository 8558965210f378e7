"""The component `serving`: its parts name each other rightly, and its command is one that `dmd2 serve` takes."""

from __future__ import annotations

import inspect

from dmd2.stages.serve import serve
from manifests.__main__ import ROOT
from tests.manifests.policy import Object
from tests.manifests.test_policies import one, rendered

OVERLAY = "dev+prometheus-operator+reaper+serving"


def template() -> Object:
    found: Object = one(rendered(OVERLAY), "Deployment", "server")["spec"]["template"]
    return found


def test_the_command_is_dmd2_serve_with_the_package_of_the_settings() -> None:
    (container,) = template()["spec"]["containers"]
    program, verb, package, *flags = container["command"]
    assert (program, verb, package) == ("dmd2", "serve", "$(PACKAGE)")
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert {flag.removeprefix("--") for flag in given} <= inspect.signature(serve).parameters.keys()
    assert given["--port"] == str(container["ports"][0]["containerPort"])
    (env,) = container["env"]
    reference = env["valueFrom"]["configMapKeyRef"]
    assert reference["key"] in one(rendered(OVERLAY), "ConfigMap", reference["name"])["data"]
    assert env["name"] == "PACKAGE"


def test_everything_selects_the_pods_of_the_deployment() -> None:
    objects, labels = rendered(OVERLAY), template()["metadata"]["labels"]
    selectors = [
        one(objects, "Deployment", "server")["spec"]["selector"]["matchLabels"],
        one(objects, "Service", "server")["spec"]["selector"],
        one(objects, "PodDisruptionBudget", "server")["spec"]["selector"]["matchLabels"],
        one(objects, "NetworkPolicy", "server")["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    target = one(objects, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", "server")


def test_a_pod_is_ready_when_the_packages_are_loaded() -> None:
    (container,) = template()["spec"]["containers"]
    probes = {
        container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    assert probes == {"/ready"}
    assert '"/ready"' in (ROOT.parent / "dmd2" / "serve" / "page.py").read_text()


def test_the_port_is_open_to_pods_with_the_label_alone() -> None:
    (rule,) = one(rendered(OVERLAY), "NetworkPolicy", "server")["spec"]["ingress"]
    assert rule == {
        "from": [{"podSelector": {"matchLabels": {"dmd2/draws": "true"}}}],
        "ports": [{"protocol": "TCP", "port": 7860}],
    }
