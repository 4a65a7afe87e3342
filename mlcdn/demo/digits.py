"""The demo's data and models: scikit-learn's handwritten digits, and four classifiers of them as ONNX.

The data ships with scikit-learn (1,797 images of 8 × 8, the UCI test set), so nothing is fetched.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Digits:
    """`held_out` float32 [N, 64] scaled to 0..1 and their `labels` int64 [N]; `v1` to `v4` are ONNX files."""

    held_out: NDArray[np.float32]
    labels: NDArray[np.int64]
    v1: Path
    v2: Path
    v3: Path
    v4: Path
    golden: Path


def train(directory: Path) -> Digits:
    """Trained on 1,437 digits, with 360 held out: a logistic regression (v1), a small neural network (v2), the same grown
    (v3), and one that learned from labels that had slipped by one (v4): sound as a file, and wrong."""
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split
    from sklearn.neural_network import MLPClassifier

    directory.mkdir(parents=True, exist_ok=True)
    pixels, labels = load_digits(return_X_y=True)
    scaled = (pixels / 16).astype(np.float32)
    known, held_out, known_labels, held_labels = train_test_split(scaled, labels, test_size=0.2, random_state=0)
    files = []
    with warnings.catch_warnings():
        # The network's training stops at its iteration limit on purpose; skl2onnx warns of its own dependencies.
        warnings.simplefilter("ignore")
        for version, model, taught in (
            ("v1", LogisticRegression(max_iter=500), known_labels),
            ("v2", MLPClassifier((64,), max_iter=150, random_state=0), known_labels),
            ("v3", MLPClassifier((96,), max_iter=150, random_state=1), known_labels),
            ("v4", MLPClassifier((64,), max_iter=100, random_state=2), (known_labels + 1) % 10),
        ):
            model.fit(known, taught)
            files.append(_export(model, known[:1], directory / f"digits-{version}.onnx"))
            if version == "v1":
                golden = _golden(model, held_out[:8], directory / "golden-v1.npz")
    v1, v2, v3, v4 = files
    return Digits(held_out, held_labels.astype(np.int64), v1, v2, v3, v4, golden)


def _export(model: Any, sample: NDArray[np.float32], path: Path) -> Path:
    from skl2onnx import to_onnx

    exported = to_onnx(model, sample, options={id(model): {"zipmap": False}})
    path.write_bytes(exported.SerializeToString())
    return path


def _golden(model: Any, rows: NDArray[np.float32], path: Path) -> Path:
    """Inputs and what scikit-learn itself answers: the ONNX file is held against the model it came from."""
    expected = {
        "input.X": rows,
        "output.label": model.predict(rows).astype(np.int64),
        "output.probabilities": model.predict_proba(rows).astype(np.float32),
    }
    np.savez(path, **expected)
    return path
