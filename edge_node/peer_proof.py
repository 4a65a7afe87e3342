"""The proof with which one node asks another for bytes of an artifact. PURE.

    mlcdn-peer: HMAC-SHA256(key, the asked node's URL · digest · first-last), in hex

Laws: who holds the key may read artifacts anyway (it is made of the secret of the object store, unless another one is
set); a proof is good for these bytes of this node only, so whoever hears it, or is asked because a beat named it, learns
nothing to ask others with. It must not know HTTP or settings.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Final

HEADER: Final = "mlcdn-peer"
# How much of the artifact the node has, in a refusal to give a part of it that is not there yet.
ARRIVED: Final = "mlcdn-arrived"


def key_of(secret: str) -> bytes | None:
    """None where there is no secret: without one nobody is a peer."""
    return hmac.digest(secret.encode(), b"mlcdn peers", "sha256") if secret else None


def proof(key: bytes, url: str, digest: str, first: int, last: int) -> str:
    said = f"{url.rstrip('/')}\n{digest}\n{first}-{last}"
    return hmac.new(key, said.encode(), hashlib.sha256).hexdigest()


def proves(given: str, key: bytes, url: str, digest: str, first: int, last: int) -> bool:
    return hmac.compare_digest(given.encode(), proof(key, url, digest, first, last).encode())
