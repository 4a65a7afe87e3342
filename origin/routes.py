"""The origin's open port: inference for models placed here, and the schemas of the log, read-only.

POST /v2/models/{model}/infer        Open Inference Protocol v2, JSON or binary; the answer names its digest
GET  /v2/models/{model}              metadata
GET  /schemas/ids/{id} · /subjects · /subjects/{s}/versions · /subjects/{s}/versions/{v|latest}
                                      the read-only part of Confluent's schema registry that tools ask for
GET  /health
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from inference import protocol
from inference.oip_answers import binary_answer
from inference.packed import pack_outputs
from origin.hosting import Hosted, Hosting
from schemas import codec, names
from schemas.errors import BadInput, MlcdnError, NotFound, Overloaded
from schemas.topics import TOPICS

_JSON_LENGTH = "inference-header-content-length"
# Asked: the release that is meant. Said: the one that answered.
_DIGEST = "mlcdn-digest"


def app(hosting: Hosting, max_body_bytes: int) -> Starlette:
    routes = _Routes(hosting, max_body_bytes)
    return Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/v2/models/{model}", routes.metadata),
            Route("/v2/models/{model}/infer", routes.infer, methods=["POST"]),
            Route("/schemas/ids/{id:int}", routes.schema),
            Route("/subjects", routes.subjects),
            Route("/subjects/{subject}/versions", routes.versions),
            Route("/subjects/{subject}/versions/{version}", routes.version),
        ],
        exception_handlers={MlcdnError: refused},
    )


async def refused(_: Request, error: Exception) -> Response:
    """One mapping from errors to answers; nothing but the error's own words leaves."""
    status = error.status if isinstance(error, MlcdnError) else 500
    headers = {"retry-after": f"{error.retry_after_s:g}"} if isinstance(error, Overloaded) else {}
    return answer({"error": str(error)}, status, headers)


def answer(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(document), status, headers, "application/json")


async def body_of(request: Request, max_bytes: int) -> bytes:
    """The whole body; 400 above the limit, found out before it is held."""
    whole = bytearray()
    async for part in request.stream():
        whole += part
        if len(whole) > max_bytes:
            raise BadInput(f"the body is over {max_bytes} bytes")
    return bytes(whole)


def subject_of(schema: codec.SchemaVersion) -> str:
    """TopicRecordNameStrategy's neighbour: the record's own name, since a kind may stand in several topics."""
    return f"mlcdn.{schema.kind}"


class _Routes:
    def __init__(self, hosting: Hosting, max_body_bytes: int) -> None:
        self._hosting, self._max_body_bytes = hosting, max_body_bytes

    async def health(self, _: Request) -> Response:
        hosted = self._hosting.models()
        return answer(
            {"ready": True, "models": {n: h.wanted.digest for n, h in hosted.items()}, "topics": list(TOPICS)}
        )

    async def metadata(self, request: Request) -> Response:
        hosted = self._asked(request)
        return answer(
            {
                "name": hosted.wanted.model,
                "versions": [hosted.wanted.version],
                "platform": "onnxruntime_onnx",
                "inputs": [_tensor(s) for s in hosted.model.inputs],
                "outputs": [_tensor(s) for s in hosted.model.outputs],
            },
            headers=_served(hosted),
        )

    async def infer(self, request: Request) -> Response:
        hosted = self._asked(request)
        body = await body_of(request, self._max_body_bytes)
        asked, binary = protocol.parse_infer(body, request.headers.get(_JSON_LENGTH))
        protocol.check_datatypes(asked, hosted.model.inputs)
        inputs = protocol.tensors_of(asked, binary)
        as_binary = protocol.binary_outputs(asked, hosted.model.outputs)
        found = await self._hosting.run(hosted, inputs, asked.output_names)
        packed = pack_outputs(found, hosted.model.outputs)
        whole, json_length = binary_answer(hosted.wanted.model, hosted.wanted.version, asked.id, packed, as_binary)
        if not as_binary:
            return Response(whole, headers=_served(hosted), media_type="application/json")
        headers = _served(hosted) | {_JSON_LENGTH: str(json_length)}
        return Response(whole, headers=headers, media_type="application/octet-stream")

    def _asked(self, request: Request) -> Hosted:
        digest = request.headers.get(_DIGEST)
        model = names.name(request.path_params["model"], "model")
        return self._hosting.find(model, names.digest(digest) if digest is not None else None)

    async def schema(self, request: Request) -> Response:
        found = codec.BY_ID.get(request.path_params["id"])
        if found is None:
            raise NotFound(f"no schema has the id {request.path_params['id']}")
        return answer({"schema": found.source, "schemaType": "AVRO"})

    async def subjects(self, _: Request) -> Response:
        return answer(sorted({subject_of(s) for s in codec.SCHEMAS}))

    async def versions(self, request: Request) -> Response:
        return answer([s.version for s in self._of(request)])

    async def version(self, request: Request) -> Response:
        known, asked = self._of(request), request.path_params["version"]
        found = known[-1] if asked == "latest" else next((s for s in known if str(s.version) == asked), None)
        if found is None:
            raise NotFound(f"{subject_of(known[0])} has no version {asked[:16]}")
        return answer(
            {"subject": subject_of(found), "version": found.version, "id": found.id, "schema": found.source},
        )

    def _of(self, request: Request) -> list[codec.SchemaVersion]:
        found = [s for s in codec.SCHEMAS if subject_of(s) == request.path_params["subject"]]
        if not found:
            raise NotFound(f"no subject {request.path_params['subject'][:80]!r}")
        return found


def _served(hosted: Hosted) -> dict[str, str]:
    wanted = hosted.wanted
    return {_DIGEST: wanted.digest, "mlcdn-model": f"{wanted.model};{wanted.version};{hosted.channel}"}


def _tensor(spec: Any) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}
