"""The house itself: documents name what exists, catalogues agree, every public command explains itself."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import fastavro
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from processes.ports import free_ports
from schemas import codec, metrics, settings
from schemas.events import KINDS
from schemas.topics import TOPICS
from streams.log.keys import write_roots

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]
DOCUMENTS += sorted((ROOT / "docs").rglob("*.md"))
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.-]*)`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_documents_name_real_paths(document: Path) -> None:
    named = {
        m
        for m in PATH.findall(document.read_text())
        if m.split("/")[0] in {p.name for p in ROOT.iterdir()} - {".mlcdn"}
    }
    missing = [path for path in named if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_documents_link_to_real_files(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_every_setting_is_documented() -> None:
    documented = set(re.findall(r"^\| `(\w+)` ", (ROOT / "docs/settings.md").read_text(), re.MULTILINE))
    assert documented == set(settings.Settings.model_fields)


def test_every_command_in_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text()
    commands = set(re.findall(r"^mlcdn ([a-z]+(?: [a-z]+)?)", text, re.MULTILINE))
    for command in commands:
        words = command.split() if command.split()[0] in ("audit", "topics", "keys") else command.split()[:1]
        shown = subprocess.run(
            [sys.executable, "-m", "mlcdn", *words, "--help"], capture_output=True, text=True, check=False
        )
        assert shown.returncode == 0, command


def test_every_kind_stands_in_a_topic_and_has_a_schema() -> None:
    assert set().union(*(t.kinds for t in TOPICS.values())) == set(KINDS)
    assert set(codec.LATEST) == set(KINDS)
    assert len({s.id for s in codec.SCHEMAS}) == len(codec.SCHEMAS)


@pytest.mark.parametrize("schema", codec.SCHEMAS, ids=lambda s: s.ce_type)
def test_every_published_schema_is_valid_avro_without_bombs(schema: codec.SchemaVersion) -> None:
    parsed = json.loads(schema.source)
    fastavro.parse_schema(parsed)
    assert '"items": "null"' not in schema.source


def test_metric_names_are_in_the_documentation_form() -> None:
    for name, metric in metrics.CATALOGUE.items():
        assert re.fullmatch(r"(cdn|mlcdn)_[a-z_]+", name)
        assert metric.help.endswith(".")
        assert (metric.kind == "counter") == name.endswith("_total")


def test_layers_hold() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_no_committed_file_names_a_registry() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    hosts = re.compile(r"://[a-z0-9.-]*(pythonhosted|pypi|npmjs|maven|debian)[a-z.]*")
    named = []
    for line in listed.stdout.splitlines():
        path = ROOT / line
        if path.is_file() and hosts.search(path.read_text(errors="replace")):
            named.append(line)
    assert named == []


def test_the_wheel_installs_and_runs_elsewhere(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-2000:]
    [wheel] = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stderr
    # A node out of the wheel, far from this checkout: no Kafka, no Redis, no model, and it answers.
    [port] = free_ports(1)
    roots = write_roots(tmp_path / "roots.txt", {"root": Ed25519PrivateKey.generate()})
    own = {
        "PYTHONPATH": str(target),
        "MLCDN_PORT": str(port),
        "MLCDN_DIR": str(tmp_path / "node"),
        "MLCDN_ROOT_KEYS": str(roots),
        "MLCDN_KAFKA": "127.0.0.1:9",
    }
    where = [sys.executable, "-c", "import edge_node, schemas; print(edge_node.__file__, schemas.__file__)"]
    asked = subprocess.run(where, cwd=tmp_path, env=os.environ | own, capture_output=True, text=True, check=False)
    assert asked.stdout.count(str(target)) == 2, asked.stderr
    node = subprocess.Popen([sys.executable, "-m", "edge_node.main"], cwd=tmp_path, env=os.environ | own)
    try:
        assert _answers(f"http://127.0.0.1:{port}/v2/health/live")
        described = httpx.get(f"http://127.0.0.1:{port}/v2", trust_env=False)
        assert described.json()["name"] == "mlcdn"
    finally:
        node.terminate()
        assert node.wait(40) == 0


def _answers(url: str) -> bool:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            return httpx.get(url, timeout=1, trust_env=False).status_code == 200
        except httpx.TransportError:
            time.sleep(0.1)
    return False
