"""What a plan says where the native CPU kernels run the model, and where they do not but would help."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgekv.cli.app import app
from edgekv.cli.remedies import remedies
from edgekv.core.dtype_choice import DtypeChoice
from edgekv.core.memory_plan import MemoryPlan
from edgekv.demo import target_path
from edgekv.engine.settings import EngineSettings, plan_engine, runs_natively
from edgekv.model.hf_config import read_spec
from edgekv.model.weight_table import read_weight_table
from edgekv.smi.device import Place
from tests.unit.cli.shapes import LLAMA_3_8B, write_shape
from tests.unit.model.test_quantised_config import AWQ

GIB = 1 << 30
TABLE = 128_256 * 4096  # elements of the embedding, and of the head
LINEAR = 8_030_261_248 - 2 * TABLE - 65 * 4096
NORMS = 4 * 65 * 4096
CARD = Place("card", "cuda:0", "a card", GIB)

run = CliRunner().invoke


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_shape(tmp_path / "llama", LLAMA_3_8B)


@pytest.fixture
def awq(tmp_path: Path) -> Path:
    return write_shape(tmp_path / "awq", LLAMA_3_8B | {"torch_dtype": "float16", "quantization_config": AWQ})


def settings(folder: Path, gib: float = 64, **changes: Any) -> EngineSettings:
    place = Place("cpu", "cpu", "CPU", free_bytes=int(gib * GIB))
    return replace(EngineSettings(folder, place, native=True), **changes)


def planned(folder: Path, gib: float = 64, **changes: Any) -> tuple[DtypeChoice, MemoryPlan]:
    return plan_engine(settings(folder, gib, **changes), read_spec(folder))


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, {"bf16": 2 * (LINEAR + 2 * TABLE), "f32": NORMS}),
        ({"dtype": "float32"}, {"f32": 4 * (LINEAR + 2 * TABLE) + NORMS}),
        ({"weight_format": "int8"}, {"q8_0": (LINEAR + 2 * TABLE) * 34 // 32, "f32": NORMS}),
        ({"weight_format": "int4"}, {"q4_0": LINEAR * 18 // 32, "q8_0": 2 * TABLE * 34 // 32, "f32": NORMS}),
    ],
)
def test_what_weights_take_in_panels(llama: Path, changes: dict[str, Any], kinds: dict[str, int]) -> None:
    memory = planned(llama, **changes)[1]
    assert memory.weights.kinds == kinds
    assert memory.weight_bytes == memory.leases["weights"] == sum(kinds.values())
    embedding = TABLE * 34 // 32 if "q8_0" in kinds else TABLE * (2 if "bf16" in kinds else 4)
    assert memory.weights.step == memory.weight_bytes - embedding


def test_quantised_files_stay_quantised_and_become_plain_without_the_kernels(awq: Path) -> None:
    choice, kept = planned(awq)
    assert (choice.name, choice.keeps_stored, kept.kv_dtype) == ("bfloat16", True, "bfloat16")
    # Groups of 128: float16 scale and a byte of zero for each.
    assert kept.weights.kinds == {"affine4_128": LINEAR * 67 // 128, "f16": 2 * 2 * TABLE, "f32": NORMS}
    choice, unpacked = planned(awq, native=False)
    assert (choice.name, choice.keeps_stored) == ("bfloat16", False)
    assert "unpacked to bfloat16: the native CPU kernels are not in use" in choice.reason
    assert unpacked.weight_bytes == 2 * 8_030_261_248
    choice, asked = planned(awq, dtype="float32")
    assert set(asked.weights.kinds) == {"affine4_128", "f32"}, "what is quantised has no dtype"


def test_int8_keys_and_values(llama: Path) -> None:
    memory = planned(llama, kv_dtype="int8")[1]
    assert memory.kv.block_bytes == 32 * 8 * 2 * (128 * 16 + 2 * 16)
    assert memory.kv.bytes_per_token == 32 * 8 * 2 * 130


def test_the_kernels_run_what_they_can_where_they_are(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings(llama, native=None)
    spec = read_spec(llama)
    for available in (True, False):
        monkeypatch.setattr("edgekv.kernels.cpu.library.available", lambda available=available: available)
        assert runs_natively(asked, spec) == available
        assert not runs_natively(asked, replace(spec, head_dim=24))
        assert not runs_natively(replace(asked, block_size=8), spec)
        assert runs_natively(replace(asked, native=True), spec)
        assert not runs_natively(replace(asked, native=False), spec)


def test_a_cards_kernels_are_taken_to_be_available(llama: Path) -> None:
    asked, spec = settings(llama, native=None, place=CARD), read_spec(llama)
    assert runs_natively(asked, spec)
    assert runs_natively(replace(asked, block_size=32), spec)
    assert not runs_natively(replace(asked, block_size=8), spec)
    assert not runs_natively(asked, replace(spec, head_dim=80))
    assert not runs_natively(replace(asked, native=False), spec)
    played = replace(CARD, torch_name="cpu")
    assert not runs_natively(replace(asked, place=played), spec), "main memory has no card's kernels"
    for target, has in (("sm_61", False), ("sm_75", True), ("sm_120", True), ("gfx906", False), ("gfx1030", True)):
        assert runs_natively(replace(asked, place=replace(CARD, target=target)), spec) == has


def test_what_a_card_keeps_of_weights(llama: Path, awq: Path) -> None:
    place = replace(CARD, free_bytes=64 * GIB, total_bytes=64 * GIB)
    quantised = planned(llama, weight_format="int4", place=place)[1].weights
    planes = {"q4_0": LINEAR * 18 // 32, "q8_0": 2 * TABLE * 34 // 32, "f32": NORMS}
    assert quantised.kinds == planes
    assert quantised.step == sum(planes.values()) - TABLE * 34 // 32
    choice, kept = planned(awq, place=place)
    assert (choice.name, choice.keeps_stored) == ("bfloat16", True)
    # Plain numbers are all in what it computes in.
    assert kept.weights.kinds == {"affine4_128": LINEAR * 68 // 128, "bf16": 2 * 2 * TABLE, "f32": NORMS}
    wide = planned(llama, dtype="float32", place=place)[1].weights
    assert wide.kinds == {"f32": 4 * (LINEAR + 2 * TABLE) + NORMS}
    assert wide.total < 1.01 * wide.kinds["f32"]
    choice, unpacked = planned(awq, place=place, native=False)
    assert "unpacked to float16: the card's kernels are not in use" in choice.reason
    assert unpacked.weight_bytes == 2 * 8_030_261_248


@pytest.mark.parametrize(
    ("architecture", "target", "dtype", "told"),
    [
        ("LlamaForCausalLM", "sm_75", "float16", "as the checkpoint, but this card has no bfloat16"),
        ("Gemma2ForCausalLM", "sm_75", "float32", "whose range Gemma needs"),
        ("LlamaForCausalLM", "sm_80", "bfloat16", "as the checkpoint"),
        ("LlamaForCausalLM", "gfx1030", "bfloat16", "as the checkpoint"),
    ],
)
def test_a_card_without_bfloat16_computes_in_something_else(
    architecture: str, target: str, dtype: str, told: str, llama: Path
) -> None:
    place = replace(CARD, free_bytes=64 * GIB, total_bytes=64 * GIB, target=target)
    asked = settings(llama, place=place)
    choice, memory = plan_engine(asked, replace(read_spec(llama), architecture=architecture))
    assert (choice.name, memory.kv_dtype) == (dtype, dtype)
    assert told in choice.reason
    choice, memory = plan_engine(replace(asked, weight_format="int4"), read_spec(llama))
    assert choice.name == ("float16" if target == "sm_75" else "bfloat16")
    assert memory.weights.kinds.keys() == {"q4_0", "q8_0", "f32"}


def test_remedies_are_real_with_the_kernels(llama: Path) -> None:
    asked, spec = settings(llama, 15), read_spec(llama)
    table = read_weight_table(llama, spec)
    result = plan_engine(asked, spec, table)[1]
    found = {made.options: made for made in remedies(asked, spec, result, table)}
    assert found["--weights int8"].brings.startswith("7.01 GiB less for the weights; the pool would hold")
    assert found["--weights int4"].fits
    assert "--kv-dtype int8" not in found, "as much would be missing"
    for weights in ("int8", "int4"):
        assert found[f"--weights {weights}"].fits == planned(llama, 15, weight_format=weights)[1].fits
    assert all(made.is_here for made in found.values())


def test_a_quantised_file_is_not_to_be_quantised_again(awq: Path) -> None:
    spec = read_spec(awq)
    table = read_weight_table(awq, spec)
    for native in (True, False):
        asked = settings(awq, 5, native=native)
        texts = [str(made) for made in remedies(asked, spec, plan_engine(asked, spec, table)[1], table)]
        assert not any("--weights" in text for text in texts)
        assert not any("as they are in the file" in text for text in texts), "they would not fit either"
    asked = settings(awq, 9, native=False)
    texts = [str(made) for made in remedies(asked, spec, plan_engine(asked, spec, table)[1], table)]
    kept = "the weights as they are in the file (with the native CPU kernels) would take 5.36 GiB and leave "
    assert any(kept in text for text in texts), texts


def test_the_printed_plan_says_what_weights_are_kept_in(
    llama: Path, awq: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekv.engine.settings.runs_natively", lambda settings, spec: True)
    wide = {"COLUMNS": "140"}
    asked = ["plan", str(llama), "--device", "cpu", "--weights", "int4", "--kv-dtype", "int8"]
    text = run(app, asked, env=wide).stdout
    assert "q4_0 3.66 GiB, q8_0 1.04 GiB " in text
    made = json.loads(run(app, [*asked, "--json"]).stdout)
    assert list(made["weights"]["kinds"]) == ["q4_0", "q8_0", "f32"]
    assert made["weights"]["total"] == made["weight_bytes"] == made["leases"]["weights"]
    assert "= 2 × 32 layers × 8 KV heads × (128 + 2 of a scale) bytes" in text
    assert re.search(r"^int8 .* ← this plan *$", text, re.MULTILINE)
    text = run(app, ["plan", str(awq), "--device", "cpu"], env=wide).stdout
    assert "in bfloat16 (the weights stay quantised)" in text
    assert "int4/128 3.40 GiB, f16 1.96 GiB" in text


@pytest.mark.parametrize("native", [True, False])
def test_a_draft_is_planned_like_a_model_of_its_own(
    native: bool, llama: Path, awq: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekv.engine.settings.runs_natively", lambda settings, spec: native)
    asked = ["plan", str(llama), "--device", "cpu", "--draft", str(awq)]
    draft = json.loads(run(app, [*asked, "--json"]).stdout)["draft"]
    alone = json.loads(run(app, ["plan", str(awq), "--device", "cpu", "--json"]).stdout)
    assert draft["weights"] == alone["weights"]
    assert draft["dtype"] == alone["dtype"] == "bfloat16"
    kinds = "int4/128 3.40 GiB, f16 1.96 GiB" if native else "bfloat16"
    assert f"the draft, in {kinds}" in run(app, asked, env={"COLUMNS": "140"}).stdout


def test_a_draft_whose_blocks_the_kernels_cannot_take_goes_to_torch(
    awq: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekv.kernels.cpu.library.available", lambda: True)
    file = tmp_path / "c.yaml"
    for block_size, kinds in ((16, "affine4_128"), (8, "bfloat16")):
        file.write_text(f"kv: {{block_size: {block_size}}}\nmodels: {{m: {{path: {target_path()}}}}}\n")
        made = run(app, ["plan", str(file), "--device", "cpu", "--draft", str(awq), "--json"])
        assert kinds in json.loads(made.stdout)["draft"]["weights"]["kinds"]
