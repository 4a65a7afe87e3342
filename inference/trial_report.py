"""What is asked of a trial and what comes back; the words that the trial's client, server and child share.

Laws:
- Everything here is frozen and travels as JSON in frames: four bytes of length, then the body.
- A report is a verdict on the artifact. That no verdict could be had is not a report but an error (TrialUnavailable).
- A frame longer than MAX_FRAME is a broken peer.

It must not know how a model is run.
"""

from __future__ import annotations

import struct
from typing import Final, Literal

import msgspec

from inference import golden
from inference.datatypes import TensorSpec
from inference.external_data import DataFile
from inference.onnx_scan import ScanLimits
from schemas.errors import MlcdnError

MIB: Final = 2**20
# How fast files of weights are read, hashed and loaded where little of a core is left.
SLOWEST_BYTES_S: Final = 50 * MIB
MAX_FRAME: Final = 4 * MIB
_LENGTH: Final = struct.Struct(">I")


class TrialUnavailable(MlcdnError):
    """The trial could not be held, and nothing is known about the artifact."""

    status = 503
    retryable = True


class TrialLimits(msgspec.Struct, frozen=True):
    """What a child may use. Its address space is what it was forked with, `memory_factor` × file, and the budget.

    Loading and running n bytes of dense weights was measured to take up to 4.7 n and 20 MiB: the bytes, onnxruntime's
    parsed copy, its tensors and its packed weights. Weights in files of their own take less.
    """

    memory_factor: float = 5.0
    memory_budget_bytes: int = 512 * MIB
    cpu_s: float = 60.0
    wall_s: float = 90.0
    run_s: float = 10.0
    batch_check_s: float = 0.5
    open_files: int = 16
    scan: ScanLimits = ScanLimits()
    golden: golden.GoldenLimits = golden.GoldenLimits()

    def beside(self, files: tuple[DataFile, ...]) -> TrialLimits:
        """With the time and the descriptors that files of weights take; their memory is counted by `memory_factor`."""
        more_s = sum(file.size_bytes for file in files) / SLOWEST_BYTES_S
        return msgspec.structs.replace(
            self,
            cpu_s=self.cpu_s + more_s,
            wall_s=self.wall_s + 2 * more_s,
            open_files=self.open_files + len(files),
        )


class TrialRequest(msgspec.Struct, frozen=True, tag="trial"):
    id: int
    path: str
    sha256: str
    limits: TrialLimits
    golden_path: str | None = None
    rtol: float = golden.RTOL
    atol: float = golden.ATOL
    files: tuple[DataFile, ...] = ()


class TrialCancel(msgspec.Struct, frozen=True, tag="cancel"):
    id: int


class TrialReport(msgspec.Struct, frozen=True):
    ok: bool
    reason: str = ""  # why not; one line without paths
    unlisted: tuple[str, ...] = ()  # refused because it names these files, and they were not listed
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    has_control_flow: bool = False
    batchable: bool = False
    batchable_reason: str = ""  # why not
    batchable_if_padded: bool = False  # not batchable, unless a lone row is always run as two of itself
    load_ms: float = 0.0
    run_ms: float | None = None  # one row; None if there were no inputs that the model accepts
    peak_rss_bytes: int = 0  # of the child
    # What the child added to what it was forked with, 16 MiB for the smallest model: at its peak, or, where weights are in
    # files of their own, at its end, when what was read of them is gone.
    model_rss_bytes: int = 0
    golden: Literal["passed", "failed", "absent"] = "absent"
    network_isolated: bool = False  # False where the kernel does not allow it
    trial_ms: float = 0.0  # fork to end


class TrialReady(msgspec.Struct, frozen=True, tag="ready"):
    pid: int


class TrialDone(msgspec.Struct, frozen=True, tag="done"):
    id: int
    report: TrialReport


ToServer = TrialRequest | TrialCancel
FromServer = TrialReady | TrialDone

TO_SERVER: Final = msgspec.json.Decoder(ToServer)
FROM_SERVER: Final = msgspec.json.Decoder(FromServer)
REPORT: Final = msgspec.json.Decoder(TrialReport)


def frame(message: ToServer | FromServer) -> bytes:
    body = msgspec.json.encode(message)
    return _LENGTH.pack(len(body)) + body


def take_frame(buffer: bytearray) -> bytes | None:
    """The first whole frame's body, taken out of `buffer`; None if there is none yet."""
    if len(buffer) < _LENGTH.size:
        return None
    (size,) = _LENGTH.unpack_from(buffer)
    if size > MAX_FRAME:
        raise TrialUnavailable(f"a frame of {size} bytes, more than {MAX_FRAME}")
    if len(buffer) < _LENGTH.size + size:
        return None
    body = bytes(buffer[_LENGTH.size : _LENGTH.size + size])
    del buffer[: _LENGTH.size + size]
    return body
