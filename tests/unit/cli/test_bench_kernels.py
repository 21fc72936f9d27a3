"""`edgekv bench kernels` over little memory: what the rows say, not how fast they are."""

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from edgekv.cli import bandwidth
from edgekv.cli.app import app
from edgekv.cli.bench_kernels import Wanted, dimensions
from edgekv.engine import measure_kernels
from edgekv.engine.measure_kernels import AttentionCase, LinearCase
from edgekv.kernels.cpu.library import available

run = CliRunner().invoke


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little memory and few repetitions."""
    if not available(compile=True):
        pytest.skip("no compiled kernels here")
    monkeypatch.setattr(measure_kernels, "ARENA_BYTES", 1 << 20)
    monkeypatch.setattr(measure_kernels, "LEAST_S", 0.0)
    monkeypatch.setattr(bandwidth, "BUFFER_BYTES", 1 << 20)


@pytest.mark.usefixtures("kernels")
def test_every_row_says_what_it_read_and_how_fast(tmp_path: Path) -> None:
    options = ["--formats", "bf16,q4_0", "--shapes", "64x256", "--tokens", "1,64", "--threads", "1"]
    options += ["--heads", "4/2x16", "--kv-dtypes", "bfloat16,int8", "--context", "48", "--batch", "1,3"]
    out = tmp_path / "results.jsonl"
    done = run(app, ["bench", "kernels", "--json", "--out", str(out), *options])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    assert json.loads(out.read_text()) == found
    assert found["kernels"].endswith("1 threads)")
    linears = [(row["encoding"], row["panels"], row["tokens"], row["bytes"]) for row in found["linear"]]
    assert linears == [
        ("bf16", "BF16", 1, 64 * 256 * 2), ("bf16", "BF16", 64, 64 * 256 * 2),
        ("q4_0", "Q4", 1, 64 * 256 * 9 // 16), ("q4_0", "Q4", 64, 64 * 256 * 9 // 16),
    ]  # fmt: skip
    token = 2 * 2 * 16  # elements
    decodes = [(row["kv_dtype"], row["batch"], row["bytes"]) for row in found["attention_decode"]]
    assert decodes == [
        ("bfloat16", 1, 48 * token * 2), ("int8", 1, 48 * (token + 2 * 2 * 2)),
        ("bfloat16", 3, 3 * 48 * token * 2), ("int8", 3, 3 * 48 * (token + 2 * 2 * 2)),
    ]  # fmt: skip
    assert [(row["context"], row["tokens"]) for row in found["attention_prefill"]] == [(0, 48)] * 2
    for row in (*found["linear"], *found["attention_decode"], *found["attention_prefill"]):
        seconds = row["us"]["p50"] / 1e6
        assert row["gb_s"] == pytest.approx(row["bytes"] / seconds / 1e9, rel=0.1, abs=0.02)
        assert row["of_bandwidth"] == pytest.approx(row["gb_s"] / row["read_gb_s"], rel=0.1, abs=0.01)
        has_torch = row.get("kv_dtype") != "int8"
        assert (row["torch_us"] is not None) == has_torch


@pytest.mark.usefixtures("kernels")
def test_a_person_gets_tables() -> None:
    options = ["--formats", "q8_0", "--shapes", "64x256", "--tokens", "1", "--heads", "", "--threads", "1"]
    done = run(app, ["bench", "kernels", "--no-torch", *options])
    assert done.exit_code == 0, done.output
    assert "q8_0 (Q8) 64x256, 1 tokens" in done.stdout
    assert "attention" not in done.stdout


@pytest.mark.parametrize(
    "options", [["--formats", "q3"], ["--kv-dtypes", "int3"], ["--shapes", "12"], ["--heads", "4x16"]]
)
def test_what_there_is_not_is_refused(options: list[str]) -> None:
    done = run(app, ["bench", "kernels", *options])
    assert done.exit_code == 2, done.output


def test_columns_that_are_no_whole_blocks_are_left_out() -> None:
    wanted = Wanted(("bf16", "q4_K"), ((64, 128),), (1,), (), (), 2048, (1,))
    assert [case.encoding for case in wanted.linears()] == ["bf16"]
    assert wanted.decodes() == wanted.prompts() == []


def test_prompts_are_measured_at_their_first_and_at_their_last_chunk() -> None:
    wanted = Wanted((), (), (), ((4, 2, 16),), ("bfloat16",), 2048, (1,))
    assert [(case.context, case.tokens) for case in wanted.prompts()] == [(0, 512), (1536, 512)]


def test_operations_are_counted() -> None:
    assert LinearCase("bf16", 10, 20, 3).flops == 2 * 10 * 20 * 3
    # three tokens after five see 6, 7 and 8
    assert AttentionCase("bfloat16", 4, 2, 16, 2, 5, 3).flops == 4 * 2 * (6 + 7 + 8) * 4 * 16


def test_layers_are_more_than_a_cache_holds() -> None:
    case = AttentionCase("bfloat16", 32, 8, 64, 1, 2047)
    assert case.num_layers * case.num_bytes > 128 << 20


def test_shapes_are_numbers_with_an_x_between() -> None:
    assert dimensions("2048x8192", "--shapes", 2) == (2048, 8192)
    with pytest.raises(typer.BadParameter, match="has 3 numbers, not 2"):
        dimensions("1x2x3", "--shapes", 2)


def test_what_the_kernels_read_are_small_numbers_in_every_format() -> None:
    numbers = measure_kernels._small_numbers(4096)
    assert sorted(set(numbers.tolist())) == [*range(0x28, 0x30)]
