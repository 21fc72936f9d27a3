"""What is measured of a system, each in less than two minutes. Runs in: the main thread; owns: the client processes."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx2

from bench.peers.client import Client
from bench.peers.systems import (
    EDGEKV,
    LLAMA,
    LLAMA_SLOTS,
    SYSTEMS,
    VLLM,
    Paths,
    edgekv_bench,
    edgekv_environ,
    family,
    llama_bench,
)

MOST_S = 600
STREAM_TOKENS = 128
# The chat template and the number in front of each prompt take about 20 tokens.
TAIL_TOKENS = STREAM_TOKENS - 20
OUTSIDE = "one stream, not in the model"


class RowFailed(Exception):
    """A measurement came to nothing; the others go on."""


@dataclass(frozen=True, slots=True)
class Measure:
    """Samples of one quantity. `more` says whether more of it is better.

    `paired`: sample i of every system in a round was taken at nearly the same time.
    """

    unit: str
    samples: Sequence[float]
    more: bool = True
    paired: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """What a row found, by the name of the quantity, and how."""

    measures: Mapping[str, Measure]
    command: str
    detail: Any = None


@dataclass(frozen=True, slots=True)
class Task:
    """One row for one system. `url` is its server where the row needs one."""

    system: str
    weights: str
    seed: int
    paths: Paths
    vocab_size: int
    tokens_per_word: float
    url: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the comparison: over HTTP or in the program itself. Each system has so many turns in a round."""

    name: str
    is_http: bool
    measure: Callable[[Task], Result]
    weights: tuple[str, ...] = tuple(SYSTEMS)
    turns: int = 1
    families: tuple[str, ...] = (LLAMA, VLLM, EDGEKV)

    def systems(self, weights: str) -> tuple[str, ...]:
        """Who takes part, in the order of the table."""
        if weights not in self.weights:
            return ()
        found: list[str] = []
        for system in SYSTEMS[weights]:
            if system == LLAMA and self.name in ("prefix", "burst"):
                found += [name for name in LLAMA_SLOTS if name != LLAMA]
            elif family(system) in self.families and (family(system) != VLLM or self.is_http):
                found.append(system)
        return tuple(found)


def decode(task: Task) -> Result:
    """Tokens a second of one sequence after 128 and 2,048 tokens."""
    if family(task.system) == LLAMA:
        command = llama_bench(task.weights, task.paths, "-p", "0", "-n", "32", "-d", "128,2048", "-r", "3")
        rows = _json_lines(_run(command))
        return Result({_decode_name(row["n_depth"]): _rate(row["samples_ts"]) for row in rows}, _shown(command))
    options = ("--contexts", "128,2048", "--batch", "1", "--prefill", "", "--steps", "32", "--repeat", "3")
    command = edgekv_bench(task.system, task.weights, task.paths, *options)
    found = json.loads(_run(command, edgekv_environ(task.paths)))
    measures = {_decode_name(row["context"]): _rate(row["samples_tok_s"]) for row in found["decode"]}
    return Result(measures, _shown(command), found)


def prefill(task: Task) -> Result:
    """Prompt tokens a second of 512 and 2,048 tokens."""
    if family(task.system) == LLAMA:
        command = llama_bench(task.weights, task.paths, "-p", "512,2048", "-n", "0", "-r", "2")
        rows = _json_lines(_run(command))
        return Result({f"prefill {row['n_prompt']}": _rate(row["samples_ts"]) for row in rows}, _shown(command))
    options = ("--contexts", "", "--batch", "1", "--prefill", "512,2048", "--repeat", "2")
    command = edgekv_bench(task.system, task.weights, task.paths, *options)
    found = json.loads(_run(command, edgekv_environ(task.paths)))
    measures = {f"prefill {row['tokens']}": _rate(row["samples_tok_s"]) for row in found["prefill"]}
    return Result(measures, _shown(command), found)


def stream(task: Task) -> Result:
    """The same over HTTP."""
    client = Client(task.url, task.vocab_size, task.seed)
    try:
        client.measure(32, 4, repeat=1)
        short, *prompts = client.measure(128, 32, repeat=3), client.measure(512, 0, 0), client.measure(512, 0, 0)
        long = client.measure(2048, 32, repeat=3)
    finally:
        client.close()
    measures = {
        "HTTP prefill 512": _rate([prompt.prefill_tok_s for prompt in prompts]),
        "HTTP prefill 2048": _rate([long.prefill_tok_s]),
        f"HTTP {_decode_name(128)}": _rate(short.decode_tok_s),
        f"HTTP {_decode_name(2048)}": _rate(long.decode_tok_s),
    }
    return Result(measures, "bench/peers/client.py")


