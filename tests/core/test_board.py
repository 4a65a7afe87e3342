"""The board: order of writes, crashes between any two of them, and what a reader may see."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_node.board import (
    CAUGHT_UP,
    FIRST_MODEL,
    INCARNATION,
    POLICY,
    PURGE,
    SLOTS,
    BoardFile,
    BoardModel,
    BoardReader,
    BoardWriter,
    Fence,
    LogIdentity,
    models_file,
    position_of,
    purge_log,
    stamp,
)
from schemas.errors import Conflict, NotFound, Overloaded
from schemas.events import Artifact, ModelReleased, Tensor
from schemas.names import Scope, ScopeKind, model_object_key
from streams.folds.invalidations import Purge, PurgeMap, Standing
from streams.folds.wanted import Wanted

IDENTITY = LogIdentity(releases_id="r1", invalidations_id="i1", catalogue="c1")
ANOTHER = LogIdentity(releases_id="r2", invalidations_id="i1", catalogue="c1")


def a_wanted(model: str = "m", sequence: int = 1) -> Wanted:
    digest = f"{sequence:064x}"
    artifact = Artifact(
        sha256=digest,
        size_bytes=10,
        object_key=model_object_key(model, digest),
        chunk_size_bytes=65_536,
        chunk_sha256=(bytes(32),),
    )
    released = ModelReleased(
        model=model,
        version=str(sequence),
        sequence=sequence,
        artifact=artifact,
        inputs=(Tensor(name="x", datatype="FP32", shape=(-1, 4)),),
        outputs=(Tensor(name="y", datatype="FP32", shape=(-1, 1)),),
        created_at_ms=1,
        author="a",
    )
    return Wanted(
        model=model,
        version=str(sequence),
        sequence=sequence,
        position=sequence,
        cause=f"c{sequence}",
        released=released,
    )


def a_model(sequence: int, model: str = "m", slot: int = FIRST_MODEL) -> BoardModel:
    wanted = a_wanted(model, sequence)
    return BoardModel(wanted=wanted, path=f"artifacts/{wanted.digest}.onnx", slot=slot)


EVERYTHING = Scope(ScopeKind.ALL)


def a_purge(position: int, scope: Scope = EVERYTHING, soft: bool = False) -> Purge:
    return Purge(position=position, scopes=(scope,), soft=soft, cause=f"c{position}")


def with_models(writer: BoardWriter, **models: BoardModel) -> BoardFile:
    assert writer.file is not None
    return writer.publish(msgspec.structs.replace(writer.file, models=models))


class PowerCut(Exception):
    """The machine stops before the operation."""


class LossyDisk:
    """The disk port over a dict, where only what was synced outlives a power cut.

    `live` is what processes see, `durable` what a power cut leaves: file contents by `sync`, names by `sync_folder`.
    After `fuse` operations that change something, the next raises PowerCut; a write or an append has then got half way.
    """

    def __init__(self, fuse: int | None = None) -> None:
        self.live: dict[Path, bytearray] = {}
        self.names: dict[Path, bytearray] = {}
        self.contents: dict[int, bytes] = {}
        self.fuse = fuse
        self.operations = 0
        self.locked: set[Path] = set()

    def power_cut(self, *, kept: bool) -> None:
        """Everything not synced is gone; or, with `kept`, has by luck reached the disk after all."""
        if not kept:
            self.live = {path: bytearray(self.contents.get(id(data), b"")) for path, data in self.names.items()}
        self.names, self.contents = dict(self.live), {id(data): bytes(data) for data in self.live.values()}
        self.locked.clear()
        self.fuse = None

    def lock(self, path: Path) -> Callable[[], None]:
        if path in self.locked:
            raise Conflict(f"{path} is held")
        self.locked.add(path)
        return lambda: self.locked.discard(path)

    def read(self, path: Path, offset: int = 0) -> bytes | None:
        return bytes(self.live[path][offset:]) if path in self.live else None

    def write(self, path: Path, data: bytes) -> None:
        self.live.setdefault(path, bytearray())[:] = data[: len(data) // 2]
        self._burn()
        self.live[path][:] = data

    def append(self, path: Path, data: bytes) -> None:
        before = len(self.live[path])
        self.live[path] += data[: len(data) // 2]
        self._burn()
        self.live[path][before:] = data

    def truncate(self, path: Path, size: int) -> None:
        self._burn()
        del self.live[path][size:]

    def sync(self, path: Path) -> None:
        self._burn()
        self.contents[id(self.live[path])] = bytes(self.live[path])

    def rename(self, old: Path, new: Path) -> None:
        self._burn()
        self.live[new] = self.live.pop(old)

    def sync_folder(self, folder: Path) -> None:
        self._burn()
        self.names = {path: data for path, data in self.live.items() if path.parent == folder}

    def _burn(self) -> None:
        if self.fuse is not None and self.operations >= self.fuse:
            raise PowerCut
        self.operations += 1


@contextmanager
def a_directory() -> Iterator[Path]:
    """The fence is a real mapped file in every test: only the disk is replaced."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def test_a_slot_only_rises_and_a_reader_sees_it_at_once(tmp_path: Path) -> None:
    writer = Fence.open(tmp_path / "fence", writable=True)
    reader = Fence.open(tmp_path / "fence", writable=False)
    writer.raise_to(9, 2**63)
    writer.raise_to(9, 7)
    assert reader[9] == 2**63
    assert (tmp_path / "fence").stat().st_size == 65_536 == SLOTS * 8
    writer.close()
    reader.close()
    again = Fence.open(tmp_path / "fence", writable=True)
    assert again[9] == 2**63
    again.close()


