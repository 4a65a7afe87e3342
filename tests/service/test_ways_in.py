"""Ways in to a release: S3 keys, MLflow models, settings files and CI, by the command line over a real store and a real log."""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import onnx
import pytest
import typer
import yaml
from botocore.config import Config

from inference.golden import write_golden
from inference.onnx_model import OnnxModel, SessionSettings
from mlcdn.cli.app import app, run
from mlcdn.identities import Identities, ensure_identities
from mlcdn.local_stack.running import RunningStack
from origin import release_settings, sources
from schemas import settings
from schemas.errors import ModelRefused
from streams.artifacts.bucket import Bucket
from streams.audit.control import At, fold_releases
from streams.folds.releases import ModelHistory
from streams.log.keys import load_roots
from streams.log.reader import KafkaReader
from tests.models import mlp_bytes, sha256

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


class Desk:
    """The command line, the store beside it, and what the log then holds."""

    def __init__(self, stack: RunningStack, identities: Identities, out: Callable[[], tuple[str, str]]) -> None:
        a = stack.addresses
        self.bucket, self._out = a.s3_bucket, out
        self._reader, self._roots = KafkaReader(a.kafka), load_roots(identities.roots)
        self.s3 = boto3.client(
            "s3",
            endpoint_url=a.s3_endpoint,
            aws_access_key_id=a.s3_access_key,
            aws_secret_access_key=a.s3_secret_key,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, proxies={}),
        )

    def __call__(self, *arguments: str, expect: int = 0) -> str:
        """Stdout where it succeeds, the last line of stderr where it does not."""
        code = run(list(arguments))
        out, err = self._out()
        assert code == expect, out + err
        return out if expect == 0 else err.strip().splitlines()[-1]

    def json(self, *arguments: str) -> Any:
        return json.loads(self(*arguments, "--json"))

    def released(self, model: str) -> ModelHistory:
        return fold_releases(self._reader, self._roots, At())[0].models[model]


@pytest.fixture(scope="module")
def identities(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Identities:
    import asyncio

    return asyncio.run(ensure_identities(tmp_path_factory.mktemp("keys"), stack.addresses.kafka, lambda _: None))


@pytest.fixture
def desk(
    stack: RunningStack,
    identities: Identities,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Desk]:
    a = stack.addresses
    for name, value in {
        "KAFKA": a.kafka,
        "S3_ENDPOINT": a.s3_endpoint,
        "S3_BUCKET": a.s3_bucket,
        "S3_ACCESS_KEY": a.s3_access_key,
        "S3_SECRET_KEY": a.s3_secret_key,
        "ROOT_KEYS": str(identities.roots),
        "SIGNING_KEY": str(identities.operator),
    }.items():
        monkeypatch.setenv(f"MLCDN_{name}", value)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path)

    def said() -> tuple[str, str]:
        captured = capsys.readouterr()
        return captured.out, captured.err

    yield Desk(stack, identities, said)
    assert list((tmp_path / "tmp").iterdir()) == [], "what was downloaded was left behind"


def test_a_key_in_s3_is_a_source(desk: Desk) -> None:
    desk.s3.put_object(Bucket=desk.bucket, Key="exports/Some Model.onnx", Body=mlp_bytes(61))
    said = desk.json("publish", "from-s3", f"s3://{desk.bucket}/exports/Some Model.onnx")
    assert (said["digest"], said["version"]) == (sha256(mlp_bytes(61)), sha256(mlp_bytes(61))[:12])
    assert said["trial"]["load_ms"] > 0 and said["trial"]["batchable"] is True and said["signature_changes"] == []
    assert desk.json("publish", "from-s3", "exports/Some Model.onnx")["sequence"] == 2
    # A file of that name goes before a key.
    Path("exports").mkdir()
    Path("exports/Some Model.onnx").write_bytes(mlp_bytes(62))
    assert desk.json("publish", "from-s3", "exports/Some Model.onnx")["digest"] == sha256(mlp_bytes(62))


