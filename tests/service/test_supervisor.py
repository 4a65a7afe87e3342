"""The supervisor with real processes: order, readiness, restarts, stopping, and death of the parent."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from processes import supervisor as supervisor_module
from processes.supervisor import Child, GaveUp, StartFailed, Supervisor

SLEEPER = (sys.executable, "-S", "-c", "import time; time.sleep(60)")


def python(code: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code)


def exists(path: Path) -> Callable[[], Awaitable[None]]:
    async def ready() -> None:
        os.stat(path)  # raises until it is there

    return ready


def is_gone(pid: int) -> bool:
    """Reaped, or dead and waiting for a slow init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def test_a_child_starts_once_what_it_comes_after_is_ready(tmp_path: Path) -> None:
    slow = Child(
        name="slow",
        argv=python(f"import time; time.sleep(0.3); open({str(tmp_path / 'up')!r}, 'w').close(); time.sleep(60)"),
        ready=exists(tmp_path / "up"),
    )
    seen = f"import os; open({str(tmp_path)!r} + '/seen-' + str(os.path.exists({str(tmp_path / 'up')!r})), 'w').close()"
    late = Child(
        name="late",
        argv=python(f"{seen}; import time; time.sleep(60)"),
        after=("slow",),
        ready=exists(tmp_path / "seen-True"),
        ready_timeout_s=5,
    )

    async def run() -> None:
        async with Supervisor() as supervisor:
            await supervisor.start([late, slow])
            assert set(supervisor.pids()) == {"late", "slow"}

    asyncio.run(run())
    assert not (tmp_path / "seen-False").exists()


def test_independent_children_start_in_parallel(tmp_path: Path) -> None:
    def child(name: str, other: str) -> Child:
        # Each is ready only when the other has started too.
        mark = f"open({str(tmp_path / name)!r}, 'w').close(); import time; time.sleep(60)"
        return Child(name=name, argv=python(mark), ready=exists(tmp_path / other), ready_timeout_s=5)

    async def run() -> None:
        async with Supervisor() as supervisor:
            await supervisor.start([child("a", "b"), child("b", "a")])

    asyncio.run(run())


def test_an_early_exit_fails_at_once_with_the_last_lines_and_stops_the_others(tmp_path: Path) -> None:
    exits: list[tuple[str, int]] = []
    broken = Child(
        name="broken",
        argv=python("import sys; sys.exit('no room on the moon')"),
        ready=exists(tmp_path / "never"),
        log=tmp_path / "logs" / "broken.log",
    )

    async def run() -> None:
        supervisor = Supervisor(on_exit=lambda name, _, code: exits.append((name, code)))
        with pytest.raises(StartFailed, match=r"(?s)broken exited with 1 before it was ready.*no room on the moon"):
            await supervisor.start([Child(name="other", argv=SLEEPER), broken])
        assert supervisor.pids() == {}

    began = time.monotonic()
    asyncio.run(run())
    assert time.monotonic() - began < 5
    assert sorted(exits) == [("broken", 1), ("other", -signal.SIGTERM)]


def test_a_silent_child_fails_with_the_last_refusal(tmp_path: Path) -> None:
    child = Child(name="silent", argv=SLEEPER, ready=exists(tmp_path / "never"), ready_timeout_s=0.2)

    async def run() -> None:
        async with Supervisor() as supervisor:
            with pytest.raises(StartFailed, match=r"not ready within 0\.2 s \(FileNotFoundError"):
                await supervisor.add(child)
            assert supervisor.names() == set()

    asyncio.run(run())


@pytest.mark.parametrize(
    "children",
    [
        [Child(name="a", argv=SLEEPER, after=("nobody",))],
        [Child(name="a", argv=SLEEPER, after=("b",)), Child(name="b", argv=SLEEPER, after=("a",))],
        [Child(name="a", argv=SLEEPER), Child(name="a", argv=SLEEPER)],
    ],
    ids=["unknown", "cycle", "twice"],
)
def test_a_wrong_order_is_refused_before_anything_starts(children: list[Child]) -> None:
    exits: list[str] = []

    async def run() -> None:
        async with Supervisor(on_exit=lambda name, *_: exits.append(name)) as supervisor:
            with pytest.raises(ValueError, match=r"nobody|cycle|two children"):
                await supervisor.start(children)

    asyncio.run(run())
    assert exits == []


def test_a_program_that_is_not_there_fails_by_name() -> None:
    async def run() -> None:
        async with Supervisor() as supervisor:
            with pytest.raises(StartFailed, match=r"ghost could not be started: .*no/such/program"):
                await supervisor.start([Child(name="ghost", argv=("/no/such/program",))])

    asyncio.run(run())


def test_what_dies_is_restarted_with_growing_pauses_until_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "FIRST_BACKOFF_S", 0.05)
    starts = tmp_path / "starts"
    dies = Child(
        name="dies",
        argv=python(f"import time; open({str(starts)!r}, 'a').write(f'{{time.monotonic()}}\\n')"),
        max_restarts=3,
    )
    exits: list[int] = []

    async def run() -> None:
        async with Supervisor(on_exit=lambda _, pid, __: exits.append(pid)) as supervisor:
            await supervisor.start([dies])
            with pytest.raises(GaveUp, match="dies died after 3 restarts"):
                await asyncio.wait_for(supervisor.run_until(asyncio.Event()), 20)

    asyncio.run(run())
    at = [float(line) for line in starts.read_text().splitlines()]
    assert len(at) == 4
    assert at[1] - at[0] >= 0.05
    assert at[2] - at[1] >= 0.1
    assert at[3] - at[2] >= 0.2
    assert len(set(exits)) == len(exits) == 4


