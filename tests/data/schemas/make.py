"""Makes `schemas.json`: what Kubernetes, KubeRay and the Prometheus operator accept, of the kinds we deploy.

    python tests/data/schemas/make.py kubernetes_validate-1.37.0-py3-none-any.whl \
        kubernetes-models-prometheus-operator-6.0.0.tgz

README.md beside it says where the three come from. Descriptions are left out, and what no kind of ours
refers to.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Schema = dict[str, Any]

KUBERNETES = "kubernetes_validate/kubernetes-json-schema/v1.37.0-local-strict/_definitions.json"
MONITORING = "package/monitoring.coreos.com/v1"
KUBERNETES_SHA256 = "85136d018a27b50ec7fc049d902bfa5193f5976807e6c0f408e3ab6fe078cad9"
MONITORING_SHA256 = "e92402ebff400ea1ca5fe60546554841ab6f5986b317f3f0d4cb756dc88fbd37"
CORE, META = "io.k8s.api.core.v1", "io.k8s.apimachinery.pkg.apis.meta.v1"
KINDS = {
    "v1/ConfigMap": f"{CORE}.ConfigMap",
    "v1/Namespace": f"{CORE}.Namespace",
    "v1/Secret": f"{CORE}.Secret",
    "v1/Service": f"{CORE}.Service",
    "v1/ServiceAccount": f"{CORE}.ServiceAccount",
    "apps/v1/Deployment": "io.k8s.api.apps.v1.Deployment",
    "autoscaling/v2/HorizontalPodAutoscaler": "io.k8s.api.autoscaling.v2.HorizontalPodAutoscaler",
    "networking.k8s.io/v1/NetworkPolicy": "io.k8s.api.networking.v1.NetworkPolicy",
    "policy/v1/PodDisruptionBudget": "io.k8s.api.policy.v1.PodDisruptionBudget",
    "ray.io/v1/RayCluster": "ray.RayCluster",
    "ray.io/v1/RayJob": "ray.RayJob",
    "ray.io/v1/RayService": "ray.RayService",
    "monitoring.coreos.com/v1/ServiceMonitor": "monitoring.ServiceMonitor",
}

# ray-operator/apis/ray/v1/*_types.go of github.com/ray-project/kuberay (Apache-2.0), fields and their
# types: `!` is required, `[]` a list, `{}` a mapping of texts, `a|b` one of these.
RAY: dict[str, dict[str, str]] = {
    "RayClusterSpec": {
        "authOptions": "AuthOptions",
        "autoscalerOptions": "AutoscalerOptions",
        "enableInTreeAutoscaling": "boolean",
        "gcsFaultToleranceOptions": "GcsFaultToleranceOptions",
        "headGroupSpec!": "HeadGroupSpec",
        "headServiceAnnotations": "{}",
        "managedBy": "ray.io/kuberay-operator|kueue.x-k8s.io/multikueue",
        "networkPolicy": "NetworkPolicyConfig",
        "rayVersion": "string",
        "suspend": "boolean",
        "tlsOptions": "TLSOptions",
        "upgradeStrategy": "RayClusterUpgradeStrategy",
        "workerGroupSpecs": "[]WorkerGroupSpec",
    },
    "AuthOptions": {
        "enableK8sTokenAuth": "boolean",
        "mode": "disabled|token",
        "secretName": "string",
    },
    "AutoscalerOptions": {
        "env": f"[]{CORE}.EnvVar",
        "envFrom": f"[]{CORE}.EnvFromSource",
        "idleTimeoutSeconds": "integer",
        "image": "string",
        "imagePullPolicy": "string",
        "resources": f"{CORE}.ResourceRequirements",
        "securityContext": f"{CORE}.SecurityContext",
        "upscalingMode": "Default|Aggressive|Conservative",
        "version": "v1|v2",
        "volumeMounts": f"[]{CORE}.VolumeMount",
    },
    "GcsFaultToleranceOptions": {
        "backend": "redis|rocksdb",
        "externalStorageNamespace": "string",
        "redisAddress": "string",
        "redisPassword": "RedisCredential",
        "redisUsername": "RedisCredential",
    },
    "RedisCredential": {"value": "string", "valueFrom": f"{CORE}.EnvVarSource"},
    "TLSOptions": {"enabled": "boolean"},
    "RayClusterUpgradeStrategy": {"type": "Recreate|None"},
    "NetworkPolicyConfig": {
        "head": "NetworkPolicyRules",
        "mode": "DenyAll|DenyAllIngress|DenyAllEgress",
        "worker": "NetworkPolicyRules",
    },
    "NetworkPolicyRules": {
        "egressRules": "[]io.k8s.api.networking.v1.NetworkPolicyEgressRule",
        "ingressRules": "[]io.k8s.api.networking.v1.NetworkPolicyIngressRule",
    },
    "HeadGroupSpec": {
        "enableIngress": "boolean",
        "headService": f"{CORE}.Service",
        "labels": "{}",
        "rayStartParams": "{}",
        "resources": "{}",
        "serviceType": "string",
        "template!": f"{CORE}.PodTemplateSpec",
    },
    "WorkerGroupSpec": {
        "groupName!": "string",
        "idleTimeoutSeconds": "integer",
        "labels": "{}",
        "maxReplicas!": "integer",
        "minReplicas!": "integer",
        "numOfHosts": "integer",
        "priority": "integer",
        "rayStartParams": "{}",
        "replicas": "integer",
        "resources": "{}",
        "template!": f"{CORE}.PodTemplateSpec",
    },
    "RayServiceSpec": {
        "excludeHeadPodFromServeSvc": "boolean",
        "managedBy": "ray.io/kuberay-operator|kueue.x-k8s.io/multikueue",
        "rayClusterConfig": "RayClusterSpec",
        "serveConfigV2": "string",
        "serveService": f"{CORE}.Service",
        "upgradeStrategy": "RayServiceUpgradeStrategy",
    },
    "RayServiceUpgradeStrategy": {"type": "NewCluster|None"},
    "RayJobSpec": {
        "activeDeadlineSeconds": "integer",
        "backoffLimit": "integer",
        "clusterSelector": "{}",
        "entrypoint": "string",
        "entrypointNumCpus": "number",
        "entrypointNumGpus": "number",
        "entrypointResources": "string",
        "jobId": "string",
        "managedBy": "ray.io/kuberay-operator|kueue.x-k8s.io/multikueue",
        "metadata": "{}",
        "rayClusterSpec": "RayClusterSpec",
        "runtimeEnvYAML": "string",
        "shutdownAfterJobFinishes": "boolean",
        "submissionMode": "K8sJobMode|HTTPMode|InteractiveMode",
        "submitterConfig": "SubmitterConfig",
        "submitterPodTemplate": f"{CORE}.PodTemplateSpec",
        "suspend": "boolean",
        "ttlSecondsAfterFinished": "integer",
    },
    "SubmitterConfig": {"backoffLimit": "integer"},
}


def main(wheel: str, package: str) -> None:
    for path, wanted_sha256 in ((wheel, KUBERNETES_SHA256), (package, MONITORING_SHA256)):
        found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        assert found == wanted_sha256, f"{path} has sha256 {found}"
    with zipfile.ZipFile(wheel) as archive:
        there: dict[str, Schema] = json.loads(archive.read(KUBERNETES))["$defs"]
    there |= {f"ray.{name}": _ray(fields) for name, fields in RAY.items()}
    for kind in ("RayCluster", "RayJob", "RayService"):
        there[f"ray.{kind}"] = _resource("ray.io/v1", kind, spec=f"ray.{kind}Spec")
    with tarfile.open(package) as archive:
        there |= _monitoring(archive)
    there["monitoring.ServiceMonitor"] = _resource(
        "monitoring.coreos.com/v1", "ServiceMonitor", spec="monitoring.ServiceMonitorSpec"
    )
    wanted: dict[str, Schema] = {}
    _take(KINDS.values(), there, wanted)
    made = {"kinds": KINDS, "$defs": dict(sorted(wanted.items()))}
    text = json.dumps(made, indent=None, separators=(",", ":"), sort_keys=True)
    (Path(__file__).parent / "schemas.json").write_text(text.replace('"io.k8s', '\n"io.k8s') + "\n")


def _take(names: Any, there: dict[str, Schema], wanted: dict[str, Schema]) -> None:
    """Of the definitions that are there, those named and all they refer to, without descriptions."""
    for name in names:
        if name not in wanted:
            wanted[name] = _bare(there[name])
            _take(_referred(wanted[name]), there, wanted)


def _bare(node: Any, *, is_properties: bool = False) -> Any:
    if isinstance(node, list):
        return [_bare(each) for each in node]
    if not isinstance(node, dict):
        return node
    return {
        key: _bare(value, is_properties=key == "properties" and not is_properties)
        for key, value in node.items()
        if is_properties or not (key == "description" or key.startswith("x-kubernetes"))
    }


def _referred(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for each in node:
            yield from _referred(each)
    elif isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"].rpartition("/")[2]
        for each in node.values():
            yield from _referred(each)


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def _resource(version: str, kind: str, *, spec: str) -> Schema:
    return {
        "type": "object",
        "properties": {
            "apiVersion": {"enum": [version]},
            "kind": {"enum": [kind]},
            "metadata": _ref(f"{META}.ObjectMeta"),
            "spec": _ref(spec),
        },
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": False,
    }


def _ray(fields: dict[str, str]) -> Schema:
    return {
        "type": "object",
        "properties": {name.rstrip("!"): _ray_type(text) for name, text in fields.items()},
        "required": [name.rstrip("!") for name in fields if name.endswith("!")],
        "additionalProperties": False,
    }


def _ray_type(text: str) -> Schema:
    if text == "{}":
        return {"type": "object", "additionalProperties": {"type": "string"}}
    if text.startswith("[]"):
        return {"type": "array", "items": _ray_type(text[2:])}
    if "|" in text:
        return {"enum": text.split("|")}
    if text in ("string", "boolean", "integer", "number"):
        return {"type": text}
    return _ref(text if "." in text else f"ray.{text}")


def _monitoring(archive: tarfile.TarFile) -> dict[str, Schema]:
    """The types of the Prometheus operator, from their TypeScript declarations."""
    made: dict[str, Schema] = {}
    for member in archive.getmembers():
        if Path(member.name).parent != Path(MONITORING) or not member.name.endswith(".d.ts"):
            continue
        file = archive.extractfile(member)
        assert file is not None, f"expected a file, found {member.name}"
        text = re.sub(r"/\*.*?\*/", "", file.read().decode(), flags=re.DOTALL)
        name = Path(member.name).name.removesuffix(".d.ts")
        if found := re.search(rf"export declare class {name} .*?\{{\n(.*?)\n\}}", text, re.DOTALL):
            body = re.sub(r"\s*constructor\(.*", "", found[1])
            members = re.findall(r'"(\w+)"(\??): (.*?);\n(?=    "|\s*$)', body + "\n", re.DOTALL)
            made[f"monitoring.{name}"] = {
                "type": "object",
                "properties": {key: _typescript(kind) for key, _, kind in members},
                "required": [key for key, optional, _ in members if not optional],
                "additionalProperties": False,
            }
        elif found := re.search(rf"export type I{name} = (.*?);", text, re.DOTALL):
            made[f"monitoring.{name}"] = _typescript(found[1])
    return made


def _typescript(text: str) -> Schema:
    text = text.strip()
    if found := re.fullmatch(r"Array<(.*)>", text, re.DOTALL):
        return {"type": "array", "items": _typescript(found[1])}
    if found := re.fullmatch(r"\{\s*\[key: string\]: (.*);\s*\}", text, re.DOTALL):
        return {"type": "object", "additionalProperties": _typescript(found[1])}
    if text.startswith('"'):
        return {"enum": [each.strip().strip('"') for each in text.split("|")]}
    if text in ("string", "boolean", "number"):
        return {"type": text}
    if found := re.fullmatch(r"IComGithubPrometheusOperator\w+MonitoringV1(\w+)", text):
        return _ref(f"monitoring.{found[1]}")
    for prefix, package in (
        ("IIoK8sApimachineryPkgApisMetaV1", META),
        ("IIoK8sApimachineryPkgUtilIntstr", "io.k8s.apimachinery.pkg.util.intstr"),
        ("IIoK8sApimachineryPkgApiResource", "io.k8s.apimachinery.pkg.api.resource"),
        ("IIoK8sApiCoreV1", CORE),
    ):
        if text.startswith(prefix):
            return _ref(f"{package}.{text.removeprefix(prefix)}")
    return {}


if __name__ == "__main__":
    main(*sys.argv[1:])
