"""An edge worker behind a certificate that changes under it: clients that trust the authority see the new one, what was
open lives on, and a broken pair never takes the place of a good one."""

from __future__ import annotations

import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trustme

from mlcdn.local_stack.running import RunningStack
from processes.tls import Certificate, CertificateRefused, certificate_of
from schemas import codec
from schemas.events import NodeBeat
from schemas.topics import FLEET
from streams.log.reader import KafkaReader
from tests.edge_node_process import until
from tests.worker_process import WorkerProcess

LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
SEEN_S = 5.0


@dataclass
class Authority:
    """A throw-away one, and the two files it writes."""

    directory: Path
    ca: trustme.CA
    chain: Path
    key: Path

    def issue(self, *, by: trustme.CA | None = None) -> bytes:
        """A new pair in place of the old one; the certificate's DER."""
        issued = (by or self.ca).issue_cert("localhost", "127.0.0.1")
        self.write(self.chain, b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        self.write(self.key, issued.private_key_pem.bytes())
        return ssl.PEM_cert_to_DER_cert(issued.cert_chain_pems[0].bytes().decode())

    def write(self, path: Path, data: bytes) -> None:
        half = path.with_suffix(".half")
        half.write_bytes(data)
        half.replace(path)

    def client(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        self.ca.configure_trust(context)
        return context


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, trustme.CA(), tmp_path / "tls.crt", tmp_path / "tls.key")


@pytest.fixture
def worker(authority: Authority, tmp_path: Path) -> Iterator[WorkerProcess]:
    authority.issue()
    settings = {"tls_cert": authority.chain, "tls_key": authority.key, "header_timeout_s": 2}
    with WorkerProcess(tmp_path / "node", beat_s=0.2, **settings) as running:
        yield running
        assert running.lives()
        assert "Traceback" not in running.log(), running.log()


def connect(worker: WorkerProcess, context: ssl.SSLContext, name: str | None = "localhost") -> ssl.SSLSocket:
    return context.wrap_socket(worker.connect(), server_hostname=name)


def shown(worker: WorkerProcess, context: ssl.SSLContext, name: str | None = "localhost") -> bytes | None:
    with connect(worker, context, name) as client:
        return client.getpeercert(binary_form=True)


def ask(client: ssl.SSLSocket) -> bytes:
    client.sendall(LIVE)
    got = b""
    while not got.endswith(b"}"):  # head and body may come in a record each
        part = client.recv(4_096)
        assert part, got
        got += part
    return got


def outcomes(worker: WorkerProcess, outcome: str) -> float:
    text = httpx.get(f"https://127.0.0.1:{worker.port}/metrics", verify=False, trust_env=False).text
    lines = [line for line in text.splitlines() if line.startswith(f'mlcdn_tls_reloads_total{{outcome="{outcome}"}}')]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


def test_a_new_pair_is_shown_to_new_connections_and_old_ones_live_on(
    worker: WorkerProcess, authority: Authority
) -> None:
    trust = authority.client()
    first = shown(worker, trust)
    with connect(worker, trust) as old:
        assert ask(old).startswith(b"HTTP/1.1 200 ")
        second = authority.issue()
        assert second != first
        until(lambda: shown(worker, trust) == second, SEEN_S)
        # By address too, where the client names nobody.
        assert shown(worker, trust, "127.0.0.1") == second
        assert ask(old).startswith(b"HTTP/1.1 200 ")
        assert old.getpeercert(binary_form=True) == first
    assert outcomes(worker, "reloaded") == 1
    with httpx.Client(verify=trust, trust_env=False) as http:
        assert http.get(f"https://localhost:{worker.port}/v2").status_code == 200


@pytest.mark.parametrize("broken", ["mismatched", "garbage", "empty", "half", "absent"])
def test_a_broken_pair_is_refused_and_the_old_one_serves_on(
    worker: WorkerProcess, authority: Authority, broken: str
) -> None:
    trust = authority.client()
    first = shown(worker, trust)
    good_key, good_chain = authority.key.read_bytes(), authority.chain.read_bytes()
    match broken:
        case "mismatched":
            authority.write(authority.key, trustme.CA().issue_cert("localhost").private_key_pem.bytes())
        case "garbage":
            authority.write(authority.chain, b"-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n")
        case "empty":
            authority.write(authority.chain, b"")
        case "half":
            authority.write(authority.key, good_key[: len(good_key) // 2])
        case "absent":
            authority.key.unlink()
    if broken == "absent":
        time.sleep(2.5)
    else:
        until(lambda: outcomes(worker, "refused") == 1, SEEN_S)
        assert "certificate_refused" in worker.log()
    assert shown(worker, trust) == first
    authority.write(authority.chain, good_chain)
    authority.write(authority.key, good_key)
    third = authority.issue()
    until(lambda: shown(worker, trust) == third, SEEN_S)


def test_what_is_not_tls_or_too_old_is_turned_away(worker: WorkerProcess, authority: Authority) -> None:
    with worker.connect() as plain:
        plain.sendall(LIVE)
        try:
            assert b"HTTP/1.1" not in plain.recv(4_096)
        except ConnectionResetError:
            pass
    old = authority.client()
    with pytest.warns(DeprecationWarning):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises((ssl.SSLError, ConnectionResetError)), connect(worker, old):
        pass
    # A handshake that does not go on holds its connection no longer than a head would.
    with worker.connect() as silent:
        silent.sendall(b"\x16\x03\x01")
        began = time.monotonic()
        try:
            assert silent.recv(1) == b""
        except ConnectionResetError:
            pass
        assert time.monotonic() - began < 5
    assert shown(worker, authority.client())


def test_a_client_without_the_authority_refuses_us(worker: WorkerProcess) -> None:
    with pytest.raises(ssl.SSLCertVerificationError):
        connect(worker, ssl.create_default_context())


def test_the_url_that_is_advertised_is_https(stack: RunningStack, authority: Authority, tmp_path: Path) -> None:
    authority.issue()
    settings = {"tls_cert": authority.chain, "tls_key": authority.key, "kafka": stack.addresses.kafka}
    with WorkerProcess(tmp_path / "node", node="tls-1", beat_s=0.2, **settings) as worker:
        assert worker.predict().status_code == 200
        reader = KafkaReader(stack.addresses.kafka)

        def beats() -> list[NodeBeat] | None:
            events = [
                codec.decode(record.topic, record.key, record.value, record.headers).event
                for partition in range(FLEET.partitions)
                for record in reader.read(FLEET.name, partition)
                if record.key == b"tls-1"
            ]
            return [event for event in events if isinstance(event, NodeBeat)] or None

        assert {beat.url for beat in until(beats, 20)} == {f"https://127.0.0.1:{worker.port}"}


def test_a_pair_is_asked_for_whole(authority: Authority) -> None:
    assert certificate_of(None, None) is None
    for chain, key in ((authority.chain, None), (None, authority.key)):
        with pytest.raises(CertificateRefused, match="come together"):
            certificate_of(chain, key)
    with pytest.raises(CertificateRefused, match="No such file"):
        Certificate(authority.chain, authority.key)


def test_a_pair_that_is_being_written_is_left_alone(authority: Authority) -> None:
    authority.issue()
    certificate = Certificate(authority.chain, authority.key)
    assert certificate.look() is None
    authority.issue()
    assert certificate.look() is None
    authority.issue()
    assert certificate.look() is None
    assert certificate.look() == "reloaded"
    assert certificate.look() is None


def test_a_node_with_half_a_pair_says_so_and_does_not_start(tmp_path: Path, authority: Authority) -> None:
    authority.issue()
    done = subprocess.run(
        [sys.executable, "-m", "edge_node.main"],
        env={"PATH": "", "MLCDN_DIR": str(tmp_path / "node"), "MLCDN_TLS_CERT": str(authority.chain)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2
    assert "tls_cert and tls_key come together" in done.stderr
