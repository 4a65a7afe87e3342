"""Reads models.json again and again, and makes new objects only of what changed in it.

    bytes → the file, its models not yet looked into → of those whose bytes are as before, the objects of before

Of a hundred models one changes at a time: to decode them all took the loop that serves 1 to 4 ms each time, and left its
collector two thousand objects.

Laws: what comes out, or is raised, is what `models_file.decode` has; of a file that is not whole nothing is remembered.
It must not know where the bytes are from.
"""

from __future__ import annotations

from typing import Any, Final, get_args

import msgspec

from edge_node.board.models_file import BoardFile, refused

_FIELDS: Final = {field.name: field for field in msgspec.structs.fields(BoardFile)}
# Those that grow with the number of models.
_BY_NAME: Final = ("desired", "models")


def _field(field: msgspec.structs.FieldInfo) -> Any:
    if field.name in _BY_NAME:
        return (field.name, dict[str, msgspec.Raw], msgspec.field(default_factory=dict))
    if field.required:
        return (field.name, field.type)
    if field.default_factory is not msgspec.NODEFAULT:
        return (field.name, field.type, msgspec.field(default_factory=field.default_factory))
    return (field.name, field.type, field.default)


_SKETCH: Final = msgspec.json.Decoder(
    msgspec.defstruct("Sketch", [_field(field) for field in _FIELDS.values()], kw_only=True)
)
_VALUES: Final = {name: msgspec.json.Decoder(get_args(_FIELDS[name].type)[1]) for name in _BY_NAME}


class BoardDecoder:
    """One reader's: it remembers the last file."""

    def __init__(self) -> None:
        self._before: dict[str, dict[str, tuple[bytes, Any]]] = {name: {} for name in _BY_NAME}

    def decode(self, data: bytes) -> BoardFile:
        """Raises `ValueError` for what is not a whole board file."""
        with refused():
            return self._decode(data)

    def _decode(self, data: bytes) -> BoardFile:
        sketch = msgspec.structs.asdict(_SKETCH.decode(data))
        # First, for a file of another format is to be called that, whatever stands in it.
        head = BoardFile(**(sketch | {name: {} for name in _BY_NAME}))
        now = {name: _seen(sketch[name], self._before[name], _VALUES[name]) for name in _BY_NAME}
        whole = {name: {key: value for key, (_, value) in seen.items()} for name, seen in now.items()}
        self._before = now
        return msgspec.structs.replace(head, **whole)


def _seen(
    said: dict[str, msgspec.Raw], before: dict[str, tuple[bytes, Any]], values: msgspec.json.Decoder[Any]
) -> dict[str, tuple[bytes, Any]]:
    seen = {}
    for name, raw in said.items():
        # A copy: a view would keep the whole file it is of.
        text = bytes(raw)
        known = before.get(name)
        seen[name] = known if known is not None and known[0] == text else (text, values.decode(text))
    return seen
