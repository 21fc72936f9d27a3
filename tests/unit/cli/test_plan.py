"""`edgekv plan`: every byte by owner, what would make it fit, and how fast it could be."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from edgekv.cli.app import app
from edgekv.cli.owners import LOOKS, Owned, owner_bar
from edgekv.demo import draft_path, target_path
from edgekv.engine.draft_settings import DraftSettings
from edgekv.engine.no_room import KVBudgetTooLarge
from edgekv.engine.pinned import PinnedPromptRefused
from edgekv.engine.settings import EngineSettings, lease, plan_engine
from edgekv.model.hf_config import read_spec
from edgekv.smi.device import Place
from tests.unit.cli.shapes import LLAMA_3_8B, MISTRAL_7B, write_shape

MIB, GIB = 1 << 20, 1 << 30
NORMS = 65 * 4096  # parameters of Llama-3-8B's

run = CliRunner().invoke


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_shape(tmp_path / "llama", LLAMA_3_8B)


@pytest.fixture
def mistral(tmp_path: Path) -> Path:
    return write_shape(tmp_path / "mistral", MISTRAL_7B)


def planned(*arguments: object) -> dict[str, Any]:
    result = run(app, ["plan", *map(str, arguments), "--json"])
    assert result.exit_code in (0, 1), result.output
    made: dict[str, Any] = json.loads(result.stdout)
    assert made["fits"] == (result.exit_code == 0)
    return made


def test_the_plan_of_llama_3_8b(llama: Path) -> None:
    result = run(app, ["plan", str(llama), "--vram", "24GiB"])
    assert result.exit_code == 0, result.output
    assert "one token: 131,072 bytes (128.00 KiB) = 2 × 32 layers × 8 KV heads × 128 × 2 bytes" in result.stdout
    assert re.search(r"^██  weights .* bf16 14.96 GiB *$", result.stdout, re.MULTILINE)
    plan = planned(llama, "--vram", "24GiB")
    tokens = plan["kv"]["pool_tokens"]
    assert plan["kv"]["bytes_per_token"] == 128 * 1024
    assert plan["weights"]["kinds"] == {"bf16": 2 * (8_030_261_248 - NORMS), "f32": 4 * NORMS}
    padding = plan["weight_bytes"] - sum(plan["weights"]["kinds"].values())
    assert 0 <= padding < 35 * 2 * MIB, "whole pages for each layer, embedding, head and norms"
    assert f"GPU KV cache size: {tokens:,} tokens" in result.stdout.splitlines()
    assert f"Maximum concurrency for 8,192 tokens per request: {tokens / 8192:.2f}x" in result.stdout.splitlines()


def test_the_printed_owners_are_those_of_the_ledger_and_add_up(llama: Path) -> None:
    text = run(app, ["plan", str(llama), "--vram", "24GiB", "--others", "1GiB", "--draft", "demo"]).stdout
    rows = dict(re.findall(r"^\S\S  ([a-z.]+) +([\d,]+) ", text, re.MULTILINE))
    shares = {name: int(num_bytes.replace(",", "")) for name, num_bytes in rows.items()}
    assert list(shares) == [
        "runtime", "weights", "workspace", "graphs", "weights.draft", "workspace.draft", "kv.draft", "kv.target",
        "unused", "headroom", "others",
    ]  # fmt: skip
    assert sum(shares.values()) == 24 * GIB
    assert shares["others"] == GIB
    assert "??" not in text, "each has a look of its own"
    plan = planned(llama, "--vram", "24GiB", "--others", "1GiB", "--draft", "demo")
    assert {name: shares[name] for name in plan["leases"]} == plan["leases"]


def test_the_bar_is_as_wide_as_asked_and_divided_as_the_bytes_are() -> None:
    shares = [Owned("weights", 3), Owned("kv.target", 4), Owned("others", 1)]
    assert owner_bar(shares, 80).plain == "█" * 30 + "▓" * 40 + "▒" * 10
    for cells in (1, 7, 99):
        assert cell_len(owner_bar(shares, cells).plain) == cells
    assert owner_bar([Owned("weights", 0)], 10).plain == ""
    assert len({fill for _, fill in LOOKS.values()}) >= len(LOOKS) - 1  # "free" is the server's word for "unused"


@pytest.mark.parametrize("model", ["llama", "mistral", "demo", "draft"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", ["auto", "float32", "bfloat16"])
@pytest.mark.parametrize("drafted", [False, True])
def test_what_is_planned_is_what_is_leased(
    model: str, dtype: str, kv_dtype: str, drafted: bool, llama: Path, mistral: Path
) -> None:
    folder = {"llama": llama, "mistral": mistral, "demo": target_path(), "draft": draft_path()}[model]
    draft = ["--draft", "demo"] if drafted else []
    plan = planned(
        folder, "--card", "RTX PRO 5000", "--others", "2GiB", "--dtype", dtype, "--kv-dtype", kv_dtype, *draft
    )
    place = Place("card", "cuda:0", "x", 46 * GIB, total_bytes=48 * GIB)
    settings = EngineSettings(
        folder=folder,
        place=place,
        dtype=None if dtype == "auto" else dtype,  # type: ignore[arg-type]
        kv_dtype=None if kv_dtype == "auto" else kv_dtype,  # type: ignore[arg-type]
    )
    if drafted:
        settings = replace(settings, draft=DraftSettings(draft_path()))
    ledger = lease(plan_engine(settings, read_spec(folder))[1])
    assert ledger.statement() == plan["leases"]
    assert ledger.budget_bytes == plan["budget_bytes"]


def test_a_card_is_planned_for_by_its_name(llama: Path) -> None:
    text = run(app, ["plan", str(llama), "--card", "7900xtx"]).stdout
    assert "on Radeon RX 7900 XTX: 24.00 GiB in all (960 GB/s; as specified by https://www.amd.com/" in text
    plan = planned(llama, "--card", "7900xtx")
    assert (plan["title"], plan["total_bytes"], plan["card"]["bandwidth"]) == ("Radeon RX 7900 XTX", 24 * GIB, 960e9)
    assert planned(llama, "--card", "8060S", "--vram", "64GiB")["total_bytes"] == 64 * GIB
    assert "shared with the machine" in run(app, ["plan", str(llama), "--card", "8060S"]).stdout


def test_a_card_that_is_not_known_is_one_line_with_what_is_near() -> None:
    result = run(app, ["plan", "demo", "--card", "7900 xtz"])
    assert result.exit_code == 1
    assert "did you mean Radeon RX 7900 XT or" in str(result.exception)


def test_how_fast_it_could_be_is_called_a_bound_and_computed_from_bytes(llama: Path) -> None:
    text = run(app, ["plan", str(llama), "--card", "7900xtx"]).stdout
    # One row of the embedding is read, not all; norms are float32.
    weights = 2 * (8_030_261_248 - 128256 * 4096 + NORMS)
    first, last = 960e9 / weights, 960e9 / (weights + 8192 * 128 * 1024)
    bound = planned(llama, "--card", "7900xtx")["decode_upper_bound_tokens_per_s"]
    assert bound == {"start_of_context": pytest.approx(first), "end_of_context": pytest.approx(last)}
    line = next(line for line in text.splitlines() if line.startswith("decode, one request"))
    assert f"at most {first:,.0f} tokens/s, {last:,.0f} at the end of a full context: an upper bound" in line
    assert "(960 GB/s ÷ the bytes that a token reads), not a measurement" in line
    assert "tokens/s" not in run(app, ["plan", str(llama), "--vram", "24GiB"]).stdout


def test_formats_of_keys_and_values_on_a_card(llama: Path) -> None:
    plan = planned(llama, "--vram", "24GiB")
    formats = {row["name"]: row for row in plan["kv_formats"]}
    assert formats["bfloat16"]["pool_tokens"] == plan["kv"]["pool_tokens"]
    assert formats["float32"]["pool_tokens"] == plan["kv"]["num_blocks"] // 2 * 16
    assert formats["int8"]["block_bytes"] == 256 * (4096 + 64)
    assert formats["fp8"]["pool_tokens"] == 2 * plan["kv"]["pool_tokens"]
    assert formats["int4"]["block_bytes"] == 256 * (2048 + 128)
    assert all(row["served"] for row in formats.values())
    text = run(app, ["plan", str(llama), "--vram", "24GiB", "--kv-dtype", "int4"]).stdout
    assert re.search(r"^int4 .* ← this plan *$", text, re.MULTILINE)
    assert "= 2 × 32 layers × 8 KV heads × (128 × 0.5 + 4 of scale and zero) bytes" in text
    for name in ("fp8", "int8", "int4"):
        kv = planned(llama, "--vram", "24GiB", "--kv-dtype", name)["kv"]
        assert kv["block_bytes"] == formats[name]["block_bytes"]
        more = kv["pool_tokens"] - formats[name]["pool_tokens"]
        assert 0 <= more < 4 * 16, "of what the pool of bfloat16 leaves, less than a block of that"


def test_a_small_block_is_counted_with_its_padding(tmp_path: Path) -> None:
    narrow = write_shape(tmp_path / "narrow", LLAMA_3_8B | {"num_key_value_heads": 2})
    formats = {row["name"]: row for row in planned(narrow, "--vram", "24GiB")["kv_formats"]}
    padded = 32 * 2 * (2 * 16 * 128 + 128)
    assert formats["int8"]["block_bytes"] == padded, "64 bytes of scales take 128"
    assert planned(narrow, "--vram", "24GiB", "--kv-dtype", "int8")["kv"]["block_bytes"] == padded


def test_formats_that_what_runs_the_model_lacks_are_shown_and_marked(llama: Path, tmp_path: Path) -> None:
    def rows(*arguments: object) -> dict[str, str]:
        text = run(app, ["plan", *map(str, arguments)], env={"COLUMNS": "140"}).stdout
        return dict(re.findall(r"^(fp8|int8|int4) .*[0-9]x +(\S.*?) *$", text, re.MULTILINE))

    assert rows(llama, "--device", "cpu")["fp8"] == "on a card"
    file = tmp_path / "c.yaml"
    file.write_text(f"kv: {{block_size: 8}}\nmodels: {{m: {{path: {llama}}}}}\n")
    lacking = "with the card's kernels"
    assert rows(file, "--vram", "24GiB") == {"fp8": lacking, "int8": lacking, "int4": lacking}
    assert planned(file, "--vram", "24GiB")["weights"]["kinds"].keys() == {"bfloat16"}, "torch runs it"
    odd = write_shape(tmp_path / "odd", LLAMA_3_8B | {"head_dim": 80})
    assert set(rows(odd, "--vram", "24GiB").values()) == {"not for this model"}


def test_a_format_that_only_cards_have_is_refused_on_the_cpu(llama: Path) -> None:
    refused = run(app, ["plan", str(llama), "--device", "cpu", "--kv-dtype", "fp8"])
    assert (refused.exit_code, str(refused.exception)) == (
        1,
        "kv.dtype: fp8 needs a card's kernels, but this model runs on the CPU. Set kv.dtype to int8; or set kv.dtype "
        "to auto",
    )


def test_a_window_is_noted_with_what_it_could_save(mistral: Path) -> None:
    text = run(app, ["plan", str(mistral), "--vram", "32GiB"]).stdout
    line = next(line for line in text.splitlines() if line.startswith("window: "))
    assert line.startswith("window: 32 of 32 layers look back 4,096 tokens; of a full context 3.50 GiB lie behind")
    assert planned(mistral, "--vram", "32GiB")["kv"]["beyond_window_bytes"] == (32768 - 4096) * 128 * 1024
    assert "window: " not in run(app, ["plan", str(mistral), "--vram", "32GiB", "--context", "4096"]).stdout


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--vram", "16GiB"], [" ✓ --weights int8: 6.98 GiB less for the weights; the pool would hold ",
                                 " ✓ --weights int4: 10.23 GiB less for the weights; the pool would hold "]),
        (
            ["--vram", "24GiB", "--dtype", "float32"],
            ["--dtype bfloat16: 14.96 GiB less for the weights; the pool would hold", "it fits then"],
        ),
        (
            ["--vram", "24GiB", "--kv-budget", "512MiB"],
            ["--kv-budget 1024MiB: one request of the whole context", "--context 4096: the longest that fits as it is",
             "--kv-dtype int8: 8 bits for each number; the pool would hold 8,064 tokens: it fits with --context 8064",
             "--kv-dtype int4: 4 bits for each number; the pool would hold 15,408 tokens: it fits then"],
        ),
        (
            ["--vram", "24GiB", "--kv-budget", "512MiB", "--kv-dtype", "float32"],
            ["--kv-dtype bfloat16: half the memory for each token; the pool would hold 4,096 tokens: it fits with "
             "--context 4096 then"],
        ),
        (
            ["--vram", "24GiB", "--kv-budget", "40%"],
            ["a KV pool of 9.60 GiB is ", " more than there is room for", "MiB: all that there is room for; the pool"],
        ),
        (
            ["--vram", "18.5GiB", "--draft", "demo", "--draft-kv", "1GiB"],
            ["✓ --draft off: without the draft, ", " GiB less; the pool would hold "],
        ),
        (
            ["--vram", "24GiB", "--others", "7GiB"],
            ["closing other programs, which hold 7.00 GiB, would do", "a model of at most 7.4 B parameters kept as"],
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_with_remedies(llama: Path, options: list[str], told: list[str]) -> None:
    result = run(app, ["plan", str(llama), *options])
    assert result.exit_code == 1
    assert "does not fit:" in result.stdout
    for words in told:
        assert words in result.stdout, result.stdout


@pytest.mark.parametrize(
    "options",
    [
        ["--vram", "24GiB", "--kv-budget", "512MiB"],
        ["--vram", "24GiB", "--kv-budget", "512MiB", "--kv-dtype", "float32"],
        ["--vram", "24GiB", "--kv-budget", "40%"],
        ["--vram", "24GiB", "--dtype", "float32"],
        ["--vram", "17.5GiB"],
        ["--vram", "18.5GiB", "--draft", "demo", "--draft-kv", "1GiB"],
    ],
)
def test_every_remedy_that_is_ticked_works(llama: Path, options: list[str]) -> None:
    remedies = [made for made in planned(llama, *options)["remedies"] if made["fits"] and made["options"]]
    assert remedies
    for made in remedies:
        budgets = ("512MiB", "40%")
        changed = [option for option in options if option not in budgets] if "budget" in made["options"] else options
        added = made["options"].split()
        if added == ["--draft", "off"]:
            changed = changed[:2]
        changed = [option for option in changed if option != "--kv-budget" or "budget" not in made["options"]]
        assert planned(llama, *changed, *added)["fits"], made


def test_what_a_cards_kernels_would_bring_is_told_where_they_could_run_the_model(llama: Path, tmp_path: Path) -> None:
    """Blocks of 8 they do not have; a head dim of 80 they have not with any blocks."""
    file, odd = tmp_path / "c.yaml", write_shape(tmp_path / "odd", LLAMA_3_8B | {"head_dim": 80})
    for model, told in ((llama, True), (odd, False)):
        file.write_text(f"kv: {{block_size: 8}}\nmodels: {{m: {{path: {model}}}}}\n")
        texts = [made["brings"] for made in planned(file, "--vram", "16GiB")["remedies"]]
        brings = "int8 weights (with the card's kernels) would take 7.9"
        assert any(text.startswith(brings) for text in texts) == told, texts
        assert any("with the card's kernels" in text for text in texts) == told


def test_the_longest_context_that_fits_is_the_longest(llama: Path) -> None:
    [made] = [made for made in planned(llama, "--vram", "17.5GiB")["remedies"] if "--context" in made["options"]]
    longest = int(made["options"].split()[1])
    assert planned(llama, "--vram", "17.5GiB", "--context", longest)["fits"]
    assert not planned(llama, "--vram", "17.5GiB", "--context", longest + 16)["fits"]


@pytest.mark.parametrize(
    "options",
    [
        ["--vram", "16"], ["--kv-dtype", "fp9"], ["--kv-budget", "x"], ["--device", "tpu"],
        ["--draft-kv", "1GiB"], ["--draft-tokens", "4"], ["--draft", "off", "--draft-kv", "1GiB"],
        ["--draft", "ngram", "--draft-kv", "1GiB"], ["--draft", "demo", "--draft-tokens", "17"],
        ["--draft", "demo", "--draft-kv", "x"], ["--others", "1GiB"], ["--vram", "1GiB", "--others", "2GiB"],
        ["--weights", "int3"],
    ],
)  # fmt: skip
def test_a_bad_option_is_refused(llama: Path, options: list[str]) -> None:
    assert run(app, ["plan", str(llama), *options]).exit_code == 2


def test_the_plan_for_this_machine_leaves_the_headroom(llama: Path) -> None:
    plan = planned(llama, "--device", "cpu")
    assert plan["device"] == "cpu"
    assert plan["headroom_bytes"] == max(512 * MIB, plan["total_bytes"] * 6 // 100)
    assert plan["others_bytes"] > 0
    assert plan["graphs_bytes"] == 0


def test_a_configuration_is_planned_as_it_would_be_served(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    words = "You keep a lighthouse. " * 40
    file.write_text(
        f"devices: {{memory: {{match: {{vendor: cpu}}, desktop_reserve: 1GiB, vram_budget: 2GiB}}}}\n"
        f"models: {{m: {{path: {target_path()}, device: memory, context: 1024, pinned_prompts: ["
        f"{{name: a, text: '{words}'}}, {{name: b, text: '{words} And a boat.'}}]}}}}\n"
    )
    plan = planned(file)
    assert (plan["headroom_bytes"], plan["budget_bytes"], plan["context_tokens"]) == (GIB, 2 * GIB, 1024)
    tokens = plan["pinned"]["tokens"]
    assert tokens["b"] > tokens["a"] > 100
    # Whole blocks, and what both begin with once.
    blocks = plan["pinned"]["num_bytes"] / plan["kv"]["block_bytes"]
    assert tokens["b"] // 16 <= blocks <= tokens["b"] // 16 + 1
    text = run(app, ["plan", str(file)]).stdout
    assert f"pinned: a {tokens['a']} tokens, b {tokens['b']} tokens; " in text
    assert "beyond vram_budget" in text
    assert "left to others: desktop_reserve" in text


def test_options_go_over_the_configuration(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"models: {{m: {{path: {target_path()}, context: 1024, kv: {{budget: 64MiB}}}}}}\n")
    plan = planned(file, "--context", "512", "--card", "4090")
    assert (plan["context_tokens"], plan["title"]) == (512, "GeForce RTX 4090")
    assert plan["kv"]["pool_bytes"] == 64 * MIB // plan["kv"]["block_bytes"] * plan["kv"]["block_bytes"]


def test_what_the_ledger_would_refuse_does_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(f"models: {{m: {{path: {draft_path()}, kv: {{budget: 99%}}}}}}\n")
    assert not planned(file)["fits"]
    served = run(app, ["serve", str(file), "--port", "0"])
    assert served.exit_code == 1
    assert isinstance(served.exception, KVBudgetTooLarge)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Hi.", "only whole blocks of 16 are pinned"),
        ("You keep a lighthouse. " * 900, "and a request may have 4,096 in all"),
        ("You keep a lighthouse. " * 500, "are kept for one context: that leaves "),
    ],
)
def test_a_pinned_prompt_that_would_not_be_loaded_is_not_planned(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    prompts = f"[{{name: house, text: '{text}'}}]"
    file.write_text(f"models: {{m: {{path: {target_path()}, kv: {{budget: 24MiB}}, pinned_prompts: {prompts}}}}}\n")
    refused = run(app, ["plan", str(file)])
    assert refused.exit_code == 1
    assert isinstance(refused.exception, PinnedPromptRefused)
    assert told in str(refused.exception)


@pytest.mark.parametrize(
    ("options", "is_lent"),
    [
        (["--card", "7900 xtx"], True),
        (["--vram", "24GiB"], True),
        (["--card", "4090"], False),
        (["--card", "W7900"], False),
    ],
)
def test_a_card_that_is_not_here_leaves_to_others_what_the_configuration_says(
    options: list[str], is_lent: bool, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "devices: {xtx: {match: {vendor: amd, name: rx 7900 XTX}, desktop_reserve: 4GiB, vram_budget: 50%}}\n"
        f"models: {{m: {{path: {target_path()}, device: xtx}}}}\n"
    )
    plan = planned(file, *options)
    assert (plan["headroom_bytes"] == 4 * GIB) == is_lent
    assert (plan["budget_bytes"] == 12 * GIB) == is_lent