def test_a_long_life_forgives_earlier_deaths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(supervisor_module, "FORGIVEN_AFTER_S", 0.0)
    starts = tmp_path / "starts"
    dies = Child(name="dies", argv=python(f"open({str(starts)!r}, 'a').write('x')"), max_restarts=1)

    async def run() -> None:
        async with Supervisor() as supervisor:
            await supervisor.start([dies])
            stop = asyncio.Event()
            running = asyncio.create_task(supervisor.run_until(stop))
            while not starts.exists() or len(starts.read_text()) < 4:
                await asyncio.sleep(0.02)
                assert not running.done()
            stop.set()
            await running

    asyncio.run(asyncio.wait_for(run(), 20))


def test_a_stopped_child_stays_stopped_until_it_is_started() -> None:
    async def run() -> None:
        async with Supervisor() as supervisor:
            await supervisor.start([Child(name="one", argv=SLEEPER), Child(name="two", argv=SLEEPER)])
            before = supervisor.pids()
            await supervisor.stop_child("one")
            await asyncio.sleep(0.3)
            assert supervisor.pids() == {"two": before["two"]}
            await supervisor.start_child("one")
            assert supervisor.pids()["one"] != before["one"]
            with pytest.raises(ValueError, match="running already"):
                await supervisor.start_child("one")
            await supervisor.restart_child("two")
            assert supervisor.pids()["two"] != before["two"]

    asyncio.run(run())


def test_children_stop_in_reverse_and_what_is_held_is_released_last() -> None:
    events: list[str] = []

    async def run() -> None:
        supervisor = Supervisor(on_exit=lambda name, *_: events.append(name))
        await supervisor.start(
            [
                Child(name="bottom", argv=SLEEPER),
                Child(name="middle", argv=SLEEPER, after=("bottom",)),
                Child(name="top", argv=SLEEPER, after=("middle", "bottom")),
            ]
        )
        supervisor.at_stop(lambda: events.append("released"))
        await supervisor.stop()

    asyncio.run(run())
    assert events == ["top", "middle", "bottom", "released"]


def test_a_deaf_child_and_its_own_child_are_killed_and_a_paused_one_hears_its_signal(tmp_path: Path) -> None:
    pids = tmp_path / "grandchild"
    deaf = Child(
        name="deaf",
        argv=python(
            "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "p = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
            f"open({str(pids)!r} + '.half', 'w').write(str(p.pid))\n"
            f"import os; os.rename({str(pids)!r} + '.half', {str(pids)!r}); time.sleep(60)"
        ),
        ready=exists(pids),
        stop_timeout_s=0.3,
    )
    codes: dict[str, int] = {}

    async def run() -> None:
        async with Supervisor(on_exit=lambda name, _, code: codes.update({name: code})) as supervisor:
            await supervisor.start([deaf, Child(name="paused", argv=SLEEPER)])
            supervisor.signal_child("paused", signal.SIGSTOP)

    asyncio.run(run())
    assert codes == {"deaf": -signal.SIGKILL, "paused": -signal.SIGTERM}
    assert wait_for(lambda: is_gone(int(pids.read_text())), 2)


def test_prefixed_lines_reach_the_writer_however_long_they_are() -> None:
    lines: list[tuple[str, str]] = []

    async def run() -> None:
        supervisor = Supervisor(write_line=lambda name, line: lines.append((name, line)))
        loud = python("import sys; print('first'); print('x' * 200_000); sys.stderr.write('last, without an end')")
        done = asyncio.Event()
        async with supervisor:
            await supervisor.start([Child(name="loud", argv=loud, log="prefix", max_restarts=0)])
            with pytest.raises(GaveUp, match="last, without an end"):
                await supervisor.run_until(done)

    asyncio.run(asyncio.wait_for(run(), 20))
    assert lines[0] == ("loud", "first")
    assert sum(line.count("x") for _, line in lines) == 200_000
    assert lines[-1] == ("loud", "last, without an end")


PARENT = """
import asyncio, sys
from processes.supervisor import Child, Supervisor

async def main():
    async with Supervisor() as supervisor:
        sleeper = (sys.executable, "-S", "-c", "import time; time.sleep(60)")
        await supervisor.start([Child(name=str(n), argv=sleeper) for n in range(3)])
        print(*supervisor.pids().values(), flush=True)
        await asyncio.sleep(60)

if "watcher" in sys.argv:
    from processes import parent_death
    parent_death._LINUX = False
asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["kernel", "watcher"])
def test_children_die_with_a_killed_parent(how: str) -> None:
    if how == "kernel" and sys.platform != "linux":
        pytest.skip("only Linux signals a parent's death")
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, how],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        try:
            assert parent.stdout is not None
            pids = [int(pid) for pid in parent.stdout.readline().split()]
            assert len(pids) == 3
            assert not any(map(is_gone, pids))
        finally:
            parent.kill()
        assert wait_for(lambda: all(map(is_gone, pids)), 0.5)


SIGNALLED = """
import asyncio
from processes.logs import configure
from processes.signals import stop_on_signals

async def main():
    configure("INFO", json=True)
    async with stop_on_signals() as stop:
        print("up", flush=True)
        await stop.wait()
        print("draining", flush=True)
        await asyncio.sleep(0.5)
        print("drained", flush=True)

asyncio.run(main())
"""


def test_a_second_signal_does_not_cut_a_drain_short() -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", SIGNALLED],
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "draining\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=10)
    assert (process.returncode, out) == (0, "drained\n")
    assert re.findall(r'"event": "(\w+)"', err) == ["stop_requested", "already_stopping", "already_stopping"]
