"""Where the workers of a node count together: held while the node lives, removed when it does not, never somebody else's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from edge_node import metrics_folder

HOLD = """
import sys, time
from pathlib import Path
from edge_node import metrics_folder
folder, _ = metrics_folder.take(Path(sys.argv[1]), Path(sys.argv[2]))
(folder / "counter_1.db").write_bytes(b"counted")
print(folder, flush=True)
time.sleep(60)
"""


def test_a_folder_is_held_while_its_node_lives_and_swept_when_it_was_killed(tmp_path: Path) -> None:
    memory, node, other = tmp_path / "memory", tmp_path / "node", tmp_path / "other"
    for path in (memory, node, other):
        path.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(node), str(memory)], stdout=subprocess.PIPE, cwd=Path.cwd()
    )
    try:
        assert holder.stdout is not None
        held = Path(holder.stdout.readline().decode().strip())
        mine, give_back = metrics_folder.take(other, memory)
        assert mine != held and (held / "counter_1.db").read_bytes() == b"counted"
        give_back()
        assert not mine.exists()
        # Another node of the same name, as two containers may have it, takes the disk.
        assert metrics_folder.take(node, memory)[0] == node / "metrics"
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()
    _, give_back = metrics_folder.take(other, memory)
    assert not held.exists()
    give_back()
    # The killed node's next life begins with nothing counted.
    again, give_back = metrics_folder.take(node, memory)
    assert again == held and not list(again.iterdir())
    give_back()


def test_a_link_is_not_followed_and_no_memory_is_no_hindrance(tmp_path: Path) -> None:
    memory, node, victim = tmp_path / "memory", tmp_path / "node", tmp_path / "victim"
    for path in (memory, node, victim):
        path.mkdir()
    (victim / "counter_1.db").write_bytes(b"theirs")
    folder, give_back = metrics_folder.take(node, memory)
    give_back()
    folder.symlink_to(victim)
    assert metrics_folder.take(node, memory)[0] == node / "metrics"
    assert (victim / "counter_1.db").read_bytes() == b"theirs"
    (node / "metrics" / "counter_2.db").write_bytes(b"old")
    assert metrics_folder.take(node, tmp_path / "nothing")[0] == node / "metrics"
    assert not list((node / "metrics").iterdir())
