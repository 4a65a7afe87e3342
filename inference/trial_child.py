"""The life of one forked child: bind itself, try the model, write a report, end.

Laws:
- Limits come first; not one byte of the artifact is read before them.
- After binding it holds the model, the golden file, the pipe for its report, and files of weights where they are listed.
  Its folder is one that
  was removed, so no relative name leads anywhere; where the kernel allows, it has no network but an unconnected one.
- It dies with its server, and it always ends by `os._exit`: nothing of the server's is run twice.
- Whatever goes wrong is a reason in the report, or else in the way it died, which the server reads.

It must not know the server's sockets, other children or what a verdict leads to.
"""

from __future__ import annotations

import ctypes
import fcntl
import math
import os
import resource
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import NoReturn

import msgspec

from inference.batchable import check_batchable, sample
from inference.deadlines import Deadline
from inference.external_data import DataNotListed, content
from inference.golden import Golden, GoldenRefused, check_names, compare, read_golden
from inference.onnx_model import Array, OnnxModel, RunFailed, SessionSettings
from inference.runtime import is_out_of_memory, reason_of
from inference.trial_report import MAX_FRAME, TrialLimits, TrialReport, TrialRequest
from schemas.errors import BadTensor, DeadlineExceeded, MlcdnError, ModelRefused

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38
_MODEL, _GOLDEN, _RESULT, _WEIGHTS = 3, 4, 5, 6
_TIMED_RUNS = 5
_NO_MEMORY = "not enough memory to try it"

# Looked up before the fork: a child should not search for libraries.
_libc = ctypes.CDLL(None, use_errno=True)


def live(
    request: TrialRequest, model: int, golden: int | None, weights: Sequence[int], result: int, null: int, server: int
) -> NoReturn:
    """Called right after fork, with the descriptors that the child is to keep."""
    try:
        _keep_only([null, null, null, model, golden if golden is not None else null, result, *weights])
        size = os.fstat(_MODEL).st_size + sum(file.size_bytes for file in request.files)
        isolated = bind(request.limits, size, server)
        report = _try(request, golden is not None)
        body = msgspec.json.encode(msgspec.structs.replace(report, network_isolated=isolated))
        if len(body) > MAX_FRAME // 2:
            body = msgspec.json.encode(TrialReport(False, "its signature is too long to be served"))
        with os.fdopen(_RESULT, "wb") as pipe:
            pipe.write(body)
    finally:
        # Also on an error above: the server then reads an empty report and says how the child ended.
        os._exit(0 if sys.exc_info()[0] is None else 70)


def _keep_only(descriptors: Sequence[int]) -> None:
    """Under the numbers of their places."""
    # First out of the way of the numbers they are to get, then there.
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, len(descriptors)) for fd in descriptors]
    for number, fd in enumerate(high):
        os.dup2(fd, number, inheritable=False)
    os.closerange(len(descriptors), resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def bind(limits: TrialLimits, model_bytes: int, server: int) -> bool:
    """Limits on this process, which ends with its parent, `server`; whether it has no network any more."""
    isolated = False
    if sys.platform == "linux":
        # A user namespace lets a process without privileges have an empty network; it takes them from one that has any.
        isolated = bool(_libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) == 0)
        _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # After unshare, because a change of credentials clears it.
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != server:
            os._exit(71)
    space = _address_space() + int(limits.memory_factor * model_bytes) + limits.memory_budget_bytes
    cpu = max(1, math.ceil(limits.cpu_s))
    _limit(resource.RLIMIT_AS, space, space)
    _limit(resource.RLIMIT_CPU, cpu, cpu + 1)
    _limit(resource.RLIMIT_NOFILE, limits.open_files, limits.open_files)
    _limit(resource.RLIMIT_FSIZE, 0, 0)
    _limit(resource.RLIMIT_CORE, 0, 0)
    return isolated


def _limit(kind: int, soft: int, hard: int) -> None:
    ceiling = resource.getrlimit(kind)[1]
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))


def _address_space() -> int:
    return _statm(0)


