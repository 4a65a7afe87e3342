"""Models placed at the origin: desired by the log, fetched from the store, kept loaded, asked over HTTP.

Level, not edge: `reconcile` compares what is loaded with what the log wants and does the difference; what failed for a
cause that may pass is tried again with growing pauses, and the old version serves on. As at an edge, bytes are verified and
tried in a limited child before they are loaded here; an artifact that was refused is not tried again until the log wants
another release.

A model in a rollout is hosted on both of its seats, and an edge says by digest which one it means. Edges hear of a change
sooner or later than this process does, so what left its seat is still answered for `LATE_EDGES_S`.
"""

from __future__ import annotations

import asyncio
import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from inference.deadlines import Deadline
from inference.external_data import DATA, stored
from inference.onnx_model import Array, OnnxModel, SessionSettings
from inference.trial import run_trial
from schemas.errors import EventRefused, MlcdnError, ModelRefused, NotFound, Overloaded
from schemas.events import Artifact, Placement
from streams.artifacts import ArtifactStore, FetchOptions
from streams.folds import releases
from streams.folds.releases import Releases
from streams.folds.wanted import Channel, Seated, Wanted, seat
from streams.log.record import Record

log = structlog.get_logger(__name__)

FETCH_S: Final = 300.0
SLOWEST_BYTES_S: Final = 2**20
FIRST_PAUSE_S: Final = 0.5
LAST_PAUSE_S: Final = 30.0
LATE_EDGES_S: Final = 30.0


@dataclass(slots=True)
class Hosted:
    """A loaded model, on a seat, and how many requests it has in hand."""

    wanted: Wanted
    model: OnnxModel
    channel: Channel = Channel.STABLE
    in_flight: int = 0


