"""What `edgekv bench engine --speculate` found, for a person. Runs in: the main thread; owns: nothing."""

from typing import Any

from rich.markup import escape

from edgekv.cli.console import stdout, table

_TIMES = (
    "ms", "proposing_ms", "kernels_ms", "preparing_ms", "sampling_ms", "deciding_ms", "planning_ms", "reporting_ms",
    "rest_ms",
)  # fmt: skip


def show_speculation(result: dict[str, Any]) -> None:
    """Print the tables."""
    console = stdout()
    console.print(
        f"[bold]{escape(result['model'])}[/], {result['kernels']}, KV {result['kv_dtype']}, "
        f"draft {escape(result['draft'])}, up to {result['draft_tokens']} tokens proposed"
    )
    console.print(result["machine"], style="dim")
    console.print(
        f"{result['prompts']} prompts of {result['prompt_tokens']} tokens on average, answers of at most "
        f"{result['max_tokens']}; {result['rounds']} rounds count, after {result['warm_up']} of warm-up"
    )
    console.print(_rates(result["speculation"]))
    for row in result["speculation"]:
        if "profile" in row:
            console.print(_times(row))
            console.print(_operations(row["profile"]))
    console.print("with and without speculation, every answer was the same, token by token")
    others, stolen = result["others_cores"], result["stolen_cores"]
    console.print(f"meanwhile others used {others:.2f} cores, other virtual machines {stolen:.2f}")


def _rates(rows: list[dict[str, Any]]) -> Any:
    made = table(
        "", "way", "tokens/s", "ratio", "in turns, p10-p90", "accepted", "the first", "proposed", "tokens a step",
        "draft", "model", "sampling", "rest", "tokens", "others",
    )  # fmt: skip
    last = ""
    for row in rows:
        title, paired, shares = _title(row), row["paired_ratio"], row["shares"]
        made.add_row(
            "" if title == last else title, row["way"], f"{row['tok_s']:,.1f}", f"{row['ratio']:.2f}",
            f"{paired['p50']:.2f}, {paired['p10']:.2f}-{paired['p90']:.2f}",
            _percent(row["acceptance"]), _percent(row["first_accepted"]),
            _number(row["proposed_a_step"]), _number(row["tokens_a_step"]),
            *(_percent(shares[name]) for name in ("draft", "model", "sampling", "rest")),
            f"{row['tokens']:,}", f"{row['others_cores']:.2f}",
        )  # fmt: skip
        last = title
    return made


def _times(row: dict[str, Any]) -> Any:
    made = table(
        f"{_title(row)}, {row['way']}", "steps", "sequences", "rows", "ms", "proposing", "kernels", "preparing",
        "sampling", "deciding", "planning", "reporting", "rest",
    )  # fmt: skip
    for kind, found in row["steps"].items():
        made.add_row(
            f"{kind} step", f"{found['steps']:,}", f"{found['sequences']:.2f}", f"{found['rows']:.2f}",
            *(f"{found[name]:.3f}" for name in _TIMES),
        )  # fmt: skip
    return made


def _operations(profile: dict[str, dict[str, float]]) -> Any:
    """Milliseconds of a step of each kind."""
    made = table("in the kernels, ms a step", *profile)
    for name in dict.fromkeys(name for spent in profile.values() for name in spent):
        made.add_row(name, *(f"{spent[name]:.4f}" if name in spent else "" for spent in profile.values()))
    return made


def _title(row: dict[str, Any]) -> str:
    sampled = f"temperature {row['temperature']}" if row["temperature"] else "greedy"
    return f"{sampled}, batch {row['batch']}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
