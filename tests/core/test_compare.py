"""Two releases' answers, held against each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from inference.compare import compared, packed_values, values
from inference.datatypes import TensorSpec
from inference.golden import ATOL, RTOL
from inference.packed import pack_outputs


def floats(*rows: list[float]) -> dict[str, Any]:
    return {"y": np.array(rows, np.float32)}


def texts(*flat: bytes) -> dict[str, Any]:
    array = np.empty(len(flat), object)
    array[:] = flat
    return {"y": array}


@pytest.mark.parametrize(
    ("wanted", "got", "differs"),
    [
        (floats([1.0, 2.0]), floats([1.0, 2.0]), False),
        (floats([1.0, 2.0]), floats([1.0009, 2.0]), False),
        (floats([1.0, 2.0]), floats([1.0021, 2.0]), True),
        (floats([math.nan, 2.0]), floats([math.nan, 2.0]), False),
        (floats([math.nan, 2.0]), floats([1.0, 2.0]), True),
        (floats([math.inf, 2.0]), floats([math.inf, 2.0]), False),
        (floats([math.inf, 2.0]), floats([-math.inf, 2.0]), True),
        (floats([1.0, 2.0]), floats([1.0, 2.0], [1.0, 2.0]), True),
        (floats([1.0, 2.0]), {}, True),
        (floats([1.0, 2.0]), {"y": np.array([[1.0, 2.0]], np.float64)}, False),
        (floats([1.0, 2.0]), {"y": np.array([[1, 2]], np.int64)}, True),
        ({"y": np.array([1_000_000])}, {"y": np.array([1_000_001])}, True),
        (texts(b"cat", b"dog"), texts(b"cat", b"dog"), False),
        (texts(b"cat", b"dog"), texts(b"cat", b"dig"), True),
        ({"y": np.zeros((0, 4), np.float32)}, {"y": np.zeros((0, 4), np.float32)}, False),
        # What the candidate gives beside what was asked for is its own affair.
        (floats([1.0, 2.0]), floats([1.0, 2.0]) | {"more": np.zeros(1)}, False),
    ],
)
def test_what_differs(wanted: dict[str, Any], got: dict[str, Any], differs: bool) -> None:
    assert (compared(wanted, got, RTOL, ATOL).difference is not None) == differs


def test_tolerances_are_the_releases() -> None:
    one, other = floats([1.0, 100.0]), floats([1.2, 100.0])
    assert compared(one, other, 0.0, 0.1).difference is not None
    assert compared(one, other, 0.0, 0.3).difference is None and compared(one, other, 0.25, 0.0).difference is None


def test_the_largest_difference_is_of_finite_values_whether_allowed_or_not() -> None:
    found = compared(floats([1.0, math.nan, 7.0]), floats([1.25, 5.0, 7.0]), 1.0, 1.0)
    assert found.max_difference == 0.25
    assert compared(floats([3e38, 0.0]), floats([-3e38, 0.0]), RTOL, ATOL).max_difference == pytest.approx(6e38)


def test_top1_is_of_rows_of_floats() -> None:
    found = compared(floats([1, 3, 2], [9, 8, 7], [0, 0, 1]), floats([1, 2, 3], [9, 8, 7], [0, 0, 1]), RTOL, ATOL)
    assert (found.top1_rows, found.top1_agreements) == (3, 2)
    for no_ranking in (floats([1.0], [2.0]), {"y": np.array([1.0, 2.0])}, {"y": np.array([[1, 2]])}):
        assert compared(no_ranking, no_ranking, RTOL, ATOL).top1_rows == 0


def test_bf16_is_compared_as_numbers() -> None:
    spec = TensorSpec("y", "BF16", (-1, 2))
    # 1.0, and the next bf16 above it, 0.8 % away; 2.0 in both.
    one, next_up = np.array([[0x3F80, 0x4000]], np.uint16), np.array([[0x3F81, 0x4000]], np.uint16)
    wanted = packed_values(pack_outputs({"y": one}, [spec]))
    assert compared(wanted, values({"y": next_up}, [spec]), 0.01, 0.0).difference is None
    found = compared(wanted, values({"y": next_up}, [spec]), 0.001, 0.0)
    assert found.difference is not None and found.max_difference == pytest.approx(1 / 128)
    assert (found.top1_rows, found.top1_agreements) == (1, 1)