def pairs(task: Task) -> Result:
    """Two seconds of `stream`: the prompts are the round's, so that from the second turn on they are in the cache."""
    client = Client(task.url, task.vocab_size, task.seed)
    try:
        measures = {
            f"in turns, {_decode_name(tokens)}": replace(_rate(client.measure(tokens, 16, 1).decode_tok_s), paired=True)
            for tokens in (128, 2048)
        }
    finally:
        client.close()
    return Result(measures, "bench/peers/client.py")


def streams(number: int) -> Callable[[Task], Result]:
    """So many streams at once, each with a prompt of its own."""

    def measure(task: Task) -> Result:
        options = ["--requests", str(number), "--concurrency", str(number), "--system-tokens", "0"]
        options += ["--tail-tokens", str(TAIL_TOKENS), "--max-tokens", str(STREAM_TOKENS)]
        found, command = _bench_serve(task, *options)
        measures = {
            f"{number} streams": _rate([found["output_tok_s"]]),
            f"{number} streams, a token": Measure("ms", [found["tpot_ms"]["p50"]], more=False),
        }
        return Result(measures, command, found)

    return measure


def outside(task: Task) -> Result:
    """What of the time of chats that come one after the other the server was not in the model."""
    before = _forward_s(task)
    options = ("--requests", "4", "--concurrency", "1", "--warmup", "0", "--system-tokens", "0")
    found, command = _bench_serve(task, *options, "--tail-tokens", str(TAIL_TOKENS), "--max-tokens", str(STREAM_TOKENS))
    share = 1 - (_forward_s(task) - before) / found["duration_s"]
    return Result({OUTSIDE: Measure("%", [round(100 * share, 2)], more=False)}, command, found)


def _forward_s(task: Task) -> float:
    """Seconds that the server has been in the model."""
    try:
        text = httpx2.get(task.url.removesuffix("/v1") + "/metrics", timeout=60, trust_env=False).text
    except httpx2.HTTPError as error:
        raise RowFailed(f"/metrics: {error}") from None
    found = re.findall(r"^edgekv_forward_seconds_total(?:{[^}]*})? (\S+)$", text, re.MULTILINE)
    if not found:
        raise RowFailed("/metrics says nothing of edgekv_forward_seconds_total")
    return float(found[0])


def prefix(name: str, *load: str) -> Callable[[Task], Result]:
    """Chats that share a system prompt of 1,500 tokens, arriving as `load` says."""

    def measure(task: Task) -> Result:
        options = ["--requests", "16", *load, "--system-tokens", "1500", "--tail-tokens", "60", "--max-tokens", "64"]
        found, command = _bench_serve(task, *options)
        measures = {
            f"{name}, output": _rate([found["output_tok_s"]]),
            f"{name}, first token p50": Measure("ms", [found["ttft_ms"]["p50"]], more=False),
            f"{name}, first token p99": Measure("ms", [found["ttft_ms"]["p99"]], more=False),
        }
        return Result(measures, command, found)

    return measure


ROWS = (
    Row("decode", False, decode),
    Row("prefill", False, prefill),
    Row("stream", True, stream),
    Row("pairs", True, pairs, turns=12),
    Row("outside", True, outside, families=(EDGEKV,)),
    Row("streams-1", True, streams(1)),
    Row("streams-8", True, streams(8)),
    Row("streams-16", True, streams(16)),
    Row("prefix", True, prefix("shared prefix", "--rate", "1"), weights=("bf16", "q4_0")),
    Row("burst", True, prefix("shared prefix at once", "--concurrency", "16"), weights=("bf16", "q4_0")),
)


def _bench_serve(task: Task, *options: str) -> tuple[dict[str, Any], str]:
    command = [
        sys.executable, "-m", "edgekv", "bench", "serve", "--url", task.url, "--json", "--seed", str(task.seed),
        "--tokens-per-word", f"{task.tokens_per_word:.4f}", "--extra", '{"ignore_eos": true}', *options,
    ]  # fmt: skip
    found = json.loads(_run(command))
    if found["errors"]:
        raise RowFailed(f"{found['errors']} chats failed: {found['first_errors']}")
    return found, _shown(command)


def _run(command: list[str], environ: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=MOST_S,
            env={**os.environ, **(environ or {})},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RowFailed(f"{_shown(command)} took more than {MOST_S} s") from None
    if done.returncode:
        raise RowFailed(f"{_shown(command)} exited with {done.returncode}: {(done.stderr or done.stdout)[-800:]}")
    return done.stdout


def _json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def _decode_name(context: int) -> str:
    return f"decode, context {context}"


def _rate(samples: Sequence[float]) -> Measure:
    return Measure("tok/s", [round(sample, 3) for sample in samples])


def _shown(command: list[str]) -> str:
    """Without where things lie on this machine."""
    names = [word.rsplit("/", 1)[-1] if word.startswith("/") else word for word in command]
    return " ".join(names).replace(f"{sys.executable.rsplit('/', 1)[-1]} -m {EDGEKV}", EDGEKV)