def test_a_reader_without_a_fence_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        Fence.open(tmp_path / "fence", writable=False)


def test_caught_up_is_true_only_of_a_counted_incarnation(tmp_path: Path) -> None:
    fence = Fence.open(tmp_path / "fence", writable=True)
    assert not fence.caught_up  # 0 == 0 is a fence that nobody has raised
    fence.raise_to(INCARNATION, 3)
    fence.raise_to(CAUGHT_UP, 2)
    assert not fence.caught_up
    fence.raise_to(CAUGHT_UP, 3)
    assert fence.caught_up
    fence.close()


@given(st.integers(1, 2**20), st.integers(-1, 2**39), st.integers(1, 2**20), st.integers(-1, 2**39))
def test_a_stamp_orders_generations_before_positions(g1: int, p1: int, g2: int, p2: int) -> None:
    assert position_of(stamp(g1, p1)) == p1
    assert (stamp(g1, p1) < stamp(g2, p2)) == ((g1, p1) < (g2, p2))


def test_a_second_writer_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = BoardWriter(tmp_path)
    with pytest.raises(Conflict, match="held by process"):
        BoardWriter(tmp_path)
    first.close()
    BoardWriter(tmp_path).close()


def test_what_is_written_is_read_and_the_fence_moved(tmp_path: Path) -> None:
    writer = BoardWriter(tmp_path)
    writer.begin("n", IDENTITY)
    reader = BoardReader(tmp_path)
    before = reader.fence[POLICY]
    written = with_models(writer, m=a_model(1))
    assert reader.fence[POLICY] == written.policy > before
    assert reader.fence[FIRST_MODEL] == written.policy
    assert reader.load() == written
    untouched = writer.publish(msgspec.structs.replace(written, positions={"t": 4}))
    assert reader.fence[POLICY] == untouched.policy
    assert reader.fence[FIRST_MODEL] == written.policy  # the model did not change
    with_models(writer)
    assert reader.fence[FIRST_MODEL] > untouched.policy  # taking it away is a change too
    reader.close()
    writer.close()


def test_purges_are_read_on_from_an_offset_and_written_once(tmp_path: Path) -> None:
    writer = BoardWriter(tmp_path)
    writer.begin("n", IDENTITY)
    reader = BoardReader(tmp_path)
    assert reader.read_purges(0) == ([], 0)
    writer.append_purges([a_purge(3)])
    assert position_of(reader.fence[PURGE]) == 3
    first, offset = reader.read_purges(0)
    assert writer.append_purges([a_purge(2), a_purge(3), a_purge(5)]) == [a_purge(5)]
    rest, end = reader.read_purges(offset)
    assert [p.position for p in first + rest] == [3, 5]
    assert reader.read_purges(end) == ([], end)
    reader.close()
    writer.close()


