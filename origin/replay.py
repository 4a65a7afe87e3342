"""The replay gate: a candidate answers the requests that clients have asked, before any client asks it.

    the last recorded requests of each region → a limited child, one at a time → held against what was answered → a report

Laws:
- The candidate runs in the child and nowhere else (inference/limited.py); a file that is not what its release names, or
  that cannot be loaded, is an error and not a report.
- The same candidate over the same log gives the same report, to the byte: one thread, one order, no clock in it.
- A request whose inputs were redacted cannot be asked again: it is counted, and is no agreement. One that the candidate
  does not answer is a disagreement. Nothing compared is nothing passed.

It must not know the command line, HTTP, or how a recording came about.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from inference.compare import Compared, checked_values, compared
from inference.external_data import stored
from inference.golden import ATOL, RTOL
from inference.limited import LimitedModel, Refused
from inference.packed import Output
from schemas.errors import BadInput, BadTensor, NotFound
from schemas.events import Compare, Gates, ModelReleased, Range, RequestRecorded
from streams.artifacts import ArtifactStore, FetchOptions
from streams.audit.recordings import RegionSample
from streams.folds.releases import ModelHistory

FETCH_S: Final = 300.0
SLOWEST_BYTES_S: Final = 2**20


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked, and by which tolerances it is judged. `released` is None for a file that nobody has released."""

    version: str
    digest: str
    released: ModelReleased | None = None

    @property
    def tolerances(self) -> tuple[float, float]:
        golden = self.released.golden if self.released is not None else None
        return (golden.rtol, golden.atol) if golden is not None else (RTOL, ATOL)

    @property
    def gates(self) -> Gates:
        return self.released.plan.gates if self.released is not None else Gates()


class RegionReport(msgspec.Struct, frozen=True, kw_only=True):
    """`rows` were compared; `disagreements` of them differ, and `failed` more were not answered. `answered_by` counts the
    compared and failed by the artifact whose answers were recorded."""

    region: str
    recorded: int
    rows: int
    disagreements: int
    failed: int
    redacted: int
    max_difference: float
    top1_rows: int
    top1_agreements: int
    answered_by: dict[str, int]
    first_difference: str
    ranges: tuple[Range, ...]

    def judged(self, compare: Compare) -> tuple[int, int]:
        """What was compared or failed, and what of it differs, as a gate counts it."""
        if compare is Compare.TOP1 and self.top1_rows:
            return self.top1_rows + self.failed, self.top1_rows - self.top1_agreements + self.failed
        return self.rows + self.failed, self.disagreements + self.failed


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`disagreement` is the share of what was compared, or not answered, over all regions."""

    model: str
    version: str
    digest: str
    rtol: float
    atol: float
    last: int
    regions: tuple[RegionReport, ...]
    rows: int
    compare: Compare
    disagreement: float
    max_disagreement: float
    passed: bool


Ask = Callable[[Sequence[Output], Sequence[str]], bytes | Refused]


def released_candidate(history: ModelHistory | None, model: str, version: str | None) -> Candidate:
    """The release of that version, the newest of it; by default the one that was asked for last."""
    if history is None:
        raise NotFound(f"no model {model} was ever released")
    if version is None:
        if history.newest is None:
            raise NotFound(f"model {model} is retired: say which version")
        released = history.newest.released
    else:
        found = [r for r in history.brought.values() if r.version == version]
        if not found:
            known = sorted(r.version for r in history.brought.values())
            raise NotFound(f"model {model} has no version {version[:80]!r}; it has {known}")
        released = max(found, key=lambda r: r.sequence)
    return Candidate(version=released.version, digest=released.digest, released=released)


def file_candidate(path: Path) -> Candidate:
    """A file that may be released later."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    return Candidate(version=digest[:12], digest=digest)


def fetched(candidate: Candidate, store: ArtifactStore, directory: Path) -> Path:
    """The ONNX file of a release, verified, in `directory`, with its data beside it."""
    if candidate.released is None:
        raise BadInput(f"nobody has released {candidate.version}")
    released, path = candidate.released, directory / "candidate.onnx"
    places = (path, *(Path(file.path) for file in stored(released.files, directory)))
    for artifact, place in zip(released.artifacts, places, strict=True):
        store.fetch(artifact, place, FetchOptions(deadline_s=FETCH_S + artifact.size_bytes / SLOWEST_BYTES_S))
    return path


def replay(
    candidate: Candidate,
    path: Path,
    model: str,
    samples: Sequence[RegionSample],
    *,
    last: int,
    compare: Compare | None = None,
    max_disagreement: float | None = None,
) -> Report:
    """The artifact at `path` is asked all of `samples`."""
    released = candidate.released
    sha256 = candidate.digest if released is None else released.artifact.sha256
    files = () if released is None else stored(released.files, path.parent)
    with LimitedModel(path, sha256, files=files) as child:
        regions = tuple(_region(sample, candidate, child.ask) for sample in samples)
    compare = compare or candidate.gates.compare
    judged = [region.judged(compare) for region in regions]
    asked, wrong = sum(one for one, _ in judged), sum(differ for _, differ in judged)
    share = wrong / asked if asked else 0.0
    allowed = candidate.gates.max_disagreement if max_disagreement is None else max_disagreement
    rtol, atol = candidate.tolerances
    return Report(
        model=model,
        version=candidate.version,
        digest=candidate.digest,
        rtol=rtol,
        atol=atol,
        last=last,
        regions=regions,
        rows=sum(r.rows for r in regions),
        compare=compare,
        disagreement=share,
        max_disagreement=allowed,
        passed=bool(asked) and share <= allowed,
    )


def _region(sample: RegionSample, candidate: Candidate, ask: Ask) -> RegionReport:
    rows = disagreements = failed = redacted = top1_rows = top1_agreements = 0
    largest, first = 0.0, ""
    answered_by: Counter[str] = Counter()
    for recorded in sample.requests:
        if any(tensor.redacted for tensor in recorded.event.inputs):
            redacted += 1
            continue
        answered_by[recorded.event.digest] += 1
        one = _compared(recorded.event, candidate, ask)
        if isinstance(one, str):
            failed += 1
            difference = one
        else:
            rows += 1
            disagreements += one.difference is not None
            largest = max(largest, one.max_difference)
            top1_rows += one.top1_rows
            top1_agreements += one.top1_agreements
            difference = str(one.difference or "")
        if difference and not first:
            first = f"{recorded.partition}/{recorded.offset}: {difference}"
    return RegionReport(
        region=sample.region,
        recorded=len(sample.requests),
        rows=rows,
        disagreements=disagreements,
        failed=failed,
        redacted=redacted,
        max_difference=largest,
        top1_rows=top1_rows,
        top1_agreements=top1_agreements,
        answered_by=dict(sorted(answered_by.items())),
        first_difference=first,
        ranges=sample.ranges,
    )


def _compared(event: RequestRecorded, candidate: Candidate, ask: Ask) -> Compared | str:
    """What it came to, or why the candidate has no answer."""
    try:
        wanted = checked_values(event.outputs)
    except BadTensor as error:
        return f"the recorded answer is none: {error}"
    inputs = [Output(t.name, t.datatype, t.shape, memoryview(t.data)) for t in event.inputs]
    reply = ask(inputs, list(wanted))
    if isinstance(reply, Refused):
        return reply.reason
    try:
        got = checked_values(reply)
    except BadTensor as error:
        return f"the answer is none: {error}"
    return compared(wanted, got, *candidate.tolerances)
