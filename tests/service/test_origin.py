"""The origin's process: its admin API behind a token, its schema endpoints, and a model placed at it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from inference.golden import write_golden
from mlcdn.identities import ensure_identities
from mlcdn.local_stack.running import RunningStack
from origin import openapi
from origin.admin import MAX_UPLOADS, Admin, InvalidateWords, PublishWords, RetireWords, RollbackWords
from processes.ports import free_ports
from schemas import codec
from tests.models import identity_bytes, mlp_bytes

TOKEN = "a-token-for-the-test"


@dataclass(frozen=True)
class Origin:
    url: str
    admin: str
    uploads: Path

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
    found = Origin(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin}", directory / "uploads")
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
        ("/admin/publish?model=ok&surprise=1", b"x", 400),
        ("/admin/publish?model=ok&model=two", b"x", 400),
        ("/admin/publish?model=ok&wait=perhaps", b"x", 400),
        ("/admin/publish?model=ok&wait=true&timeout_s=nan", b"x", 400),
        ("/admin/publish?model=ok&placement=moon", b"x", 400),
        ("/admin/publish?model=ok", b"", 422),
        ("/admin/publish?model=ok", b"not a model", 422),
        ("/admin/rollback", b"{", 400),
        ("/admin/rollback", b'{"model": "never-released"}', 404),
        ("/admin/rollback", b'{"model": "x", "surprise": 1}', 400),
        ("/admin/rollback", b'{"model": "x", "timeout_s": 1e9}', 400),
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


FILE = ("any name/../x", mlp_bytes(31))


def fits(answer: httpx.Response, schema: str) -> Any:
    """The answer's JSON, which is what the document says of it."""
    assert answer.status_code == 200, answer.text
    whole = {"$ref": f"#/components/schemas/{schema}", "components": openapi.document("0")["components"]}
    jsonschema.Draft202012Validator(whole).validate(answer.json())
    return answer.json()


def test_a_form_brings_a_golden_file_and_settings(origin: Origin, tmp_path: Path) -> None:
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    write_golden(tmp_path / "right.npz", {"x": x}, {"y": x})
    write_golden(tmp_path / "wrong.npz", {"x": x}, {"y": x + 1})
    settings = (None, b'{"version": "from settings", "reason": "weekly", "cache": {"ttl_s": 7}}', "application/json")
    file = ("m.onnx", identity_bytes())

    def publish(golden: str, query: str = "") -> httpx.Response:
        parts = {"settings": settings, "golden": ("g", (tmp_path / golden).read_bytes()), "file": file}
        return origin.post(f"/admin/publish?model=formed{query}", files=parts)

    refused = publish("wrong.npz")
    assert refused.status_code == 422 and "output y[0, 0]" in refused.json()["error"]
    said = fits(publish("right.npz"), "Released")
    assert (
        said["version"] == "from settings" and said["trial"]["golden"] == "passed" and said["signature_changes"] == []
    )
    assert said["trial"]["batchable"] and said["trial"]["load_ms"] > 0 and said["trial"]["run_ms"] > 0
    assert said["trial"]["peak_rss_bytes"] > said["trial"]["model_rss_bytes"] > 0 and said["nodes"] == []
    assert publish("right.npz", "&version=by-query").json()["version"] == "by-query"


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"golden": FILE}, "no part `file`"),
        ({"file": FILE, "other": FILE}, "not 'other'"),
        ([("file", FILE), ("file", FILE)], "there twice"),
        ({"file": FILE, "settings": (None, b"{")}, "the settings: "),
        ({"file": FILE, "settings": (None, b"[" * 100_000)}, "the settings: "),
        ({"file": FILE, "settings": (None, b'{"ttl": 3}')}, "did you mean 'cache.ttl_s'"),
        ({"file": FILE, "settings": (None, b'{"golden": "/etc/passwd"}')}, "a part of the form, not a path"),
        ({"file": FILE, "settings": (None, b" " * 1_048_577)}, "the settings is over 1048576 bytes"),
        ({"file": FILE, "golden": ("g", b"x" * (64 * 2**20 + 1))}, "the golden is over 67108864 bytes"),
        ({"file": FILE, "golden": ("g", b"no archive")}, "not a usable .npz file"),
    ],
)
def test_a_form_that_is_none_gets_a_clear_no(origin: Origin, parts: Any, said: str) -> None:
    answer = origin.post("/admin/publish?model=ill-formed", files=parts)
    assert answer.status_code in (400, 422) and said in answer.json()["error"], answer.text


