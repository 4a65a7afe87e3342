"""Keys: what changes an answer changes the key, and nothing else does."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_node.caching.keys import prediction_key

DIGEST = "d" * 64
ROW = np.arange(6, dtype="<f4").reshape(2, 3)


def key(inputs: Any = None, model: str = "m", digest: str = DIGEST, **rest: Any) -> bytes:
    return prediction_key(model, digest, {"x": ROW} if inputs is None else inputs, **rest)


def test_keys_do_not_change_from_one_release_of_ours_to_the_next() -> None:
    """A changed framing must change the `person` of the hash, and then this: nodes of a region share keys."""
    assert key().hex() == "dc87803f0c5264fd2120e0f647aba194"


def test_what_does_not_change_the_answer_does_not_change_the_key() -> None:
    two = {"a": ROW, "b": ROW}
    assert key(two) == key(dict(reversed(two.items())))
    assert key({"x": np.asfortranarray(ROW)}) == key()
    assert key({"x": ROW.astype(">f4")}) == key()
    assert key({"x": np.repeat(ROW, 2, axis=1)[:, ::2]}) == key()
    assert key(outputs=["b", "a"]) == key(outputs=["a", "b", "a"])
    assert key(parameters={"a": 1, "b": [2]}) == key(parameters={"b": (2,), "a": 1})
    assert key(parameters={}) == key(parameters=None) and key(tenant="") == key(tenant=None)


def test_everything_that_may_change_the_answer_changes_the_key() -> None:
    nan_payload = np.frombuffer(b"\x01\x00\xc0\x7f", "<f4").reshape(1)
    texts: list[Any] = [[b"ab", b"c"], [b"a", b"bc"], [b"abc", b""], [b"abc"]]
    keys = [
        key(),
        key(model="n"),
        key(digest="e" * 64),
        key(tenant="t"),
        key(outputs=[]),
        key(outputs=["a"]),
        key(outputs=["a", "b"]),
        key(outputs=["ab"]),
        *(key(parameters={"p": value}) for value in (None, True, 1, 1.0, "1", b"1", [1], {"1": 1}, [[1]], [1, 1])),
        key({"y": ROW}),
        key({}),
        key({"x": ROW, "y": ROW}),
        key({"x": ROW.reshape(3, 2)}),
        key({"x": ROW.reshape(6)}),
        key({"x": ROW.view("<i4")}),
        key({"x": ROW.astype("<f8")}),
        key({"x": np.zeros((0, 3), "<f4")}),
        key({"x": np.zeros((3, 0), "<f4")}),
        key({"x": np.array([0.0], "<f4")}),
        key({"x": np.array([-0.0], "<f4")}),
        key({"x": np.array([np.nan], "<f4")}),
        key({"x": nan_payload}),
        key({"x": np.array(0.0, "<f4")}),
        *(key({"x": np.array(text, dtype=object)}) for text in texts),
        key({"x": np.array([[b"ab", b"c"]], dtype=object)}),
    ]
    assert all(len(k) == 16 for k in keys)
    same = [(a, b) for (a, one), (b, two) in combinations(enumerate(keys), 2) if one == two]
    assert not same


texts = st.lists(st.binary(max_size=4), max_size=4)


@given(texts, texts)
def test_no_two_lists_of_byte_strings_share_a_key(one: list[bytes], two: list[bytes]) -> None:
    first, second = (np.array([*items, None], dtype=object)[:-1] for items in (one, two))
    assert (key({"x": first}) == key({"x": second})) == (one == two)


names = st.dictionaries(st.text(max_size=3), st.one_of(st.text(max_size=3), st.integers(), st.booleans()), max_size=3)


@given(names, names)
def test_no_two_sets_of_parameters_share_a_key(one: dict[str, Any], two: dict[str, Any]) -> None:
    def typed(parameters: dict[str, Any]) -> dict[str, Any]:
        return {name: (type(value), value) for name, value in parameters.items()}

    assert (key(parameters=one) == key(parameters=two)) == (typed(one) == typed(two))


def test_what_has_no_bytes_is_refused() -> None:
    for element in ("text", 1, None):
        with pytest.raises(TypeError):
            key({"x": np.array([element], dtype=object)})
    with pytest.raises(TypeError):
        key(parameters={"p": object()})