@pytest.mark.parametrize(
    ("source", "code", "said"),
    [
        ("nowhere.onnx", 2, "nowhere.onnx is no file, and no key in the bucket"),
        ("./nowhere.onnx", 2, "./nowhere.onnx is no file"),
        ("/nowhere.onnx", 2, "/nowhere.onnx is no file"),
        (".", 2, ". is no file"),
        ("https://example.org/model.onnx", 2, "is no file"),
        ("s3://", 2, "is not of the form s3://BUCKET/KEY"),
        ("s3://bucket", 2, "is not of the form s3://BUCKET/KEY"),
        ("s3://no-such-bucket/key", 1, "there is no s3://no-such-bucket/key"),
    ],
)
def test_what_is_no_source_gets_a_clear_no(desk: Desk, source: str, code: int, said: str) -> None:
    assert said in desk("publish", "nowhere", source, expect=code)


def test_an_object_is_bounded_before_and_while_it_is_read(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.s3.put_object(Bucket=desk.bucket, Key="exports/large.onnx", Body=bytes(100_000))
    source = f"s3://{desk.bucket}/exports/large.onnx"
    with (
        pytest.raises(ModelRefused, match="100000 bytes, at most 99999"),
        sources.opened(source, settings.load(), 99_999),
    ):
        pass
    for lie in (99_999, 100_001):
        monkeypatch.setattr(Bucket, "size", lambda _, __, lie=lie: lie)
        with pytest.raises(ModelRefused, match=f"not the {lie} it said"), sources.opened(source, settings.load()):
            pass


def test_options_win_over_the_settings_file(desk: Desk) -> None:
    Path("model.onnx").write_bytes(mlp_bytes(63))
    said = 'version = "by file"\nreason = "weekly"\nmax_batch = 7\n[cache]\nttl_s = 60\ntiers = "never"'
    Path("release.toml").write_text(said)
    arguments = ["publish", "settled", "model.onnx", "--settings", "release.toml"]
    assert desk.json(*arguments, "--version", "by hand", "--ttl", "5")["version"] == "by hand"
    history = desk.released("settled")
    assert history.stable is not None
    released = history.stable.released
    assert (released.version, released.reason, released.batching.max_size) == ("by hand", "weekly", 7)
    assert (released.cache.ttl_s, released.cache.tiers) == (5.0, "never")
    Path("release.toml").write_text("ttl = 60")
    assert desk(*arguments, expect=2) == "mlcdn: release.toml: unknown setting 'ttl'; did you mean 'cache.ttl_s'?"
    assert json.loads(desk("publish", "--print-settings-schema")) == release_settings.json_schema()


def test_a_changed_signature_needs_an_option_and_is_told(desk: Desk) -> None:
    Path("one.onnx").write_bytes(mlp_bytes(1))
    Path("two.onnx").write_bytes(mlp_bytes(2, (16, 8)))
    assert "trial: loaded in" in desk("publish", "resigned", "one.onnx", "--version", "one")
    refused = desk("publish", "resigned", "two.onnx", expect=1)
    assert refused.endswith("clients of one, which is served now: input 'features' was [N, 32], takes [N, 16]")
    told = desk("publish", "resigned", "two.onnx", "--allow-signature-change")
    assert "changed for clients: input 'features' was [N, 32], takes [N, 16]" in told
    said = desk.json("publish", "resigned", "one.onnx", "--allow-signature-change")
    assert said["signature_changes"] == [{"side": "input", "tensor": "features", "how": "was [N, 16], takes [N, 32]"}]


class Tracking:
    """A tracking store of MLflow in files, and a registry in it."""

    def __init__(self, mlflow: Any, uri: str) -> None:
        self._client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._experiment = self._client.create_experiment("test")

    def log(self, folder: Path) -> str:
        """The run that has the folder as its artifact `model`."""
        run_id: str = self._client.create_run(self._experiment).info.run_id
        self._client.log_artifacts(run_id, str(folder), "model")
        return run_id

    def register(self, name: str, run_id: str, alias: str) -> str:
        self._client.create_registered_model(name)
        version = self._client.create_model_version(name, f"runs:/{run_id}/model", run_id).version
        self._client.set_registered_model_alias(name, alias, version)
        return str(version)


@pytest.fixture
def tracking(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracking:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    # The store in files takes no new features, which is what a test of reading wants of it; a database needs the server.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow = pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    uri = f"file://{tmp_path / 'mlruns'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", uri)
    return Tracking(mlflow, uri)


def opened(source: str, max_bytes: int = 2**31) -> tuple[bytes, str | None]:
    with sources.opened(source, settings.load(), max_bytes) as found:
        return found.path.read_bytes(), found.version


def logged(folder: Path, model: bytes, flavors: dict[str, Any] | None = None, *, beside: bool = True) -> Path:
    """What mlflow.onnx.save_model writes: weights above a kilobyte stand beside the file."""
    folder.mkdir()
    proto = onnx.load_model_from_string(model)
    onnx.save_model(proto, str(folder / "model.onnx"), save_as_external_data=beside)
    onnx_flavor = {"onnx": {"code": None, "data": "model.onnx", "onnx_version": onnx.__version__}}
    pyfunc = {"python_function": {"data": "model.onnx", "loader_module": "mlflow.onnx"}}
    (folder / "MLmodel").write_text(yaml.safe_dump({"flavors": onnx_flavor | pyfunc if flavors is None else flavors}))
    return folder


def test_a_model_of_mlflow_is_a_source(desk: Desk, tracking: Tracking, tmp_path: Path) -> None:
    model = mlp_bytes(64)
    Path("model.onnx").write_bytes(model)
    x = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
    scores = OnnxModel.load(Path("model.onnx"), sha256(model), SessionSettings()).run({"features": x})
    write_golden(Path("golden.npz"), {"features": x}, scores)
    run_id = tracking.log(logged(tmp_path / "beside", model))
    version = tracking.register("scorer", run_id, "champion")
    assert len(list((tmp_path / "beside").iterdir())) == 3
    found = {
        uri: opened(uri) for uri in (f"models:/scorer/{version}", "models:/scorer@champion", f"runs:/{run_id}/model")
    }
    assert [label for _, label in found.values()] == [version, version, run_id]
    assert len({data for data, _ in found.values()}) == 1
    # The golden file has the answers of the model before its weights were taken apart.
    said = desk.json("publish", "from-mlflow", "models:/scorer@champion", "--golden", "golden.npz")
    assert (said["version"], said["trial"]["golden"]) == (version, "passed")
    assert desk.json("publish", "from-mlflow", "models:/scorer/1", "--version", "mine")["version"] == "mine"
    # With its weights inside, it is the file that was logged.
    whole = tracking.log(logged(tmp_path / "inside", model, beside=False))
    assert opened(f"runs:/{whole}/model") == (model, whole)
    with pytest.raises(ModelRefused, match="bytes, at most 1000 are taken"):
        opened(f"runs:/{whole}/model", 1_000)
    # Neither alone is too large, and together they are.
    with pytest.raises(ModelRefused, match=r"bytes, at most \d+ are taken"):
        opened(f"runs:/{run_id}/model", len(model) - 1_000)


def test_what_mlflow_does_not_have_is_named(desk: Desk, tracking: Tracking, tmp_path: Path) -> None:
    trees = {"sklearn": {"pickled_model": "model.pkl"}, "python_function": {"loader_module": "mlflow.sklearn"}}
    tracking.register("trees", tracking.log(logged(tmp_path / "trees", mlp_bytes(1), trees)), "best")
    outside = {"onnx": {"data": "../MLmodel"}}
    escaping = tracking.log(logged(tmp_path / "outside", mlp_bytes(1), outside))
    folder = logged(tmp_path / "lost", mlp_bytes(1))
    [weights] = [p for p in folder.iterdir() if p.name not in ("MLmodel", "model.onnx")]
    weights.unlink()
    lost = tracking.log(folder)
    folder = logged(tmp_path / "secret", mlp_bytes(1))
    proto = onnx.load_model(folder / "model.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../../../../../../../etc/passwd"
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    secret = tracking.log(folder)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "model.onnx").write_bytes(mlp_bytes(1))
    no_model = tracking.log(tmp_path / "none")
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "MLmodel").write_text("!!python/object/apply:os.mkdir ['executed']")
    garbage = tracking.log(tmp_path / "garbage")
    for uri, code, said in (
        ("models:/trees@best", 1, "models:/trees@best has no ONNX flavor, only python_function, sklearn"),
        ("models:/trees/2", 1, "version=2) not found"),
        ("models:/nobody/1", 1, "name=nobody"),
        ("models:/trees@worst", 2, "alias worst not found"),
        ("models:/trees/latest", 2, "is not models:/NAME/NUMBER"),
        ("runs:/0123456789abcdef/model", 1, "'0123456789abcdef' not found"),
        (f"runs:/{no_model}/model", 1, "has no file MLmodel"),
        (f"runs:/{no_model}/elsewhere", 1, "elsewhere"),
        (f"runs:/{garbage}/model", 1, "does not say which flavors there are"),
        (f"runs:/{escaping}/model", 2, "file name '../MLmodel'"),
        (f"runs:/{lost}/model", 1, f"no file '{weights.name}'"),
        (f"runs:/{secret}/model", 2, "file name '../../../../../../../../etc/passwd'"),
    ):
        assert said in desk("publish", "not-in-mlflow", uri, expect=code), uri
    assert not Path("executed").exists(), "what a registry says was run"
    good = tracking.log(logged(tmp_path / "good", mlp_bytes(1)))
    assert opened(f"runs:/{good}/model")[1] == good


def test_without_the_extra_it_says_how_to_get_it(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "mlflow", None)
    said = desk("publish", "no-extra", "models:/any/1", expect=2)
    assert said == "mlcdn: MLflow is not installed: pip install 'mlcdn[mlflow]'"


def commands(workflow: Any) -> list[str]:
    """Every line of every step that is a command of ours."""
    lines = [
        line.strip()
        for job in workflow["jobs"].values()
        for step in job["steps"]
        for line in step.get("run", "").splitlines()
    ]
    return [line for line in lines if line.startswith("mlcdn ")]


def test_the_example_of_a_workflow_is_one(tmp_path: Path) -> None:
    workflow = yaml.safe_load((EXAMPLES / "release.yml").read_text())
    # YAML 1.1 reads the key `on` as true.
    assert {"name", True, "jobs"} <= set(workflow)
    found = commands(workflow)
    assert len(found) == 1
    for line in found:
        words = shlex.split(line.partition(" > ")[0])[1:]
        command: Any = typer.main.get_command(app)
        name, *arguments = words
        with command.commands[name].make_context(name, arguments) as context:
            assert context.params["wait"] is True and context.params["source"] == "model.onnx"
            assert context.params["json"] is True
    [job] = workflow["jobs"].values()
    known = {f"MLCDN_{name.upper()}" for name in settings.Settings.model_fields}
    assert {name for name in job["env"] if name.startswith("MLCDN_")} <= known
    # A secret is handed over by the environment: in a command line, it would be in every list of processes.
    assert not [line for step in job["steps"] for line in re.findall(r"\$\{\{\s*secrets", step.get("run", ""))]


def test_the_example_of_settings_is_one() -> None:
    document = release_settings.read_toml(EXAMPLES / "release.toml")
    asked = release_settings.request(document, model="m", path=Path("m.onnx"), author="test")
    assert asked.limits.deadline_ms == 500
