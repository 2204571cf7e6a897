"""The daemon's log: lines for a person at a terminal, JSON for everything else. Never a token, at any level."""

import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

import msgspec

from carserver.cli.plain import visible
from carserver.config import LogLevel

_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def set_up(level: LogLevel, stream: TextIO | None = None) -> None:
    """Sends what `carserver` logs to `stream` (standard error).

    Other packages' loggers are left alone: at DEBUG some print headers.
    """
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(_Text() if stream.isatty() else _Json())
    logger = logging.getLogger("carserver")
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _OWN}


class _Json(logging.Formatter):
    """One object a line: time, level, logger, message, and what was said beside it."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            said["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(said, enc_hook=repr).decode()


class _Text(logging.Formatter):
    """A line for a person."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        extras = "".join(f" {name}={value}" for name, value in _extras(record).items())
        line = visible(f"{moment} {record.levelname.lower():7} {record.getMessage()}{extras}")
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
