"""An edge's way to the origin carries every tensor as its bits: what comes back is what would have been computed here."""

from __future__ import annotations

from pathlib import Path

import httpx
import numpy as np
import pytest

from edge_node.serving.origin_client import OriginClient
from inference.datatypes import BY_NAME
from inference.deadlines import Deadline
from inference.packed import unpack
from mlcdn.local_stack.running import RunningStack
from origin.hosting import Hosting
from origin.routes import app
from schemas.errors import BadTensor
from tests import models
from tests.oip_node import array
from tests.service.test_hosting import Scene, hosted

NAN_OF_ITS_OWN = np.frombuffer(b"\x01\x00\xc0\x7f\x00\x00\x80\x3f", np.float32).reshape(1, 2)


@pytest.fixture
def scene(stack: RunningStack, tmp_path: Path) -> Scene:
    return Scene(stack, tmp_path)


@pytest.mark.parametrize("datatype", ["BF16", "BYTES", "FP32", "BOOL"])
def test_a_tensor_goes_to_the_origin_and_back_bit_for_bit(scene: Scene, datatype: str) -> None:
    kind = BY_NAME[datatype].onnx
    artifact = scene.upload(models.identity_bytes(kind, ["N", 2]))
    sent = NAN_OF_ITS_OWN if datatype == "FP32" else array(datatype)

    async def act(hosting: Hosting) -> None:
        await scene.trust()
        await scene.release(1, artifact)
        scene.told(hosting)
        await hosted(hosting, artifact.sha256)
        there = hosting.find("far").model
        client = OriginClient("http://origin", transport=httpx.ASGITransport(app(hosting, 2**20)))
        try:
            packed = await client.infer("far", artifact.sha256, {"x": sent}, there.inputs, None, Deadline.after(5))
            (output,) = unpack(packed)
            assert (output.name, output.datatype, output.shape) == ("y", datatype, sent.shape)
            got = output.array
            assert got.tolist() == sent.tolist() if datatype == "BYTES" else got.tobytes() == sent.tobytes()
            with pytest.raises(BadTensor, match="missing"):
                await client.infer("far", artifact.sha256, {}, there.inputs, None, Deadline.after(5))
        finally:
            await client.close()

    scene.play(act)
