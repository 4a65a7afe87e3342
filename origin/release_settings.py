"""The settings of a release as a document: what a TOML file or the admin API says, held against one schema.

The fields are those of `ReleaseRequest` but for the model, its file and its author, which come with the act itself: a field
that a release learns is a setting by that alone.

Laws: an unknown name is refused with the nearest known one, at any depth; a value of the wrong type is refused by its
path; the schema that is printed is the one that is checked. It must not know options, HTTP or where a document lies.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from origin.release_request import ReleaseRequest
from schemas.errors import BadInput

MAX_BYTES: Final = 1_048_576
APART: Final = frozenset({"model", "path", "author"})
_SPOKEN: Final = {"golden": "Path of an .npz file, relative to the settings file; the admin API takes a part instead."}

Document = dict[str, Any]


def _fields() -> list[tuple[str, Any, Any]]:
    hints = typing.get_type_hints(ReleaseRequest)
    made = []
    for given in dataclasses.fields(ReleaseRequest):
        if given.name not in APART:
            # A path is text in a document.
            kind = str | None if hints[given.name] == Path | None else hints[given.name]
            default = (
                msgspec.field(default_factory=given.default_factory)
                if given.default is dataclasses.MISSING and given.default_factory is not dataclasses.MISSING
                else given.default
            )
            made.append((given.name, kind, default))
    return made


ReleaseSettings: Final = msgspec.defstruct("ReleaseSettings", _fields(), frozen=True, kw_only=True)


def read_toml(path: Path) -> Document:
    """The document in a file, checked; the golden file is found beside it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise BadInput(f"{path} has more than {MAX_BYTES} bytes")
        given = tomllib.loads(data.decode())
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise BadInput(f"{path}: {error}") from None
    document = checked(given, str(path))
    if document.get("golden") is not None:
        document["golden"] = str(path.parent / document["golden"])
    return document


def checked(given: object, where: str) -> Document:
    """`given` if every name and type in it is one of a release; `BadInput` says which is not."""
    if not isinstance(given, dict):
        raise BadInput(f"{where}: the settings of a release are a table")
    _no_strangers(given, ReleaseSettings, where, ())
    _converted(given, where)
    return dict(given)


def request(document: Document, *, model: str, path: Path, author: str, where: str = "settings") -> ReleaseRequest:
    """The release that the document describes."""
    said = _converted(document, where)
    values = {name: getattr(said, name) for name, _, _ in _fields()}
    if values.get("golden") is not None:
        values["golden"] = Path(values["golden"])
    return ReleaseRequest(model=model, path=path, author=author, **values)


def merged(document: Document, over: Mapping[str, Any]) -> Document:
    """`over` wins, name by name within tables."""
    result = dict(document)
    for name, value in over.items():
        there = result.get(name)
        result[name] = merged(there, value) if isinstance(there, dict) and isinstance(value, Mapping) else value
    return result


def json_schema() -> Document:
    """JSON Schema 2020-12 of the document, closed at every depth as the check is."""
    components = schemas("#/$defs/{name}")
    own = components.pop("ReleaseSettings")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **own, "$defs": components}


def schemas(ref_template: str) -> dict[str, Document]:
    """The same by name, for a document that holds them elsewhere; the whole is `ReleaseSettings`."""
    _, components = msgspec.json.schema_components([ReleaseSettings], ref_template=ref_template)
    for part in components.values():
        if part.get("type") == "object":
            part["additionalProperties"] = False
            # Prose for who reads the code says nothing of a document's form.
            part.pop("description", None)
    for name, words in _SPOKEN.items():
        components["ReleaseSettings"]["properties"][name]["description"] = words
    # As JSON has it: a default may be a tuple.
    plain: dict[str, Document] = msgspec.json.decode(msgspec.json.encode(components))
    return plain


def _converted(given: Document, where: str) -> Any:
    try:
        return msgspec.convert(given, ReleaseSettings)
    except msgspec.ValidationError as error:
        raise BadInput(f"{where}: {error}") from None
    except BadInput as error:
        raise BadInput(f"{where}: {error}") from None


def _no_strangers(given: object, kind: Any, where: str, path: tuple[str, ...]) -> None:
    """msgspec names an unknown field only where the type forbids it, which the types of events must not."""
    known = _struct(kind)
    if known is None or not isinstance(given, dict):
        element = _element(kind)
        if element is not None and isinstance(given, list):
            for index, item in enumerate(given):
                _no_strangers(item, element, where, (*path, str(index)))
        return
    fields = {f.encode_name: f.type for f in msgspec.structs.fields(known)}
    for name, value in given.items():
        if name not in fields:
            raise BadInput(f"{where}: unknown setting {'.'.join((*path, name))!r}; {_meant(name, path)}")
        _no_strangers(value, fields[name], where, (*path, name))


def _meant(name: str, path: tuple[str, ...]) -> str:
    """The setting that is likely meant: near by name, wherever it stands; one that begins alike before others."""
    if name in APART:
        return "it comes with the act of publishing, not with the settings"
    known = _names(ReleaseSettings, ())
    begins = [said for said in known if said.rpartition(".")[2].startswith(name) and len(name) >= 3]
    leaves = {said.rpartition(".")[2]: said for said in known}
    near = begins[:1] or [leaves[leaf] for leaf in difflib.get_close_matches(name, leaves, 1)]
    if near:
        return f"did you mean {near[0]!r}?"
    here = ".".join(path)
    return "there are " + ", ".join(sorted(said for said in known if said.rpartition(".")[0] == here))


def _names(kind: type[msgspec.Struct], path: tuple[str, ...]) -> list[str]:
    """Every setting's dotted name."""
    found = []
    for given in msgspec.structs.fields(kind):
        here = (*path, given.encode_name)
        found.append(".".join(here))
        inner = _struct(_element(given.type) or given.type)
        found += _names(inner, here) if inner is not None else []
    return found


def _struct(kind: Any) -> type[msgspec.Struct] | None:
    """The struct that `kind` is, or that it is optionally."""
    for one in (kind, *typing.get_args(kind)):
        if isinstance(one, type) and issubclass(one, msgspec.Struct):
            return None if _element(kind) is not None else one
    return None


def _element(kind: Any) -> Any:
    """What a list of that kind holds."""
    arguments = typing.get_args(kind)
    return arguments[0] if typing.get_origin(kind) in (tuple, list) and arguments else None
