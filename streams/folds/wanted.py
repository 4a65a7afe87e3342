"""What a node is told to serve of a model: releases on seats. PURE.

A model has two *seats* on a node: the stable one, and beside it, while a rollout is under way, the candidate's. It must
not know how the log comes to say so.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from schemas.events import ModelReleased


class Channel(StrEnum):
    STABLE = "stable"
    CANDIDATE = "candidate"


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What should be served of one model, by the event at `position` (whose CloudEvents id is `cause`).

    `released` is the release that brought the artifact: the event itself, or what a rollback points back to.
    """

    model: str
    version: str
    sequence: int
    position: int
    cause: str
    released: ModelReleased

    @property
    def digest(self) -> str:
        return self.released.digest


class Seated(msgspec.Struct, frozen=True, kw_only=True):
    """A release on a seat. `percent` of the model's requests are a candidate's; the stable one has the others."""

    wanted: Wanted
    channel: Channel = Channel.STABLE
    percent: float = 100.0

    @property
    def seat(self) -> str:
        return seat(self.wanted.model, self.channel)

    @property
    def digest(self) -> str:
        return self.wanted.digest


def seat(model: str, channel: Channel) -> str:
    """Its name: the model's own, and with ``@candidate`` behind it, which no model's name may hold."""
    return model if channel is Channel.STABLE else f"{model}@{channel}"


def model_of(seat: str) -> str:
    return seat.partition("@")[0]
