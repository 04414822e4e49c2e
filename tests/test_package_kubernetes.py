"""The package `kserve`: manifests that the schemas of Kubernetes accept, with sizes from the bundle."""

from __future__ import annotations

import copy
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from lrt_deploy.bundle.manifest import MANIFEST, hash_file, read_manifest
from lrt_deploy.exporters.packages import kserve

VERSION = "1.37.0"
# Fields of a predictor that are KServe's own; the others are those of a pod.
KSERVE_FIELDS = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget"}


@pytest.fixture(scope="module")
def bundle(export_once):
    return export_once("padded_vocab")


@pytest.fixture(scope="module")
def package(bundle, package_of):
    return package_of(bundle, "kserve")


@pytest.fixture(scope="module")
def objects(package):
    return {found["kind"]: found for found in yaml.safe_load_all((package / "deployment.yaml").read_text())}


@pytest.fixture(scope="module")
def inference_service(package):
    return yaml.safe_load((package / "inferenceservice.yaml").read_text())


def pod_of(inference_service):
    """The pod that KServe makes of a predictor, by Kubernetes' own schema."""
    predictor = inference_service["spec"]["predictor"]
    spec = {name: value for name, value in predictor.items() if name not in KSERVE_FIELDS}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": spec}


def accept(found):
    kubernetes_validate.validate(found, VERSION, strict=True)


def test_the_schemas_accept_every_object(package, objects, inference_service):
    assert set(objects) == {"Deployment", "Service", "HorizontalPodAutoscaler"}
    for found in objects.values():
        accept(found)
    accept(pod_of(inference_service))
    command = [Path(sys.executable).with_name("kubernetes-validate"), "--strict", "-k", VERSION]
    done = subprocess.run([*command, package / "deployment.yaml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", ["terminationGracePeriodSecond", "containers.0.readinessProb", "containers.0.port"])
def test_a_wrong_field_is_caught(objects, inference_service, path):
    """The twin of the above: a misspelt name in the pod of either."""
    for wrong in (copy.deepcopy(objects["Deployment"]), pod_of(copy.deepcopy(inference_service))):
        place = wrong["spec"]["template"]["spec"] if wrong["kind"] == "Deployment" else wrong["spec"]
        *parents, name = path.split(".")
        for parent in parents:
            place = place[int(parent) if parent.isdigit() else parent]
        place[name] = place.pop(next(right for right in place if right.startswith(name)))
        with pytest.raises(kubernetes_validate.ValidationError, match=name):
            accept(wrong)


def test_a_wrong_value_is_caught(objects):
    for kind, path, value in (("HorizontalPodAutoscaler", "maxReplicas", "many"), ("Service", "ports", {"port": 80})):
        wrong = copy.deepcopy(objects[kind])
        wrong["spec"][path] = value
        with pytest.raises(kubernetes_validate.ValidationError):
            accept(wrong)


def test_both_run_the_same_pod(objects, inference_service):
    pod, other = objects["Deployment"]["spec"]["template"]["spec"], pod_of(inference_service)["spec"]
    assert other["containers"][0].pop("name") == "kserve-container", "KServe routes to the container of this name"
    assert {**pod, "containers": [{k: v for k, v in pod["containers"][0].items() if k != "name"}]} == other


def test_the_objects_refer_to_each_other(package, objects):
    deployment, service, autoscaler = objects["Deployment"], objects["Service"], objects["HorizontalPodAutoscaler"]
    template = deployment["spec"]["template"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    (container,) = template["spec"]["containers"]
    (port,) = container["ports"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"] and port["containerPort"] == 8000
    target = autoscaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"], "applying the file again must not undo the autoscaler"
    assert "cpu" in container["resources"]["requests"], "the autoscaler's target is a share of it"
    kustomization = yaml.safe_load((package / "kustomization.yaml").read_text())
    (image,) = kustomization["images"]
    assert kustomization["resources"] == ["deployment.yaml"]
    assert f"{image['name']}:{image['newTag']}" == container["image"]
    assert f"docker build --tag {container['image']} image" in (package / "README.md").read_text()
    assert (package / "image" / "Dockerfile").is_file() and (package / "image" / "bundle" / "manifest.json").is_file()


def test_a_pod_has_probes_no_rights_and_time_to_drain(objects):
    spec = objects["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready", "503 while it drains"
    assert container["livenessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/health"
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > pause + 30 + 2 + 2, "the drain and the closing of connections"
    assert spec["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]


def test_memory_follows_from_the_bundle(objects, bundle):
    manifest = read_manifest(bundle)
    config, memory = manifest.model, kserve.Memory.of(manifest, "fp32")
    assert memory.row == 2 * config.n_layer * config.kv_dim * manifest.max_seq_len * 4
    assert memory.weights == (bundle / "graphs" / "fp32" / "weights.bin").stat().st_size
    (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    asked, limit = (container["resources"][kind]["memory"] for kind in ("requests", "limits"))
    assert asked == f"{-(-memory.request // 2**20)}Mi" and limit == f"{-(-memory.limit // 2**20)}Mi"
    assert memory.weights + 2 * manifest.max_batch_size * memory.row < memory.request < memory.limit
    options = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
    assert options["--state-bytes"] == str(memory.slots * memory.row) and options["--precision"] == "fp32"
    assert options["--threads"] == container["resources"]["requests"]["cpu"]


def test_the_tag_of_the_image_names_the_bundle(package, bundle):
    """Another bundle is another image, so that applying it rolls it out."""
    (image,) = yaml.safe_load((package / "kustomization.yaml").read_text())["images"]
    assert image["newTag"] == f"{version('lrt-deploy')}-{hash_file(bundle / MANIFEST)[:12]}"
