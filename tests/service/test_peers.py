"""A region's nodes bring each other artifacts: whole nodes on the real stack, and one fetch against peers that lie, stall,
go away or are slow. What a peer says is worth what its digest says, and the store is there when no peer is."""

from __future__ import annotations

import asyncio
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import trustme

from edge_node.agent import peer_fetch
from edge_node.agent.peer_fetch import PeerFetches
from edge_node.agent.peers import Neighbour, weight
from edge_node.peer_proof import ARRIVED, HEADER, key_of, proof, proves
from mlcdn.identities import Identities, ensure_identities
from mlcdn.local_stack.running import RunningStack
from mlcdn.local_stack.stack import S3
from schemas.events import Artifact
from schemas.metrics import counter
from streams.artifacts import CHUNK_BYTES, ArtifactStore, FetchOptions, describe
from tests import models
from tests.edge_node_process import EdgeNode, Operator, node_settings, until
from tests.tcp_faults import TcpFaults

START_S = 30.0
BIG = 5 * CHUNK_BYTES + 4_321
KEY = key_of("secret") or b""


def spent(name: str, *labels: str) -> float:
    found = counter(name).labels(*labels) if labels else counter(name)
    return float(found._value.get())


# -- whole nodes


@pytest.fixture(scope="module")
def identities(stack: RunningStack, tmp_path_factory: pytest.TempPathFactory) -> Identities:
    keys = tmp_path_factory.mktemp("identities") / "keys"
    return asyncio.run(ensure_identities(keys, stack.addresses.kafka, lambda _: None))


@pytest.fixture
def operator(stack: RunningStack, identities: Identities, tmp_path: Path) -> Operator:
    return Operator(stack.addresses, identities, tmp_path)


@contextmanager
def nodes(
    stack: RunningStack, identities: Identities, tmp_path: Path, names: dict[str, str], **changes: str
) -> Iterator[dict[str, EdgeNode]]:
    """`names`: region by node."""
    made = {}
    for name, region in names.items():
        settings = node_settings(stack.addresses, identities, tmp_path / name, name)
        made[name] = EdgeNode(settings | {"MLCDN_REGION": region, "MLCDN_REDIS_URL": ""} | changes)
    for node in made.values():
        node.start()
    try:
        yield made
    except BaseException:
        for node in made.values():
            print(node.log()[-3_000:])  # noqa: T201 (what the processes said belongs to the failure)
        raise
    finally:
        for node in made.values():
            if node.runs:
                node.kill()


def came(node: EdgeNode, source: str) -> int:
    answer = node.get("/metrics")
    found = re.search(rf'^mlcdn_fetch_bytes_total{{source="{source}"}} (\S+)$', answer.text if answer else "", re.M)
    return int(float(found[1])) if found else 0


def test_a_region_takes_an_artifact_from_the_store_once(
    stack: RunningStack, identities: Identities, operator: Operator, tmp_path: Path
) -> None:
    small = operator.release("mirrored", models.mlp_bytes(1))
    places = {"mirror-1": "tokyo", "mirror-2": "tokyo", "mirror-3": "london"}
    with nodes(stack, identities, tmp_path, places) as made:
        until(lambda: all(node.serves("mirrored", small) for node in made.values()), START_S)
        time.sleep(1.5)  # each has heard a beat of the other
        before = {name: (came(node, "s3"), came(node, "peer")) for name, node in made.items()}
        data = models.big_model_bytes(BIG, seed=7)
        digest = operator.release("mirrored", data)
        until(lambda: all(node.serves("mirrored", digest) for node in made.values()), START_S)
        since = {n: (came(node, "s3") - before[n][0], came(node, "peer") - before[n][1]) for n, node in made.items()}
        tokyo = since["mirror-1"], since["mirror-2"]
        assert sum(s3 for s3, _ in tokyo) == len(data), since
        assert sum(peer for _, peer in tokyo) == len(data), since
        assert since["mirror-3"] == (len(data), 0)
        first = max(("mirror-1", "mirror-2"), key=lambda n: weight(digest, n))
        assert since[first] == (len(data), 0)
        # A node that comes late needs no store at all.
        stack.stop_part(S3)
        try:
            with nodes(stack, identities, tmp_path, {"mirror-4": "tokyo"}) as late:
                until(lambda: late["mirror-4"].serves("mirrored", digest), START_S)
                assert came(late["mirror-4"], "s3") == 0
        finally:
            stack.start_part(S3)


