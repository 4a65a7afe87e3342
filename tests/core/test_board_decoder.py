"""A board that is read again: the same as one that is read for the first time, and what did not change is not made anew."""

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_node.board import BoardFile, BoardModel, models_file
from edge_node.board.decoder import BoardDecoder
from streams.folds.wanted import Seated
from tests.core.test_board import IDENTITY, a_wanted


def a_file(sequences: dict[str, int], policy: int = 1) -> BoardFile:
    wanted = {model: a_wanted(model, sequence) for model, sequence in sequences.items()}
    return BoardFile(
        node="n",
        generation=1,
        log=IDENTITY,
        policy=policy,
        positions={"mlcdn.releases": policy},
        purges="p",
        desired={name: Seated(wanted=w) for name, w in wanted.items()},
        models={
            name: BoardModel(wanted=w, path=f"{name}.onnx", slot=20 + i) for i, (name, w) in enumerate(wanted.items())
        },
        errors={"m": "download: gone"},
    )


BEFORE = a_file({"a": 1, "b": 1, "m": 1})


def test_only_what_changed_is_made_anew() -> None:
    decoder = BoardDecoder()
    first = decoder.decode(models_file.encode(BEFORE))
    after = a_file({"a": 1, "b": 2, "c": 1}, policy=2)
    second = decoder.decode(models_file.encode(after))
    assert (first, second) == (BEFORE, after)
    assert second.models["a"] is first.models["a"] and second.desired["a"] is first.desired["a"]
    assert second.models["b"] is not first.models["b"]
    # `m` was away, and what it was is not remembered for ever.
    third = decoder.decode(models_file.encode(BEFORE))
    assert third == BEFORE and third.models["m"] is not first.models["m"]


@given(at=st.integers(0, len(models_file.encode(BEFORE)) - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_file_is_refused_as_it_would_be_the_first_time(at: int, byte: int, cut: bool) -> None:
    decoder, whole = BoardDecoder(), models_file.encode(BEFORE)
    first = decoder.decode(whole)
    damaged = whole[:at] if cut else whole[:at] + bytes([byte]) + whole[at + 1 :]
    try:
        expected = models_file.decode(damaged)
    except ValueError:
        with pytest.raises(ValueError):
            decoder.decode(damaged)
    else:
        assert decoder.decode(damaged) == expected
        return
    # The next good one is read, on what was known before.
    again = decoder.decode(whole)
    assert again == BEFORE and again.models["a"] is first.models["a"]


def test_a_file_of_another_format_is_called_that() -> None:
    said = msgspec.json.decode(models_file.encode(BEFORE))
    said["format"], said["models"]["a"] = 99, {"of": "another shape"}
    with pytest.raises(ValueError, match="format 99"):
        BoardDecoder().decode(msgspec.json.encode(said))


@pytest.mark.parametrize("decode", [models_file.decode, BoardDecoder().decode])
def test_what_no_event_may_say_is_no_board(decode: Callable[[bytes], BoardFile]) -> None:
    """An error of another kind would reach who only asked for an answer."""
    with pytest.raises(ValueError, match="not a relative key"):
        decode(models_file.encode(BEFORE).replace(b'"models/a/', b'"/odels/a/'))
