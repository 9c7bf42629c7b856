"""The manifests of deploy/k8s: that they fit together, and fit what the processes serve and do."""

import re
from typing import Any

import pytest
import yaml

from api.server import GRACE_SECONDS
from domain.jobs import WaitingFor
from metrics import Process, registries
from settings import PREFIX, ROOT, Settings

FOLDER = ROOT / "deploy/k8s"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
RESOURCES: list[dict[str, Any]] = [
    resource for name in KUSTOMIZATION["resources"] for resource in yaml.safe_load_all((FOLDER / name).read_text())
]


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [resource for resource in RESOURCES if resource["kind"] == kind]


def pods() -> list[dict[str, Any]]:
    return [resource["spec"]["template"] for kind in ("Deployment", "Job") for resource in of_kind(kind)]


def settings() -> dict[str, str]:
    [generator] = [one for one in KUSTOMIZATION["configMapGenerator"] if one["name"] == "celeriac-settings"]
    return dict(literal.split("=", 1) for literal in generator["literals"])


def test_every_manifest_is_listed() -> None:
    assert {path.name for path in FOLDER.glob("*.yaml")} == {"kustomization.yaml", *KUSTOMIZATION["resources"]}


def test_every_manifest_fits_the_schemas_of_kubernetes() -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for resource in RESOURCES:
        if not resource["apiVersion"].startswith("keda.sh"):
            validate.validate(resource, "1.33", strict=True)


def test_keda_knows_each_field_of_its_objects() -> None:
    """Whose schemas no package has: fields that it does not know, it ignores."""
    spec_fields = {"scaleTargetRef", "minReplicaCount", "maxReplicaCount", "pollingInterval", "cooldownPeriod"}
    for one in of_kind("ScaledObject"):
        spec = one["spec"]
        assert spec.keys() == spec_fields | {"advanced", "triggers"}
        assert all(type(spec[name]) is int for name in spec_fields - {"scaleTargetRef"})
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        assert behavior.keys() <= {"scaleUp", "scaleDown"}
        for trigger in spec["triggers"]:
            assert trigger.keys() == {"type", "metadata"}
            assert trigger["metadata"].keys() == {"serverAddress", "query", "threshold", "activationThreshold"}
            assert all(isinstance(value, str) for value in trigger["metadata"].values())


def test_each_setting_is_one_that_the_processes_know() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields} | {"HF_HOME"}
    assert settings().keys() <= known
    for pod in pods():
        for container in pod["spec"]["containers"]:
            assert {one["name"] for one in container.get("env", ())} <= known


def test_each_pod_runs_without_rights_and_within_bounds() -> None:
    for pod in pods():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert "memory" in container["resources"]["limits"]
            mounted = {mount["name"] for mount in container.get("volumeMounts", ())}
            assert mounted == {volume["name"] for volume in spec.get("volumes", ())}


def test_each_image_is_one_of_the_dockerfile() -> None:
    targets = set(re.findall(r"^FROM base AS (\w+)$", (ROOT / "deploy/Dockerfile").read_text(), re.MULTILINE))
    images = {container["image"] for pod in pods() for container in pod["spec"]["containers"]}
    assert (
        images == {f"celeriac-{target}" for target in targets} == {image["name"] for image in KUSTOMIZATION["images"]}
    )


def test_each_selector_finds_the_pods_that_it_means() -> None:
    labels = [pod["metadata"]["labels"] for pod in pods()]
    selectors = [
        one["spec"]["selector"]["matchLabels"] for one in (*of_kind("Deployment"), *of_kind("PodDisruptionBudget"))
    ]
    selectors += [service["spec"]["selector"] for service in of_kind("Service")]
    for selector in selectors:
        assert any(selector.items() <= own.items() for own in labels), selector
    for policy in of_kind("NetworkPolicy"):
        wanted = policy["spec"]["podSelector"].get("matchLabels", {})
        assert any(wanted.items() <= own.items() for own in labels), policy["metadata"]["name"]


