"""`edgekv bench engine` over the demo model."""

import json
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from edgekv.cli.app import app
from edgekv.cli.bench_engine import Wanted, numbers
from edgekv.kernels.cpu.library import available

run = CliRunner().invoke
SMALL = ["--contexts", "32", "--batch", "1,3", "--prefill", "48", "--steps", "4", "--repeat", "2", "--kernels", "torch"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench") / "results.jsonl"
    done = run(app, ["bench", "engine", "demo", "--json", "--out", str(out), "--label", "a label", *SMALL])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    assert json.loads(out.read_text()) == found
    return found


def test_a_result_says_what_was_measured_and_on_what(result: dict[str, Any]) -> None:
    assert (result["model"], result["label"], result["weights"]) == ("demo", "a label", "auto")
    assert result["kernels"].startswith("torch")
    assert "cores of" in result["machine"]
    assert result["others_cores"] >= 0
    assert result["read_gb_s"] > 0


def test_a_decoding_row_says_what_it_read_and_how_fast(result: dict[str, Any]) -> None:
    one, three = result["decode"]
    assert (one["context"], one["batch"], three["batch"]) == (32, 1, 3)
    for row in (one, three):
        assert len(row["samples_tok_s"]) == 2
        assert row["bytes"] == result["weight_bytes"] + row["kv_bytes"]
        tokens = row["kv_bytes"] / row["batch"] / result["kv_token_bytes"]
        assert 32 <= tokens <= 32 + 2 + 8
        seconds = row["step_ms"]["p50"] / 1e3
        assert row["gb_s"] == pytest.approx(row["bytes"] / seconds / 1e9, abs=0.01)
        assert row["of_bandwidth"] == pytest.approx(row["gb_s"] / row["read_gb_s"], rel=0.05, abs=0.001)
        assert 0 < row["overhead"] < 1
        assert row["step_ms"]["p10"] <= row["step_ms"]["p50"]
        assert set(row["parts_us"]) == {"plan", "prepare", "model", "sample", "report"}
        assert "profile" not in row


def test_a_prompts_row_says_how_fast_it_was(result: dict[str, Any]) -> None:
    [row] = result["prefill"]
    assert row["tok_s"] == pytest.approx(48 / row["prompt_ms"]["p50"] * 1e3, rel=0.01)
    assert row["gflop_s"] > 0
    assert len(row["samples_tok_s"]) == 2


def test_a_person_gets_tables() -> None:
    options = ["--contexts", "16", "--batch", "1", "--prefill", "", "--steps", "2", "--repeat", "1"]
    done = run(app, ["bench", "engine", "demo", "--kernels", "torch", *options])
    assert done.exit_code == 0, done.output
    assert "of bandwidth" in done.stdout
    assert "context 16" in done.stdout
    assert "prefill" not in done.stdout
    assert "meanwhile others used" in done.stdout


def test_a_profile_says_which_operations_the_time_went_to() -> None:
    if not available(compile=True):
        pytest.skip("no compiled kernels here")
    options = ["--contexts", "64", "--batch", "2", "--prefill", "", "--steps", "8", "--repeat", "1", "--profile"]
    done = run(app, ["bench", "engine", "demo", "--kernels", "native", "--json", *options])
    assert done.exit_code == 0, done.output
    [row] = json.loads(done.stdout)["decode"]
    profile = row["profile"]
    assert {"attend", "norm", "rope_append", "embed"} < profile.keys()
    linears = [spent for name, spent in profile.items() if name.startswith("linear")]
    assert all(spent["ms"] > 0 and spent["of_bandwidth"] is not None for spent in (*linears, profile["attend"]))
    assert profile["norm"]["of_bandwidth"] is None
    # The operations are all that the model does.
    mean_model_ms = row["step_ms"]["p90"] * 8
    assert 0 < sum(spent["ms"] for spent in profile.values()) < mean_model_ms
    assert list(profile) == sorted(profile, key=lambda name: -profile[name]["ms"])


def test_the_kv_pool_has_room_for_the_longest_of_all_sequences() -> None:
    wanted = Wanted((128, 2048), (1, 16), (512,), steps=32, repeat=3)
    assert wanted.most_context >= 2048 + 96
    assert wanted.most_tokens >= 16 * (2048 + 96 + 16)
    assert Wanted((), (1,), (4096,), 1, 1).most_context >= 4096


@pytest.mark.parametrize("text", ["12,x", "0", "-3", "1.5"])
def test_what_are_no_counts_is_refused_by_name(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="--batch takes numbers"):
        numbers(text, "--batch")
    assert numbers("1, 8,", "--batch") == (1, 8)
    assert numbers("", "--batch") == ()


@pytest.mark.parametrize("option", ["--weights", "--kernels", "--kv-dtype"])
def test_an_unknown_choice_is_refused_by_name(option: str) -> None:
    done = run(app, ["bench", "engine", "demo", option, "int3"])
    assert done.exit_code == 2
    assert f"{option} is one of auto" in done.stderr
