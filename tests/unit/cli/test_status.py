"""`edgekv status`: the running server's statement for a person, and one line where there is none."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from edgekv.actors.service import MemoryEvent, MemoryView
from edgekv.cli.app import app
from edgekv.cli.status import NoStatement, fetch, view
from edgekv.core.pressure import Decision, PoolFacts
from edgekv.core.reading import Holder, Reading
from edgekv.core.spill import Condition, State
from edgekv.core.step import EngineStats, MemoryStats, PoolStats, SpeculationState, SpeculationStats
from edgekv.http.memory import memory_json

MIB, GIB = 1 << 20, 1 << 30
POOL = PoolStats(total_blocks=100, free_blocks=60, cached_blocks=15, active_blocks=25, block_size=16)
MEMORY = MemoryStats(
    leases={"weights": 2 * GIB, "kv.target": 6 * GIB},
    budget_bytes=10 * GIB,
    wanted_budget_bytes=7 * GIB,
    facts=PoolFacts(6 * GIB, 8 * GIB, 64 * MIB, 8 * GIB, 128 * MIB, 2 * GIB, GIB, 5),
    earmarks={"prefix.pinned": ("kv.target", 128 * MIB)},
    held=True,
)
WATCHED = MemoryView(
    device="GeForce RTX 4080",
    headroom_bytes=GIB,
    reading=Reading(
        16 * GIB, 12 * GIB, 8 * GIB, "nvml", 5.0, spilled_own_bytes=3 * MIB,
        holders=(Holder(8, "compositor", None), Holder(7, "game", 4 * GIB)),
    ),
    age_s=0.25,
    decision=Decision(
        Condition(State.PRESSURE, "700 MiB free, headroom 983 MiB"), 9 * GIB, 4 * GIB, 5 * GIB, True, patience_s=20.0
    ),
    memory=MEMORY,
    pool=POOL,
    events=(MemoryEvent(1_700_000_000.0, "shrunk", 2 * GIB, "gave 2.00 GiB back: others took 2.00 GiB"),),
)  # fmt: skip


def printed(watched: MemoryView | None, stats: EngineStats | None = None, width: int = 100) -> str:
    told = json.loads(json.dumps(memory_json(watched, stats)))
    console = Console(width=width, highlight=False, file=None, record=True, quiet=False)
    with console.capture() as capture:
        console.print(view(told, width))
    text = capture.get()
    assert all(len(line) <= width for line in text.splitlines())
    return text


def test_the_statement_names_every_owner_with_its_share() -> None:
    text = printed(WATCHED)
    assert text.startswith("GeForce RTX 4080  pressure: 700 MiB free, headroom 983 MiB  (read 0.2 s ago by nvml)\n")
    rows = [line.split()[1:5] for line in text.splitlines() if line[:4] in ("██  ", "▓▓  ", "▒▒  ", "··  ")]
    assert [row[0] for row in rows] == ["weights", "kv.target", "others", "free"]
    assert sum(int(row[1].replace(",", "")) for row in rows) == 16 * GIB
    assert "of it prefix.pinned 128.00 MiB" in text
    assert "game 4.00 GiB, compositor ?" in text
    bar = next(line for line in text.splitlines() if line.startswith("███"))
    assert bar == "█" * 12 + "▓" * 38 + "▒" * 25 + "·" * 25


def test_a_program_may_be_called_anything() -> None:
    holders = (Holder(7, "[vkps] Update", GIB), Holder(8, "[/x]", None))
    text = printed(replace(WATCHED, reading=replace(WATCHED.reading, holders=holders)))  # type: ignore[type-var]
    assert "[vkps] Update 1.00 GiB, [/x] ?" in text


def test_it_says_what_was_given_back_and_what_is_held() -> None:
    text = printed(WATCHED)
    for line in (
        "ledger  8.00 GiB leased of 10.00 GiB, 7.00 GiB once memory has been given back",
        "others  4.00 GiB now, 5.00 GiB at most in the last 20 s",
        "spilled 3.00 MiB of ours are not on the device",
        "held    no step runs until memory is where it should be",
        "pool    1,600 tokens in 100 blocks: 25 in use, 15 cached, 60 free",
        "        6.00 GiB, from 128.00 MiB to 8.00 GiB; gave back 2.00 GiB, took 1.00 GiB",
    ):
        assert line in text.splitlines()
    assert "shrunk      gave 2.00 GiB back: others took 2.00 GiB" in text


DRAFTS = SpeculationStats(
    "model", SpeculationState.ON, tokens=3.42, acceptance=0.624, speedup=1.52, verifications=9,
    pool=PoolStats(total_blocks=2000, free_blocks=1200, cached_blocks=790, active_blocks=10, block_size=16),
    drafter="Llama-3.2-1B", most_tokens=8, tokens_a_step=3.14,
)  # fmt: skip


def drafting(stats: SpeculationStats, width: int = 150) -> list[str]:
    """The lines on who drafts."""
    lines = printed(WATCHED, EngineStats(POOL, 0, 0, speculation=stats), width).splitlines()
    begin = next(index for index, line in enumerate(lines) if line.startswith("draft "))
    return lines[begin : lines.index("", begin)]


def test_it_says_how_speculation_goes() -> None:
    assert drafting(DRAFTS) == [
        "draft   Llama-3.2-1B, up to 8 tokens at once, on: 3.4 proposed for a sequence, 62 % accepted, "
        "3.1 tokens a step, 1.52x as fast as without",
        "        32,000 tokens in 2,000 blocks: 10 in use, 790 cached, 1,200 free",
    ]
    fresh = replace(
        DRAFTS, acceptance=None, speedup=None, tokens_a_step=None, method="ngram", drafter=None, pool=None,
        most_tokens=1,
    )  # fmt: skip
    assert drafting(fresh) == ["draft   n-grams, up to 1 token at once, on: nothing was measured yet"]
    assert drafting(replace(fresh, most_tokens=None)) == ["draft   n-grams, on: nothing was measured yet"]


def test_it_says_why_nothing_is_proposed() -> None:
    paused = replace(DRAFTS, state=SpeculationState.PAUSED, detail="proposals do not pay", pauses=1)
    assert drafting(paused) == [
        "draft   Llama-3.2-1B, up to 8 tokens at once, paused: proposals do not pay",
        "        when last tried: 62 % accepted, 3.1 tokens a step, 1.52x as fast as without",
        "        32,000 tokens in 2,000 blocks: 10 in use, 790 cached, 1,200 free",
        "        paused 1 time",
    ]
    yielded = replace(
        paused, state=SpeculationState.YIELDED, detail="its memory was given back", acceptance=None, speedup=None,
        tokens_a_step=None, yields=3, returns=2, pool=PoolStats(0, 0, 0, 0, 16),
    )  # fmt: skip
    assert drafting(yielded) == [
        "draft   Llama-3.2-1B, up to 8 tokens at once, yielded: its memory was given back",
        "        paused 1 time, gave its memory back 3 times, took it again 2 times",
    ]


def test_what_the_draft_holds_is_told_with_the_pool() -> None:
    held = "        6.00 GiB{}, from 128.00 MiB to 8.00 GiB; gave back 2.00 GiB, took 1.00 GiB"
    for stats, beside in ((DRAFTS, " with the draft"), (replace(DRAFTS, method="ngram", pool=None), "")):
        assert held.format(beside) in printed(WATCHED, EngineStats(POOL, 0, 0, speculation=stats)).splitlines()


def test_what_is_not_known_is_left_out() -> None:
    unread = MemoryView("a card", GIB, problem="nvml: the driver does not answer")
    text = "a card\nnvml: the driver does not answer\n\nledger  nothing is leased: no model has been loaded yet\n"
    assert printed(unread) == text
    alone = printed(None, EngineStats(POOL, running=0, waiting=0))
    assert alone.splitlines()[0] == "nobody watches this server's device"
    assert "pool    1,600 tokens" in alone
    stale = replace(WATCHED, reading=replace(WATCHED.reading, stale=True))  # type: ignore[type-var]
    assert "read 0.2 s ago by nvml, stale)" in printed(stale)


@contextmanager
def answering(status: int, body: bytes) -> Iterator[tuple[str, list[str | None]]]:
    """A server that gives one answer to everything; and the keys that it was shown."""
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            keys.append(self.headers.get("Authorization"))
            self.send_response(status if self.path == "/api/edgekv/memory" else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", keys
        finally:
            server.shutdown()
            thread.join()


STATEMENT = json.dumps(memory_json(WATCHED, None)).encode()


@pytest.mark.parametrize("key", ["a long secret", "ein Schlüssel"])
def test_it_asks_the_server_with_the_key(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(200, STATEMENT) as (url, keys):
        monkeypatch.setenv("EDGEKV_KEY", key)
        result = CliRunner().invoke(app, ["status", "--url", f"{url}/v1"])
        as_json: dict[str, Any] = json.loads(CliRunner().invoke(app, ["status", "--url", url, "--json"]).stdout)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("GeForce RTX 4080  pressure")
    assert as_json == json.loads(STATEMENT)
    assert keys == [f"Bearer {key}".encode().decode("latin-1")] * 2  # the bytes, as http.server reads them


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, b"{}", "wants an API key: give --key, or set EDGEKV_KEY"),
        (404, b"{}", "is not an edgekv server of this version (404)"),
        (200, b"<html>", "is not an edgekv server of this version (200)"),
        (200, b'{"object": "list"}', "is not an edgekv server of this version (200)"),
        (403, b'{"error": {"message": "This Host is not allowed."}}', "refuses: This Host is not allowed."),
        (403, b'{"error": "no"}', "is not an edgekv server of this version (403)"),
    ],
)
def test_what_is_no_statement_is_one_line(status: int, body: bytes, told: str) -> None:
    with answering(status, body) as (url, _), pytest.raises(NoStatement) as caught:
        fetch(url, None)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body", [b'{"owners": null}', STATEMENT.replace(b"free_blocks", b"free"), b'{"owners": [1]}'])
def test_another_versions_statement_is_one_line(body: bytes) -> None:
    with answering(200, body) as (url, _):
        shown = CliRunner().invoke(app, ["status", "--url", url])
        as_json = CliRunner().invoke(app, ["status", "--url", url, "--json"])
    assert isinstance(shown.exception, NoStatement)
    assert "not of the same version" in str(shown.exception)
    assert json.loads(as_json.stdout) == json.loads(body)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://nowhere.invalid", "no url", "http://[", ""])
def test_where_no_server_is_it_says_so_in_one_line(url: str) -> None:
    with pytest.raises(NoStatement) as caught:
        fetch(url, None)
    assert "no server answers at" in str(caught.value)
    assert "start one with: edgekv serve" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_that_the_server_does_not_know_is_told_apart_from_none() -> None:
    with answering(401, b"{}") as (url, _), pytest.raises(NoStatement, match="does not know this API key"):
        fetch(url, "wrong")


def test_in_a_pipe_each_statement_follows_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("edgekv.cli.status.time.sleep", sleep)
    with answering(200, STATEMENT) as (url, _):
        told = CliRunner().invoke(app, ["status", "--url", url, "--watch"])
    assert told.stdout.count("GeForce RTX 4080  pressure") == 3
    assert "\x1b" not in told.stdout


def test_one_json_document_cannot_be_followed() -> None:
    assert CliRunner().invoke(app, ["status", "--json", "--watch"]).exit_code == 2


def test_a_terminal_of_80_columns_breaks_lines_between_phrases() -> None:
    drafts = EngineStats(POOL, 0, 0, speculation=DRAFTS)
    lines = printed(WATCHED, drafts, width=80).splitlines()
    assert lines[:2] == [
        "GeForce RTX 4080  pressure: 700 MiB free, headroom 983 MiB",
        "  (read 0.2 s ago by nvml)",
    ]
    held = lines.index("        6.00 GiB with the draft, from 128.00 MiB to 8.00 GiB;")
    assert lines[held + 1 : held + 5] == [
        "          gave back 2.00 GiB, took 1.00 GiB",
        "draft   Llama-3.2-1B, up to 8 tokens at once, on: 3.4 proposed for a sequence,",
        "          62 % accepted, 3.1 tokens a step, 1.52x as fast as without",
        "        32,000 tokens in 2,000 blocks: 10 in use, 790 cached, 1,200 free",
    ]


def test_what_happened_stays_in_its_column() -> None:
    event = MemoryEvent(1_700_000_000.0, "shrunk", GIB, "gave 2.00 GiB back: others took 2.00 GiB, " * 2)
    *_, first, second = printed(replace(WATCHED, events=(event,)), width=80).splitlines()
    assert first.endswith("  shrunk      gave 2.00 GiB back: others took 2.00 GiB,")
    assert second.startswith(" " * 22 + "gave 2.00 GiB back:")


def test_on_a_narrow_terminal_nothing_is_cut_off() -> None:
    assert "…" not in printed(WATCHED, width=60)
    drafts = EngineStats(POOL, 0, 0, speculation=DRAFTS)
    assert "…" not in printed(WATCHED, drafts, width=60)
