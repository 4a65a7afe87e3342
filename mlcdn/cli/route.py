"""``mlcdn route, predict, demo``: which edge and why; one prediction, with where it came from; the whole job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import httpx
import msgspec
import typer

from mlcdn.cli import output
from mlcdn.cli.output import Json
from mlcdn.cli.target import DEFAULT_DIR, Dir, Target
from mlcdn.client import Client, PredictionFailed
from schemas.errors import BadInput, NotReady, Unreachable

SHOWN = 10


def register(app: typer.Typer) -> None:
    app.command()(route)
    app.command()(predict)
    app.command()(demo)


def route(
    model: Annotated[str | None, typer.Option(help="Only edges that serve it.")] = None,
    ip: Annotated[str | None, typer.Option(help="The client's address.")] = None,
    lat: Annotated[float | None, typer.Option(help="The client's place, degrees north.")] = None,
    lon: Annotated[float | None, typer.Option(help="The client's place, degrees east.")] = None,
    json: Json = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """Edges ranked for a client, with every term of every score."""
    url = Target.at(directory).url("router.http")
    said = {"model": model, "ip": ip, "lat": lat, "lon": lon}
    try:
        answer = httpx.get(f"{url}/route", params={k: v for k, v in said.items() if v is not None}, trust_env=False)
    except httpx.HTTPError as error:
        raise Unreachable("the router", url, type(error).__name__) from None
    if answer.status_code == 400:
        raise BadInput(str(answer.json().get("error")))
    if answer.status_code != 200:
        raise NotReady(f"the router answers {answer.status_code}: {answer.text[:300]}")
    document: dict[str, Any] = answer.json()
    if json:
        output.document(document)
        return
    terms = sorted({term for edge in document["edges"] for term in edge["terms"]})
    output.table(
        ("edge", "region", "score", *terms),
        [
            (e["node"], e["region"], f"{e['score']:.4f}", *(_short(e["terms"].get(term)) for term in terms))
            for e in document["edges"]
        ],
    )
    for edge in document.get("out", []):
        output.say(f"out: {edge['node']}: {edge.get('why', '')}")


def _short(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def predict(
    model: Annotated[str, typer.Argument(help="Model name.")],
    data: Annotated[str, typer.Argument(help="JSON rows or tensors, an .npz of tensors, or - for JSON on stdin.")],
    region: Annotated[str | None, typer.Option(help="Ask from where this region stands.")] = None,
    json: Json = False,
    directory: Dir = DEFAULT_DIR,
) -> None:
    """A prediction through the router, with where it came from."""
    target = Target.at(directory)
    inputs = _inputs(data)
    place = _place(target, region)
    with Client(target.url("router.http"), place=place) as client:
        try:
            found = client.predict(model, inputs)
        except PredictionFailed as failed:
            if failed.status is not None and failed.status < 500:
                raise BadInput(str(failed)) from None
            raise NotReady(str(failed)) from None
    if json:
        output.document(
            {
                "outputs": found.outputs,
                "model": found.model,
                "version": found.version,
                "digest": found.digest,
                "region": found.region,
                "node": found.node,
                "cache_status": found.cache_status,
            },
        )
        return
    for name, tensor in found.outputs.items():
        shown = str(tensor["data"][:SHOWN])
        output.say(f"{name} {tensor['shape']}: {shown[:-1]}, …]" if len(tensor["data"]) > SHOWN else f"{name}: {shown}")
    output.say(f"{found.model} {found.version} {found.digest[:12]} from {found.node} ({found.cache_status})")


def _inputs(data: str) -> Any:
    if data.endswith(".npz"):
        return _npz(Path(data))
    text = sys.stdin.read() if data == "-" else Path(data).read_text() if Path(data).is_file() else data
    try:
        said = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise BadInput(f"not JSON: {error}") from None
    if isinstance(said, dict) and isinstance(said.get("inputs"), list):
        return {t.pop("name", ""): t for t in said["inputs"]}
    if isinstance(said, list) and said and all(isinstance(row, list) for row in said):
        return said
    if isinstance(said, list) and said:
        return [said]
    raise BadInput('say a row [..], rows [[..], ..], or {"inputs": [{"name", "datatype", "shape", "data"}]}')


def _npz(path: Path) -> Any:
    import numpy as np

    from inference.golden import read_golden

    try:
        golden = read_golden(path)
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    kinds = {"f": "FP", "i": "INT", "u": "UINT"}
    return {
        name: {
            "datatype": "BOOL" if a.dtype == np.bool_ else f"{kinds[a.dtype.kind]}{a.dtype.itemsize * 8}",
            "shape": list(a.shape),
            "data": a.ravel().tolist(),
        }
        for name, a in golden.inputs.items()
    }


def _place(target: Target, region: str | None) -> dict[str, str]:
    if region is None:
        return {}
    regions = (target.document or {}).get("regions", {})
    if region not in regions:
        raise BadInput(f"no region {region!r}; there are {', '.join(regions)}")
    where = regions[region]["location"]
    return {"lat": str(where["lat"]), "lon": str(where["lon"])}


def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the network running at the end.")] = False,
    directory: Annotated[Path, typer.Option("--dir", help="Directory of the demo's own network.")] = Path(
        ".mlcdn/demo"
    ),
) -> None:
    """The main job from end to end on a real model; exit 1 if a step is not as promised."""
    from mlcdn.demo.run import demo as run_demo

    raise typer.Exit(run_demo(directory, keep=keep))