def test_a_compacted_log_says_the_same_and_late_readers_find_it(tmp_path: Path) -> None:
    writer = BoardWriter(tmp_path)
    writer.begin("n", IDENTITY)
    reader = BoardReader(tmp_path)
    live, seen = PurgeMap(), PurgeMap()
    key = Scope(ScopeKind.KEY, "k")
    for position in range(50):
        writer.append_purges([a_purge(position, key)])
        live.apply(a_purge(position, key))
    purges, offset = reader.read_purges(0)
    for purge in purges[:10]:
        seen.apply(purge)
    long = writer.purge_bytes
    writer.compact_purges(live.purges())
    assert writer.purge_bytes < long / 10
    writer.append_purges([a_purge(60, Scope(ScopeKind.TAG, "t"))])
    purges, offset = reader.read_purges(offset)  # an offset into the old log
    for purge in purges:
        seen.apply(purge)
    assert seen.last == 60
    assert seen.standing(48, "k", None, ()) is Standing.HARD
    assert seen.standing(49, "k", None, ()) is Standing.VALID
    assert seen.standing(59, "z", None, ("t",)) is Standing.HARD
    assert reader.read_purges(offset) == ([], offset)
    reader.close()
    writer.close()


def test_another_log_begins_a_generation_and_models_serve_on(tmp_path: Path) -> None:
    writer = BoardWriter(tmp_path)
    old = writer.begin("n", IDENTITY)
    with_models(writer, m=a_model(1))
    writer.append_purges([a_purge(900)])
    high = writer.fence[PURGE]
    new = writer.begin("n", ANOTHER)
    assert new.generation == old.generation + 1
    assert new.models == {"m": a_model(1)}
    assert new.log.namespace != old.log.namespace
    assert writer.fence[PURGE] > high
    assert writer.append_purges([a_purge(0)]) == [a_purge(0)]  # positions start again
    assert writer.begin("n", ANOTHER) == writer.file  # and begin again is nothing new
    writer.close()


def test_a_file_written_meanwhile_does_not_bring_the_old_log_back(tmp_path: Path) -> None:
    writer = BoardWriter(tmp_path)
    stale = writer.begin("n", IDENTITY)
    new = writer.begin("n", ANOTHER)
    written = writer.publish(msgspec.structs.replace(stale, models={"m": a_model(1)}))
    assert (written.log, written.generation, written.purges) == (new.log, new.generation, new.purges)
    writer.close()


def test_a_damaged_file_is_no_board_and_generations_still_rise(tmp_path: Path) -> None:
    writer = BoardWriter(tmp_path)
    old = writer.begin("n", IDENTITY)
    writer.append_purges([a_purge(7)])
    high = writer.fence[PURGE], writer.fence[POLICY]
    writer.close()
    (tmp_path / "board" / "models.json").write_bytes(b'{"format": 1, "node"')
    reader = BoardReader(tmp_path)
    assert reader.load() is None
    assert reader.read_purges(0) == ([], 0)
    reader.close()
    writer = BoardWriter(tmp_path)
    assert writer.file is None
    assert writer.begin("n", IDENTITY).generation > old.generation
    assert writer.fence[PURGE] > high[0]
    assert writer.fence[POLICY] > high[1]
    writer.close()


