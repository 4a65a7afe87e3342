"""The doors to predictions: each turns a request into arrays, asks the predictor, and words the answer.

    /predict         one row of the only required input      /batch_predict   rows, each looked up by itself
    /v2/…/infer      Open Inference Protocol v2, JSON or binary, in any mixture

Laws: the fence is read before the body; one release answers a request, and a path with a version says which; what could
not be worded is refused before it is run; each request that names a
model is noted once, however it ends.

It must not know tiers, sessions, the log, or which path leads here.
"""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from edge_node.serving import answers
from edge_node.serving.asking import Asking
from edge_node.serving.bodies import JSON_LENGTH, read_body, whole
from edge_node.serving.choosing import chosen
from edge_node.serving.controls import Consulted, Controls, controls_of
from edge_node.serving.gate import Note, note
from edge_node.serving.model_slot import ModelSlot, Slots
from edge_node.serving.predict import Answer
from edge_node.serving.reporter import Identity
from edge_node.serving.repository import named
from edge_node.serving.served import Served
from inference import protocol as oip
from inference.datatypes import TensorSpec
from inference.packed import prediction_of
from schemas.errors import BadInput, BadTensor
from schemas.events import ModelRef

_PREDICT = msgspec.json.Decoder(oip.PredictRequest)
Inputs = dict[str, oip.Array]
_BATCH = msgspec.json.Decoder(oip.BatchPredictRequest)


class Limits(msgspec.Struct, frozen=True):
    body_bytes: int
    batch_rows: int
    gateway: bool = False


class PredictionDoors:
    def __init__(self, slots: Slots, asking: Asking, identity: Identity, limits: Limits) -> None:
        self._slots, self._asking, self._identity, self._limits = slots, asking, identity, limits

    async def predict(self, request: Request) -> Response:
        noted = note(request.scope)
        controls = self._controls(request)
        asked = oip.parse(await self._body(request, noted), _PREDICT)
        slot = self._meant(asked.model, noted)

        def read(served: Served) -> Inputs:
            spec = _only_input(served)
            answers.check_json(served)
            return {spec.name: oip.row_of(spec, asked.features)}

        served, row = chosen(slot, controls.cohort, read, lambda by, row: [by.key_of(row, None, None, controls.tenant)])
        _named(noted, served)
        answer = await self._asking.predict(served, row, None, controls)
        _answered(noted, answer)
        body = answers.predict_answer(served, answer, self._identity.region)
        return whole(body, answers.answer_headers(served, answer, len(body)))

    async def batch_predict(self, request: Request) -> Response:
        noted = note(request.scope)
        controls = self._controls(request)
        asked = oip.parse(await self._body(request, noted), _BATCH)
        slot = self._meant(asked.model, noted)
        if not 0 < len(asked.features) <= self._limits.batch_rows:
            raise BadInput(f"features has {len(asked.features)} rows; a batch has 1 to {self._limits.batch_rows}")

        def read(served: Served) -> list[Inputs]:
            spec = _only_input(served)
            answers.check_json(served)
            return [{spec.name: _row(spec, features, i)} for i, features in enumerate(asked.features)]

        served, rows = chosen(
            slot, controls.cohort, read, lambda by, rows: [by.key_of(r, None, None, controls.tenant) for r in rows]
        )
        _named(noted, served)
        found = await self._asking.predict_rows(served, rows, controls)
        computed = [a for a in found if not a.cached]
        _answered(noted, computed[0] if computed else found[0])
        predictions = [prediction_of(a.body)[0] for a in found]
        tail = {"count": len(found), "cached": [a.cached for a in found], "edge_region": self._identity.region}
        tail |= {"model": served.name, "version": served.wanted.version, "digest": served.digest}
        body = b'{"predictions":[' + b",".join(predictions) + b"]," + msgspec.json.encode(tail)[1:]
        return whole(body, _batch_headers(served, found) + answers.body_headers(len(body)))

    async def infer(self, request: Request) -> Response:
        noted = note(request.scope)
        controls = self._controls(request)
        body = await self._body(request, noted)
        served = named(self._slots, request)
        _named(noted, served)
        asked, binary = oip.parse_infer(body, request.headers.get(JSON_LENGTH))

        def read(served: Served) -> Inputs:
            oip.check_datatypes(asked, served.inputs)
            inputs = oip.tensors_of(asked, binary)
            if list(inputs) == [""]:
                # Our client does not ask for the signature first: its one tensor is the model's one input.
                inputs = {_only_input(served).name: inputs[""]}
            return inputs

        if "version" in request.path_params:
            inputs = read(served)
        else:
            slot = self._slots.get(served.name)
            names, meaning = asked.output_names, asked.meaning
            served, inputs = chosen(
                slot, controls.cohort, read, lambda by, inputs: [by.key_of(inputs, names, meaning, controls.tenant)]
            )
            _named(noted, served)
        # What leads a tensor of another model is no number of rows: a fixed 10,000 is a valid signature.
        has_rows = served.wanted.released.batching.batchable
        if has_rows and any(array.shape and array.shape[0] > self._limits.batch_rows for array in inputs.values()):
            raise BadInput(f"a request has at most {self._limits.batch_rows} rows")
        as_binary = oip.binary_outputs(asked, served.outputs)
        answer = await self._asking.predict(served, inputs, asked.output_names, controls, asked.meaning)
        _answered(noted, answer)
        return _infer_answer(served, answer, asked.id, as_binary)

    def _controls(self, request: Request) -> Controls:
        return controls_of(request.scope["headers"], self._asking.now(), gateway=self._limits.gateway)

    async def _body(self, request: Request, noted: Note) -> bytes:
        body = await read_body(request, self._limits.body_bytes)
        noted.request_bytes = len(body)
        return body

    def _meant(self, name: str | None, noted: Note) -> ModelSlot:
        slot = self._slots.meant(name)
        _named(noted, slot.serving)
        return slot


def _named(noted: Note, served: Served) -> None:
    noted.model = ModelRef(name=served.name, version=served.wanted.version, digest=served.digest)


def _answered(noted: Note, answer: Answer) -> None:
    noted.tier, noted.key = answer.tier, answer.key


def _infer_answer(served: Served, answer: Answer, request_id: str | None, as_binary: frozenset[str]) -> Response:
    if not as_binary:
        body = answers.infer_answer(served, answer.body, request_id)
        return whole(body, answers.answer_headers(served, answer, len(body)))
    return whole(*answers.binary_answer(served, answer, request_id, as_binary))


def _row(spec: TensorSpec, features: msgspec.Raw, index: int) -> oip.Array:
    try:
        return oip.row_of(spec, features)
    except BadTensor as error:
        raise BadTensor(f"row {index}: {error}") from None


def _only_input(served: Served) -> TensorSpec:
    required = [spec for spec in served.inputs if not spec.optional]
    if len(required) != 1:
        names = [spec.name for spec in served.inputs]
        raise BadInput(f"model {served.name} has inputs {names}: name them, in /v2/models/{served.name}/infer")
    return required[0]


def _batch_headers(served: Served, found: list[Answer]) -> answers.Headers:
    hits = sum(a.cached for a in found)
    all_hits = hits == len(found)
    forward = "partial" if hits else found[0].trail[-1].forward
    said = Consulted("edge", all_hits, forward, detail=f"{hits} of {len(found)} rows")
    return [
        *answers.model_headers(served),
        (b"cache-status", str(said).encode()),
        (b"age", b"%d" % max(a.age_s for a in found)),
        (b"mlcdn-position", found[0].position.encode()),
    ]
