"""The words of an answer, as bytes: every door of a worker says them alike. PURE.

    infer_answer     POST /v2/models/M/infer, in JSON        answer_headers   what both say of where it came from
    predict_answer   POST /predict                           error_answer     any error of ours, with its status

Laws:
- `answer_headers` is complete and in its final order, but for what the server, the gate and a compression add.
- An error is `{"error": "…"}` with the status that its class says. Where a part of ours stands is for the log, not for
  callers: no traces, paths or addresses.

It must not know Starlette, sockets, or how an answer was found.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import msgspec

from edge_node.serving.controls import Consulted, cache_status
from edge_node.serving.predict import Answer
from edge_node.serving.served import Served
from inference import oip_answers
from inference.packed import outputs_json, prediction_of
from schemas.errors import BadInput, MlcdnError, Overloaded, Unreachable

Headers = list[tuple[bytes, bytes]]
JSON: Final = b"application/json"
BINARY: Final = b"application/octet-stream"
JSON_LENGTH: Final = b"inference-header-content-length"
# From this size on an answer may be compressed for who accepts it, and says that it depends on that.
COMPRESSIBLE_BYTES: Final = 1_024
_json = msgspec.json.Encoder().encode


def infer_answer(served: Served, packed: bytes, request_id: str | None) -> bytes:
    """BadInput where an output has no JSON form: `check_json` says so before a run."""
    return oip_answers.infer_answer(served.name, served.wanted.version, request_id, outputs_json(packed))


def binary_answer(
    served: Served, answer: Answer, request_id: str | None, names: frozenset[str]
) -> tuple[bytes, Headers]:
    """With the outputs `names` as binary data."""
    body, head = oip_answers.binary_answer(served.name, served.wanted.version, request_id, answer.body, names)
    return body, [*answer_headers(served, answer, len(body), BINARY), (JSON_LENGTH, b"%d" % head)]


def predict_answer(served: Served, answer: Answer, region: str) -> bytes:
    """A model's first output, and where it has several all of them by name: a classifier's label and probabilities."""
    prediction, outputs = prediction_of(answer.body)
    named = b',"outputs":' + outputs if outputs else b""
    tail = {"cached": answer.cached, "tier": answer.tier, "edge_region": region}
    tail |= {"model": served.name, "version": served.wanted.version, "digest": served.digest}
    return b'{"prediction":%b%b,%b' % (prediction, named, _json(tail)[1:])


def check_json(served: Served) -> None:
    """BadInput where the plain doors could not word what the model answers."""
    for spec in served.outputs:
        if spec.datatype == "BF16":
            raise BadInput(
                f"output {spec.name!r} is BF16, which has no JSON form: "
                f"ask /v2/models/{served.name}/infer for binary data"
            )


def answer_headers(served: Served, answer: Answer, length: int, content_type: bytes = JSON) -> Headers:
    """`length` is the body's."""
    headers = [
        *model_headers(served),
        (b"cache-status", _cache_status(answer.trail)),
        (b"age", b"%d" % answer.age_s),
        (b"mlcdn-position", answer.position.encode("latin-1")),
        (b"mlcdn-cache-key", answer.key.hex().encode()),
    ]
    return headers + body_headers(length, content_type)


def answer_head(
    model_lines: bytes, trail: tuple[Consulted, ...], age_s: int, position: str, key: bytes, length: int
) -> bytes:
    """`answer_headers` of a JSON answer as they are written, for a door that makes 50,000 a second of them.

    `model_lines` is `model_headers`, written.
    """
    return b"%bcache-status: %b\r\nage: %d\r\nmlcdn-position: %b\r\nmlcdn-cache-key: %b\r\n%b" % (
        model_lines,
        _cache_status(trail),
        age_s,
        position.encode("latin-1"),
        key.hex().encode(),
        _body_lines(length),
    )


@lru_cache(4_096)
def _cache_status(trail: tuple[Consulted, ...]) -> bytes:
    return cache_status(trail).encode("latin-1")


@lru_cache(4_096)
def _body_lines(length: int) -> bytes:
    return written(body_headers(length))


def body_headers(length: int, content_type: bytes = JSON) -> Headers:
    headers = [(b"content-length", b"%d" % length), (b"content-type", content_type)]
    if length >= COMPRESSIBLE_BYTES:
        headers.append((b"vary", b"accept-encoding"))
    return headers


def smaller_headers(headers: Headers, coding: str, length: int) -> Headers:
    """`headers` of a body that was made smaller."""
    kept = [header for header in headers if header[0] != b"content-length"]
    return [*kept, (b"content-encoding", coding.encode()), (b"content-length", b"%d" % length)]


def model_headers(served: Served) -> Headers:
    return _model_headers(served.name, served.wanted.version, served.channel, served.digest).copy()


@lru_cache(256)
def _model_headers(name: str, version: str, channel: str, digest: str) -> Headers:
    # A version may be any printable text; a header takes Latin-1.
    plain = version.encode("ascii", "backslashreplace").decode()
    return [(b"mlcdn-model", f"{name};{plain};{channel}".encode("latin-1")), (b"mlcdn-digest", digest.encode())]


def error_answer(error: MlcdnError) -> tuple[int, Headers, bytes]:
    headers: Headers = []
    if isinstance(error, Overloaded):
        headers.append((b"retry-after", b"%d" % max(1, round(error.retry_after_s))))
    elif error.status == 503:
        headers.append((b"retry-after", b"1"))
    text = f"the {error.part} does not answer" if isinstance(error, Unreachable) else str(error)
    body = error_body(text)
    return error.status, headers + body_headers(len(body)), body


def error_body(text: str) -> bytes:
    # A message quotes what the caller sent, which need not be Unicode.
    return _json({"error": text.encode("utf-8", "backslashreplace").decode()})


def written(headers: Headers) -> bytes:
    """As they stand in an answer's head."""
    return b"".join([b"%b: %b\r\n" % header for header in headers])