def test_a_full_disk_leaves_whole_lines_only(tmp_path: Path) -> None:
    class Full(LossyDisk):
        def append(self, path: Path, data: bytes) -> None:
            self.live[path] += data[: len(data) // 2]
            raise OSError(28, "No space left on device")

    disk = Full()
    writer = BoardWriter(tmp_path, disk)
    writer.begin("n", IDENTITY)
    before = writer.fence[PURGE]
    with pytest.raises(OSError, match="No space"):
        writer.append_purges([a_purge(1)])
    assert writer.fence[PURGE] == before
    disk.__class__ = LossyDisk  # there is room again
    assert writer.append_purges([a_purge(1)]) == [a_purge(1)]
    reader = BoardReader(tmp_path, disk)
    assert reader.read_purges(0)[0] == [a_purge(1)]
    reader.close()
    writer.close()


def test_a_torn_line_is_not_obeyed_and_cut_off(tmp_path: Path) -> None:
    writer = BoardWriter(tmp_path)
    file = writer.begin("n", IDENTITY)
    writer.append_purges([a_purge(1)])
    writer.close()
    path = tmp_path / "board" / file.purges
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"position": 2, "sco' + bytes(9) + b"\n" + purge_log.encode([a_purge(3)]))
    reader = BoardReader(tmp_path)
    assert reader.read_purges(0) == ([a_purge(1)], len(whole))
    writer = BoardWriter(tmp_path)
    assert path.read_bytes() == whole
    assert writer.append_purges([a_purge(2)]) == [a_purge(2)]
    assert reader.read_purges(len(whole))[0] == [a_purge(2)]
    reader.close()
    writer.close()


def test_slots_are_given_back_and_run_out_with_an_error(tmp_path: Path) -> None:
    writer = BoardWriter(tmp_path)
    assert writer.free_slot([FIRST_MODEL, FIRST_MODEL + 1]) == FIRST_MODEL + 2
    assert writer.free_slot([FIRST_MODEL + 1]) == FIRST_MODEL
    with pytest.raises(Overloaded):
        writer.free_slot(range(FIRST_MODEL, SLOTS))
    writer.close()


@settings(max_examples=150, deadline=None)
@given(
    steps=st.lists(st.sampled_from(["publish", "purge", "compact", "generation"]), min_size=1, max_size=6),
    fuse=st.integers(0, 40),
    power=st.sampled_from(["kill", "cut", "cut, but all had reached the disk"]),
)
def test_a_crash_between_any_two_operations_leaves_old_or_new_whole(steps: list[str], fuse: int, power: str) -> None:
    """A kill keeps what was written, a power cut what was synced; either way the next writer goes on."""
    with a_directory() as directory:
        disk = LossyDisk()
        writer = BoardWriter(directory, disk)
        writer.begin("n", IDENTITY)
        with_models(writer, m=a_model(1))
        disk.fuse = disk.operations + fuse
        identities = iter(LogIdentity(releases_id=f"r{i}", invalidations_id="i", catalogue="c") for i in range(9))
        position, announced = 0, writer.fence[POLICY]
        try:
            for number, step in enumerate(steps, 2):
                match step:
                    case "publish":
                        with_models(writer, m=a_model(number))
                    case "purge":
                        position += 1
                        writer.append_purges([a_purge(position)])
                    case "compact":
                        writer.compact_purges([a_purge(position)] if position else [])
                    case _:
                        writer.begin("n", next(identities))
                        position = 0
                announced = writer.fence[POLICY]
        except PowerCut:
            pass
        intended = writer.file
        fence_before = [writer.fence[i] for i in range(FIRST_MODEL + 1)]
        writer.fence.close()
        if power == "kill":
            disk.locked.clear()
            disk.fuse = None
        else:
            disk.power_cut(kept=power != "cut")

        data = disk.read(directory / "board" / "models.json")
        assert data is not None
        found = models_file.decode(data)  # whole, whatever happened
        assert intended is not None
        # Whatever the fence has announced is there; at most the one write under way is missing or new.
        assert max(announced, fence_before[POLICY], fence_before[FIRST_MODEL]) <= found.policy
        assert found.policy <= max(intended.policy, announced + 1)

        again = BoardWriter(directory, disk)
        assert again.file == found
        assert again.fence[POLICY] >= found.policy
        assert again.fence[FIRST_MODEL] >= fence_before[FIRST_MODEL]
        assert all(again.fence[i] >= value for i, value in enumerate(fence_before))
        # What follows is the level-triggered repair: whoever plans writes what is missing.
        again.begin("n", found.log)
        again.append_purges([a_purge(p) for p in range(1, position + 2)])
        repaired = with_models(again, m=a_model(99))
        reader = BoardReader(directory, disk)
        assert reader.load() == repaired
        purged = PurgeMap()
        for purge in reader.read_purges(0)[0]:
            purged.apply(purge)
        assert purged.last == again.last_purge >= position + 1
        reader.close()
        again.close()
