"""One whole network for the story suite, driven only as a user could: by the command line and over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mlcdn.demo.command import Mlcdn


@pytest.fixture(scope="session")
def mlcdn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlcdn]:
    """Three regions, one node each, two workers in a node."""
    network = Mlcdn(tmp_path_factory.mktemp("network") / "net")
    network("up", "--detach", "--workers", "2", timeout_s=240)
    yield network
    network("down", "--wipe")


@pytest.fixture
def nodes(mlcdn: Mlcdn) -> dict[str, str]:
    """URL by node, as it is now: a network that was started anew has other addresses."""
    return {n["node"]: n["url"] for r in mlcdn.network()["regions"].values() for n in r["nodes"]}


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three versions of one small network, by label."""
    from tests.models import mlp_bytes

    directory = tmp_path_factory.mktemp("models")
    files = {}
    for seed in (1, 2, 3):
        files[f"v{seed}"] = directory / f"v{seed}.onnx"
        files[f"v{seed}"].write_bytes(mlp_bytes(seed))
    return files
