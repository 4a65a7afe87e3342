"""The worker's HTTP: paths, bodies, headers, and the one place where an error becomes a status.

    POST /predict  /batch_predict                                  plain doors
    GET  /v2  /v2/health/live|ready  /v2/models/M[/versions/V][/ready]   Open Inference Protocol v2
    POST /v2/models/M[/versions/V]/infer
    GET  /health  /metrics

Where a model has several outputs, `/predict` answers the first as `prediction` and all of them by name as `outputs`:
a classifier's label and its probabilities.

Laws: an error is `{"error": "…"}` with the status that its class says, without traces, paths or addresses; a body is
read once, within a limit and a time; the fence is read before the body.

It must not know tiers, sessions or the log.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib.metadata import version as installed_version
from typing import Any, Final, Protocol

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from edge_node.serving import answers
from edge_node.serving.controls import Consulted, controls_of
from edge_node.serving.gate import Gate, Note, note
from edge_node.serving.model_slot import Slots
from edge_node.serving.predict import Answer, Predictor
from edge_node.serving.reporter import Identity
from edge_node.serving.rows import Rows
from edge_node.serving.served import Served
from inference import protocol as oip
from schemas.errors import BadInput, BadTensor, MlcdnError, NotFound
from schemas.events import ModelRef

BODY_TIMEOUT_S: Final = 10.0
_JSON: Final = "application/json"
_BINARY: Final = "application/octet-stream"
_PREDICT = msgspec.json.Decoder(oip.PredictRequest)
_BATCH = msgspec.json.Decoder(oip.BatchPredictRequest)

log = structlog.get_logger()


class State(Protocol):
    """What the routes ask of the worker."""

    @property
    def ready(self) -> bool: ...

    @property
    def draining(self) -> bool: ...

    async def health(self) -> dict[str, Any]: ...

    def metrics(self) -> tuple[bytes, str]: ...


class Limits(msgspec.Struct, frozen=True):
    body_bytes: int
    batch_rows: int


class Doors:
    """The endpoints. Each turns a request into arrays, asks the predictor, and words the answer."""

    def __init__(self, state: State, slots: Slots, predictor: Predictor, identity: Identity, limits: Limits) -> None:
        self._state, self._slots, self._predictor = state, slots, predictor
        self._identity, self._limits = identity, limits

    async def predict(self, request: Request) -> Response:
        noted, controls = note(request.scope), controls_of(request.headers, self._predictor.now())
        asked = oip.parse(await self._body(request, noted), _PREDICT)
        served = self._meant(asked.model, noted)
        spec = _only_input(served)
        answers.check_json(served)
        answer = await self._predictor.predict(served, {spec.name: oip.row_of(spec, asked.features)}, None, controls)
        _note(noted, answer)
        body = answers.predict_answer(served, answer, self._identity.region)
        return _whole(body, answers.answer_headers(served, answer, len(body)))

    async def batch_predict(self, request: Request) -> Response:
        noted, controls = note(request.scope), controls_of(request.headers, self._predictor.now())
        asked = oip.parse(await self._body(request, noted), _BATCH)
        served = self._meant(asked.model, noted)
        if not 0 < len(asked.features) <= self._limits.batch_rows:
            raise BadInput(f"features has {len(asked.features)} rows; a batch has 1 to {self._limits.batch_rows}")
        spec = _only_input(served)
        answers.check_json(served)
        rows = [{spec.name: _row(spec, features, i)} for i, features in enumerate(asked.features)]
        found = await self._predictor.predict_rows(served, rows, controls)
        computed = [a for a in found if not a.cached]
        _note(noted, computed[0] if computed else found[0])
        predictions = [oip.prediction_of(a.body)[0] for a in found]
        tail = {"count": len(found), "cached": [a.cached for a in found], "edge_region": self._identity.region}
        tail |= {"model": served.name, "version": served.wanted.version, "digest": served.digest}
        body = b'{"predictions":[' + b",".join(predictions) + b"]," + msgspec.json.encode(tail)[1:]
        return _whole(body, _batch_headers(served, found) + answers.body_headers(len(body)))

    async def infer(self, request: Request) -> Response:
        noted, controls = note(request.scope), controls_of(request.headers, self._predictor.now())
        json_length = request.headers.get("inference-header-content-length")
        body = await self._body(request, noted, binary=json_length is not None)
        served = self._named(request)
        noted.model = _ref(served)
        asked, binary = oip.parse_infer(body, json_length)
        oip.check_datatypes(asked, served.inputs)
        inputs = oip.tensors_of(asked, binary)
        if list(inputs) == [""]:
            # Our client does not ask for the signature first: its one tensor is the model's one input.
            inputs = {_only_input(served).name: inputs[""]}
        if any(a.shape and a.shape[0] > self._limits.batch_rows for a in inputs.values()):
            raise BadInput(f"a request has at most {self._limits.batch_rows} rows")
        as_binary = oip.binary_outputs(asked, served.outputs)
        answer = await self._predictor.predict(served, inputs, asked.output_names, controls, asked.meaning)
        _note(noted, answer)
        if not as_binary:
            body = answers.infer_answer(served, answer.body, asked.id)
            return _whole(body, answers.answer_headers(served, answer, len(body)))
        body, head = oip.binary_answer(served.name, served.wanted.version, asked.id, answer.body, as_binary)
        headers = answers.answer_headers(served, answer, len(body), answers.BINARY)
        return _whole(body, [*headers, (b"inference-header-content-length", b"%d" % head)])

    async def model(self, request: Request) -> Response:
        served = self._named(request)
        described = {
            "name": served.name,
            "versions": [served.wanted.version],
            "platform": "onnxruntime_onnx",
            "inputs": [_described(t) for t in served.inputs],
            "outputs": [_described(t) for t in served.outputs],
        }
        return _json(described, headers=answers.model_headers(served))

    async def model_ready(self, request: Request) -> Response:
        served = self._named(request)
        return _json({"name": served.name, "ready": True}, headers=answers.model_headers(served))

    async def server(self, _: Request) -> Response:
        return _json({"name": "mlcdn", "version": installed_version("mlcdn"), "extensions": ["binary_tensor_data"]})

    async def live(self, _: Request) -> Response:
        return _json({"live": True})

    async def ready(self, _: Request) -> Response:
        ready = self._state.ready and not self._state.draining
        return _json({"ready": ready}, 200 if ready else 503)

    async def health(self, _: Request) -> Response:
        return _json(await self._state.health())

    async def metrics(self, _: Request) -> Response:
        # Merging the files of several workers reads each of them.
        text, media_type = await asyncio.to_thread(self._state.metrics)
        return Response(text, media_type=media_type)

    def _meant(self, name: str | None, noted: Note) -> Served:
        served = self._slots.meant(name).serving
        noted.model = _ref(served)
        return served

    def _named(self, request: Request) -> Served:
        served = self._slots.get(request.path_params["model"]).serving
        version = request.path_params.get("version")
        if version is not None and version != served.wanted.version:
            raise NotFound(f"model {served.name} is served in version {served.wanted.version}")
        return served

    async def _body(self, request: Request, noted: Note, *, binary: bool = False) -> bytes:
        kind = request.headers.get("content-type", _JSON).partition(";")[0].strip().lower()
        if kind != _JSON and not kind.endswith("+json") and not (binary and kind == _BINARY):
            raise HTTPException(415, f"the body must be {_JSON}")
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise HTTPException(415, "the body must not be compressed")
        limit = self._limits.body_bytes
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise HTTPException(413, f"the body is larger than {limit} bytes", {"connection": "close"})
        except TimeoutError:
            raise HTTPException(408, "the body did not arrive in time", {"connection": "close"}) from None
        noted.request_bytes = len(body)
        return bytes(body)


def build_app(doors: Doors, state: State, rows: Rows, identity: Identity) -> Starlette:
    endpoints: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("POST", "/predict", doors.predict),
        ("POST", "/batch_predict", doors.batch_predict),
        ("GET", "/v2", doors.server),
        ("GET", "/v2/health/live", doors.live),
        ("GET", "/v2/health/ready", doors.ready),
        ("GET", "/health", doors.health),
        ("GET", "/metrics", doors.metrics),
    ]
    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        endpoints += [
            ("GET", prefix, doors.model),
            ("GET", f"{prefix}/ready", doors.model_ready),
            ("POST", f"{prefix}/infer", doors.infer),
        ]
    always = ((b"mlcdn-region", identity.region.encode()), (b"mlcdn-node", identity.node.encode()))
    app = Starlette(
        routes=[Route(path, endpoint, methods=[method]) for method, path, endpoint in endpoints],
        middleware=[Middleware(Gate, rows=rows, draining=lambda: state.draining, headers=always)],
        exception_handlers={
            MlcdnError: _on_ours,
            HTTPException: _on_http,
            ClientDisconnect: _on_disconnect,
            Exception: _on_bug,
        },
    )
    app.router.redirect_slashes = False
    return app


async def _on_ours(_: Request, error: Exception) -> Response:
    assert isinstance(error, MlcdnError)
    status, headers, body = answers.error_answer(error)
    if status >= 500:
        log.warning("request_failed", status=status, cause=str(error))
    return _whole(body, headers, status)


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    body = answers.error_body(error.detail)
    said = [(name.encode(), value.encode("latin-1")) for name, value in (error.headers or {}).items()]
    return _whole(body, said + answers.body_headers(len(body)), error.status_code)


async def _on_disconnect(_: Request, __: Exception) -> Response:
    return _json({"error": "the client closed the connection before its body was whole"}, 400)


async def _on_bug(_: Request, __: Exception) -> Response:
    # Starlette raises it again after this, and uvicorn logs the trace.
    return _json({"error": "internal error"}, 500)


def _json(value: Any, status: int = 200, headers: answers.Headers | None = None) -> Response:
    body = msgspec.json.encode(value)
    return _whole(body, [*(headers or ()), *answers.body_headers(len(body))], status)


def _whole(body: bytes, headers: answers.Headers, status: int = 200) -> Response:
    """With these headers and no others."""
    response = Response(body, status)
    response.raw_headers = headers
    return response


def _row(spec: Any, features: msgspec.Raw, index: int) -> oip.Array:
    try:
        return oip.row_of(spec, features)
    except BadTensor as error:
        raise BadTensor(f"row {index}: {error}") from None


def _only_input(served: Served) -> Any:
    required = [spec for spec in served.inputs if not spec.optional]
    if len(required) != 1:
        named = [spec.name for spec in served.inputs]
        raise BadInput(f"model {served.name} has inputs {named}: name them, in /v2/models/{served.name}/infer")
    return required[0]


def _described(spec: Any) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": spec.shape}


def _ref(served: Served) -> ModelRef:
    return ModelRef(name=served.name, version=served.wanted.version, digest=served.digest)


def _note(noted: Note, answer: Answer) -> None:
    noted.tier, noted.key = answer.tier, answer.key


def _batch_headers(served: Served, found: list[Answer]) -> answers.Headers:
    hits = sum(a.cached for a in found)
    whole = hits == len(found)
    forward = "partial" if hits else found[0].trail[-1].forward
    said = Consulted("edge", whole, forward, detail=f"{hits} of {len(found)} rows")
    return [
        *answers.model_headers(served),
        (b"cache-status", str(said).encode()),
        (b"age", b"%d" % max(a.age_s for a in found)),
        (b"mlcdn-position", found[0].position.encode()),
    ]
