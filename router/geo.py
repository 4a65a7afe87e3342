"""Where a client stands, and how far that is from a node. PURE.

A location file has one network a line: ``network, latitude, longitude``, ``#`` begins a comment; the longest prefix
that holds an address wins, an IPv4 address in IPv6 dress is an IPv4 address, and whatever nothing holds stands at the
default.
"""

from __future__ import annotations

import ipaddress
import math
from typing import Final

import msgspec

from schemas.errors import BadInput, SettingsInvalid

EARTH_RADIUS_KM: Final = 6_371.0
FARTHEST_KM: Final = math.pi * EARTH_RADIUS_KM


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Degrees north and east; `source` says how it is known: ``asked``, ``network <cidr>`` or ``default``."""

    lat: float
    lon: float
    source: str

    def __post_init__(self) -> None:
        if not (-90 <= self.lat <= 90 and -180 <= self.lon <= 180):
            raise BadInput("a place is -90 to 90 degrees north and -180 to 180 degrees east")


def great_circle_km(lat1: float, lon1: float, lat2: float, lon2: float) -> float:
    """By the haversine formula; a coordinate that is no number is as far as can be."""
    if not all(map(math.isfinite, (lat1, lon1, lat2, lon2))):
        return FARTHEST_KM
    north1, north2 = math.radians(lat1), math.radians(lat2)
    east = math.radians(lon2 - lon1)
    h = math.sin((north2 - north1) / 2) ** 2 + math.cos(north1) * math.cos(north2) * math.sin(east / 2) ** 2
    return 2 * EARTH_RADIUS_KM * math.asin(math.sqrt(min(1.0, max(0.0, h))))


class Locations:
    """Networks and where they are. A look-up asks one dictionary per prefix length in use."""

    def __init__(self, default: Place, networks: dict[str, tuple[float, float]]) -> None:
        self.default = default
        self._by_length: dict[tuple[int, int], dict[int, Place]] = {}
        for cidr, (lat, lon) in networks.items():
            network = ipaddress.ip_network(cidr)
            place = Place(lat=lat, lon=lon, source=f"network {network}")
            shift = network.max_prefixlen - network.prefixlen
            same_length = self._by_length.setdefault((network.version, shift), {})
            same_length[int(network.network_address) >> shift] = place
        # The smallest shift is the longest prefix.
        self._lengths = sorted(self._by_length)

    def of(self, address: str) -> Place:
        """`BadInput` when it is no IP address."""
        try:
            ip = ipaddress.ip_address(address.strip())
        except ValueError:
            raise BadInput(f"{address[:80]!r} is no IP address") from None
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        for version, shift in self._lengths:
            if version == ip.version:
                found = self._by_length[(version, shift)].get(int(ip) >> shift)
                if found is not None:
                    return found
        return self.default


def parse_locations(text: str, default: Place) -> Locations:
    """`SettingsInvalid` names the line."""
    networks: dict[str, tuple[float, float]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        said = [word.strip() for word in line.partition("#")[0].split(",")]
        if said == [""]:
            continue
        try:
            cidr, lat, lon = said
            network = str(ipaddress.ip_network(cidr))
            where = Place(lat=float(lat), lon=float(lon), source=network)
        except (ValueError, BadInput) as error:
            raise SettingsInvalid(f"location file, line {number}: {error}") from None
        networks[network] = (where.lat, where.lon)
    return Locations(default, networks)
