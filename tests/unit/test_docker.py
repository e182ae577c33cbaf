"""The manifests as far as no container engine is needed: they parse, fit each other, and no Ray is without a token."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import batchinfer
from batchinfer.run_metrics import METRICS

ROOT = Path(batchinfer.__file__).parent.parent
DOCKER = ROOT / "docker"


def read(name: str) -> Any:
    return yaml.safe_load((DOCKER / name).read_text(encoding="utf-8"))


def services(*, of_ours: bool) -> dict[str, Any]:
    """Compose's services that run our image, or all others."""
    found: dict[str, Any] = read("compose.yaml")["services"]
    return {name: service for name, service in found.items() if (service["image"] == "batchinfer") == of_ours}


def test_compose_asks_for_a_token_and_refuses_to_start_without_one() -> None:
    assert set(services(of_ours=True)) == {"head", "worker"}
    for name, service in services(of_ours=True).items():
        environment = service["environment"]
        assert environment["RAY_AUTH_MODE"] == "token", name
        assert environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?"), name


def test_what_compose_runs_beside_ray_is_pinned_and_listens_on_loopback() -> None:
    others = services(of_ours=False)
    for name, service in others.items():
        tag = service["image"].partition(":")[2]
        assert re.fullmatch(r"v?\d+\.\d+\.\d+", tag), name
        assert "ports" not in service, name
        assert service["cap_drop"] == ["ALL"], name
    assert "--web.listen-address=127.0.0.1:9090" in others["prometheus"]["command"]
    assert others["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"


def test_prometheus_asks_rays_head_with_the_clusters_token() -> None:
    (scrape,) = read("prometheus.yml")["scrape_configs"]
    (discovery,) = scrape["http_sd_configs"]
    compose = read("compose.yaml")
    (secret,) = compose["services"]["prometheus"]["secrets"]
    # Without the type, Prometheus sends the bare token, which Ray does not take.
    assert discovery["authorization"] == {"type": "Bearer", "credentials_file": f"/run/secrets/{secret}"}
    assert compose["secrets"][secret] == {"environment": "RAY_AUTH_TOKEN"}


def test_grafana_is_given_what_lies_here() -> None:
    for service in services(of_ours=False).values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert (DOCKER / source).exists() if source.startswith(".") else source in read("compose.yaml")["volumes"]
    (source,) = read("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://127.0.0.1:9090"
    dashboard = read("grafana/dashboard.json")
    used = {target["datasource"]["uid"] for panel in dashboard["panels"] for target in panel["targets"]}
    assert used == {source["uid"]}
    (provider,) = read("grafana/provisioning/dashboards/batchinfer.yaml")["providers"]
    path = services(of_ours=False)["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert path.startswith(provider["options"]["path"])


def queries() -> list[str]:
    dashboard = read("grafana/dashboard.json")
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return panels + [variable["query"]["query"] for variable in dashboard["templating"]["list"]]


def test_the_dashboard_shows_every_metric_and_no_other() -> None:
    exported = {
        f"ray_{metric.name}{'_bucket' if metric.kind == 'histogram' else ''}": metric.kind for metric in METRICS
    }
    used = {name for query in queries() for name in re.findall(r"\bray_\w+", query)}
    assert used == set(exported)
    for query in queries():
        for name in re.findall(r"\bray_\w+", query):
            # What only grows says nothing by itself but its total.
            is_rated = f"rate({name}" in query
            assert is_rated or exported[name] != "histogram"
            assert not (is_rated and exported[name] == "gauge")


def test_the_dashboards_queries_use_tags_that_are_there_and_close_their_brackets() -> None:
    tags = {f"ray_{metric.name}{'_bucket' if metric.kind == 'histogram' else ''}": metric.tags for metric in METRICS}
    for query in queries():
        for opening, closing in ("()", "{}", "[]"):
            assert query.count(opening) == query.count(closing), query
        for name, selector in re.findall(r"\b(ray_\w+)\{([^}]*)\}", query):
            assert set(re.findall(r"(\w+)=~?\"", selector)) <= set(tags[name]), query
        for grouped, rest in re.findall(r"by \(([\w, ]+)\) \((.*)", query):
            (name, *_) = re.findall(r"\b(ray_\w+)", rest)
            assert {tag.strip() for tag in grouped.split(",")} <= {*tags[name], "le"}, query


def test_panels_have_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in read("grafana/dashboard.json")["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken
        assert all(x < 24 for x, _ in cells)
        taken |= cells


def test_kuberay_asks_for_a_token() -> None:
    cluster = read("kuberay-rayjob.yaml")["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    constraints = (ROOT / "constraints.txt").read_text()
    assert f"ray=={cluster['rayVersion']}" in constraints


def test_the_image_runs_as_nobody_in_particular() -> None:
    lines = (DOCKER / "Dockerfile").read_text().splitlines()
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    # A number, or Kubernetes cannot tell that it is not root.
    assert int(users[-1].partition(":")[0]) > 0


@pytest.mark.parametrize("name", ["compose.yaml", "kuberay-rayjob.yaml", "prometheus.yml"])
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
