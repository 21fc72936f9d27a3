"""`edgekv bench serve` against a scripted server."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgekv.cli.app import app
from edgekv.cli.load import Answer, summarise
from edgekv.cli.percentile import percentile
from tests.unit.cli.openai_server import Script, openai_server

run = CliRunner().invoke


def test_a_load_is_sent_and_summed_up(tmp_path: Path) -> None:
    script, out = Script(gap_s=0.002), tmp_path / "results.jsonl"
    with openai_server(script) as url:
        options = ["--requests", "5", "--warmup", "1", "--api-key", "Schlüssel", "--seed", "3", "--out", str(out)]
        result = run(app, ["bench", "serve", "--url", url, "--json", *options, "--extra", '{"ignore_eos": true}'])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert (summary["ok"], summary["errors"], summary["output_tokens"]) == (5, 0, 30)
    assert (summary["model"], summary["prompt_tokens_mean"], summary["cached_tokens_mean"]) == ("a-model", 120, 100)
    assert summary["itl_ms"]["p50"] >= 1.5
    assert json.loads(out.read_text()) == summary
    assert len(script.asked) == 6
    assert all(body["stream"] and body["ignore_eos"] and body["temperature"] == 0 for body in script.asked)
    assert set(script.keys) == {"Bearer Schlüssel".encode().decode("latin-1")}


def test_the_same_seed_sends_the_same_prompts_that_share_a_system_prompt() -> None:
    prompts = []
    for seed in ("1", "1", "2"):
        script = Script()
        with openai_server(script) as url:
            run(app, ["bench", "serve", "--url", url, "-n", "3", "--seed", seed, "--concurrency", "1"])
        prompts.append([[message["content"] for message in body["messages"]] for body in script.asked])
    assert prompts[0] == prompts[1] != prompts[2]
    assert len({system for system, _ in prompts[0]}) == 1
    assert len({user for _, user in prompts[0]}) == 4


def test_lengths_are_in_the_servers_own_tokens() -> None:
    script = Script()
    with openai_server(script) as url:
        run(app, ["bench", "serve", "--url", url, "-n", "1", "--system-tokens", "300"])
    assert len(script.asked[0]["messages"][0]["content"].split()) == 150


def test_lengths_that_are_given_are_the_same_for_every_server() -> None:
    script = Script()
    with openai_server(script) as url:
        options = ["--system-tokens", "300", "--tokens-per-word", "3"]
        run(app, ["bench", "serve", "--url", url, "-n", "1", *options])
    assert len(script.asked[0]["messages"][0]["content"].split()) == 100


def test_cold_and_warm_prefixes_are_compared() -> None:
    script = Script(cold_s=0.1)
    with openai_server(script) as url:
        result = run(app, ["bench", "serve", "--url", url, "--json", "--shared-prefix", "400", "--rounds", "2"])
        table = run(app, ["bench", "serve", "--url", url, "--shared-prefix", "400", "--rounds", "1"])
    summary = json.loads(result.stdout)
    assert [(row["cold_cached"], row["warm_cached"]) for row in summary["rounds"]] == [(0, 100), (0, 100)]
    assert summary["cold_ttft_ms"] > 100 > summary["warm_ttft_ms"]
    assert summary["speedup"] == pytest.approx(summary["cold_ttft_ms"] / summary["warm_ttft_ms"], rel=0.05)
    assert "times sooner" in table.stdout


def test_errors_are_counted_told_and_the_exit_code() -> None:
    for script in (Script(error=(429, "The queue is full")), Script(break_off=True), Script(words=[])):
        with openai_server(script) as url:
            result = run(app, ["bench", "serve", "--url", url, "-n", "2"])
        assert result.exit_code == 1
        assert "0 chats, 2 errors" in result.stdout
        assert "error:" in result.stderr


def test_no_server_is_one_line() -> None:
    result = run(app, ["bench", "serve", "--url", "http://127.0.0.1:9/v1"])
    assert "http://127.0.0.1:9/v1/models does not answer as it should" in str(result.exception)


def test_percentiles_interpolate() -> None:
    assert percentile([], 50) is None
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([0.0, 10.0], 99) == pytest.approx(9.9)


def test_time_per_token_does_not_depend_on_chunking() -> None:
    answer = Answer(0.0, chunks_s=[1.0, 2.0], end_s=2.0, output_tokens=11)
    summary = summarise([answer, Answer(0.0, error="HTTP 500")])
    assert (summary["tpot_ms"]["p50"], summary["ttft_ms"]["p50"], summary["errors"]) == (100.0, 1000.0, 1)
