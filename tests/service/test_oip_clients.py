"""Stock clients, unchanged, against a real worker: what they send is understood, and what they get is the model's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.utils import InferenceServerException

from tests.oip_node import ALL, NUMBERS, OipNode, array, identity_name


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OipNode]:
    with OipNode(tmp_path_factory.mktemp("oip")) as running:
        yield running
        assert "Traceback" not in running.log(), running.log()


@pytest.fixture
def client(node: OipNode) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(node.address) as made:
        yield made


def tensor(module: Any, name: str, datatype: str, values: np.ndarray[Any, Any], *, binary: bool = True) -> Any:
    made = module.InferInput(name, list(values.shape), datatype)
    typed = values.view(ml_dtypes.bfloat16) if datatype == "BF16" else values
    return made.set_data_from_numpy(typed, binary_data=binary)


def bits(values: np.ndarray[Any, Any]) -> list[Any]:
    raw = values.view(np.uint16) if values.dtype == ml_dtypes.bfloat16 else values
    found: list[Any] = raw.tolist()
    return found


@pytest.mark.parametrize("datatype", ALL)
def test_every_datatype_goes_there_and_back_in_binary(client: triton.InferenceServerClient, datatype: str) -> None:
    sent = array(datatype)
    answer = client.infer(
        identity_name(datatype),
        [tensor(triton, "x", datatype, sent)],
        outputs=[triton.InferRequestedOutput("y", binary_data=True)],
        request_id="a-7",
    )
    said = answer.get_response()
    assert said["id"] == "a-7" and said["outputs"][0]["datatype"] == datatype and said["outputs"][0]["shape"] == [2, 2]
    got = answer.as_numpy("y")
    assert got.shape == sent.shape and bits(got) == bits(sent)


@pytest.mark.parametrize("datatype", [*(d for d in NUMBERS if d != "FP16"), "BOOL"])
def test_json_and_binary_in_any_mixture_are_one_entry(client: triton.InferenceServerClient, datatype: str) -> None:
    sent, answers = array(datatype), []
    for to, back in ((True, True), (True, False), (False, True), (False, False)):
        answer = client.infer(
            identity_name(datatype),
            [tensor(triton, "x", datatype, sent, binary=to)],
            outputs=[triton.InferRequestedOutput("y", binary_data=back)],
        )
        answers.append(bits(answer.as_numpy("y")))
    assert answers == [bits(sent)] * 4


@pytest.mark.parametrize("to", [None, "gzip", "deflate"])
@pytest.mark.parametrize("back", [None, "gzip", "deflate"])
def test_bodies_may_be_compressed_both_ways(
    client: triton.InferenceServerClient, to: str | None, back: str | None
) -> None:
    sent = np.zeros((60, 2), np.float64) + np.arange(60)[:, None]
    sent[0, 0] = len(to or "") + len(back or "") / 16
    answer = client.infer(
        "identity_fp64",
        [tensor(triton, "x", "FP64", sent)],
        request_compression_algorithm=to,
        response_compression_algorithm=back,
    )
    assert np.array_equal(answer.as_numpy("y"), sent)


def test_the_asynchronous_client_is_served_alike(node: OipNode) -> None:
    async def scenario() -> None:
        async with triton_aio.InferenceServerClient(node.address) as client:
            assert await client.is_server_live() and await client.is_server_ready()
            assert await client.is_model_ready("several")
            for datatype in ALL:
                sent = array(datatype, rows=3)
                answer = await client.infer(identity_name(datatype), [tensor(triton_aio, "x", datatype, sent)])
                assert bits(answer.as_numpy("y")) == bits(sent), datatype
            with pytest.raises(InferenceServerException, match="unknown input 'z'"):
                await client.infer("several", [tensor(triton_aio, "z", "FP32", array("FP32"))])

    asyncio.run(scenario())


def test_several_inputs_and_the_outputs_that_were_asked_for(client: triton.InferenceServerClient) -> None:
    a, b = array("FP32") / 4, np.full((2, 2), 0.5, np.float32)
    word = np.array([b"\xc3\xa9", b""], object)
    inputs = [tensor(triton, "a", "FP32", a), tensor(triton, "b", "FP32", b, binary=False)]
    inputs.append(tensor(triton, "word", "BYTES", word))
    both = client.infer("several", inputs)
    assert np.array_equal(both.as_numpy("total"), a + b) and both.as_numpy("echo").tolist() == word.tolist()
    mixed = client.infer(
        "several",
        [*inputs, tensor(triton, "bias", "FP32", np.array([1, 2], np.float32))],
        outputs=[
            triton.InferRequestedOutput("total", binary_data=True),
            triton.InferRequestedOutput("echo", binary_data=False),
        ],
    )
    assert np.array_equal(mixed.as_numpy("total"), a + b + np.array([1, 2], np.float32))
    assert [o["name"] for o in mixed.get_response()["outputs"]] == ["total", "echo"]
    assert mixed.get_response()["outputs"][1]["data"] == ["é", ""]
    only = client.infer("several", inputs, outputs=[triton.InferRequestedOutput("echo")])
    assert [o["name"] for o in only.get_response()["outputs"]] == ["echo"]


def test_no_rows_scalars_and_free_dimensions(client: triton.InferenceServerClient) -> None:
    for model, values in (
        ("identity_fp32", np.empty((0, 2), np.float32)),
        ("scalar", np.array(7.5, np.float32)),
        ("fixed", np.array([1, 2, 3], np.float32)),
        ("cube", np.arange(12).reshape(2, 3, 2)),
        ("cube", np.empty((2, 0, 2), np.int64)),
    ):
        datatype = "INT64" if values.dtype == np.int64 else "FP32"
        answer = client.infer(model, [tensor(triton, "x", datatype, values)])
        assert answer.get_response()["outputs"][0]["shape"] == list(values.shape), model
        assert bits(answer.as_numpy("y")) == bits(values), model


def test_no_inputs_any_rank_and_odd_names(client: triton.InferenceServerClient) -> None:
    assert client.infer("constant", []).as_numpy("y").tolist() == [1, 2]
    assert client.get_model_metadata("any_rank")["inputs"][0]["parameters"] == {"any_rank": True}
    for shape in ((), (3,), (1, 2, 3)):
        values = np.ones(shape, np.float32)
        assert client.infer("any_rank", [tensor(triton, "x", "FP32", values)]).as_numpy("y").shape == shape
    values = np.ones((1, 2), np.float32)
    for binary in (True, False):
        answer = client.infer("odd_names", [tensor(triton, 'a b/é"', "FP32", values, binary=binary)])
        assert np.array_equal(answer.as_numpy("ü"), values)
    assert client.get_model_metadata("odd_names")["inputs"][0]["name"] == 'a b/é"'


def test_what_is_asked_of_a_server_before_it_is_used(node: OipNode, client: triton.InferenceServerClient) -> None:
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("flowers")
    assert not client.is_model_ready("nothing")
    server = client.get_server_metadata()
    assert server["name"] == "mlcdn" and "binary_tensor_data" in server["extensions"]
    said = client.get_model_metadata("flowers")
    assert said["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}]
    assert said["outputs"][1] == {
        "name": "probabilities",
        "datatype": "FP32",
        "shape": [-1, 3],
        "parameters": {"labels": ["setosa", "versicolor", "virginica"]},
    }
    config = client.get_model_config("identity_int8")
    assert config["max_batch_size"] == 64 and config["input"][0]["data_type"] == "TYPE_INT8"
    assert config["input"][0]["dims"] == [2] and config["mlcdn"]["batching"]["batchable"]
    assert client.get_model_config("scalar")["max_batch_size"] == 0
    names = {entry["name"] for entry in client.get_model_repository_index()}
    assert {"digits", "flowers", "several"} <= names
    for act in (client.load_model, client.unload_model):
        with pytest.raises(InferenceServerException, match="the log decides"):
            act("flowers")


def test_statistics_are_counted(client: triton.InferenceServerClient) -> None:
    values = np.arange(30).reshape(3, 5, 2)
    for _ in range(2):
        client.infer("counted", [tensor(triton, "x", "INT64", values)])
    with pytest.raises(InferenceServerException):
        client.infer("counted", [tensor(triton, "x", "FP32", array("FP32"))])
    end = time.monotonic() + 10
    while True:
        (said,) = client.get_inference_statistics("counted")["model_stats"]
        stats = said["inference_stats"]
        if stats["success"]["count"] + stats["fail"]["count"] >= 3:
            break
        assert time.monotonic() < end, said
        time.sleep(0.05)
    counts = {what: stats[what]["count"] for what in ("success", "fail", "cache_hit", "cache_miss", "compute_infer")}
    assert counts == {"success": 2, "fail": 1, "cache_hit": 1, "cache_miss": 1, "compute_infer": 1}
    assert all(stats[what]["ns"] > 0 for what in counts)
    assert (said["name"], said["version"], said["execution_count"]) == ("counted", "v1", 1)
    assert said["last_inference"] > 1.6e12
    assert "counted" in {each["name"] for each in client.get_inference_statistics()["model_stats"]}


def test_the_version_before_the_live_one_is_served_to_who_names_it(
    node: OipNode, client: triton.InferenceServerClient
) -> None:
    row = [tensor(triton, "features", "FP32", np.ones((1, 32), np.float32))]
    first = client.infer("digits", row).as_numpy("scores")
    node.release_digits_again()
    end = time.monotonic() + 10
    while client.get_model_metadata("digits")["versions"] != ["v2", "v1"]:
        assert time.monotonic() < end
        time.sleep(0.05)
    live = client.infer("digits", row)
    assert live.get_response()["model_version"] == "v2" and not np.array_equal(live.as_numpy("scores"), first)
    before = client.infer("digits", row, model_version="v1")
    assert before.get_response()["model_version"] == "v1" and np.array_equal(before.as_numpy("scores"), first)
    with pytest.raises(InferenceServerException, match="served here: v2, v1"):
        client.infer("digits", row, model_version="v7")
    ready = client.get_model_repository_index()
    assert [(e["version"], e["state"]) for e in ready if e["name"] == "digits"] == [("v2", "READY"), ("v1", "READY")]


def test_what_is_not_served_is_refused_by_name(client: triton.InferenceServerClient) -> None:
    sent = [tensor(triton, "x", "FP32", array("FP32"))]
    with pytest.raises(InferenceServerException, match="sequences are not served"):
        client.infer("identity_fp32", sent, sequence_id=3, sequence_start=True)
    with pytest.raises(InferenceServerException, match="classification is not served"):
        client.infer("identity_fp32", sent, outputs=[triton.InferRequestedOutput("y", class_count=2)])
    shared = triton.InferInput("x", [2, 2], "FP32")
    shared.set_shared_memory("region", 16)
    with pytest.raises(InferenceServerException, match="shared memory is not served"):
        client.infer("identity_fp32", [shared])
    with pytest.raises(InferenceServerException, match="no such path"):
        client.get_system_shared_memory_status()
    with pytest.raises(InferenceServerException, match="BF16, which has no JSON form"):
        bf16 = [tensor(triton, "x", "BF16", array("BF16"))]
        client.infer("identity_bf16", bf16, outputs=[triton.InferRequestedOutput("y", binary_data=False)])
