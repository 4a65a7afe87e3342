"""What the admin API is sent to release: an ONNX file as the body, or a form of a file, a golden file and settings.

    POST …                                       the body is the ONNX file
    POST …  Content-Type: multipart/form-data    parts `file` (ONNX), `golden` (.npz) and `settings` (JSON)

Laws: every byte is counted before it is kept, part by part; a file goes to the origin's disk under a name of ours, whatever
name it came with; a part that is unknown, there twice, or cut off is refused. It must not know releases.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from origin.release_request import GOLDEN_MAX_BYTES
from origin.release_settings import MAX_BYTES as SETTINGS_MAX_BYTES
from schemas.errors import BadInput, NotReady

_FORM: Final = b"multipart/form-data"


@dataclass(slots=True)
class Upload:
    """`file` is always there, perhaps empty; `golden` where it was sent; `settings` as decoded JSON."""

    file: Path
    golden: Path | None = None
    settings: Any = field(default_factory=dict)


async def receive(parts: AsyncIterator[bytes], content_type: str | None, folder: Path, max_bytes: int) -> Upload:
    """Reads a body into files of `folder`; `BadInput` says what is wrong with it, `NotReady` that the disk is."""
    kind, options = parse_options_header(content_type)
    places = {"file": folder / "model.onnx", "golden": folder / "golden.npz", "settings": folder / "settings.json"}
    limits = {"file": max_bytes, "golden": GOLDEN_MAX_BYTES, "settings": SETTINGS_MAX_BYTES}
    try:
        if kind != _FORM:
            await _body(parts, _Sink("file", places["file"], max_bytes))
            return Upload(places["file"])
        if not options.get(b"boundary"):
            raise BadInput("a form names its boundary in Content-Type")
        form = _Form(options[b"boundary"], places, limits)
        try:
            await form.read(parts)
        finally:
            form.close()
    except OSError as error:
        raise NotReady(f"the origin's disk does not take the upload: {error.strerror}") from None
    if "file" not in form.done:
        raise BadInput("the form has no part `file` with the ONNX file")
    return Upload(
        places["file"],
        places["golden"] if "golden" in form.done else None,
        _json(places["settings"].read_bytes()) if "settings" in form.done else {},
    )


class _Sink:
    """A file that takes up to a number of bytes."""

    def __init__(self, name: str, path: Path, max_bytes: int) -> None:
        self.name, self._left, self._max_bytes = name, max_bytes, max_bytes
        self._file: BinaryIO = path.open("wb")

    def write(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise BadInput(f"the {self.name} is over {self._max_bytes} bytes")
        self._file.write(data)

    def close(self) -> None:
        self._file.close()


async def _body(parts: AsyncIterator[bytes], sink: _Sink) -> None:
    try:
        async for part in parts:
            sink.write(part)
    finally:
        sink.close()


class _Form:
    """The callbacks of one parser. Between parts there is no sink."""

    def __init__(self, boundary: bytes, places: dict[str, Path], limits: dict[str, int]) -> None:
        self._places, self._limits = places, limits
        self._header, self._value, self._name = b"", b"", ""
        self._sink: _Sink | None = None
        self._ended = False
        self.done: set[str] = set()
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    async def read(self, parts: AsyncIterator[bytes]) -> None:
        try:
            async for part in parts:
                self._parser.write(part)
            self._parser.finalize()
        except FormParserError as error:
            raise BadInput(f"not a whole form: {error}") from None
        if not self._ended:
            raise BadInput("not a whole form: it is cut off")

    def close(self) -> None:
        if self._sink is not None:
            self._sink.close()

    def _part_begin(self) -> None:
        self._header, self._value, self._name = b"", b"", ""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            _, options = parse_options_header(self._value)
            self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._header, self._value = b"", b""

    def _headers_finished(self) -> None:
        if self._name not in self._places:
            raise BadInput(f"a form has the parts {', '.join(self._places)}, not {self._name[:80]!r}")
        if self._name in self.done:
            raise BadInput(f"the part {self._name} is there twice")
        self._sink = _Sink(self._name, self._places[self._name], self._limits[self._name])

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._sink is not None:
            self._sink.write(data[start:end])

    def _part_end(self) -> None:
        self.close()
        self._sink = None
        self.done.add(self._name)

    def _end(self) -> None:
        self._ended = True


def _json(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadInput(f"the settings: {error}") from None
