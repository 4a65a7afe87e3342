"""The child behind `inference.limited`: bind itself, load the model, answer one question after the other, end with them.

    stdin    frames of a Question        stdout   a Reply that says whether it was loaded, then one for each question

Laws: limits come first, the artifact's bytes after (trial_child.py has them); one session of one thread; whatever goes
wrong with a question is its reply, in one line without paths; the end of stdin is the end.

It must not know who asks, or what for.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from typing import IO, Final

import msgspec

from inference.compare import checked_tensors
from inference.deadlines import Deadline
from inference.external_data import DataFile, content
from inference.limited import LENGTH, MAX_FRAME, Question, Reply
from inference.onnx_model import OnnxModel, SessionSettings
from inference.packed import pack_outputs
from inference.runtime import reason_of
from inference.trial_child import bind
from inference.trial_report import TrialLimits
from schemas.errors import MlcdnError, ModelRefused

_QUESTION: Final = msgspec.msgpack.Decoder(Question)
_encode: Final = msgspec.msgpack.Encoder().encode


def main() -> int:
    path, sha256, said, listed = sys.argv[1:5]
    limits = msgspec.json.decode(said, type=TrialLimits)
    files = msgspec.json.decode(listed, type=list[DataFile])
    # Nothing but frames may reach the pipe, whatever a library prints.
    asked, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)
    os.close(null)
    try:
        model = _load(path, sha256, limits, files)
    except MlcdnError as error:
        _say(answers, Reply(reason=str(error)))
        return 0
    except Exception as error:  # noqa: BLE001 - a model must not find an exception that leaves its caller without a word
        _say(answers, Reply(reason=f"it cannot be loaded: {reason_of(error)}"))
        return 0
    _say(answers, Reply())
    while (frame := _hear(asked)) is not None:
        _say(answers, _answer(model, frame, limits))
    return 0


def _load(path: str, sha256: str, limits: TrialLimits, files: list[DataFile]) -> OnnxModel:
    file = _open(path, "the artifact")
    size = os.fstat(file).st_size
    weights = [_open(listed.path, f"the file {listed.name}") for listed in files]
    folder = tempfile.mkdtemp(prefix="mlcdn-replay-")
    os.chdir(folder)
    os.rmdir(folder)
    bind(limits, size + sum(listed.size_bytes for listed in files), os.getppid())
    with os.fdopen(file, "rb") as opened:
        data = opened.read(min(size, limits.scan.max_file_bytes) + 1)
    beside = []
    for listed, descriptor in zip(files, weights, strict=True):
        with os.fdopen(descriptor, "rb", buffering=0) as raw:
            beside.append(content(listed, raw))
    return OnnxModel.from_bytes(data, sha256, SessionSettings(scan_limits=limits.scan), beside)


def _open(path: str, what: str) -> int:
    try:
        # Without O_NONBLOCK a named pipe in the file's place would stop here.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ModelRefused(f"{what} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        raise ModelRefused(f"{what} is not a regular file")
    return file


def _answer(model: OnnxModel, frame: bytes, limits: TrialLimits) -> Reply:
    try:
        question = _QUESTION.decode(frame)
        inputs = checked_tensors(question.inputs)
        model.validate_inputs(inputs)
        # Those that it has: that one is missing is for who compares.
        names = [name for name in question.outputs if name in model.output_names]
        outputs = model.run(inputs, names, Deadline.after(limits.run_s)) if names else {}
        return Reply(packed=pack_outputs(outputs, model.outputs))
    except MlcdnError as error:
        return Reply(reason=str(error))
    except Exception as error:  # noqa: BLE001 - see above
        return Reply(reason=f"the run failed: {reason_of(error)}")


def _hear(asked: IO[bytes]) -> bytes | None:
    head = asked.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    if length > MAX_FRAME:
        return None
    body = asked.read(length)
    return body if len(body) == length else None


def _say(answers: IO[bytes], reply: Reply) -> None:
    body = _encode(reply)
    answers.write(LENGTH.pack(len(body)) + body)
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
