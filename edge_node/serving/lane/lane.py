"""The fast lane: the second door to the predict core, for requests whose every byte is usual.

    head bytes known? ── no ──→ the full path, which may make them known
      │ yes
    body bytes known, and the answer still said so? ── yes ──→ its bytes, as they are           (9 us of a core)
      │ no
    body → one tensor → key → core.begin → memory has it, or a row in this turn's batch         (20 us)
      │ anything unusual on the way
    the full path, as if nothing had been tried

Laws: an answer has the bytes that the full path would give it, and pays what that pays: the fence, a row, `Cache-Status`
and `Age`. What lies outside a request's bytes is looked at for each request. What is refused is refused by the full
path, which knows the words.

It must not know sockets or how the HTTP parser works; `connection.py` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import structlog
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from edge_node.board import POLICY, Fence
from edge_node.serving import answers
from edge_node.serving.batches import Ask
from edge_node.serving.cohorts import input_cohort
from edge_node.serving.controls import Controls
from edge_node.serving.encodings import encoded
from edge_node.serving.flights import Found, Outcome
from edge_node.serving.lane.bindings import NOT_USUAL, Binding, Taken, named_model
from edge_node.serving.lane.heads import Head
from edge_node.serving.lane.repeats import KnownHead, Repeat, Repeats
from edge_node.serving.model_slot import ModelSlot, Slots
from edge_node.serving.predict import Predictor, collapsed
from edge_node.serving.reporter import Identity
from edge_node.serving.rows import Rows
from edge_node.serving.sampling import tell
from edge_node.serving.served import Served
from inference.deadlines import Deadline
from inference.onnx_model import RunFailed
from schemas.errors import MlcdnError
from schemas.events import ModelRef

_PLAIN: Final = Controls(as_of=0)
_MS: Final = 1_000_000
_EMPTY_LINE: Final = b"\r\n"

log = structlog.get_logger()


class Wire:
    """An answer as it goes out, without the status line and the date; `status` words the former."""

    __slots__ = ("rest", "status")

    def __init__(self, status: int, rest: bytes) -> None:
        self.status, self.rest = status, rest

    def closing(self) -> bytes:
        """The same, said to be the last on its connection."""
        head, _, body = self.rest.partition(b"\r\n\r\n")
        return b"%b\r\nconnection: close\r\n\r\n%b" % (head, body)


class Lane:
    """One event loop owns it, for all connections of a worker."""

    def __init__(
        self,
        slots: Slots,
        predictor: Predictor,
        rows: Rows,
        fence: Fence,
        identity: Identity,
        max_rows: int,
        max_bytes: int,
        max_body_bytes: int,
    ) -> None:
        self._slots, self._predictor, self._rows, self._region = slots, predictor, rows, identity.region
        self._max_rows = max_rows
        self.max_body_bytes = max_body_bytes
        self.fence = fence.slots
        self.repeats = Repeats(max_bytes)
        self.heads = self.repeats.heads
        self.row = rows.extend
        self._always = answers.written(
            [(b"mlcdn-region", identity.region.encode()), (b"mlcdn-node", identity.node.encode())]
        )
        self._bounds: dict[Served, Bound] = {}
        self._dates: tuple[object, bytes] = (None, b"")

    def start_of(self, status: int, default_headers: list[tuple[bytes, bytes]]) -> bytes:
        """Status line and the server's own headers, which it makes anew once a second."""
        if status != 200:
            return STATUS_LINE[status] + answers.written(default_headers)
        made_of, start = self._dates
        if made_of is not default_headers:
            start = STATUS_LINE[200] + answers.written(default_headers)
            self._dates = default_headers, start
        return start

    def ask(self, known: KnownHead, body: bytes, t0: int, wait: Callable[[], Callable[[Wire], None]]) -> Wire | bool:
        """The answer; True where `wait()`'s function will get it; False where the full path must be asked.

        `wait` is called before anything can land.
        """
        as_of = self._predictor.now()
        try:
            found = self._understood(known, body)
        except NOT_USUAL:
            return False
        if found is None:
            return False
        slot, bound, taken = found
        deadline = Deadline.after(bound.limit_s)
        ask = Ask(bound.served, taken.key, taken.inputs, None, _PLAIN, as_of, deadline)
        one = self._predictor.begin(ask)
        if isinstance(one, Found):
            return self._answered(known, body, t0, slot, bound, ask, taken, one)
        land = wait()
        joined = one.ask is not ask

        def landed(outcome: Outcome) -> None:
            try:
                if joined and isinstance(outcome, Found):
                    outcome = collapsed(outcome)
                wire = self._landed(known, bound, body, t0, ask, taken, outcome)
            except Exception:
                # Others wait for the same outcome, and this connection for its answer.
                log.exception("answer_not_worded", model=ask.served.name)
                wire, _ = self._refusal(RunFailed("internal error"))
            land(wire)

        one.wait(landed)
        return True

    def _understood(self, known: KnownHead, body: bytes) -> tuple[ModelSlot, Bound, Taken] | None:
        head = known.head
        if head.model is not None:
            slot = self._slots.find(head.model)
        else:
            # The one that is meant without a name is nearly always the one that is named, too.
            slot = self._slots.find_meant(None) or self._slots.find_meant(named_model(body))
        served = slot.usual if slot is not None else None
        if slot is None or served is None or (head.version is not None and head.version != served.wanted.version):
            return None
        bound = self._bounds.get(served) or self._bind(served)
        taken = _read(bound, head, body)
        if taken is None:
            return None
        if slot.split is not None and head.version is None:
            chosen = slot.chosen(input_cohort((taken.key,)))
            if chosen is not served:
                bound = self._bounds.get(chosen) or self._bind(chosen)
                taken = _read(bound, head, body)
        return None if taken is None else (slot, bound, taken)

    def _bind(self, served: Served) -> Bound:
        # Those that serve no more are let go with the next release.
        serving = {served for slot in self._slots for served in (slot.usual, slot.candidate)}
        self._bounds = {s: b for s, b in self._bounds.items() if s in serving}
        bound = self._bounds[served] = Bound(served, self._max_rows, self._rows)
        return bound

    def _answered(
        self,
        known: KnownHead,
        body: bytes,
        t0: int,
        slot: ModelSlot,
        bound: Bound,
        ask: Ask,
        taken: Taken,
        found: Found,
    ) -> Wire:
        wire, size = self._worded(known, bound, ask, taken, found)
        cells = self._rows.cells(found.tier, 200, bound.row_index, len(body), size, ask.key)
        entry, place = found.entry, self._predictor.place(ask.key)
        if taken.id is None and entry is not None and place is not None:
            # Until its age or its ttl is another second's.
            now_ms = time.time_ns() // _MS
            age_ms, left_ms = now_ms - entry.stored_at_ms, entry.fresh_until_ms - now_ms
            if age_ms >= 0 and left_ms > 0:
                until = t0 + min(1_000 - age_ms % 1_000, left_ms % 1_000 + 1) * _MS
                policy = self.fence[POLICY]
                repeat = Repeat(wire.rest, until, ask.as_of, policy, slot, slot.turn, place, entry, cells, 0)
                self.repeats.put(known, body, repeat)
        self.row((t0, time.perf_counter_ns() - t0, cells))
        if bound.served.witness is not None:
            tell(ask, found.body)
        return wire

    def _landed(
        self, known: KnownHead, bound: Bound, body: bytes, t0: int, ask: Ask, taken: Taken, one: Outcome
    ) -> Wire:
        if isinstance(one, Found):
            wire, size = self._worded(known, bound, ask, taken, one)
            cells = self._rows.cells(one.tier, 200, bound.row_index, len(body), size, ask.key)
            if bound.served.witness is not None:
                tell(ask, one.body)
        else:
            wire, size = self._refusal(one)
            cells = self._rows.cells("none", wire.status, bound.row_index, len(body), size, b"")
        self.row((t0, time.perf_counter_ns() - t0, cells))
        return wire

    def _worded(self, known: KnownHead, bound: Bound, ask: Ask, taken: Taken, found: Found) -> tuple[Wire, int]:
        """And the size of its body."""
        head, age_s, position = known.head, self._predictor.age_s(found), self._predictor.position(ask)
        if taken.binary:
            answer = self._predictor.answer(ask, found)
            body, headers = answers.binary_answer(bound.served, answer, taken.id, bound.output_names)
            return self._smaller(body, headers, head.coding)
        if head.door == "infer":
            body = answers.infer_answer(bound.served, found.body, taken.id)
        else:
            body = answers.predict_answer(bound.served, self._predictor.answer(ask, found), self._region)
        size = len(body)
        if size >= answers.COMPRESSIBLE_BYTES and head.coding is not None:
            headers = answers.answer_headers(bound.served, self._predictor.answer(ask, found), size)
            return self._smaller(body, headers, head.coding)
        lines = answers.answer_head(bound.model_lines, found.trail, age_s, position, ask.key, size)
        return Wire(200, b"".join((lines, self._always, _EMPTY_LINE, body))), size

    def _smaller(self, body: bytes, headers: answers.Headers, coding: str | None) -> tuple[Wire, int]:
        """In the coding that the caller likes, where that is worth it."""
        if len(body) >= answers.COMPRESSIBLE_BYTES and coding is not None:
            small = encoded(body, coding)
            if small is not None:
                body, headers = small, answers.smaller_headers(headers, coding, len(small))
        return Wire(200, b"".join((answers.written(headers), self._always, _EMPTY_LINE, body))), len(body)

    def _refusal(self, error: MlcdnError) -> tuple[Wire, int]:
        status, headers, body = answers.error_answer(error)
        if status >= 500:
            log.warning("request_failed", status=status, cause=str(error))
        rest = b"".join((answers.written(headers), self._always, _EMPTY_LINE, body))
        return Wire(status, rest), len(body)


def _read(bound: Bound, head: Head, body: bytes) -> Taken | None:
    """As that release reads it; None, or one of `NOT_USUAL`, where the full path must."""
    binding = bound.binding
    if binding is None:
        return None
    if head.json_length is not None:
        return binding.binary(body, head.json_length)
    return binding.infer(body) if head.door == "infer" else binding.predict(body)


class Bound:
    """What the lane knows of a release: how to read its requests, and what all its answers say."""

    __slots__ = ("binding", "limit_s", "model_lines", "output_names", "row_index", "served")

    def __init__(self, served: Served, max_rows: int, rows: Rows) -> None:
        self.served = served
        self.binding = Binding.of(served, max_rows)
        self.limit_s = served.wanted.released.limits.deadline_ms / 1e3
        self.output_names = frozenset(spec.name for spec in served.outputs)
        self.model_lines = answers.written(answers.model_headers(served))
        self.row_index = rows.index_of(ModelRef(name=served.name, version=served.wanted.version, digest=served.digest))
