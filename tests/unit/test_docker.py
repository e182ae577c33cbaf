"""The cluster manifests as far as no container engine is needed: they parse, and none starts Ray without a token."""

from pathlib import Path
from typing import Any

import pytest
import yaml

import batchinfer

ROOT = Path(batchinfer.__file__).parent.parent
DOCKER = ROOT / "docker"


def read(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text(encoding="utf-8"))


def test_compose_asks_for_a_token_and_refuses_to_start_without_one() -> None:
    for name, service in read("compose.yaml")["services"].items():
        environment = service["environment"]
        assert environment["RAY_AUTH_MODE"] == "token", name
        assert environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?"), name


def test_kuberay_asks_for_a_token() -> None:
    cluster = read("kuberay-rayjob.yaml")["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"ray=={cluster['rayVersion']}" in constraints


def test_the_image_runs_as_nobody_in_particular() -> None:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    assert users[-1] not in {"root", "0"}


@pytest.mark.parametrize("name", ["compose.yaml", "kuberay-rayjob.yaml"])
def test_manifests_hold_no_secret(name: str) -> None:
    """A credential in a manifest ends up in a repository: they come from the environment or a Secret."""

    def check(value: object, path: str) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                check(child, f"{path}.{key}")
        elif isinstance(value, list):
            for child in value:
                check(child, path)
        elif any(word in path for word in ("TOKEN", "SECRET", "KEY")):
            assert value is None or str(value).startswith("${"), path

    check(read(name), "")
