"""Which releases may follow which: what a client of the old one sends is taken, and what it was promised stays true."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from origin.signature import SignatureChanged, changes
from schemas.events import Tensor


def t(name: str, *shape: int, kind: str = "FP32", **more: object) -> Tensor:
    return Tensor(name=name, datatype=kind, shape=shape, **more)  # type: ignore[arg-type]


X, Y = t("x", -1, 4), t("y", -1, 2)
OLD = ((X,), (Y,))


@pytest.mark.parametrize(
    ("new", "why"),
    [
        ((t("x", -1, -1),), "a fixed dimension becomes free"),
        ((t("x", -1, ranked=False),), "any rank is taken"),
        ((X, t("z", 1, optional=True)), "a new input may be left out"),
        ((t("z", 1, optional=True), X), "inputs are known by name"),
    ],
)
def test_an_input_may_take_more(new: tuple[Tensor, ...], why: str) -> None:
    assert changes(*OLD, new, (Y,)) == (), why


@pytest.mark.parametrize(
    ("new", "said"),
    [
        ((t("x", 1, 4),), "input 'x' was [N, 4], takes [1, 4]"),
        ((t("x", -1, 5),), "input 'x' was [N, 4], takes [N, 5]"),
        ((t("x", -1, 4, 1),), "input 'x' was [N, 4], takes [N, 4, 1]"),
        ((t("x", -1, 4, kind="FP64"),), "input 'x' was FP32, is FP64"),
        ((t("w", -1, 4, optional=True),), "input 'x' is gone"),
        ((X, t("z", 1)), "input 'z' is new and not optional"),
        ((t("x", -1, 4, optional=True),), "input 'x' is not the one required input any more"),
    ],
)
def test_an_input_may_not_take_less(new: tuple[Tensor, ...], said: str) -> None:
    assert [str(c) for c in changes(*OLD, new, (Y,))] == [said]


def test_what_was_optional_or_of_any_rank_stays_so() -> None:
    optional, unranked = t("o", -1, optional=True), t("u", -1, ranked=False)
    found = changes((X, optional, unranked), (Y,), (X, t("o", -1), t("u", -1)), (Y,))
    assert [str(c) for c in found] == ["input 'o' was optional, is required", "input 'u' was of any rank, takes [N]"]
    # Two were required, so nobody asks without a name: one may become optional.
    assert changes((X, t("z", 1)), (Y,), (X, t("z", 1, optional=True)), (Y,)) == ()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (Y, (t("y", 1, 2),), None),
        (Y, (Y, t("more", -1)), None),
        (t("y", -1, ranked=False), (Y,), None),
        (Y, (t("y", -1, 2, labels=("no", "yes")),), None),
        (Y, (t("y", -1, -1),), "output 'y' was [N, 2], is [N, N]"),
        (Y, (t("y", -1, 3),), "output 'y' was [N, 2], is [N, 3]"),
        (Y, (t("y", -1, ranked=False),), "output 'y' was [N, 2], is of any rank"),
        (Y, (t("y", -1, 2, kind="INT64"),), "output 'y' was FP32, is INT64"),
        (Y, (t("z", -1, 2),), "output 'y' is gone"),
        (Y, (t("more", -1), Y), "output 'y' was output 0, is output 1"),
        (
            t("y", -1, 2, labels=("no", "yes")),
            (t("y", -1, 2, labels=("yes", "no")),),
            "output 'y' had the columns [no, yes], has [yes, no]",
        ),
    ],
)
def test_an_output_may_promise_more_and_never_less(old: Tensor, new: tuple[Tensor, ...], said: str | None) -> None:
    assert [str(c) for c in changes((X,), (old,), (X,), new)] == ([said] if said else [])


def test_every_change_is_named_at_once() -> None:
    found = changes((X, t("z", 1)), (Y,), (t("x", -1, 4, kind="INT8"),), (t("w", 1),))
    error = SignatureChanged("m", "v1", found)
    assert str(error) == (
        "m does not fit the clients of v1, which is served now: input 'x' was FP32, is INT8; input 'z' is gone;"
        " output 'y' is gone"
    )


DIMENSIONS = st.sampled_from([-1, 1, 2])
TENSORS = st.builds(
    lambda shape, ranked: t("x", *(shape if ranked else [-1]), ranked=ranked),
    st.lists(DIMENSIONS, max_size=3),
    st.booleans(),
)
SHAPES = [shape for rank in range(4) for shape in product((1, 2, 3), repeat=rank)]


def allowed(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    if not tensor.ranked:
        return True
    return len(shape) == len(tensor.shape) and all(d in (-1, s) for d, s in zip(tensor.shape, shape, strict=True))


@given(TENSORS, TENSORS)
def test_a_shape_is_refused_if_and_only_if_a_client_can_trip_over_it(old: Tensor, new: Tensor) -> None:
    """By every shape there is, instead of by rules."""
    taken = all(allowed(new, s) for s in SHAPES if allowed(old, s))
    assert (changes((old,), (Y,), (new,), (Y,)) == ()) == taken
    promised = all(allowed(old, s) for s in SHAPES if allowed(new, s))
    assert (changes((X,), (old,), (X,), (new,)) == ()) == promised