def test_a_first_node_that_hangs_costs_patience_and_no_more(
    stack: RunningStack, identities: Identities, operator: Operator, tmp_path: Path
) -> None:
    small = operator.release("hung", models.mlp_bytes(2))
    event = operator.prepare("hung", models.big_model_bytes(BIG, seed=8))
    digest = event.artifact.sha256
    names = {"hang-1": "tokyo", "hang-2": "tokyo"}
    first, second = sorted(names, key=lambda n: weight(digest, n), reverse=True)
    with nodes(stack, identities, tmp_path, names, MLCDN_PEER_PATIENCE_S="1") as made:
        until(lambda: all(node.serves("hung", small) for node in made.values()), START_S)
        time.sleep(1.5)
        wake = made[first].pause_agent()
        try:
            operator.append(event)
            began = time.monotonic()
            until(lambda: made[second].serves("hung", digest), START_S)
            assert 1 < time.monotonic() - began < 15
        finally:
            wake()
        until(lambda: made[first].serves("hung", digest), START_S)


def test_the_door_is_for_peers_and_gives_what_was_verified(
    stack: RunningStack, identities: Identities, operator: Operator, tmp_path: Path
) -> None:
    data = models.big_model_bytes(CHUNK_BYTES + 1_000, seed=9)
    digest = operator.release("door", data)
    with nodes(stack, identities, tmp_path, {"door-1": "tokyo"}, MLCDN_PEER_SECRET="secret") as made:
        node = made["door-1"]
        until(lambda: node.serves("door", digest), START_S)

        def asked(first: int, last: int, *, of: str = digest, url: str = node.url, key: bytes = KEY) -> httpx.Response:
            headers = {"range": f"bytes={first}-{last}", HEADER: proof(key, url, of, first, last)}
            return httpx.get(f"{node.url}/artifacts/{of}", headers=headers, trust_env=False)

        good = asked(100, CHUNK_BYTES - 1)
        assert good.status_code == 206
        assert good.content == data[100:CHUNK_BYTES]
        assert good.headers["content-range"] == f"bytes 100-{CHUNK_BYTES - 1}/{len(data)}"
        assert asked(CHUNK_BYTES, len(data) - 1).content == data[CHUNK_BYTES:]
        refused = {
            "no range": httpx.get(f"{node.url}/artifacts/{digest}", trust_env=False),
            "over two chunks": asked(100, CHUNK_BYTES),
            "behind the end": asked(CHUNK_BYTES, len(data)),
            "backwards": asked(9, 3),
            "another artifact": asked(0, 9, of="0" * 64),
            "no artifact at all": asked(0, 9, of="models.json"),
            "another node's proof": asked(0, 9, url="http://elsewhere"),
            "another secret's proof": asked(0, 9, key=b"guess"),
        }
        assert {what: answer.status_code for what, answer in refused.items()} == {
            "no range": 416,
            "over two chunks": 416,
            "behind the end": 416,
            "backwards": 416,
            "another artifact": 404,
            "no artifact at all": 404,
            "another node's proof": 403,
            "another secret's proof": 403,
        }
        assert all("error" in answer.json() for answer in refused.values())
        assert asked(0, 9).content == data[:10]
        assert node.predict("door", 1).status_code == 200


def ask(node: EdgeNode, digest: str, first: int, last: int) -> dict[str, str]:
    return {"range": f"bytes={first}-{last}", HEADER: proof(KEY, node.url, digest, first, last)}


