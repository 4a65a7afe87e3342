"""Key files: made once, read strictly, never replaced, never for others' eyes."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from schemas.errors import BadInput, SettingsInvalid
from streams.log.keys import generate, load_private, load_roots, write_roots


def test_a_key_is_made_for_its_owner_alone_and_never_replaced(tmp_path: Path) -> None:
    path = generate(tmp_path, "root")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(SettingsInvalid):
        generate(tmp_path, "root")
    assert path.read_bytes() == before
    with pytest.raises(BadInput):
        generate(tmp_path, "../root")


def test_roots_are_read_as_they_were_written_and_never_replaced(tmp_path: Path) -> None:
    keys = {label: load_private(generate(tmp_path, label)) for label in ("one", "two")}
    path = write_roots(tmp_path / "roots.txt", keys)
    assert load_roots(path) == tuple(k.public_key().public_bytes_raw() for k in keys.values())
    with pytest.raises(SettingsInvalid):
        write_roots(path, keys)


@pytest.mark.parametrize("text", ["", "# nothing\n", "root\n", "root AAAA\n", "root not/base64!\n", "a b c\n"])
def test_a_file_that_is_no_list_of_roots_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "roots.txt").write_text(text)
    with pytest.raises(SettingsInvalid):
        load_roots(tmp_path / "roots.txt")


def test_a_private_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    path = generate(tmp_path, "open")
    path.chmod(0o640)
    with pytest.raises(SettingsInvalid, match="chmod 600"):
        load_private(path)
    (tmp_path / "text.key").write_text("no key")
    (tmp_path / "text.key").chmod(0o600)
    with pytest.raises(SettingsInvalid, match="PEM"):
        load_private(tmp_path / "text.key")
