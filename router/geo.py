"""Where a client stands: by what it says, by a file of networks, else by default. PURE.

The file names networks and places, one a line: ``203.0.113.0/24 35.7 139.7  # comment``; the longest match wins.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Iterable
from typing import Final

import msgspec

from schemas.errors import BadInput

EARTH_KM: Final = 6371.0088
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Place(msgspec.Struct, frozen=True):
    """Degrees north and east; `source` says how it is known: asked, network, default."""

    lat: float
    lon: float
    source: str = "asked"

    def __post_init__(self) -> None:
        if not (-90 <= self.lat <= 90 and -180 <= self.lon <= 180):
            raise BadInput(f"no such place: {self.lat}, {self.lon}")


def distance_km(a: Place, b: Place) -> float:
    """Great-circle distance by the haversine formula, kilometres."""
    phi_a, phi_b = math.radians(a.lat), math.radians(b.lat)
    half = math.sin((phi_b - phi_a) / 2) ** 2
    half += math.cos(phi_a) * math.cos(phi_b) * math.sin(math.radians(b.lon - a.lon) / 2) ** 2
    return 2 * EARTH_KM * math.asin(min(1.0, math.sqrt(half)))


class Networks:
    """The places of networks. Looking up costs one dict access per prefix length in use."""

    def __init__(self, lines: Iterable[str] = ()) -> None:
        self._by_length: dict[tuple[int, int], dict[int, Place]] = {}
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            try:
                network, lat, lon = words
                self._add(ipaddress.ip_network(network), Place(float(lat), float(lon), "network"))
            except (ValueError, BadInput) as error:
                raise BadInput(f"networks file, line {number}: {error}") from None
        self._lengths = sorted(self._by_length, reverse=True)

    def _add(self, network: _Network, place: Place) -> None:
        key = int(network.network_address) >> (network.max_prefixlen - network.prefixlen)
        self._by_length.setdefault((network.prefixlen, network.version), {})[key] = place

    def find(self, address: str) -> Place | None:
        """`BadInput` when it is no address; IPv4 mapped into IPv6 is looked up as IPv4."""
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            raise BadInput(f"{address[:64]!r} is no IP address") from None
        if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        for length, version in self._lengths:
            if version == found.version:
                place = self._by_length[(length, version)].get(int(found) >> (found.max_prefixlen - length))
                if place is not None:
                    return place
        return None
