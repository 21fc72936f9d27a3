"""How the server's log looks, on standard error. Runs in: anywhere; owns: the root logger's handler."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

from edgekv.errors import EdgeKVError


def configure_logging(level: str, form: Literal["auto", "text", "json"]) -> None:
    """Log to standard error; auto is text on a terminal, else one JSON object a line."""
    handler = logging.StreamHandler(sys.stderr)
    as_text = form == "text" or (form == "auto" and sys.stderr.isatty())
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("edgekv").setLevel(level.upper())


class TextFormatter(logging.Formatter):
    """`12:34:56 warning edgekv.http: …`; an error that is meant for a person comes without a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """One entry."""
        at = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        text = f"{at} {record.levelname.lower()} {record.name}: {record.getMessage()}"
        if (error := _error(record)) is not None:
            reason = _personal(error)
            text += f": {reason}" if reason else "\n" + self.formatException(record.exc_info)  # type: ignore[arg-type]
        return text


class JsonFormatter(logging.Formatter):
    """One JSON object: time, level, logger, message, and the traceback where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """One entry."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (error := _error(record)) is not None:
            reason = _personal(error)
            entry["error"] = reason or self.formatException(record.exc_info)  # type: ignore[arg-type]
        return json.dumps(entry, ensure_ascii=False)


def _error(record: logging.LogRecord) -> BaseException | None:
    return record.exc_info[1] if record.exc_info else None


def _personal(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return str(error) if isinstance(error, EdgeKVError) else ""
