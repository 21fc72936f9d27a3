"""What `edgekv bench engine --speculate` found, for a person. Runs in: the main thread; owns: nothing.

Every table fits a terminal of 80 columns, so there are several; `--json` has all figures of a row together.
"""

from typing import Any

from rich.markup import escape

from edgekv.cli.console import stdout, table

# Ways of decoding, as `edgekv.engine.measure_speculation` names them, which this cannot import: it needs torch.
PLAIN, AUTOMATIC, FIXED = "plain", "automatic", "fixed"

_COUNTS = ("steps", "sequences", "rows")
_TIMES = (
    "ms", "proposing_ms", "kernels_ms", "preparing_ms", "sampling_ms", "deciding_ms", "planning_ms", "reporting_ms",
    "rest_ms",
)  # fmt: skip
_SHARES = ("draft", "model", "sampling", "rest")


def show_speculation(result: dict[str, Any]) -> None:
    """Print the tables."""
    console, rows = stdout(), result["speculation"]
    console.print(
        f"[bold]{escape(result['model'])}[/], {result['kernels']}, KV {result['kv_dtype']}, "
        f"draft {escape(result['draft'])}, up to {result['draft_tokens']} tokens proposed"
    )
    console.print(result["machine"], style="dim")
    rounds = "1 round counts" if result["rounds"] == 1 else f"{result['rounds']} rounds count"
    console.print(
        f"{result['prompts']} prompts of {result['prompt_tokens']} tokens on average, answers of at most "
        f"{result['max_tokens']}; {rounds}, after {result['warm_up']} of warm-up"
    )
    console.print()
    console.print(_speeds(rows))
    console.print()
    console.print(_shares(rows))
    console.print()
    for row in rows:
        if "profile" in row:
            console.print(f"[bold]{', '.join(_place(row))}[/]")
            console.print(_times(row["steps"]))
            console.print(_operations(row["profile"]))
            console.print()
    console.print(_legend(rows), style="dim")
    console.print()
    console.print("with and without speculation, every answer was the same, token by token")
    others, stolen = result["others_cores"], result["stolen_cores"]
    console.print(f"meanwhile others used {others:.2f} cores, other virtual machines {stolen:.2f}")


def _speeds(rows: list[dict[str, Any]]) -> Any:
    cells: dict[tuple[str, str], tuple[str, ...]] = {}
    for row in rows:
        paired, is_plain = row["paired_ratio"], row["way"] == PLAIN
        cells[_place(row)] = (
            f"{row['tok_s']:,.1f}",
            "" if is_plain else f"{row['ratio']:.2f}",
            "" if is_plain else f"{paired['p50']:.2f}, {paired['p10']:.2f}-{paired['p90']:.2f}",
            _number(row["tokens_a_step"]),
            f"{row['others_cores']:.2f}",
        )
    headings = ("tokens/s", "x plain", "turn by turn,\np10-p90", "tokens\na step", "others'\ncores")
    return _grouped("how fast", headings, cells)


def _shares(rows: list[dict[str, Any]]) -> Any:
    cells = {
        _place(row): (
            _number(row["proposed_a_step"]), _percent(row["acceptance"]),
            *(_percent(row["shares"][name]) for name in _SHARES),
        )
        for row in rows
    }  # fmt: skip
    return _grouped("proposals, and time for", ("proposed\na step", "accepted", *_SHARES), cells)


def _grouped(title: str, headings: tuple[str, ...], cells: dict[tuple[str, str], tuple[str, ...]]) -> Any:
    """A row for each way below a line for what they have in common."""
    made = table(title, *headings)
    last = ""
    for (common, way), texts in cells.items():
        if common != last:
            made.add_row(common)
        made.add_row(f"  {way}", *texts)
        last = common
    return made


def _legend(rows: list[dict[str, Any]]) -> Any:
    """What the words in the tables mean."""
    made = table("", "")
    made.columns[1].justify, made.show_header = "left", False
    made.add_row(PLAIN, "nothing is proposed")
    made.add_row(AUTOMATIC, "as it is served: as many tokens as are found to pay")
    if any(row["way"].startswith(FIXED) for row in rows):
        made.add_row(f"{FIXED} N", "always N tokens, whether or not that pays")
    made.add_row(f"x {PLAIN}", "times as fast, by the medians of all rounds")
    made.add_row("turn by turn", "the same by the same prompts, one right after the other")
    return made


def _times(steps: dict[str, dict[str, Any]]) -> Any:
    """The mean step of each kind."""
    made = table("a step", *steps)
    for name in _COUNTS:
        shown = "{:,}" if name == "steps" else "{:.2f}"
        made.add_row(name, *(shown.format(found[name]) for found in steps.values()))
    for name in _TIMES:
        label = name if name == "ms" else f"  {name.removesuffix('_ms')}"
        made.add_row(label, *(f"{found[name]:.3f}" for found in steps.values()))
    return made


def _operations(profile: dict[str, dict[str, float]]) -> Any:
    """Milliseconds of a step of each kind."""
    made = table("in the kernels, ms a step", *profile)
    for name in dict.fromkeys(name for spent in profile.values() for name in spent):
        made.add_row(name, *(f"{spent[name]:.4f}" if name in spent else "" for spent in profile.values()))
    return made


def _place(row: dict[str, Any]) -> tuple[str, str]:
    """What a row has in common with others, and its way."""
    sampled = f"temperature {row['temperature']}" if row["temperature"] else "greedy"
    return f"{sampled}, batch {row['batch']}", row["way"]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