PART = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
WHOLE = PART % (b"file", mlp_bytes(1))


@pytest.mark.parametrize(
    "body",
    [b"", b"--b", b"--b\r\n", b"garbage", WHOLE[:500], WHOLE, WHOLE + b"--b\r\n", WHOLE + PART % (b"golden", b"abc")],
    ids=range(8),
)
def test_a_form_that_is_cut_off_releases_nothing(origin: Origin, body: bytes) -> None:
    for kind in ("multipart/form-data; boundary=b", "multipart/form-data"):
        answer = origin.post("/admin/publish?model=cut", content=body, headers={"content-type": kind})
        assert answer.status_code == 400 and answer.json()["error"], answer.text


def test_a_changed_signature_needs_a_word(origin: Origin) -> None:
    assert origin.post("/admin/publish?model=shaped&version=one", content=mlp_bytes(1)).status_code == 200
    other = mlp_bytes(2, (16, 8))
    refused = origin.post("/admin/publish?model=shaped", content=other)
    assert refused.status_code == 409
    assert refused.json()["error"].endswith("one, which is served now: input 'features' was [N, 32], takes [N, 16]")
    said = fits(origin.post("/admin/publish?model=shaped&allow_signature_change=true", content=other), "Released")
    assert said["signature_changes"] == [{"side": "input", "tensor": "features", "how": "was [N, 32], takes [N, 16]"}]


def test_uploads_leave_nothing_on_the_disk_and_are_so_many_at_once(origin: Origin) -> None:
    body = mlp_bytes(41)

    def slowly() -> Iterator[bytes]:
        yield body[:1000]
        time.sleep(1.0)
        yield body[1000:]

    with ThreadPoolExecutor(MAX_UPLOADS) as pool:
        held = [
            pool.submit(origin.post, f"/admin/publish?model=held-{i}", content=slowly()) for i in range(MAX_UPLOADS)
        ]
        _until(lambda: len(list(origin.uploads.iterdir())) == MAX_UPLOADS, 5)
        refused = origin.post("/admin/publish?model=held-out", content=body)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
        assert [one.result().status_code for one in held] == [200] * MAX_UPLOADS
    assert list(origin.uploads.iterdir()) == []


def test_the_admin_document_is_behind_the_token_and_true(origin: Origin) -> None:
    assert httpx.get(f"{origin.admin}/openapi.json", trust_env=False).status_code == 401
    told = httpx.get(f"{origin.admin}/openapi.json", headers={"authorization": f"Bearer {TOKEN}"}, trust_env=False)
    document = told.json()
    OpenAPIV31SpecValidator(document).validate()
    assert document["paths"] == openapi.document("0")["paths"]
    words = {"Rollback": RollbackWords, "Retire": RetireWords, "Invalidate": InvalidateWords}
    for name, kind in words.items():
        assert set(document["components"]["schemas"][name]["properties"]) == set(kind.__struct_fields__)
    query = {p["name"] for p in document["paths"]["/admin/publish"]["post"]["parameters"]}
    assert query == set(PublishWords.__struct_fields__)
    assert {p["name"] for p in document["paths"]["/admin/publish"]["post"]["parameters"] if p["required"]} == {"model"}


def test_every_admin_route_is_in_the_document_and_answers_as_it_says(origin: Origin) -> None:
    admin: Any = object.__new__(Admin)
    served = {(m.lower(), r.path) for r in admin.app().routes for m in r.methods if m != "HEAD"}
    assert served == {(m, path) for path, item in openapi.document("0")["paths"].items() for m in item}
    fits(origin.post("/admin/publish?model=documented", content=mlp_bytes(51)), "Released")
    fits(origin.post("/admin/publish?model=documented&wait=true", content=mlp_bytes(52)), "Released")
    fits(origin.post("/admin/rollback", json={"model": "documented", "wait": True, "timeout_s": 1}), "Released")
    fits(origin.post("/admin/retire", json={"model": "documented"}), "Released")
    scopes = [{"kind": "tag", "value": "t"}]
    fits(origin.post("/admin/invalidate", json={"scopes": scopes, "wait": True}), "Invalidated")
    for path, status in (("/admin/rollback", 400), ("/admin/publish", 400)):
        answer = origin.post(path, content=b"{")
        assert answer.status_code == status and set(answer.json()) == {"error"}


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
