"""`edgekv status`: who owns which byte of the running server's device. Runs in: the main thread; owns: the terminal."""

import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import typer
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from edgekv.cli.console import bearer, print_json, stdout
from edgekv.cli.owners import WIDEST_BAR, Owned, owner_bar, owner_table
from edgekv.cli.phrases import wrap_phrases
from edgekv.cli.speculation_status import blocks_line, speculation_lines
from edgekv.config.units import format_size
from edgekv.errors import EdgeKVError

DEFAULT_URL = "http://127.0.0.1:8181"
TIMEOUT_S = 5.0
PERIOD_S = 1.0
LATEST_EVENTS = 8
MOST_HOLDERS = 6
INDENT = 10  # of what is left of a line that is too long: two more than what stands below a label
STATE_STYLES = {"ok": "green", "pressure": "yellow", "critical": "red", "thrash": "red", "spilled": "bold red"}

Statement = dict[str, Any]


class NoStatement(EdgeKVError):
    """There is no server at this address, or it does not tell."""


def status(
    url: str = typer.Option(DEFAULT_URL, help="Where the server is."),
    key: str | None = typer.Option(None, envvar="EDGEKV_KEY", help="An API key, where the server wants one."),
    as_json: bool = typer.Option(False, "--json", help="Print the server's statement as JSON."),
    watch: bool = typer.Option(False, "--watch", help="Follow it, once a second, until Ctrl-C."),
) -> None:
    """Show where the running server's memory is, what the memory guard sees, and what it did."""
    if as_json and watch:
        raise typer.BadParameter("--json prints one statement, and --watch follows it: leave one of them out")
    told = fetch(url, key)
    if as_json:
        print_json(told)
    elif watch:
        _follow(url, key, told)
    else:
        stdout().print(view(told, stdout().width))


def fetch(url: str, key: str | None) -> Statement:
    """The statement of the server at `url`. Raises NoStatement in one line."""
    import httpx2

    address = url.rstrip("/").removesuffix("/v1")
    try:
        answer = httpx2.get(f"{address}/api/edgekv/memory", headers=bearer(key), timeout=TIMEOUT_S, trust_env=False)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        why = str(error) or type(error).__name__
        raise NoStatement(f"no server answers at {address} ({why}); start one with: edgekv serve") from None
    if answer.status_code == 401:
        wants = "does not know this API key: give another with" if key else "wants an API key: give"
        raise NoStatement(f"the server at {address} {wants} --key, or set EDGEKV_KEY")
    try:
        told = answer.json()
    except ValueError:
        told = None
    if answer.status_code == 200 and isinstance(told, dict) and "owners" in told:
        return told
    if answer.status_code == 403 and isinstance(told, dict) and isinstance(told.get("error"), dict):
        raise NoStatement(f"the server at {address} refuses: {told['error'].get('message')}")
    raise NoStatement(f"what answers at {address} is not an edgekv server of this version ({answer.status_code})")


def view(told: Statement, width: int) -> RenderableType:
    """The statement for a person, at most `width` cells wide. Raises NoStatement for that of another version."""
    try:
        return Group(*_parts(told, width))
    except (LookupError, TypeError, ValueError, AttributeError):
        raise NoStatement("this server is not of the same version: its statement can be had with --json") from None


def _follow(url: str, key: str | None, told: Statement) -> None:
    console = stdout()
    shown = view(told, console.width)
    if not console.is_terminal:  # there is nothing to draw over: one statement after the other
        while True:
            console.print(shown, end="\n\n")
            time.sleep(PERIOD_S)
            shown = _latest(url, key, console.width)
    with Live(shown, console=console, auto_refresh=False) as live:
        while True:
            time.sleep(PERIOD_S)
            live.update(_latest(url, key, console.width), refresh=True)


def _latest(url: str, key: str | None, width: int) -> RenderableType:
    """The statement as it is now; while there is none, why."""
    try:
        return view(fetch(url, key), width)
    except NoStatement as error:
        return Text(str(error), style="yellow")


