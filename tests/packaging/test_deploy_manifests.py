"""The manifests: accepted by the real schemas, and in agreement with each other and with the code."""

from __future__ import annotations

import copy
import itertools
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import yaml

from paceline.actors import cli
from paceline.actors.commands.serve import read_settings
from paceline.actors.frontends.http import OPEN_PATHS
from paceline.runtime.metrics import PREFIX, Metrics

ROOT = Path(__file__).parents[2]
K8S, KUBERAY = ROOT / "deploy/k8s", ROOT / "deploy/kuberay"
SCHEMAS = json.loads((ROOT / "tests/data/schemas/schemas.json").read_text())
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
COMPONENTS = ("gpu", "tls", "with-prometheus")

Manifest = dict[str, Any]


def read(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text()))


def manifests() -> Iterator[tuple[str, Manifest]]:
    """All that are whole by themselves, named by file, kind and name."""
    for folder in (K8S, KUBERAY):
        for path in sorted(folder.rglob("*.yaml")):
            for document in read(path):
                is_patch = path == K8S / "gpu/deployment.yaml"
                if (
                    "kind" in document
                    and "kustomize" not in document["apiVersion"]
                    and not is_patch
                ):
                    name = f"{document['kind']} {document['metadata']['name']}"
                    yield f"{path.relative_to(ROOT)} {name}", document


MANIFESTS = dict(manifests())


def validate(manifest: Manifest) -> None:
    kind = SCHEMAS["kinds"][f"{manifest['apiVersion']}/{manifest['kind']}"]
    schema = {"$ref": f"#/$defs/{kind}", "$defs": SCHEMAS["$defs"]}
    jsonschema.Draft202012Validator(schema).validate(manifest)


def the(kind: str, name: str) -> Manifest:
    return next(m for m in MANIFESTS.values() if (m["kind"], m["metadata"]["name"]) == (kind, name))


def pods(node: Any) -> Iterator[Manifest]:
    """Every pod spec within."""
    if isinstance(node, list):
        for each in node:
            yield from pods(each)
    elif isinstance(node, dict):
        if "containers" in node:
            yield node
        for each in node.values():
            yield from pods(each)


# Schemas


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
def test_the_api_server_would_take_it(manifest: Manifest) -> None:
    validate(manifest)


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("Deployment", "paceline", "spec/template/spec/containers/0/livenessProb", {}),
        ("Deployment", "paceline", "spec/template/spec/containers/0/ports/0/containerPort", "http"),
        ("Service", "paceline", "spec/port", []),
        ("NetworkPolicy", "paceline", "spec/ingress/0/ports", {"port": 8000}),
        ("PodDisruptionBudget", "paceline", "spec/maxUnavailble", 1),
        ("HorizontalPodAutoscaler", "paceline", "spec/metrics/0/pods/target/averageValues", "1"),
        ("ServiceMonitor", "paceline", "spec/endpoints/0/intervall", "5s"),
        ("ServiceMonitor", "paceline", "spec/endpoints/0/scheme", ["http"]),
        ("RayCluster", "paceline", "spec/workerGroupSpecs/0/minReplica", 1),
        ("RayCluster", "paceline", "spec/workerGroupSpecs/0/minReplicas", "one"),
        ("RayCluster", "paceline", "spec/headGroupSpec/template/spec/contaners", []),
        ("RayCluster", "paceline", "spec/authOptions/mode", "tokens"),
        ("RayService", "paceline", "spec/rayClusterSpec", {}),
        ("RayJob", "paceline-batch", "spec/ttlSecondsAfterFinish", 1),
    ],
)
def test_a_slip_is_caught(kind: str, name: str, path: str, value: Any) -> None:
    manifest = copy.deepcopy(the(kind, name))
    *parents, last = path.split("/")
    node: Any = manifest
    for part in parents:
        node = node[int(part) if part.isdigit() else part]
    node[last] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(manifest)


# kustomize


