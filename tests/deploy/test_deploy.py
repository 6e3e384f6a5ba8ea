"""What can be checked of deploy/ without a container engine: files parse, names exist, commands and sizes are ours."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from bench.capacity import NAMES, settings_of, table
from peer.cli import _parser
from peer.core.model import layout_of

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
YAMLS = sorted([*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.yml")])
UNITS = sorted(DEPLOY.glob("systemd/*.service"))
IMAGES = sorted(DEPLOY.glob("Dockerfile*"))
EXPOSURE_MAX = 2.5  # of 10, as `systemd-analyze security` counts
METRIC = re.compile(r"\b(?:sparseloco|process)_[a-z_]+")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, check=False)


def documents(path: Path) -> list[Any]:
    return [each for each in yaml.safe_load_all(path.read_text("utf-8")) if each is not None]


def manifests() -> list[dict[str, Any]]:
    return [each for path in sorted(DEPLOY.glob("kubernetes/*.yaml")) for each in documents(path)]


def known_metrics() -> set[str]:
    return set(METRIC.findall((ROOT / "docs" / "metrics.md").read_text("utf-8")))


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.relative_to(DEPLOY).as_posix())
def test_yaml_can_be_read(path: Path) -> None:
    assert documents(path)


@pytest.mark.parametrize(("name", "parameters"), [("tiny", 3.3e6), ("150m", 126e6), ("1b", 969e6), ("8b", 8.05e9)])
def test_runs_have_the_size_that_they_are_named_after(name: str, parameters: float) -> None:
    assert layout_of(settings_of(name).model).size == pytest.approx(parameters, rel=0.01)


def test_the_capacity_table_is_the_computed_one() -> None:
    assert {path.stem for path in DEPLOY.glob("runs/*.toml")} == set(NAMES)
    assert "\n".join(table()) in (DEPLOY / "README.md").read_text("utf-8"), "run `python -m bench.capacity`"


def test_alerts_and_dashboard_use_metrics_that_exist() -> None:
    rules = documents(DEPLOY / "prometheus" / "alerts.yml")[0]["groups"][0]["rules"]
    panels = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text("utf-8"))["panels"]
    expressions = [rule["expr"] for rule in rules]
    expressions += [target["expr"] for panel in panels for target in panel["targets"]]
    used = {name for text in expressions for name in METRIC.findall(text)}
    documented = {name for name in used if not name.startswith("process_")}
    assert len(documented) > 15
    assert documented - known_metrics() == set()
    assert all({"summary", "description"} <= rule["annotations"].keys() for rule in rules)


def test_panels_do_not_overlap() -> None:
    panels = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text("utf-8"))["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of ours in deploy/, with the file that it is in."""
    for unit in UNITS:
        yield (
            unit.name,
            re.findall(r"^ExecStart=\S+/sparseloco-peer (.*)$", unit.read_text("utf-8"), re.MULTILINE)[0].split(),
        )
    for item in manifests():
        for container in item.get("spec", {}).get("template", {}).get("spec", {}).get("containers", ()):
            yield f"{item['metadata']['name']}/{container['name']}", container["args"]
    for name, service in documents(DEPLOY / "compose.yaml")[0]["services"].items():
        if service.get("image") == "sparseloco-peer":
            words = " ".join(service["command"]).split()
            lines = " ".join(words).split("sparseloco-peer ")[1:] if "entrypoint" in service else [" ".join(words)]
            yield from ((f"compose/{name}", line.split()) for line in lines)


def test_commands_are_those_of_the_command_line() -> None:
    found = dict(commands())
    assert len(found) == len(UNITS) + 3 + 4
    for place, words in found.items():
        assert callable(_parser().parse_args(words).command), place


def test_pods_and_containers_have_no_more_rights_than_they_need() -> None:
    pods = [item["spec"]["template"]["spec"] for item in manifests() if item["kind"] == "StatefulSet"]
    assert len(pods) == 2
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        for container in pod["containers"]:
            rights = container["securityContext"]
            assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
            assert rights["capabilities"] == {"drop": ["ALL"]}
            assert "limits" in container["resources"]
    for image in IMAGES:
        text = image.read_text("utf-8")
        assert re.search(r"^USER [1-9][0-9]*$", text, re.MULTILINE) and "HEALTHCHECK" in text


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_images_copy_what_is_there_and_what_the_package_needs(image: Path) -> None:
    sources = [
        word
        for line in re.findall(r"^COPY (?!--from)(.*)$", image.read_text("utf-8"), re.MULTILINE)
        for word in line.split()[:-1]
    ]
    assert {"pyproject.toml", "setup.py", "protocol", "peer"} <= set(sources)
    assert [each for each in sources if not (ROOT / each).exists()] == []


@pytest.mark.parametrize("image", IMAGES, ids=lambda path: path.name)
def test_images_pass_hadolint(image: Path) -> None:
    beside = Path(sys.executable).with_name("hadolint")
    found = str(beside) if beside.exists() else shutil.which("hadolint")
    if found is None:
        pytest.skip("hadolint is not installed")
    linted = run(found, "--config", str(ROOT / ".hadolint.yaml"), str(image))
    assert linted.returncode == 0, linted.stdout


def test_units_pass_systemd_analyze(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    for unit in UNITS:
        # It looks for the program, which is not installed here.
        text = unit.read_text("utf-8").replace("/opt/sparseloco/bin/sparseloco-peer", sys.executable)
        copy = tmp_path / unit.name
        copy.write_text(text, "utf-8")
        checked = run("systemd-analyze", "verify", str(copy))
        assert (checked.returncode, checked.stderr) == (0, ""), unit.name
        rated = run("systemd-analyze", "security", "--offline=true", str(copy))
        level = re.search(r"exposure level for \S+: ([0-9.]+)", rated.stdout)
        assert level is not None and float(level[1]) <= EXPOSURE_MAX, rated.stdout


def test_kustomize_renders_the_manifests() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    rendered = run("kubectl", "kustomize", str(DEPLOY / "kubernetes"))
    assert rendered.returncode == 0, rendered.stderr
    items = [each for each in yaml.safe_load_all(rendered.stdout) if each]
    assert sorted(item["kind"] for item in items) == sorted(
        item["kind"] for item in manifests() if item["kind"] != "Kustomization"
    )
    assert {item["metadata"].get("namespace", "sparseloco") for item in items} == {"sparseloco"}


def test_alerts_pass_promtool() -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    checked = run("promtool", "check", "rules", str(DEPLOY / "prometheus" / "alerts.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr
