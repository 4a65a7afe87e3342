"""Where regions stand: well-known cities, so that a local network can name them. PURE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from schemas.errors import BadInput

PLACES: Final[Mapping[str, tuple[float, float]]] = {
    "amsterdam": (52.37, 4.90),
    "bahrain": (26.07, 50.55),
    "bangkok": (13.76, 100.50),
    "cape-town": (-33.92, 18.42),
    "chicago": (41.88, -87.63),
    "dubai": (25.20, 55.27),
    "dublin": (53.35, -6.26),
    "frankfurt": (50.11, 8.68),
    "hong-kong": (22.32, 114.17),
    "jakarta": (-6.21, 106.85),
    "johannesburg": (-26.20, 28.05),
    "lagos": (6.52, 3.38),
    "london": (51.51, -0.13),
    "madrid": (40.42, -3.70),
    "melbourne": (-37.81, 144.96),
    "milan": (45.46, 9.19),
    "montreal": (45.50, -73.57),
    "mumbai": (19.08, 72.88),
    "nairobi": (-1.29, 36.82),
    "ohio": (39.96, -83.00),
    "oregon": (45.52, -122.68),
    "osaka": (34.69, 135.50),
    "paris": (48.86, 2.35),
    "sao-paulo": (-23.55, -46.63),
    "seoul": (37.57, 126.98),
    "singapore": (1.35, 103.82),
    "stockholm": (59.33, 18.07),
    "sydney": (-33.87, 151.21),
    "tokyo": (35.68, 139.69),
    "virginia": (38.95, -77.45),
}


def place(region: str, given: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """Latitude and longitude of a region, degrees; what was given goes first."""
    found = given.get(region) or PLACES.get(region)
    if found is None:
        raise BadInput(f"no place is known for region {region!r}; say where it is: --location {region}=LAT,LON")
    return found