def _parts(told: Statement, width: int) -> Iterator[RenderableType]:
    yield _headline(told, width)
    reading, ledger = told["reading"], told["ledger"]
    if told["owners"] is not None:
        yield Text()
        total = reading["total_bytes"]
        shares = [Owned(name, num_bytes, _how(name, told)) for name, num_bytes in told["owners"].items()]
        shares = [share for share in shares if share.num_bytes or share.name != "unleased"]
        yield owner_bar(shares, min(width, WIDEST_BAR))
        yield owner_table(shares, total)
    elif ledger is not None:
        yield Text()
        shares = [Owned(name, num_bytes, _how(name, told)) for name, num_bytes in ledger["leases"].items()]
        yield owner_table(shares, ledger["budget_bytes"])
    lines = [*_ledger_lines(told), *_pool_lines(told), *speculation_lines(told["speculation"])]
    if lines:
        yield Text()
        yield Text("\n".join(wrap_phrases(line, width, INDENT) for line in lines))
    if told["events"]:
        yield Text()
        for event in told["events"][-LATEST_EVENTS:]:
            at = datetime.fromtimestamp(event["at"]).astimezone().strftime("%H:%M:%S")
            before = f"{at}  {event['kind']:<10}  "
            line = Text(wrap_phrases(f"{before}{event['detail']}", width, len(before)))
            line.stylize("dim", 0, len(at))
            yield line


def _headline(told: Statement, width: int) -> Text:
    if told["device"] is None:
        return Text("nobody watches this server's device", style="yellow")
    state, reading = told["state"], told["reading"]
    line = Text.assemble((told["device"], "bold"))
    if state is not None:
        line.append(f"  {state}", style=STATE_STYLES.get(state, "bold"))
        line.append(f": {told['reason']}")
    if reading is not None:
        stale = ", stale" if reading["stale"] else ""
        read = f"  (read {reading['age_s']:.1f} s ago by {reading['source']}{stale})"
        line.append(read if line.cell_len + cell_len(read) <= width else f"\n{read}", style="dim")
    if told["problem"]:
        line.append(f"\n{told['problem']}", style="yellow")
    return line


def _how(name: str, told: Statement) -> str:
    if name == "free" and told["headroom_bytes"] is not None:
        return f"headroom {format_size(told['headroom_bytes'])}"
    if name == "others" and told["reading"] is not None:
        return _holders(told["reading"]["holders"])
    if name == "unleased":
        return "ours, and on no lease"
    marks = [] if told["ledger"] is None else told["ledger"]["earmarks"].items()
    within = [f"{label} {format_size(mark['num_bytes'])}" for label, mark in marks if mark["within"] == name]
    return ("of it " + ", ".join(within)) if within else ""


def _holders(holders: list[dict[str, Any]]) -> str:
    ordered = sorted(holders, key=lambda holder: -(holder["num_bytes"] or -1))
    shown = [
        f"{holder['name']} {'?' if holder['num_bytes'] is None else format_size(holder['num_bytes'])}"
        for holder in ordered[:MOST_HOLDERS]
    ]
    more = len(ordered) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def _ledger_lines(told: Statement) -> Iterator[str]:
    ledger, decision = told["ledger"], told["decision"]
    if ledger is None and told["device"] is not None:
        yield "ledger  nothing is leased: no model has been loaded yet"
    if ledger is not None:
        wanted = ""
        if ledger["wanted_budget_bytes"] < ledger["budget_bytes"]:
            wanted = f", {format_size(ledger['wanted_budget_bytes'])} once memory has been given back"
        yield f"ledger  {format_size(ledger['leased_bytes'])} leased of {format_size(ledger['budget_bytes'])}{wanted}"
    if decision is not None:
        yield (
            f"others  {format_size(decision['others_bytes'])} now, "
            f"{format_size(decision['others_peak_bytes'])} at most in the last {decision['patience_s']:.0f} s"
        )
    spilled = 0 if told["reading"] is None else told["reading"]["spilled_own_bytes"]
    if spilled:
        yield f"spilled {format_size(spilled)} of ours are not on the device"
    if (ledger is not None and ledger["held"]) or (decision is not None and decision["hold"]):
        yield "held    no step runs until memory is where it should be"


def _pool_lines(told: Statement) -> Iterator[str]:
    pool = told["pool"]
    if pool is None:
        return
    yield f"pool    {blocks_line(pool)}"
    if "kv_bytes" in pool:
        drafts = told["speculation"] is not None and told["speculation"]["method"] == "model"
        beside = " with the draft" if drafts else ""
        yield (
            f"        {format_size(pool['kv_bytes'])}{beside}, from {format_size(pool['floor_bytes'])} to "
            f"{format_size(pool['ceiling_bytes'])}; gave back {format_size(pool['given_back_bytes'])}, "
            f"took {format_size(pool['taken_bytes'])}"
        )
