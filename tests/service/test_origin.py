"""The origin's process: its admin API behind a token, its schema endpoints, and a model placed at it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlcdn.identities import ensure_identities
from mlcdn.local_stack.running import RunningStack
from processes.ports import free_ports
from schemas import codec
from tests.models import mlp_bytes

TOKEN = "a-token-for-the-test"


@dataclass(frozen=True)
class Origin:
    url: str
    admin: str

    def post(self, path: str, *, token: str | None = TOKEN, **more: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        headers |= more.pop("headers", {})
        return httpx.post(f"{self.admin}{path}", headers=headers, timeout=30, trust_env=False, **more)


@pytest.fixture(scope="module")
def origin(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Origin]:
    directory = tmp_path_factory.mktemp("origin")
    a = stack.addresses
    identities = asyncio.run(ensure_identities(directory / "keys", a.kafka, lambda _: None))
    port, admin = free_ports(2)
    env = {
        "MLCDN_KAFKA": a.kafka,
        "MLCDN_S3_ENDPOINT": a.s3_endpoint,
        "MLCDN_S3_BUCKET": a.s3_bucket,
        "MLCDN_S3_ACCESS_KEY": a.s3_access_key,
        "MLCDN_S3_SECRET_KEY": a.s3_secret_key,
        "MLCDN_ROOT_KEYS": str(identities.roots),
        "MLCDN_SIGNING_KEY": str(identities.origin),
        "MLCDN_NODE": "origin-test",
        "MLCDN_DIR": str(directory),
        "MLCDN_PORT": str(port),
        "MLCDN_ADMIN_PORT": str(admin),
        "MLCDN_ADMIN_TOKEN": TOKEN,
    }
    log = (directory / "log").open("wb")
    process = subprocess.Popen([sys.executable, "-m", "origin.main"], env=os.environ | env, stderr=log)
    found = Origin(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}")
    try:
        _until(lambda: httpx.get(f"{found.url}/health", timeout=1, trust_env=False).status_code == 200, 30)
        yield found
    finally:
        process.terminate()
        assert process.wait(20) == 0
        log.close()


def _until(true: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if true():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < end
        time.sleep(0.05)


def test_without_the_token_nothing_is_done(origin: Origin) -> None:
    words = {"scopes": [{"kind": "all"}]}
    assert origin.post("/admin/invalidate", token=None, json=words).status_code == 401
    assert origin.post("/admin/invalidate", token="guess", json=words).status_code == 403
    elsewhere = {"origin": "https://elsewhere.example"}
    assert origin.post("/admin/invalidate", headers=elsewhere, json=words).status_code == 403
    assert origin.post("/admin/invalidate", headers={"sec-fetch-site": "cross-site"}, json=words).status_code == 403
    assert httpx.post(f"{origin.url}/admin/invalidate", json=words, trust_env=False).status_code == 404


def test_a_model_is_released_rolled_back_and_retired(origin: Origin, tmp_path: Path) -> None:
    one = origin.post("/admin/publish?model=admin-model&version=a&reason=test", content=mlp_bytes(1))
    two = origin.post("/admin/publish?model=admin-model&version=b", content=mlp_bytes(2))
    assert (one.status_code, two.status_code) == (200, 200), (one.text, two.text)
    assert two.json()["sequence"] == one.json()["sequence"] + 1
    back = origin.post("/admin/rollback", json={"model": "admin-model", "reason": "test"})
    assert back.json()["digest"] == one.json()["digest"]
    assert origin.post("/admin/retire", json={"model": "admin-model"}).status_code == 200
    assert origin.post("/admin/retire", json={"model": "admin-model"}).status_code == 404


@pytest.mark.parametrize(
    ("path", "content", "status"),
    [
        ("/admin/publish", b"x", 400),
        ("/admin/publish?model=UPPER", b"x", 400),
        ("/admin/publish?model=ok", b"", 422),
        ("/admin/publish?model=ok", b"not a model", 422),
        ("/admin/rollback", b"{", 400),
        ("/admin/rollback", b'{"model": "never-released"}', 404),
        ("/admin/rollback", b'{"model": "x", "surprise": 1}', 400),
        ("/admin/invalidate", b'{"scopes": []}', 400),
        ("/admin/invalidate", b'{"scopes": [{"kind": "nothing", "value": "x"}]}', 400),
        ("/admin/invalidate", b"[" * 100_000, 400),
    ],
)
def test_bad_words_get_a_clear_no(origin: Origin, path: str, content: bytes, status: int) -> None:
    answer = origin.post(path, content=content)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]
    assert origin.post("/admin/invalidate", json={"scopes": [{"kind": "tag", "value": "t"}]}).status_code == 200


def test_schemas_are_served_as_tools_ask_for_them(origin: Origin) -> None:
    def get(path: str) -> Any:
        answer = httpx.get(f"{origin.url}{path}", trust_env=False)
        assert answer.status_code == 200, answer.text
        return answer.json()

    assert len(get("/subjects")) == len(codec.LATEST)
    for schema in codec.SCHEMAS:
        assert get(f"/schemas/ids/{schema.id}")["schema"] == schema.source
    latest = get("/subjects/mlcdn.NodeBeat/versions/latest")
    assert latest["id"] == codec.LATEST["NodeBeat"].id
    assert httpx.get(f"{origin.url}/schemas/ids/9999", trust_env=False).status_code == 404


def test_a_model_placed_at_the_origin_is_answered_there(origin: Origin, stack: RunningStack, tmp_path: Path) -> None:
    assert httpx.get(f"{origin.url}/v2/models/far", trust_env=False).status_code == 404
    answer = origin.post("/admin/publish?model=far&placement=origin", content=mlp_bytes(5))
    assert answer.status_code == 200, answer.text
    body = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 32], "data": [0.5] * 32}], "id": "7"}

    def ask() -> httpx.Response:
        return httpx.post(f"{origin.url}/v2/models/far/infer", json=body, timeout=5, trust_env=False)

    _until(lambda: ask().status_code == 200, 15)
    said = ask()
    assert said.headers["mlcdn-digest"] == answer.json()["digest"]
    assert said.json()["id"] == "7"
    assert len(said.json()["outputs"][0]["data"]) == 8
    body["inputs"][0]["shape"] = [1, 31]  # type: ignore[index]
    assert ask().status_code == 400