def kustomized(folder: Path) -> list[Manifest]:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("no kubectl")
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize(
    "components", [c for n in range(4) for c in itertools.combinations(COMPONENTS, n)]
)
def test_every_choice_of_components_goes_together(
    components: tuple[str, ...], tmp_path: Path
) -> None:
    folder = tmp_path / "k8s"
    shutil.copytree(K8S, folder)
    file = folder / "kustomization.yaml"
    chosen = yaml.safe_load(file.read_text()) | {"components": list(components)}
    file.write_text(yaml.safe_dump(chosen))
    made = kustomized(folder)
    for manifest in made:
        validate(manifest)
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "paceline"
    (deployment,) = [each for each in made if each["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    flavour = "cuda" if "gpu" in components else "cpu"
    assert container["image"] == f"paceline:{VERSION}-{flavour}"
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == ("gpu" in components)
    scheme = container["livenessProbe"]["httpGet"].get("scheme")
    assert scheme == ("HTTPS" if "tls" in components else None)
    assert ("replicas" in deployment["spec"]) == ("with-prometheus" not in components)
    cli.parser().parse_args(container["args"])


def test_the_ray_service_comes_with_its_surroundings() -> None:
    made = kustomized(KUBERAY)
    for manifest in made:
        validate(manifest)
    assert {
        "Namespace",
        "NetworkPolicy",
        "PodDisruptionBudget",
        "RayService",
        "ServiceAccount",
    } == {manifest["kind"] for manifest in made}


@pytest.mark.parametrize("path", sorted([*K8S.rglob("kustomization.yaml"), *KUBERAY.glob("kust*")]))
def test_a_kustomization_names_files_that_are_there(path: Path) -> None:
    (chosen,) = read(path)
    generated = [file for each in chosen.get("configMapGenerator", []) for file in each["files"]]
    patches = [each["path"] for each in chosen.get("patches", []) if "path" in each]
    for name in (*chosen.get("resources", []), *generated, *patches):
        assert (path.parent / name).exists(), name
    offered = re.findall(r"^#  - ([\w-]+)$", path.read_text(), flags=re.MULTILINE)
    assert tuple(offered) == (COMPONENTS if path.parent == K8S else ())


# Agreement


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
def test_every_pod_has_no_more_rights_than_it_needs(manifest: Manifest) -> None:
    for pod in pods(manifest):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        volumes = {each["name"]: each for each in pod["volumes"]}
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        for container in pod["containers"]:
            context = container["securityContext"]
            assert not context["allowPrivilegeEscalation"]
            assert context["readOnlyRootFilesystem"]
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
            assert {"/tmp", "/dev/shm", "/var/cache/paceline"} <= set(mounts)
            assert set(mounts.values()) == set(volumes)


@pytest.mark.parametrize("flavour", [".", "gpu"])
def test_the_server_is_configured_as_its_manifests_assume(flavour: str) -> None:
    config = str(K8S / flavour / "serve.yaml")
    server, _, _ = read_settings(cli.parser().parse_args(["serve", "--config", config]))
    pod = the("Deployment", "paceline")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert ports == {"http": server.port, "grpc": server.grpc_port}
    assert server.host == "0.0.0.0"
    (hook_s,) = map(int, container["lifecycle"]["preStop"]["exec"]["command"][1:])
    assert pod["terminationGracePeriodSeconds"] >= hook_s + server.shutdown_timeout + 15
    mounted = {each["name"]: each["mountPath"] for each in container["volumeMounts"]}
    example = the("Secret", "paceline-api-keys")["stringData"]
    assert server.api_key_file in {f"{mounted['keys']}/{key}" for key in example}
    assert container["args"] == ["serve", "--config", f"{mounted['config']}/serve.yaml"]


def test_probes_ask_what_answers_without_a_key() -> None:
    (container,) = the("Deployment", "paceline")["spec"]["template"]["spec"]["containers"]
    paths = {
        probe: container[probe]["httpGet"]["path"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe")
    }
    assert paths == {"startupProbe": "/live", "livenessProbe": "/live", "readinessProbe": "/ready"}
    (endpoint,) = the("ServiceMonitor", "paceline")["spec"]["endpoints"]
    assert {*paths.values(), endpoint["path"]} <= OPEN_PATHS


def test_selectors_select() -> None:
    deployment = the("Deployment", "paceline")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    for selector in (
        deployment["selector"]["matchLabels"],
        the("Service", "paceline")["spec"]["selector"],
        the("PodDisruptionBudget", "paceline")["spec"]["selector"]["matchLabels"],
        the("NetworkPolicy", "paceline")["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    service = the("Service", "paceline")["metadata"]["labels"]
    scraped = the("ServiceMonitor", "paceline")["spec"]["selector"]["matchLabels"]
    assert scraped.items() <= service.items()
    for kind in ("RayCluster", "RayJob", "RayService"):
        name = "paceline-batch" if kind == "RayJob" else "paceline"
        text = yaml.safe_dump(the(kind, name))
        assert text.count("app.kubernetes.io/component: ray") == 2


def test_the_autoscaler_asks_for_a_metric_that_there_is() -> None:
    exposed = Metrics("m", version="0").exposition("")[0].decode()
    (rule,) = read(K8S / "with-prometheus/adapter-rules.yaml")[0]["rules"]
    (series,) = re.findall(r'__name__="([^"]+)"', rule["seriesQuery"])
    assert f"\n{series}{{" in exposed
    assert rule["name"]["as"] == series.replace(PREFIX, "paceline_")
    (metric,) = the("HorizontalPodAutoscaler", "paceline")["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]


def test_every_secret_that_is_named_has_its_form_in_the_example() -> None:
    shown = {m["metadata"]["name"] for m in MANIFESTS.values() if m["kind"] == "Secret"}
    texts = [path.read_text() for path in (*K8S.rglob("*.yaml"), *KUBERAY.glob("*.yaml"))]
    named = {name for text in texts for name in re.findall(r"secretName: ([\w-]+)", text)}
    assert named == shown


@pytest.mark.parametrize(
    ("kind", "name"), [("RayCluster", "paceline"), ("RayJob", "paceline-batch")]
)
def test_images_and_ray_are_those_of_this_version(kind: str, name: str) -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    spec = the(kind, name)["spec"]
    spec = spec.get("rayClusterSpec", spec)
    assert f"\nray=={spec['rayVersion']}\n" in constraints
    images = {c["image"] for pod in pods(spec) for c in pod["containers"]}
    assert images == {f"paceline:{VERSION}-cpu"}


def test_the_batch_is_a_command_that_parses() -> None:
    argv = shlex.split(the("RayJob", "paceline-batch")["spec"]["entrypoint"])
    assert argv[:3] == ["python", "-m", "paceline"]
    cli.parser().parse_args(argv[3:])


def test_the_serve_application_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve.schema import ServeDeploySchema

    spec = the("RayService", "paceline")["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(config).applications
    module, _, function = application.import_path.partition(":")
    build_app = getattr(__import__(module, fromlist=[function]), function)
    replica = build_app(application.args)._bound_deployment
    needed = sum(bundle["CPU"] for bundle in replica._replica_config.placement_group_bundles)
    (worker,) = [pod for pod in pods(spec) if pod["containers"][0]["name"] == "ray-worker"]
    there = int(worker["containers"][0]["resources"]["limits"]["cpu"])
    assert needed <= there, "a replica fits on a worker"
    grace_s = replica._deployment_config.graceful_shutdown_timeout_s
    assert worker["terminationGracePeriodSeconds"] > grace_s
    mounted = {m["name"]: m["mountPath"] for m in worker["containers"][0]["volumeMounts"]}
    keys = msgspec.to_builtins(replica.init_args[1])["api_key_file"]
    assert Path(keys).parent == Path(mounted["keys"])