def _statm(field: int) -> int:
    """Pages of address space (0) or of memory (1), in bytes; 0 where there is no /proc."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[field]) * resource.getpagesize()
    except FileNotFoundError:
        return 0


def _try(request: TrialRequest, has_golden: bool) -> TrialReport:
    before = _statm(1)
    report = TrialReport(False)
    try:
        started = time.perf_counter()
        model = _load(request)
        report = msgspec.structs.replace(
            report,
            inputs=model.inputs,
            outputs=model.outputs,
            has_control_flow=model.summary.has_control_flow,
            load_ms=(time.perf_counter() - started) * 1e3,
        )
        golden = None
        if has_golden:
            report = msgspec.structs.replace(report, golden="failed")
            golden = _check_golden(model, request)
            report = msgspec.structs.replace(report, golden="passed")
        report = _measure(model, golden, request.limits, report)
        report = msgspec.structs.replace(report, ok=True)
    except DeadlineExceeded:
        report = msgspec.structs.replace(report, reason=f"a run took longer than {request.limits.run_s:g} s")
    except DataNotListed as error:
        report = msgspec.structs.replace(report, reason=str(error), unlisted=error.names)
    except MlcdnError as error:
        report = msgspec.structs.replace(report, reason=str(error))
    except Exception as error:  # noqa: BLE001 - a model must not find an exception that leaves it without a verdict
        # A thread has no room for its stack where the address space is used up: no fault but the lack of memory.
        reason = _NO_MEMORY if is_out_of_memory(error) else f"the trial failed: {reason_of(error)}"
        report = msgspec.structs.replace(report, reason=reason)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)
    held = _statm(1) if request.files else peak
    return msgspec.structs.replace(report, peak_rss_bytes=peak, model_rss_bytes=max(0, held - before))


def _load(request: TrialRequest) -> OnnxModel:
    scan_limits = request.limits.scan
    with os.fdopen(_MODEL, "rb") as file:
        data = file.read(min(os.fstat(_MODEL).st_size, scan_limits.max_file_bytes) + 1)
    beside = []
    for number, listed in enumerate(request.files, _WEIGHTS):
        with os.fdopen(number, "rb", buffering=0) as opened:
            beside.append(content(listed, opened))
    return OnnxModel.from_bytes(data, request.sha256, SessionSettings(scan_limits=scan_limits), beside)


def _check_golden(model: OnnxModel, request: TrialRequest) -> Golden:
    with os.fdopen(_GOLDEN, "rb") as file:
        golden = read_golden(file, request.limits.golden)
    check_names(golden, model.inputs, model.outputs)
    try:
        model.validate_inputs(golden.inputs)
        got = model.run(golden.inputs, list(golden.outputs), Deadline.after(request.limits.run_s))
    except BadTensor as error:
        raise GoldenRefused(f"the golden input cannot be run: {error}") from error
    difference = compare(golden.outputs, got, request.rtol, request.atol)
    if difference is not None:
        raise ModelRefused(f"golden test failed: {difference}")
    return golden


def _measure(model: OnnxModel, golden: Golden | None, limits: TrialLimits, report: TrialReport) -> TrialReport:
    known = golden.inputs if golden is not None else None
    run_ms = _run_ms(model, sample(model, 1, known), limits)
    if run_ms is None and known is not None:
        run_ms = _run_ms(model, known, limits)
    try:
        batchable = check_batchable(model, known, limits.batch_check_s, limits.run_s)
    except DeadlineExceeded:
        # One row was fast enough, so the model may be served; many together were not.
        return msgspec.structs.replace(report, run_ms=run_ms, batchable_reason="a batch ran past the deadline")
    return msgspec.structs.replace(
        report,
        run_ms=run_ms,
        batchable=batchable.yes,
        batchable_reason=batchable.reason,
        batchable_if_padded=batchable.if_padded,
    )


def _run_ms(model: OnnxModel, inputs: Mapping[str, Array], limits: TrialLimits) -> float | None:
    """The median of a few runs after the first; only the first, if that took long."""
    times: list[float] = []
    try:
        for _ in range(_TIMED_RUNS + 1):
            started = time.perf_counter()
            model.run(inputs, None, Deadline.after(limits.run_s))
            times.append((time.perf_counter() - started) * 1e3)
            if sum(times) > 1e3 * limits.batch_check_s:
                break
    except BadTensor:
        return None
    except RunFailed as error:
        if error.out_of_memory:
            raise ModelRefused("one row needs more memory than a trial may use") from error
        return None
    return statistics.median(times[1:] or times)