def test_a_chunk_is_given_once_it_was_verified_and_the_rest_is_said_to_be_on_its_way(
    stack: RunningStack, identities: Identities, operator: Operator, tmp_path: Path
) -> None:
    small = operator.release("growing", models.mlp_bytes(4))
    data = models.big_model_bytes(BIG, seed=12)
    with TcpFaults(int(stack.addresses.s3_endpoint.rpartition(":")[2])) as line:
        changes = {"MLCDN_S3_ENDPOINT": f"http://127.0.0.1:{line.port}", "MLCDN_FETCH_CHUNKS": "1"}
        places = {"growing-1": "tokyo"}
        with nodes(stack, identities, tmp_path, places, MLCDN_PEER_SECRET="secret", **changes) as made:
            node = made["growing-1"]
            until(lambda: node.serves("growing", small), START_S)
            line.bytes_s = CHUNK_BYTES / 2
            digest = operator.release("growing", data)
            url = f"{node.url}/artifacts/{digest}"

            def chunk(number: int) -> httpx.Response:
                last = min(len(data), (number + 1) * CHUNK_BYTES) - 1
                headers = ask(node, digest, number * CHUNK_BYTES, last)
                return httpx.get(url, headers=headers, trust_env=False)

            until(lambda: chunk(0).status_code == 503, START_S)
            until(lambda: chunk(0).status_code == 206, START_S)
            assert not node.serves("growing", digest)
            assert chunk(0).content == data[:CHUNK_BYTES]
            early = chunk(5)
            assert early.status_code == 503 and "error" in early.json()
            assert CHUNK_BYTES <= int(early.headers[ARRIVED]) < len(data)
            line.heal()
            until(lambda: node.serves("growing", digest), START_S)
            assert chunk(5).content == data[5 * CHUNK_BYTES :]


def test_only_so_many_are_served_at_once_and_a_client_that_goes_makes_room(
    stack: RunningStack, identities: Identities, operator: Operator, tmp_path: Path
) -> None:
    data = models.big_model_bytes(CHUNK_BYTES, seed=13)
    digest = operator.release("busy", data)
    changes = {"MLCDN_PEER_SECRET": "secret", "MLCDN_PEER_BYTES_S": str(2**20)}
    with (
        nodes(stack, identities, tmp_path, {"busy-1": "tokyo"}, **changes) as made,
        httpx.Client(trust_env=False) as http,
    ):
        node = made["busy-1"]
        until(lambda: node.serves("busy", digest), START_S)
        url, headers = f"{node.url}/artifacts/{digest}", ask(node, digest, 0, CHUNK_BYTES - 1)
        slow = [http.send(http.build_request("GET", url, headers=headers), stream=True) for _ in range(4)]
        assert [answer.status_code for answer in slow] == [206] * 4
        fifth = http.get(url, headers=headers)
        assert fifth.status_code == 429 and int(fifth.headers["retry-after"]) >= 1
        assert node.predict("busy", 1).status_code == 200
        for answer in slow:
            answer.close()
        few = ask(node, digest, 0, 9)
        until(lambda: http.get(url, headers=few).status_code == 206, 10)
        for _ in range(8):
            assert http.get(url, headers=few).content == data[:10]


def test_a_node_that_shares_nothing_says_so(
    stack: RunningStack, identities: Identities, operator: Operator, tmp_path: Path
) -> None:
    digest = operator.release("closed", models.mlp_bytes(3))
    with nodes(stack, identities, tmp_path, {"closed-1": "tokyo"}, MLCDN_PEERS="false") as made:
        node = made["closed-1"]
        until(lambda: node.serves("closed", digest), START_S)
        headers = {"range": "bytes=0-9", HEADER: proof(KEY, node.url, digest, 0, 9)}
        answer = httpx.get(f"{node.url}/artifacts/{digest}", headers=headers, trust_env=False)
        assert answer.status_code == 404 and "error" in answer.json()


# -- one fetch, and peers that are not what they should be


