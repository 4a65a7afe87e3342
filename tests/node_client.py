"""Asks a node for predictions as its clients do: in binary with the stock client of the protocol, in JSON by hand.

Arrays are numpy's own, bfloat16 is ml_dtypes', and text is `str`. It must not know how the node encodes anything.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import httpx
import numpy as np
import tritonclient.http as triton

from inference.datatypes import DATATYPES
from processes.ports import LOOPBACK

Arrays = dict[str, np.ndarray[Any, Any]]
_DTYPES: Final = {d.name: np.dtype(d.dtype) for d in DATATYPES}


class AskFailed(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status} {message}"[:300])
        self.status = status


class NodeClient:
    def __init__(self, port: int) -> None:
        self.http = httpx.Client(base_url=f"http://{LOOPBACK}:{port}", trust_env=False, timeout=30)
        self._triton = triton.InferenceServerClient(f"{LOOPBACK}:{port}")

    def close(self) -> None:
        self._triton.close()
        self.http.close()

    def await_ready(self, model: str, seconds: float) -> str:
        """Empty, or why it never was."""
        end = time.monotonic() + seconds
        while (answer := self.http.get(f"/v2/models/{model}/ready")).status_code != 200:
            if time.monotonic() > end:
                return f"not ready in {seconds:g} s: {answer.text[:200]}"
            time.sleep(0.01)
        return ""

    def described(self, model: str) -> dict[str, Any]:
        said: dict[str, Any] = self.http.get(f"/v2/models/{model}").json()
        return said

    def signature(self, model: str) -> tuple[dict[str, str], dict[str, str]]:
        """Inputs and outputs → datatypes."""
        said = self.described(model)
        inputs, outputs = ({t["name"]: t["datatype"] for t in said[side]} for side in ("inputs", "outputs"))
        return inputs, outputs

    def ask_binary(self, model: str, inputs: Arrays, datatypes: Mapping[str, str], outputs: Sequence[str]) -> Arrays:
        tensors = [
            # A copy, because the serializer takes an array's bytes as they lie.
            triton.InferInput(name, list(array.shape), datatypes[name]).set_data_from_numpy(np.array(array, order="C"))
            for name, array in inputs.items()
        ]
        try:
            answer = self._triton.infer(model, tensors, outputs=[triton.InferRequestedOutput(name) for name in outputs])
        except triton.InferenceServerException as error:
            raise AskFailed(int(error.status() or 0), f"in binary: {error.message()}") from None
        return {name: _text(answer.as_numpy(name)) for name in outputs}

    def ask_json(self, model: str, inputs: Arrays, datatypes: Mapping[str, str]) -> Arrays:
        tensors = ",".join(
            f'{{"name":{json.dumps(name)},"shape":{list(array.shape)},"datatype":"{datatypes[name]}",'
            f'"data":[{",".join(map(_spelled, array.ravel().tolist()))}]}}'
            for name, array in inputs.items()
        )
        answer = self.http.post(f"/v2/models/{model}/infer", content=f'{{"inputs":[{tensors}]}}'.encode())
        if answer.status_code != 200:
            raise AskFailed(answer.status_code, f"in JSON: {answer.text}")
        return {each["name"]: _of_json(each) for each in answer.json()["outputs"]}


def texts(flat: Sequence[str], shape: Sequence[int]) -> np.ndarray[Any, Any]:
    array = np.empty(len(flat), object)
    array[:] = flat
    return array.reshape(shape)


def _text(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array if array.dtype.kind != "O" else texts([each.decode() for each in array.ravel()], array.shape)


def _spelled(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return "null" if math.isnan(value) else "1e999" if value > 0 else "-1e999"
    return json.dumps(value)


def _of_json(output: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    flat, dtype = list(_flat(output["data"])), _DTYPES[output["datatype"]]
    if dtype.kind == "O":
        return texts(flat, output["shape"])
    return np.array([math.nan if v is None else v for v in flat], dtype).reshape(output["shape"])


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, list):
        for each in values:
            yield from _flat(each)
    else:
        yield values
