"""How log entries look."""

import json
import logging
from collections.abc import Iterator

import pytest

from edgekv.cli.logs import JsonFormatter, TextFormatter, configure_logging
from edgekv.errors import ModelError


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    logger, ours = logging.getLogger(), logging.getLogger("edgekv")
    before = logger.handlers[:], logger.level, ours.level
    yield logger
    logger.handlers[:], level, our_level = before
    logger.setLevel(level)
    ours.setLevel(our_level)


def record(error: BaseException | None = None) -> logging.LogRecord:
    raised = (type(error), error, None) if error is not None else None
    return logging.LogRecord("edgekv.http", logging.WARNING, "f.py", 1, "%d left", (3,), raised)


def test_text_is_one_line() -> None:
    assert TextFormatter().format(record())[9:] == "warning edgekv.http: 3 left"


def test_json_is_one_object() -> None:
    entry = json.loads(JsonFormatter().format(record()))
    assert (entry["level"], entry["logger"], entry["message"]) == ("warning", "edgekv.http", "3 left")
    assert "error" not in entry


def test_an_error_for_a_person_has_no_traceback_and_a_bug_has_one() -> None:
    group = ExceptionGroup("group", [ModelError("config.json: no such field")])
    assert TextFormatter().format(record(group)).endswith(": 3 left: config.json: no such field")
    assert json.loads(JsonFormatter().format(record(group)))["error"] == "config.json: no such field"
    assert "ZeroDivisionError: oh" in TextFormatter().format(record(ZeroDivisionError("oh")))
    assert "ZeroDivisionError: oh" in json.loads(JsonFormatter().format(record(ZeroDivisionError("oh"))))["error"]


def test_only_our_own_loggers_follow_the_level(root: logging.Logger) -> None:
    configure_logging("debug", "json")
    assert isinstance(root.handlers[0].formatter, JsonFormatter)
    assert logging.getLogger("edgekv.actors").isEnabledFor(logging.DEBUG)
    assert not logging.getLogger("hypercorn").isEnabledFor(logging.INFO)