class Peer(ThreadingHTTPServer):
    """A node of the region, or what says that it is one. `gives` makes the answer's body of what was asked for."""

    daemon_threads = True

    def __init__(
        self, data: bytes, gives: Callable[[bytes, int], bytes | int], certificate: trustme.LeafCert | None = None
    ) -> None:
        self.data, self.gives, self.asked, self.unproved = data, gives, 0, 0
        self.pause_s = 0.0
        super().__init__(("127.0.0.1", 0), _Answers)
        self.url = f"{'https' if certificate else 'http'}://127.0.0.1:{self.server_port}"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(context)
            # The handshake is for the connection's own thread.
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.02,))
        self._thread.start()

    def handle_error(self, *_: object) -> None:
        """A client that does not like the certificate says so."""

    def end(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Answers(BaseHTTPRequestHandler):
    server: Peer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        peer = self.server
        peer.asked += 1
        first, last = map(int, self.headers["range"].removeprefix("bytes=").split("-"))
        digest = self.path.rpartition("/")[2]
        peer.unproved += not proves(self.headers[HEADER], KEY, peer.url, digest, first, last)
        body = peer.gives(peer.data[first : last + 1], peer.asked)
        if isinstance(body, int):
            self.send_response(body)
            self.send_header(ARRIVED, "0")
            self.send_header("location", f"{peer.url}/elsewhere")
            self.send_header("content-length", "0")
            self.end_headers()
            return
        self.send_response(206)
        self.send_header("content-range", f"bytes {first}-{last}/{len(peer.data)}")
        self.send_header("content-length", str(max(len(body), last + 1 - first)))
        self.end_headers()
        try:
            for start in range(0, len(body), 2**20):
                self.wfile.write(body[start : start + 2**20])
                time.sleep(peer.pause_s)
            if len(body) < last + 1 - first:
                self.connection.close()
        except OSError:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


class Region:
    """The neighbours that a test names."""

    def __init__(self, *peers: Neighbour) -> None:
        self.peers = peers
        self.looked = threading.Event()
        self.looked.set()

    def known(self) -> tuple[Neighbour, ...]:
        return self.peers


@pytest.fixture(scope="module")
def whole() -> bytes:
    return random.Random(11).randbytes(BIG)


@pytest.fixture(scope="module")
def store(stack: RunningStack) -> ArtifactStore:
    a = stack.addresses
    return ArtifactStore(a.s3_endpoint, a.s3_bucket, a.s3_access_key, a.s3_secret_key, "us-east-1")


@pytest.fixture(scope="module")
def artifact(store: ArtifactStore, whole: bytes, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    path = tmp_path_factory.mktemp("whole") / "a"
    path.write_bytes(whole)
    made = describe(path, lambda digest: f"models/peers/{digest}.onnx")
    store.put(made, path)
    return made


def flipped(data: bytes, _: int) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


def half(data: bytes, _: int) -> bytes:
    return data[: len(data) // 2]


def too_much(data: bytes, _: int) -> bytes:
    return data + b"more"


GIVES: dict[str, tuple[Callable[[bytes, int], bytes | int], str | None, bool]] = {
    # what it gives, why it is left alone, whether the store is asked
    "all of it": (lambda data, _: data, None, False),
    "more than was asked": (too_much, None, False),
    "wrong bytes": (flipped, "wrong", True),
    "half of each": (half, "silent", True),
    "errors": (lambda *_: 500, "500", True),
    "a redirect": (lambda *_: 307, "307", True),
    "not yet, for ever": (lambda *_: 503, None, True),
    "too busy, then all of it": (lambda data, asked: 429 if asked < 5 else data, None, False),
    "nothing of it, for a moment": (lambda data, asked: 404 if asked < 5 else data, None, False),
}


@pytest.mark.parametrize("case", GIVES)
def test_one_peer_that_gives(store: ArtifactStore, artifact: Artifact, whole: bytes, tmp_path: Path, case: str) -> None:
    gives, reason, asks_store = GIVES[case]
    peer = Peer(whole, gives)
    peers = Region(Neighbour(node="peer", url=peer.url, live=frozenset({artifact.sha256})))
    fetches = PeerFetches("me", KEY, 0.5, peers)
    s3, refused = spent("mlcdn_fetch_bytes_total", "s3"), spent("mlcdn_fetch_chunks_refused_total", "peer")
    left = spent("mlcdn_peers_left_total", reason) if reason else 0.0
    try:
        store.fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=60, sources=fetches.sources(artifact)))
    finally:
        peer.end()
    assert (tmp_path / "got").read_bytes() == whole
    assert peer.asked and not peer.unproved
    came_from_store = spent("mlcdn_fetch_bytes_total", "s3") - s3
    assert (came_from_store > 0) == asks_store
    if reason:
        assert spent("mlcdn_peers_left_total", reason) > left
        assert fetches.left() == {"peer"}
        assert peer.asked <= 8, "one that failed is left alone"
    else:
        assert not fetches.left()
    if case == "wrong bytes":
        assert spent("mlcdn_fetch_chunks_refused_total", "peer") > refused
        assert came_from_store == len(whole)
    if case == "half of each":
        assert came_from_store < len(whole), "what a peer gave before it broke off is kept"


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "http://[", "ftp://127.0.0.1", "http://127.0.0.1:99999", "", "x"]
)
def test_a_peer_that_is_not_there_is_not_waited_for(
    store: ArtifactStore, artifact: Artifact, whole: bytes, tmp_path: Path, url: str
) -> None:
    peers = Region(Neighbour(node="peer", url=url, live=frozenset({artifact.sha256})))
    fetches = PeerFetches("me", KEY, 5, peers)
    began = time.monotonic()
    store.fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=60, sources=fetches.sources(artifact)))
    assert time.monotonic() - began < 4
    assert (tmp_path / "got").read_bytes() == whole
    assert fetches.left() == {"peer"}


