"""An MLflow model as one ONNX file: found in the registry or a run, downloaded within bounds, its weights put into it.

``models:/name/version``, ``models:/name@alias``, ``models:/m-<id>`` and ``runs:/run/path`` are asked of the tracking server
that MLflow's own settings name (MLFLOW_TRACKING_URI and the like).

Laws:
- An alias is resolved once, so what is labelled is what is downloaded; what moves by itself (``latest``, a stage) is
  refused.
- Of a model directory nothing but MLmodel, the ONNX file and the weights that it names is downloaded, and each only where
  the listing says how large it is. No pickle of it, and no code, is touched.
- MLflow writes weights beside the ONNX file; an artifact is one file, so they are put into it.

It must not know the log or the store. MLflow is an extra of its own, and imported here alone.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from inference.onnx_scan import MAX_PROTOBUF_BYTES
from schemas import names
from schemas.errors import BadInput, MlcdnError, ModelRefused, NotFound, Unreachable

SCHEMES: Final = ("models:/", "runs:/")
_VERSION: Final = re.compile(r"models:/+([^/@]+)/(\d+)")
_ALIAS: Final = re.compile(r"models:/+([^/@]+)@([^/@]+)")
_LOGGED: Final = re.compile(r"models:/+(m-[0-9a-f]+)")
_RUN: Final = re.compile(r"runs:/+([^/]+)/(.*[^/])/*")
_MLMODEL_MAX_BYTES: Final = 1_048_576
_AWAY: Final = frozenset({"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "IO_ERROR"})


def fetch(uri: str, directory: Path, max_bytes: int = MAX_PROTOBUF_BYTES) -> tuple[Path, str]:
    """The ONNX file, in `directory`, and MLflow's own label of it: version, model id or run id."""
    mlflow = _mlflow()
    with _translating(mlflow):
        found, label = _resolved(mlflow, uri)
        model = _Directory(mlflow, found, directory)
        path = model.download(_onnx_file(model, uri), max_bytes)
        return _whole(model, path, max_bytes), label


class _Directory:
    """The files of one model where MLflow keeps them."""

    def __init__(self, mlflow: Any, uri: str, directory: Path) -> None:
        self._mlflow, self._uri, self._to = mlflow, uri, directory
        listed = mlflow.artifacts.list_artifacts(artifact_uri=uri)
        self._sizes = {file.path.rpartition("/")[2]: file.file_size for file in listed if not file.is_dir}

    def has(self, name: str) -> bool:
        return name in self._sizes

    def size(self, name: str) -> int:
        size = self._sizes.get(name)
        if size is None:
            raise NotFound(f"MLflow lists no file {name!r} of a known size at {self._uri}")
        return int(size)

    def download(self, name: str, max_bytes: int) -> Path:
        if (size := self.size(name)) > max_bytes:
            raise ModelRefused(f"{name} at {self._uri} has {size} bytes, at most {max_bytes} are taken")
        done = Path(
            self._mlflow.artifacts.download_artifacts(artifact_uri=f"{self._uri}/{name}", dst_path=str(self._to))
        )
        if done.is_symlink() or not done.is_file() or done.stat().st_size != size:
            raise ModelRefused(f"{name} at {self._uri} is not the file of {size} bytes that MLflow lists")
        return done


def _resolved(mlflow: Any, uri: str) -> tuple[str, str]:
    """A URI that means one thing for ever, and its label."""
    if match := _VERSION.fullmatch(uri):
        return f"models:/{match[1]}/{match[2]}", match[2]
    if match := _ALIAS.fullmatch(uri):
        version = str(mlflow.MlflowClient().get_model_version_by_alias(match[1], match[2]).version)
        return f"models:/{match[1]}/{version}", version
    if match := _LOGGED.fullmatch(uri):
        # Files of one are not found by models:/m-ID/FILE, which is read as the version of a registered name.
        return str(mlflow.MlflowClient().get_logged_model(match[1]).artifact_location).rstrip("/"), match[1]
    if match := _RUN.fullmatch(uri):
        return f"runs:/{match[1]}/{match[2]}", match[1]
    raise BadInput(f"{uri} is not models:/NAME/NUMBER, models:/NAME@ALIAS, models:/m-ID or runs:/RUN/PATH")


def _onnx_file(model: _Directory, uri: str) -> str:
    if not model.has("MLmodel"):
        raise NotFound(f"there is no MLflow model at {uri}: it has no file MLmodel")
    yaml: Any = importlib.import_module("yaml")
    try:
        said = yaml.safe_load(model.download("MLmodel", _MLMODEL_MAX_BYTES).read_bytes())
        flavors = dict(said["flavors"])
    except (yaml.YAMLError, TypeError, KeyError, ValueError):
        raise ModelRefused(f"the file MLmodel at {uri} does not say which flavors there are") from None
    if "onnx" not in flavors:
        has = ", ".join(sorted(map(str, flavors))) or "none"
        raise ModelRefused(f"{uri} has no ONNX flavor, only {has}: log it with mlflow.onnx.log_model")
    return names.file_name(str(dict(flavors["onnx"] or {}).get("data", "model.onnx")))


def _whole(model: _Directory, path: Path, max_bytes: int) -> Path:
    """The file with its weights in it; the file itself, byte for byte, where they are already."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx.external_data_helper import load_external_data_for_model

    try:
        proto = onnx.load_model(path, load_external_data=False)
        outside = {
            entry.value for t in proto.graph.initializer for entry in t.external_data if entry.key == "location"
        }  # what stands elsewhere than in an initializer stays where it is, and the trial refuses it
        if not outside:
            return path
        left = max_bytes - path.stat().st_size
        for name in sorted(outside):
            left -= model.download(names.file_name(name), left).stat().st_size
        load_external_data_for_model(proto, str(path.parent))
        whole = path.with_suffix(".whole.onnx")
        whole.write_bytes(proto.SerializeToString())
        return whole
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise ModelRefused(
            f"the weights cannot be put into the ONNX file: {str(error).splitlines()[0][:200]}"
        ) from None


def _mlflow() -> Any:
    # A release is nobody else's business; and MLflow's own patience is 7 tries of 2 minutes.
    for name, value in (
        ("MLFLOW_DISABLE_TELEMETRY", "true"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"),
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "20"),
        ("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false"),
    ):
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("mlflow")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "mlflow":
            raise
        raise BadInput("MLflow is not installed: pip install 'mlcdn[mlflow]'") from None


@contextmanager
def _translating(mlflow: Any) -> Iterator[None]:
    try:
        yield
    except MlcdnError:
        raise
    except mlflow.exceptions.MlflowException as error:
        said = str(error).strip().splitlines()[0][:300]
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise NotFound(f"MLflow: {said}") from None
        if error.error_code in _AWAY:
            raise Unreachable("MLflow", mlflow.get_tracking_uri(), said) from error
        raise BadInput(f"MLflow: {said}") from None
    except OSError as error:
        raise NotFound(f"MLflow gives no such artifact: {error.strerror or error}") from None
