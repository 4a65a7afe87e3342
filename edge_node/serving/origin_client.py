"""The way to the origin, for models that are placed there.

Laws:
- One connection pool, no redirects, no proxies of the environment, every attempt inside the caller's deadline.
- What the origin says no to is the caller's fault and keeps its status; what it does not answer is `Unreachable`.
- The release is asked for by its digest, and an answer counts only if it names that too: during a release the origin and
  an edge may disagree for a moment, and an entry under the wrong digest would outlive it.

It must not know caches or who asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import msgspec
import numpy as np

from inference.datatypes import TensorSpec
from inference.deadlines import Deadline
from inference.oip_answers import infer_body, outputs_in
from schemas.errors import BadInput, BadTensor, DeadlineExceeded, NotReady, Overloaded, Unreachable

MAX_ANSWER_BYTES = 64 * 2**20
DIGEST = "mlcdn-digest"
JSON_LENGTH = "inference-header-content-length"
MAX_CONNECTIONS = 64


class OriginClient:
    def __init__(self, url: str, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._url = url.rstrip("/")
        self._client = httpx.AsyncClient(
            base_url=self._url,
            transport=transport,
            trust_env=False,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS),
        )

    async def infer(
        self,
        model: str,
        digest: str,
        inputs: Mapping[str, np.ndarray[Any, np.dtype[Any]]],
        specs: Sequence[TensorSpec],
        outputs: Sequence[str] | None,
        deadline: Deadline,
        traceparent: str = "",
    ) -> bytes:
        """The packed outputs of the origin's answer."""
        body, json_length = infer_body(inputs, specs, outputs)
        headers = {"content-type": "application/octet-stream", JSON_LENGTH: str(json_length), DIGEST: digest}
        if traceparent:
            headers["traceparent"] = traceparent
        remaining = deadline.remaining()
        if remaining <= 0:
            raise DeadlineExceeded("the deadline passed before the origin was asked")
        headers["mlcdn-deadline-ms"] = str(max(1, int(remaining * 1_000)))
        try:
            answer = await self._client.post(
                f"/v2/models/{model}/infer", content=body, headers=headers, timeout=remaining
            )
        except httpx.TimeoutException:
            raise DeadlineExceeded("the origin did not answer before the deadline") from None
        except httpx.HTTPError as error:
            raise self._unreachable(type(error).__name__) from None
        if answer.status_code != httpx.codes.OK:
            raise self._refused(answer)
        if len(answer.content) > MAX_ANSWER_BYTES:
            raise self._unreachable(f"its answer has {len(answer.content)} bytes")
        if (actual := answer.headers.get(DIGEST, "")) != digest:
            raise NotReady(f"the origin serves {actual[:12] or 'nothing'} of model {model}, not {digest[:12]} yet")
        try:
            return outputs_in(answer.content, _json_length(answer))
        except BadInput as error:
            raise self._unreachable(str(error)) from None

    async def offers(self, model: str, digest: str, timeout_s: float) -> bool:
        """Whether it serves that release."""
        try:
            answer = await self._client.get(f"/v2/models/{model}", headers={DIGEST: digest}, timeout=timeout_s)
        except httpx.HTTPError:
            return False
        return answer.status_code == httpx.codes.OK and answer.headers.get(DIGEST) == digest

    async def check(self, timeout_s: float) -> bool:
        """Whether it answers at all."""
        try:
            return (await self._client.get("/health", timeout=timeout_s)).status_code < 500
        except httpx.HTTPError:
            return False

    async def close(self) -> None:
        await self._client.aclose()

    def _refused(self, answer: httpx.Response) -> Exception:
        match answer.status_code:
            case 400:
                return BadTensor(_error_in(answer))
            case 404:
                return NotReady(f"the origin does not serve it yet: {_error_in(answer)}")
            case 429:
                return Overloaded("the origin is overloaded")
            case 504:
                return DeadlineExceeded("the origin did not finish before the deadline")
            case status:
                return self._unreachable(f"status {status}")

    def _unreachable(self, hint: str) -> Unreachable:
        return Unreachable("origin", self._url, hint)


def _json_length(answer: httpx.Response) -> int:
    said = answer.headers.get(JSON_LENGTH, "")
    if not (said.isascii() and said.isdigit() and len(said) < 16):
        raise BadInput("not an infer answer with binary data")
    return int(said)


class _Error(msgspec.Struct):
    error: str = ""


def _error_in(answer: httpx.Response) -> str:
    try:
        return msgspec.json.decode(answer.content, type=_Error).error[:500]
    except (msgspec.MsgspecError, RecursionError):
        return f"status {answer.status_code}"
