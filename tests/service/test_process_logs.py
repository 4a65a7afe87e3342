"""What a process writes to stderr: one form for all loggers, and a limit for those that repeat themselves."""

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from processes.logs import RateLimit, configure


@pytest.fixture(autouse=True)
def root_logger_restored() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in [h for h in root.handlers if h not in before]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def record(name: str, template: str = "connection to %s lost", level: int = logging.ERROR) -> logging.LogRecord:
    return logging.LogRecord(name, level, __file__, 1, template, ("broker",), None)


def test_both_kinds_of_loggers_write_the_same_json_lines_to_stderr_only(capsys: pytest.CaptureFixture[str]) -> None:
    configure("INFO", json=True)
    structlog.get_logger("ours").info("model_swapped", model="fraud")
    logging.getLogger("theirs").warning("child_exited", extra={"child": "kafka"})
    logging.getLogger("theirs").debug("below the level")
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in err.splitlines()]
    assert out == ""
    assert [(line["event"], line["level"], line["logger"]) for line in lines] == [
        ("model_swapped", "info", "ours"),
        ("child_exited", "warning", "theirs"),
    ]
    assert (lines[0]["model"], lines[1]["child"]) == ("fraud", "kafka")


@pytest.mark.parametrize("as_json", [True, False])
def test_tracebacks_do_not_show_local_variables(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    configure("INFO", json=as_json)

    def fail(password: str) -> None:
        raise ValueError(len(password))

    try:
        fail("open" + "sesame")
    except ValueError:
        logging.getLogger("theirs").exception("login_failed")
        structlog.get_logger("ours").exception("login_failed")
    err = capsys.readouterr().err
    assert err.count("ValueError: 10") == 2
    assert "opensesame" not in err


def test_configuring_again_replaces_and_does_not_repeat(capsys: pytest.CaptureFixture[str]) -> None:
    configure("INFO", json=False)
    configure("INFO", json=True)
    logging.getLogger("theirs").warning("once")
    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()] == ["once"]


def test_a_noisy_library_gets_a_few_lines_and_then_one_with_the_count(capsys: pytest.CaptureFixture[str]) -> None:
    configure("INFO", json=True)
    for attempt in range(120):
        logging.getLogger("aiokafka.conn").error("connection %d failed", attempt)
    logging.getLogger("ours").info("still_serving")
    configure("INFO", json=True)  # closes the handler, and with it the window
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines[:6]] == [*(f"connection {n} failed" for n in range(5)), "still_serving"]
    assert len(lines) == 7
    assert (lines[6]["event"], lines[6]["suppressed"], lines[6]["template"]) == (
        "log_lines_suppressed",
        115,
        "connection %d failed",
    )


def test_templates_are_limited_apart_and_a_new_window_begins_after_the_old() -> None:
    now = [0.0]
    limit = RateLimit(["redis"], lines=1, window_s=10, now=lambda: now[0])
    assert [limit.admits(record("redis.client")) for _ in range(3)] == [True, False, False]
    assert limit.admits(record("redis.client", "another %s"))
    assert limit.admits(record("redis.sentinel"))
    assert all(limit.admits(record("redistribution")) for _ in range(3))
    now[0] = 9.9
    assert limit.due() == []
    now[0] = 10.0
    [summary] = limit.due()
    assert (summary.name, summary.levelno, summary.__dict__["suppressed"]) == ("redis.client", logging.ERROR, 2)
    assert limit.due() == []
    assert limit.admits(record("redis.client"))


def test_templates_without_end_do_not_fill_the_memory() -> None:
    limit = RateLimit(["mode"], lines=1, window_s=10, now=lambda: 0.0)
    for number in range(3_000):
        limit.admits(record("mode.worker", f"built from {number}, not a template %s"))
        limit.due()
    assert limit.admits(record("mode.worker", "built from 0, not a template %s"))
