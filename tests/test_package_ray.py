"""The package `ray`: a config that Ray Serve's schema accepts, and an application that builds from it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import yaml

import lrt_deploy
from lrt_deploy.errors import InputError
from lrt_deploy.exporters.packages import ray as ray_package
from lrt_deploy.exporters.packages.package import read_package, verify_package


@pytest.fixture(scope="module")
def package(export_once, package_of):
    folder = package_of(export_once("padded_vocab"), "ray")
    assert read_package(folder).run == ray_package.COMMAND
    return folder


@pytest.fixture(scope="module")
def config(package):
    return yaml.safe_load((package / "serve_config.yaml").read_text())


def test_the_package_is_whole_and_its_readme_starts_with_the_command(package):
    verify_package(package)
    lines = (package / "README.md").read_text().splitlines()
    assert lines[1] == f"$ {ray_package.COMMAND}" and "@" not in "".join(lines)
    with lrt_deploy.open_decoder(package / "bundle", threads=1) as decoder:
        assert len(list(decoder.generate([1, 2, 3], 4, stop_ids=[]))) == 4


def test_the_schema_of_ray_serve_accepts_the_config_and_notices_a_wrong_field(config):
    schema = pytest.importorskip("ray.serve.schema")
    accepted = schema.ServeDeploySchema.model_validate(config)
    assert accepted.http_options.host == "127.0.0.1"
    wrong = config["applications"][0]["deployments"][0] | {"health_check_period_s": -2}
    with pytest.raises(ValueError, match="health_check_period_s"):
        schema.DeploymentSchema.model_validate(wrong)


def test_the_application_has_the_deployments_that_the_config_names(package, config):
    """In a process of its own: the module sets Ray's environment."""
    pytest.importorskip("ray.serve")
    (app,) = config["applications"]
    code = f"""
import sys; sys.path.insert(0, {str(package)!r})
from importlib import import_module
module, name = {app["import_path"]!r}.split(":")
built = getattr(import_module(module), name)({app["args"]!r})
front = built._bound_deployment
(replica,) = front.init_args
options, = replica._bound_deployment.init_args
print(front.name, replica._bound_deployment.name, options["bundle"], options["model"], options["opening"]["precision"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = result.stdout.split()
    assert set(found[:2]) == {deployment["name"] for deployment in app["deployments"]}
    assert found[2:] == [str(package / "bundle"), app["args"]["model"], "fp32"]


def test_arguments_that_the_application_does_not_have_are_named():
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed")
    from lrt_deploy.runtime.serving.replicas.cluster import application

    with pytest.raises(InputError, match="args has slot, expected some of"):
        application({"bundle": "b", "slot": 3})
    with pytest.raises(InputError, match="args has no bundle"):
        application({})