def test_the_service_does_not_become_settings_of_the_pods() -> None:
    assert any(service["metadata"]["name"].startswith("celeriac-") for service in of_kind("Service"))
    assert [pod["spec"]["enableServiceLinks"] for pod in pods()] == [False] * len(pods())


def test_only_the_migration_reads_the_bootstrap_key() -> None:
    readers = [
        container["name"]
        for pod in pods()
        for container in pod["spec"]["containers"]
        if any(one.get("secretRef", {}).get("name") == "celeriac-bootstrap" for one in container["envFrom"])
    ]
    assert readers == ["migrate"]


def test_a_worker_that_is_drained_is_not_ready_and_not_killed() -> None:
    [worker] = [one for one in of_kind("Deployment") if "celeriac/model" in one["spec"]["selector"]["matchLabels"]]
    [container] = worker["spec"]["template"]["spec"]["containers"]
    assert container["startupProbe"]["httpGet"]["path"] == container["livenessProbe"]["httpGet"]["path"] == "/health"
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert worker["spec"]["progressDeadlineSeconds"] > Settings.model_fields["engine_load_seconds"].default


def test_probes_and_scrapes_ask_the_port_that_the_process_serves() -> None:
    port_by_setting = {name: int(value) for name, value in settings().items() if name.endswith("_PORT")}
    for pod in pods():
        for container in pod["spec"]["containers"]:
            ports = {one["name"]: one["containerPort"] for one in container.get("ports", ())}
            assert set(ports.values()) <= set(port_by_setting.values())
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert probe not in container or container[probe]["httpGet"]["port"] in ports
            scraped = pod["metadata"].get("annotations", {}).get("prometheus.io/port")
            assert scraped is None or int(scraped) in ports.values()


def test_a_pod_gets_more_time_to_end_than_its_process_takes() -> None:
    [worker] = [pod for pod in pods() if pod["metadata"]["labels"]["app.kubernetes.io/name"] == "worker"]
    drain_seconds = Settings.model_fields["drain_seconds"].default
    assert worker["spec"]["terminationGracePeriodSeconds"] > drain_seconds + 15
    [api] = [pod for pod in pods() if pod["metadata"]["labels"]["app.kubernetes.io/name"] == "api"]
    [container] = api["spec"]["containers"]
    pause_seconds = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    drain_seconds = Settings.model_fields["api_drain_seconds"].default
    assert api["spec"]["terminationGracePeriodSeconds"] > pause_seconds + drain_seconds + GRACE_SECONDS


def test_each_worker_has_a_gpu_a_model_and_a_scaler_of_its_own() -> None:
    workers = [one for one in of_kind("Deployment") if "celeriac/model" in one["spec"]["selector"]["matchLabels"]]
    models = (FOLDER / "models.toml").read_text()
    scalers = {one["spec"]["scaleTargetRef"]["name"]: one for one in of_kind("ScaledObject")}
    for worker in workers:
        [container] = worker["spec"]["template"]["spec"]["containers"]
        model = worker["spec"]["selector"]["matchLabels"]["celeriac/model"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert container["command"][-2:] == ["--model", model]
        assert f'id = "{model}"' in models
        assert "replicas" not in worker["spec"], "the scaler owns it"
        triggers = scalers[worker["metadata"]["name"]]["spec"]["triggers"]
        jobs, refused = (trigger["metadata"]["query"] for trigger in triggers)
        assert (jobs.count(f'model="{model}"'), refused.count(f'model="{model}"')) == (2, 1)
        served = {metric.name for metric in registries[Process.API].collect()}
        assert {name.removesuffix("_total") for name in re.findall(r"celeriac_\w+", jobs + refused)} <= served
        [reasons] = re.findall(r'reason=~"([^"]+)"', jobs)
        assert set(reasons.split("|")) <= set(WaitingFor)
