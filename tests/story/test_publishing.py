"""Ways in to a release over a whole network: the lines and the program of docs/publishing.md, and the admin API's receipts."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from inference.golden import write_golden
from inference.onnx_model import OnnxModel, SessionSettings
from mlcdn.demo.command import Mlcdn

ROOT = Path(__file__).parents[2]
# The README's own `digits` stand in the same network, and these are other models.
DOCUMENT = (ROOT / "docs" / "publishing.md").read_text().replace("digits", "documented")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", DOCUMENT, re.DOTALL)
NODES = ["london-1", "tokyo-1", "virginia-1"]
# An MLflow server's, and an object that nobody put there; test_ways_in.py has both.
ELSEWHERE = ("models:/", "runs:/", "s3://", "exports/")
# test_model_files.py has a model whose weights lie in files of their own.
SEVERAL = "--files"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def place(mlcdn: Mlcdn, model_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the document names, and the network where it looks for one."""
    folder = tmp_path_factory.mktemp("publishing")
    model = model_files["v1"].read_bytes()
    (folder / "model.onnx").write_bytes(model)
    x = np.ones((2, 32), np.float32)
    session = OnnxModel.load(folder / "model.onnx", hashlib.sha256(model).hexdigest(), SessionSettings())
    write_golden(folder / "golden.npz", {"features": x}, session.run({"features": x}))
    (folder / "release.toml").write_text((ROOT / "docs" / "examples" / "release.toml").read_text())
    (folder / ".mlcdn").symlink_to(mlcdn.directory.absolute())
    return folder


def sh(line: str, place: Path, **more: str) -> str:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path} | more
    done = subprocess.run(["sh", "-c", line], cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_every_command_of_the_document_runs(place: Path) -> None:
    lines = re.findall(r"^mlcdn .*", DOCUMENT, re.MULTILINE)
    ran = [line for line in lines if not any(word in line for word in (*ELSEWHERE, SEVERAL))]
    assert len(lines) == 8 and len(ran) == 2
    for line in ran:
        assert "trial: loaded in" in sh(line, place)


def test_the_program_of_the_document_runs(place: Path) -> None:
    [program] = [text for language, text in BLOCKS if language == "python"]
    (place / "program.py").write_text(program)
    said = sh(f"{sys.executable} program.py", place)
    assert [node for node in NODES if f"('{node}', 'live')" in said] == NODES


def test_every_curl_of_the_document_gets_its_nodes(mlcdn: Mlcdn, place: Path) -> None:
    [block] = [text for _, text in BLOCKS if text.startswith("curl")]
    lines = block.replace("\\\n", " ").strip().splitlines()
    assert len(lines) == 3
    admin = mlcdn.network()["admin"]
    for line in lines:
        said = sh(f"{line} --noproxy '*' --fail-with-body", place, TOKEN=admin["token"], ADMIN=admin["url"])
        assert '"digest"' in said
        if "wait=true" in line:
            assert said.count('"outcome":"live"') == 3
    # It is the same artifact each time: what was rolled back to is the label before.
    assert mlcdn.json("status", "documented")["desired"]["sequence"] >= 3


def test_the_admin_api_names_the_node_that_does_not_serve_it(mlcdn: Mlcdn, model_files: dict[str, Path]) -> None:
    admin = mlcdn.network()["admin"]
    with httpx.Client(headers={"authorization": f"Bearer {admin['token']}"}, timeout=60, trust_env=False) as http:
        published = http.post(
            f"{admin['url']}/admin/publish?model=by-http&wait=true", content=model_files["v1"].read_bytes()
        )
        assert published.status_code == 200, published.text
        assert [(n["node"], n["outcome"]) for n in published.json()["nodes"]] == [(node, "live") for node in NODES]
        # No time to wait is given: what the log took is said, and each node that has not told yet is named.
        hasty = http.post(
            f"{admin['url']}/admin/publish?model=by-http&wait=true&timeout_s=0", content=model_files["v2"].read_bytes()
        )
        assert hasty.status_code == 200
        assert {n["outcome"] for n in hasty.json()["nodes"]} <= {"missing", "live"}
        assert [n["node"] for n in hasty.json()["nodes"]] == NODES