class Hosting:
    """One event loop owns it. Runs happen in `threads` threads."""

    def __init__(
        self,
        store: ArtifactStore,
        directory: Path,
        roots: tuple[bytes, ...],
        session: SessionSettings,
        threads: int,
    ) -> None:
        self._store, self._artifacts, self._session = store, directory / "artifacts", session
        self._state = Releases.initial(roots)
        self._roots = roots
        # By seat.
        self._hosted: dict[str, Hosted] = {}
        self._left: dict[tuple[str, str], Hosted] = {}
        self._refused: dict[str, Wanted] = {}
        self._changed = asyncio.Event()
        self._caught_up = False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="origin-run")

    def on_record(self, record: Record) -> None:
        step = releases.fold(self._state, record)
        self._state = step.state
        self._changed.set()
        if step.refused is not None:
            raise EventRefused(step.refused.refusal, step.refused.detail)

    def on_caught_up(self) -> None:
        """Only now is what the log wants known: acting earlier would load every release it ever held, one by one."""
        self._caught_up = True
        self._changed.set()

    def on_recreated(self, _topic: str) -> None:
        """The log was made again and comes anew from its start; what is loaded serves on until all of it was read."""
        self._state, self._caught_up = Releases.initial(self._roots), False

    def find(self, model: str, digest: str | None = None) -> Hosted:
        """The stable release, or the one of that digest. `NotFound` when it is not placed here, or not loaded yet."""
        seats = [self._hosted.get(model), self._hosted.get(seat(model, Channel.CANDIDATE))]
        for hosted in (*seats, self._left.get((model, digest or ""))):
            if hosted is not None and digest in (None, hosted.wanted.digest):
                return hosted
        which = f"{model} of digest {digest[:12]}" if digest else model
        raise NotFound(f"no model {which} is served at the origin")

    def models(self) -> dict[str, Hosted]:
        """By seat."""
        return dict(self._hosted)

    async def run(self, hosted: Hosted, inputs: dict[str, Array], outputs: tuple[str, ...] | None) -> dict[str, Array]:
        """One run, within the release's deadline and queue."""
        limits = hosted.wanted.released.limits
        if hosted.in_flight >= limits.max_queue:
            raise Overloaded(f"{limits.max_queue} requests of {hosted.wanted.model} are in hand")
        hosted.model.validate_inputs(inputs)
        deadline = Deadline.after(limits.deadline_ms / 1000)
        hosted.in_flight += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, hosted.model.run, inputs, outputs, deadline)
        finally:
            hosted.in_flight -= 1

    async def reconcile_until(self, stop: asyncio.Event) -> None:
        pause = FIRST_PAUSE_S
        while not stop.is_set():
            self._changed.clear()
            if not self._caught_up or await self._reconcile():
                pause = FIRST_PAUSE_S
                timeout = None
            else:
                timeout, pause = pause, min(pause * 2, LAST_PAUSE_S)
            await _first(self._changed, stop, timeout)
        self._pool.shutdown(wait=True)

    async def _reconcile(self) -> bool:
        """False when something could not be done and should be tried again."""
        told = releases.desired(self._state, None)
        wanted = {n: s for n, s in told.items() if s.wanted.released.placement is Placement.ORIGIN}
        # What is loaded changes seats first, and at once: no request finds its release gone meanwhile.
        loaded = {hosted.wanted.digest: hosted for hosted in (*self._left.values(), *self._hosted.values())}
        for name, seated in wanted.items():
            if (known := loaded.get(seated.digest)) is not None:
                self._seat(name, seated, known.model)
        for name in [n for n in self._hosted if n not in wanted]:
            self._leaves(self._hosted.pop(name))
            log.info("model retired", model=name)
        done = True
        for name, seated in wanted.items():
            want, known = seated.wanted, self._hosted.get(name)
            if (known is not None and known.wanted == want) or self._refused.get(name) == want:
                continue
            try:
                model = await asyncio.to_thread(self._load, want)
                await asyncio.to_thread(model.warm)
                self._seat(name, seated, model)
                log.info("model hosted", model=name, version=want.version, digest=want.digest)
            except MlcdnError as error:
                log.warning("model not hosted", model=name, version=want.version, error=str(error))
                if error.retryable:
                    done = False
                else:
                    self._refused[name] = want
        there = [hosted.wanted for hosted in (*self._hosted.values(), *self._left.values())]
        # What is here of a release of several files, of which one has yet to come.
        there += [seated.wanted for name, seated in wanted.items() if self._refused.get(name) != seated.wanted]
        await asyncio.to_thread(self._sweep, {a.sha256 for want in there for a in want.released.artifacts})
        return done

    def _seat(self, name: str, seated: Seated, model: OnnxModel) -> None:
        before = self._hosted.get(name)
        if before is not None and before.wanted == seated.wanted:
            return
        self._hosted[name] = Hosted(seated.wanted, model, seated.channel)
        if before is not None and before.wanted.digest != seated.digest:
            self._leaves(before)

    def _leaves(self, hosted: Hosted) -> None:
        key = (hosted.wanted.model, hosted.wanted.digest)
        self._left[key] = hosted

        def gone() -> None:
            if self._left.get(key) is hosted:
                del self._left[key]
                self._changed.set()

        asyncio.get_running_loop().call_later(LATE_EDGES_S, gone)

    def _load(self, want: Wanted) -> OnnxModel:
        artifact, files = want.released.artifact, stored(want.released.files, self._artifacts)
        path = self._artifacts / f"{artifact.sha256}.onnx"
        places = (path, *(Path(file.path) for file in files))
        if all(place.exists() for place in places):
            try:
                return OnnxModel.load(path, artifact.sha256, self._session, files)
            except ModelRefused as refused:
                # It was tried when it was fetched: what changed since is our disk, not the release.
                log.warning("artifact on disk is spoilt, it is fetched again", digest=want.digest, error=str(refused))
        for part, place in zip(want.released.artifacts, places, strict=True):
            if not _holds(place, part):
                self._store.fetch(part, place, FetchOptions(deadline_s=FETCH_S + part.size_bytes / SLOWEST_BYTES_S))
        report = run_trial(path, artifact.sha256, files=files)
        if not report.ok:
            raise ModelRefused(report.reason)
        return OnnxModel.load(path, artifact.sha256, self._session, files)

    def _sweep(self, hosted: set[str]) -> None:
        """Removes files that no model needs; one that comes back is fetched again."""
        for kind in ("onnx", DATA):
            for path in self._artifacts.glob(f"*.{kind}"):
                if path.stem not in hosted:
                    path.unlink()


def _holds(path: Path, artifact: Artifact) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == artifact.sha256
    except FileNotFoundError:
        return False


async def _first(changed: asyncio.Event, stop: asyncio.Event, timeout: float | None) -> None:
    waits = [asyncio.create_task(changed.wait()), asyncio.create_task(stop.wait())]
    await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
