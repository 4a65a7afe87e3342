"""What the doctor says of checkpoints, and that each thing it finds wrong comes with what mends it."""

from __future__ import annotations

import pytest

from mlcdn.doctor import checkpoints
from schemas.topics import RELEASES
from streams.audit.verify import LogAlarm
from streams.folds.checkpoints import Held
from streams.folds.trust import KeyGrant, Trust

NOW_MS = 1_000_000
HELD = Held(position=7, chain_sha256="0" * 64, expires_at_ms=NOW_MS + 90_000, signer="x")
ALARM = LogAlarm(topic=RELEASES.name, reason="frozen", what="expired")
SIGNER = KeyGrant(public_key=bytes(32), label="jobs", models=("*",), kinds=("LogCheckpoint",), granted_at=0)
OTHER = KeyGrant(public_key=bytes(32), label="op", models=("*",), kinds=("ModelReleased",), granted_at=0)
REVOKED = KeyGrant(
    public_key=bytes(32), label="old", models=("*",), kinds=("LogCheckpoint",), granted_at=0, revoked_at=3
)  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "held", "alarms", "young", "ok", "said"),
    [
        ((SIGNER, OTHER, REVOKED), HELD, (), False, True, "to position 7, fresh for 90 s; jobs may sign them"),
        ((OTHER, REVOKED), HELD, (), False, False, "no key in force may sign them"),
        ((SIGNER,), None, (), False, False, "none yet; jobs may sign them"),
        ((SIGNER,), None, (), True, True, "none yet; jobs may sign them"),
        ((SIGNER,), HELD, (ALARM,), False, False, "frozen: expired; jobs may sign them"),
    ],
)
def test_checkpoints_are_fresh_or_it_is_said_what_to_do(
    keys: tuple[KeyGrant, ...], held: Held | None, alarms: tuple[LogAlarm, ...], young: bool, ok: bool, said: str
) -> None:
    trust = Trust(roots=(bytes(32),), keys={str(n): key for n, key in enumerate(keys)})
    found = checkpoints(
        RELEASES.name, trust, {RELEASES.name: held} if held else {}, alarms, NOW_MS, young=young
    )  # fmt: skip
    assert (found.ok, found.detail) == (ok, said)
    assert bool(found.mend) is not ok