def test_a_peer_that_crawls_is_left_for_one_that_does_not(
    store: ArtifactStore, artifact: Artifact, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_fetch, "SLOW_S", 0.3)
    monkeypatch.setattr(peer_fetch, "SLOW_BYTES_S", 64 * 2**20)
    slow, good = (Peer(whole, lambda data, _: data) for _ in range(2))
    slow.pause_s = 0.2
    live = frozenset({artifact.sha256})
    peers = Region(Neighbour(node="slow", url=slow.url, live=live), Neighbour(node="good", url=good.url, live=live))
    fetches = PeerFetches("me", KEY, 5, peers)
    before = spent("mlcdn_fetch_bytes_total", "s3")
    try:
        store.fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=60, sources=fetches.sources(artifact)))
    finally:
        slow.end()
        good.end()
    assert (tmp_path / "got").read_bytes() == whole
    assert spent("mlcdn_fetch_bytes_total", "s3") == before
    assert fetches.left() == {"slow"}


@pytest.mark.parametrize("known", [True, False], ids=["whose authority is known", "of a stranger"])
def test_a_peer_that_speaks_tls(
    store: ArtifactStore,
    artifact: Artifact,
    whole: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    known: bool,
) -> None:
    authority = trustme.CA()
    if known:
        authority.cert_pem.write_to_path(str(tmp_path / "authority"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority"))
    peer = Peer(whole, lambda data, _: data, authority.issue_cert("127.0.0.1"))
    peers = Region(Neighbour(node="peer", url=peer.url, live=frozenset({artifact.sha256})))
    fetches = PeerFetches("me", KEY, 5, peers)
    before = spent("mlcdn_fetch_bytes_total", "s3")
    try:
        store.fetch(artifact, tmp_path / "got", FetchOptions(deadline_s=60, sources=fetches.sources(artifact)))
    finally:
        peer.end()
    assert (tmp_path / "got").read_bytes() == whole
    assert spent("mlcdn_fetch_bytes_total", "s3") - before == (0 if known else len(whole))
    assert fetches.left() == (frozenset() if known else {"peer"})
    assert bool(peer.asked) == known, "a stranger is not even asked"
