"""What a plan says of a model on the native kernels is what is there afterwards, for every kind of file and setting."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import edgekv.demo
from edgekv.config.units import MIB
from edgekv.core.kv_format import KVDtypeName
from edgekv.engine.assemble import assemble
from edgekv.engine.draft_settings import DraftSettings
from edgekv.engine.native_pool import NativeKVPool
from edgekv.engine.settings import EngineSettings, plan_engine
from edgekv.kernels.cpu.formats import PanelFormat
from edgekv.kernels.cpu.library import KernelsUnavailable, load_library
from edgekv.model.hf_config import read_spec
from edgekv.model.native_lm import NativeLM
from edgekv.smi.device import Place
from tests.model.quantised_models import SHAPE, quantise_folder
from tests.model.test_packing import make_mixed_gguf
from tests.model.tiny_models import make_tiny

CPU = Place("cpu", "cpu", "CPU", free_bytes=4 << 30)
TOKENIZER = Path(edgekv.demo.__file__).parent / "draft"


def make_plain(folder: Path, arch: str = "llama", dtype: torch.dtype = torch.bfloat16, **shape: Any) -> Path:
    made = make_tiny(arch, folder / "plain", vocab_size=4096, dtype=dtype, **SHAPE | shape)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, made)
    return made


MAKERS: dict[str, Callable[[Path], Path]] = {
    "llama": make_plain,
    "odd": lambda folder: make_plain(folder, intermediate_size=264),
    "float16": lambda folder: make_plain(folder, dtype=torch.float16),
    "gemma2": lambda folder: make_plain(folder, "gemma2", head_dim=32),
    "awq": lambda folder: quantise_folder(make_plain(folder), "awq", 64)[0],
    "gptq": lambda folder: quantise_folder(make_plain(folder), "gptq", -1)[0],
    "gguf": lambda folder: make_mixed_gguf(folder, {"*": "Q8_0", "blk.*.ffn_up*": "Q4_K", "token_embd*": "F16"}),
}
KINDS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in MAKERS),
    ("llama", {"dtype": "bfloat16", "kv_dtype": "int8"}),
    ("odd", {"weight_format": "int8"}),
    ("odd", {"weight_format": "int4", "kv_dtype": "int8"}),
    ("awq", {"dtype": "float32", "kv_dtype": "float16"}),
    ("float16", {"dtype": "float16"}),
]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    try:
        load_library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(("kind", "changes"), KINDS, ids=lambda value: str(value))
def test_plan_ledger_and_memory_agree(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    path = MAKERS[kind](tmp_path)
    settings = EngineSettings(path, CPU, kv_budget=3 * MIB + 777, max_step_tokens=64, native=True, **changes)
    choice, planned = plan_engine(settings, read_spec(path))
    core, assembly = assemble(settings, progress=lambda done, total, stage: None)
    assert assembly.dtype == choice
    leased, promised = dict(assembly.leases), dict(planned.leases)
    assert leased.pop("runtime") > 0
    promised.pop("runtime")
    assert leased == promised
    model, pool = core.runner._model, core.runner._pool  # type: ignore[attr-defined]
    assert isinstance(model, NativeLM)
    assert isinstance(pool, NativeKVPool)
    assert model.lowered.weight_bytes == planned.weight_bytes == leased["weights"]
    assert pool.num_bytes == planned.kv.pool_bytes == leased["kv.target"]
    assert pool.num_tokens == planned.kv.pool_tokens == assembly.pool_tokens


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_so_is_what_it_says_of_a_draft(kv_dtype: KVDtypeName | None, tmp_path: Path) -> None:
    path = make_plain(tmp_path)
    draft = DraftSettings(TOKENIZER, kv_dtype=kv_dtype, kv_budget=2 * MIB + 777)
    settings = EngineSettings(path, CPU, kv_budget=3 * MIB, max_step_tokens=64, native=True, draft=draft)
    planned = plan_engine(settings, read_spec(path))[1]
    core, assembly = assemble(settings, progress=lambda done, total, stage: None)
    assert planned.draft is not None
    leased, promised = dict(assembly.leases), dict(planned.leases)
    assert leased.pop("runtime") > 0
    promised.pop("runtime")
    assert leased == promised
    own = core.proposer.pipeline.runner  # type: ignore[union-attr]
    assert isinstance(own._model, NativeLM)
    assert own._model.lowered.weight_bytes == planned.draft.weight_bytes == leased["weights.draft"]
    assert own._pool.num_bytes == planned.draft.kv.pool_bytes == leased["kv.draft"]
    assert own._pool.num_tokens == planned.draft.kv.pool_tokens
    assert planned.draft.workspace_bytes == leased["workspace.draft"]


def test_float16_that_is_asked_for_is_float16_everywhere(tmp_path: Path) -> None:
    settings = EngineSettings(
        MAKERS["float16"](tmp_path), CPU, dtype="float16", kv_budget=MIB, max_step_tokens=64, native=True
    )
    core, assembly = assemble(settings, progress=lambda done, total, stage: None)
    model = core.runner._model  # type: ignore[attr-defined]
    matrices = [op.matrix for op in model.lowered.operations if op.matrix is not None]
    assert {part.format for matrix in matrices for part in matrix.parts} == {PanelFormat.F16}
    assert list(assembly.memory.weights.kinds) == ["f16", "f32"], "norms are float32"
    assert (assembly.memory.kv_dtype, assembly.dtype.reason) == ("float16", "as configured")
