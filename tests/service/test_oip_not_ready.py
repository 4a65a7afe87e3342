"""A model that cannot be served here is 503 at every door, with its reason, and in the index; the others are served."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests import models
from tests.oip_node import OipNode


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OipNode]:
    made = OipNode(tmp_path_factory.mktemp("oip"))
    made.node.release(models.mlp_bytes(3), model="spoilt", file=b"not what was released")
    with made as running:
        yield running
        assert "Traceback" not in running.log(), running.log()


@pytest.mark.parametrize("path", ["", "/ready", "/config", "/stats", "/versions/v1", "/versions/v1/ready"])
def test_what_is_asked_of_it_is_503(node: OipNode, path: str) -> None:
    answer = node.http.get(f"/v2/models/spoilt{path}")
    assert answer.status_code == 503 and "spoilt is not served here" in answer.json()["error"], answer.text
    assert answer.headers["retry-after"] == "1" and str(node.directory) not in answer.text


def test_predictions_are_503(node: OipNode) -> None:
    tensor = {"name": "features", "datatype": "FP32", "shape": [1, 32], "data": [0.0] * 32}
    assert node.infer("spoilt", [tensor]).status_code == 503
    assert node.http.post("/predict", json={"model": "spoilt", "features": [0.0] * 32}).status_code == 503
    assert node.infer("digits", [tensor]).status_code == 200


def test_stock_clients_see_it_as_not_ready(node: OipNode) -> None:
    with triton.InferenceServerClient(node.address) as client:
        assert client.is_server_ready() and client.is_model_ready("digits") and not client.is_model_ready("spoilt")
        with pytest.raises(InferenceServerException, match="spoilt is not served here") as caught:
            client.get_model_metadata("spoilt")
        assert caught.value.status() == "503"


def test_the_index_says_why_and_can_leave_it_out(node: OipNode) -> None:
    (entry,) = [e for e in node.http.post("/v2/repository/index").json() if e["name"] == "spoilt"]
    assert entry["state"] == "UNAVAILABLE" and "SHA-256" in entry["reason"]
    ready = node.http.post("/v2/repository/index", json={"ready": True}).json()
    assert ready and all(e["state"] == "READY" and e["name"] != "spoilt" for e in ready)
