"""Logging of every process: one event name a message, facts beside it, to stderr.

Laws:
1. Standard output belongs to answers (`--json`), so logs never go there.
2. structlog and the standard library come out of one formatter: JSON lines where stderr is not a terminal, coloured
   lines where it is one.
3. A client library repeats itself 75 to 120 times a second while its broker is away. Such loggers may say each message
   template a few times in ten seconds; then one line says how many were held back.

It must not know who logs what, apart from the names of those libraries.
"""

import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog
from structlog.typing import Processor

# A line a request, or for every phase of a start: nothing that an operator would look for.
CHATTY_LOGGERS = ("httpx", "httpcore", "faust", "mode", "aiokafka")
NOISY_LOGGERS = ("aiokafka", "faust", "mode", "botocore", "redis", "librdkafka")
LINES_PER_WINDOW = 5
WINDOW_S = 10.0
# Templates remembered at once; above it the oldest window is closed early.
_TEMPLATES_LIMIT = 1_000


def configure(level: str = "INFO", json: bool | None = None) -> None:
    """Sets up logging for this process; `json` None means: unless stderr is a terminal. May be called again."""
    as_json = not sys.stderr.isatty() if json is None else json
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    last: list[Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=repr)]
        if as_json
        else [
            # The plain formatter: the others print the local variables of every frame, secrets with them.
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback)
        ]
    )
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.PositionalArgumentsFormatter(),
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,  # a second call must reach loggers made before it
    )
    handler = _StderrHandler(RateLimit(NOISY_LOGGERS, lines=LINES_PER_WINDOW, window_s=WINDOW_S))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    for old in [h for h in root.handlers if isinstance(h, _StderrHandler)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    for chatty in CHATTY_LOGGERS:
        logging.getLogger(chatty).setLevel(max(root.level, logging.WARNING))
    logging.captureWarnings(True)


class RateLimit:
    """Admits `lines` records of each logger and message template in a window that the first of them opens.

    What it held back comes out of `due` as one record a window, once the window is over.
    """

    def __init__(
        self, names: Sequence[str], *, lines: int, window_s: float, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._names = frozenset(names)
        self._lines = lines
        self._window_s = window_s
        self._now = now
        self._windows: dict[tuple[str, str], _Window] = {}  # oldest first: a window never moves

    def admits(self, record: logging.LogRecord) -> bool:
        if record.name.split(".", 1)[0] not in self._names:
            return True
        key = (record.name, str(record.msg))
        window = self._windows.get(key)
        if window is None:
            window = self._windows[key] = _Window(ends=self._now() + self._window_s)
        window.seen += 1
        window.level = max(window.level, record.levelno)
        return window.seen <= self._lines

    def due(self, *, all_of_them: bool = False) -> list[logging.LogRecord]:
        """Closes the windows that are over; the summaries of those that held something back."""
        now = self._now()
        summaries = []
        while self._windows:
            (name, template), window = next(iter(self._windows.items()))
            if window.ends > now and len(self._windows) <= _TEMPLATES_LIMIT and not all_of_them:
                break
            del self._windows[name, template]
            if window.seen > self._lines:
                summary = logging.LogRecord(name, window.level, __file__, 0, "log_lines_suppressed", None, None)
                summary.__dict__.update(template=template, suppressed=window.seen - self._lines)
                summaries.append(summary)
        return summaries


@dataclass(slots=True)
class _Window:
    ends: float
    seen: int = 0
    level: int = logging.NOTSET


class _StderrHandler(logging.Handler):
    """Writes to whatever `sys.stderr` is now. A summary that is due goes before the next line, of whatever logger."""

    def __init__(self, limit: RateLimit) -> None:
        super().__init__()
        self._limit = limit

    def emit(self, record: logging.LogRecord) -> None:
        for summary in self._limit.due():
            self._write(summary)
        if self._limit.admits(record):
            self._write(record)

    def close(self) -> None:
        for summary in self._limit.due(all_of_them=True):
            self._write(summary)
        super().close()

    def _write(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            # stderr is closed or its reader is gone: there is no place left to say so.
            return
