"""`edgekv bench`: how fast a server is, the engine alone, its kernels. Runs in: the main thread; owns: nothing."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from edgekv.cli.bench_engine import bench_engine
from edgekv.cli.bench_kernels import bench_kernels
from edgekv.cli.console import bearer, print_json, stderr, stdout, table
from edgekv.errors import EdgeKVError

if TYPE_CHECKING:
    from edgekv.cli.load import Answer, Target

T = TypeVar("T")

bench = typer.Typer(help="Measure a running server, the engine by itself, or its kernels.", no_args_is_help=True)
bench.command("engine")(bench_engine)
bench.command("kernels")(bench_kernels)


class NoServer(EdgeKVError):
    """Nobody answers at the URL, or not as an OpenAI-compatible server does."""


@bench.callback()
def benches() -> None:
    """Measure a running server, the engine by itself, or its kernels."""


@bench.command("serve")
def bench_serve(
    url: str = typer.Option("http://127.0.0.1:8181/v1", help="The server's OpenAI endpoint."),
    model: str | None = typer.Option(None, help="Which model; by default the first that the server lists."),
    api_key: str | None = typer.Option(None, envvar="OPENAI_API_KEY", help="Sent as a bearer token."),
    requests: int = typer.Option(16, "--requests", "-n", min=1, help="Chats to send."),
    rate: float = typer.Option(0.0, min=0.0, help="Arrivals per second (Poisson); 0: all at once."),
    concurrency: int = typer.Option(0, min=0, help="The most in flight; 0: no limit."),
    seed: int = typer.Option(0, help="The same seed sends the same prompts."),
    system_tokens: int = typer.Option(200, min=0, help="Length of the system prompt that the chats share."),
    tail_tokens: int | None = typer.Option(
        None, min=1, help="Length of each chat's own question; 60, or 16 with --shared-prefix."
    ),
    max_tokens: int = typer.Option(64, min=1, help="The longest answer."),
    temperature: float = typer.Option(0.0, min=0.0, help="0: greedy."),
    unique_system: bool = typer.Option(False, help="Share no system prompt (for comparison)."),
    warmup: int = typer.Option(1, min=0, help="Chats sent first and not counted."),
    tokens_per_word: float | None = typer.Option(
        None, min=0.1, help="So that several servers get the same prompts; by default their own tokenizers say."
    ),
    extra: str = typer.Option("{}", help="JSON that is added to each request."),
    shared_prefix: int | None = typer.Option(
        None, min=1, help="Instead: time to first token with a prefix of so many tokens, cold against warm."
    ),
    rounds: int = typer.Option(5, min=1, help="Fresh prefixes to try with --shared-prefix."),
    timeout: float = typer.Option(1200.0, min=1.0, help="Seconds a server may keep silent."),
    label: str = typer.Option("", help="A name for the result."),
    as_json: bool = typer.Option(False, "--json", help="Print the result as JSON."),
    out: Path | None = typer.Option(None, help="Append the result to this file, one JSON object a line."),
) -> None:
    """Drive any OpenAI-compatible server with streaming chats: TTFT, inter-token latency, tokens per second."""
    from edgekv.cli.load import Load, measure_prefix, run_load, summarise

    try:
        added = json.loads(extra)
    except ValueError as error:
        raise typer.BadParameter(f"--extra is not JSON: {error}") from None
    tail = tail_tokens or (60 if shared_prefix is None else 16)
    load = Load(
        requests, rate, concurrency, seed, system_tokens, tail, max_tokens, temperature, unique_system, warmup,
        added,
    )  # fmt: skip
    reach = _Reach(url, model, api_key, timeout, tokens_per_word)
    result: dict[str, Any]
    if shared_prefix is not None:
        pairs, served = reach.run(lambda target: measure_prefix(target, shared_prefix, load, rounds))
        result = {"label": label, "model": served, "prefix_tokens": shared_prefix, **compare(pairs)}
        show: Callable[[dict[str, Any]], None] = _show_prefix
    else:
        answers, served = reach.run(lambda target: run_load(target, load))
        result = {
            "label": label, "model": served, "requests": requests, "rate": rate, "concurrency": concurrency,
            "seed": seed, "max_tokens": max_tokens, **summarise(answers),
        }  # fmt: skip
        show = _show_load
    if as_json:
        print_json(result)
    else:
        show(result)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    for failure in result["first_errors"]:
        stderr().print(f"error: {failure}", markup=False, soft_wrap=True)
    if result["errors"]:
        raise typer.Exit(1)


def compare(pairs: "list[tuple[Answer, Answer]]") -> dict[str, Any]:
    """Cold against warm: each pair's times to first token, their medians and the ratio of these."""
    from edgekv.cli.percentile import percentile

    good = [(cold, warm) for cold, warm in pairs if cold.error is None and warm.error is None]
    cold = percentile([first.ttft_s for first, _ in good], 50)
    warm = percentile([second.ttft_s for _, second in good], 50)
    failed = [answer.error for pair in pairs for answer in pair if answer.error is not None]
    return {
        "rounds": [
            {
                "cold_ttft_ms": round(first.ttft_s * 1e3, 2), "warm_ttft_ms": round(second.ttft_s * 1e3, 2),
                "prompt_tokens": second.prompt_tokens, "cold_cached": first.cached_tokens,
                "warm_cached": second.cached_tokens,
            }
            for first, second in good
        ],
        "cold_ttft_ms": None if cold is None else round(cold * 1e3, 2),
        "warm_ttft_ms": None if warm is None else round(warm * 1e3, 2),
        "speedup": round(cold / warm, 2) if cold and warm else None,
        "errors": len(failed),
        "first_errors": sorted(set(failed))[:3],
    }  # fmt: skip


class _Reach:
    """How to reach the server."""

    def __init__(
        self, url: str, model: str | None, api_key: str | None, timeout_s: float, tokens_per_word: float | None
    ) -> None:
        self._url, self._model, self._api_key, self._timeout_s = url.rstrip("/") + "/", model, api_key, timeout_s
        self._tokens_per_word = tokens_per_word

    def run(self, measure: "Callable[[Target], Awaitable[T]]") -> tuple[T, str]:
        """Measure over one client; also the name of the model that was measured."""
        import httpx2
        import trio

        from edgekv.cli.load import Target

        # A connection for each request: some servers close an idle one just as the next request goes out on it.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)

        async def main() -> tuple[T, str]:
            async with httpx2.AsyncClient(
                base_url=self._url,
                headers=bearer(self._api_key),
                timeout=self._timeout_s,
                limits=limits,
                trust_env=False,
            ) as client:
                try:
                    target = await Target.find(client, self._model, self._tokens_per_word)
                except (httpx2.HTTPError, ValueError, KeyError, IndexError) as error:
                    raise NoServer(f"{self._url}models does not answer as it should: {error}") from None
                return await measure(target), target.model

        return trio.run(main)


def _show_load(result: dict[str, Any]) -> None:
    console = stdout()
    console.print(
        f"[bold]{result['model']}[/]: {result['ok']} chats, {result['errors']} errors, {result['output_tokens']:,} "
        f"tokens in {result['duration_s']:.2f} s = [bold]{result['output_tok_s']:.1f} tokens/s[/]"
    )
    console.print(
        f"prompts of {result['prompt_tokens_mean']:,} tokens, {result['cached_tokens_mean']:,} of them cached (means)"
    )
    percents = sorted({int(p[1:]) for name in ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms") for p in result[name]})
    latencies = table("milliseconds", *(f"p{percent}" for percent in percents))
    for label, name in (
        ("time to first token", "ttft_ms"),
        ("between chunks", "itl_ms"),
        ("per output token", "tpot_ms"),
        ("whole answer", "e2e_ms"),
    ):
        values = [result[name].get(f"p{percent}") for percent in percents]
        latencies.add_row(label, *("" if value is None else f"{value:,.1f}" for value in values))
    console.print(latencies)


def _show_prefix(result: dict[str, Any]) -> None:
    console = stdout()
    rounds = table("round", "prompt tokens", "cached", "cold TTFT ms", "warm TTFT ms", "ratio")
    for number, row in enumerate(result["rounds"], 1):
        cold, warm = row["cold_ttft_ms"], row["warm_ttft_ms"]
        rounds.add_row(
            str(number), f"{row['prompt_tokens']:,}", f"{row['warm_cached']:,}", f"{cold:,.1f}", f"{warm:,.1f}",
            f"{cold / warm:.1f}",
        )  # fmt: skip
    console.print(rounds)
    if result["speedup"] is not None:
        console.print(
            f"[bold]{result['model']}[/], medians: {result['cold_ttft_ms']:,.1f} ms cold, "
            f"{result['warm_ttft_ms']:,.1f} ms warm: [bold]{result['speedup']:.1f} times sooner[/]"
        )
