"""What a plan says before anything is loaded is what is there afterwards, to the byte."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import edgekv.demo
from edgekv.config.units import MIB
from edgekv.core.dtype_choice import DtypeName
from edgekv.core.kv_format import KVFormatName, plan_kv
from edgekv.engine.assemble import assemble
from edgekv.engine.draft_settings import DraftSettings
from edgekv.engine.kv_pool import KVPool, PoolShape
from edgekv.engine.settings import EngineSettings, plan_engine
from edgekv.model.causal_lm import CausalLM
from edgekv.model.hf_config import read_spec
from edgekv.smi.device import Place
from tests.model.tiny_models import make_tiny

CPU = Place("cpu", "cpu", "CPU", free_bytes=4 << 30)
TOKENIZER = Path(edgekv.demo.__file__).parent / "draft"
MODELS = [("llama", 64), ("mistral", 64), ("mistral", 512), ("gemma2", 64), ("gemma2", 512)]
DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16", "float16")


def tensors_of(thing: object) -> Iterator[Tensor]:
    """Every tensor that a model holds."""
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict | list | tuple):
        for each in thing.values() if isinstance(thing, dict) else thing:
            yield from tensors_of(each)
    elif type(thing).__module__.startswith("edgekv.model") and hasattr(thing, "__dict__"):
        yield from tensors_of(vars(thing))


@pytest.fixture(scope="module", params=MODELS, ids=lambda model: f"{model[0]}-{model[1]}")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch, window = request.param
    folder = make_tiny(arch, tmp_path_factory.mktemp(arch), vocab_size=4096, window=window)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


def test_plan_ledger_and_memory_agree_for_every_format_with_and_without_a_draft(folder: Path) -> None:
    for kv_dtype, drafts in itertools.product(DTYPES, (False, True)):
        draft = DraftSettings(TOKENIZER, kv_dtype=kv_dtype, kv_budget=MIB) if drafts else None
        settings = EngineSettings(
            folder, CPU, dtype="bfloat16", kv_dtype=kv_dtype, kv_budget=5 * MIB + 777, draft=draft
        )
        _, planned = plan_engine(settings, read_spec(folder))
        core, assembly = assemble(settings, progress=lambda done, total, stage: None)
        memory = core.stats().memory
        assert memory is not None
        leased, promised = dict(memory.leases), dict(planned.leases)
        assert leased.pop("runtime") > 0
        promised.pop("runtime")
        assert leased == promised
        assert all((f"{name}.draft" in leased) == drafts for name in ("weights", "workspace", "kv"))
        assert memory.budget_bytes >= planned.budget_bytes
        assert assembly.pool_tokens == core.stats().pool.total_blocks * 16 == planned.kv.pool_tokens > 0
        pool, model = core.runner._pool, core.runner._model  # type: ignore[attr-defined]
        assert isinstance(pool, KVPool)
        assert isinstance(model, CausalLM)
        storages = [segment.data.untyped_storage() for segment in pool.cache.segments.values()]
        drafted_bytes = 0 if planned.draft is None else planned.draft.num_bytes
        assert sum(storage.nbytes() for storage in storages) == planned.kv.pool_bytes
        assert memory.facts.kv_bytes == planned.kv.pool_bytes + drafted_bytes
        weights = {each.data_ptr(): each.numel() * each.itemsize for each in tensors_of(model)}
        assert sum(weights.values()) == pytest.approx(planned.weight_bytes, rel=0.01), "RoPE's tables are in it too"
        assert memory.facts.ceiling_bytes - drafted_bytes == planned.ceiling_bytes == planned.kv.pool_bytes
        if planned.draft is not None:
            own = core.proposer.pipeline.runner  # type: ignore[union-attr]
            weights = {each.data_ptr(): each.numel() * each.itemsize for each in tensors_of(own._model)}
            assert sum(weights.values()) == pytest.approx(planned.draft.weight_bytes, rel=0.01)
            storages = [segment.data.untyped_storage() for segment in own._pool.cache.segments.values()]
            held = sum(storage.nbytes() for storage in storages)
            assert held == planned.draft.kv.pool_bytes == leased["kv.draft"] > 0


@pytest.mark.parametrize(
    ("kv_format", "dtype", "scale_bytes"),
    # int8 has a scale for each token of a block's keys and of its values, 2 bytes each.
    [("fp8", torch.float8_e4m3fn, 0), ("int8", torch.int8, 2 * (16 + 16)), ("bfloat16", torch.bfloat16, 0)],
)
@pytest.mark.parametrize("shape", [PoolShape(2, 1, 64), PoolShape(5, 3, 64)])
def test_formats_of_one_byte_take_the_memory_that_is_planned_for_them(
    kv_format: KVFormatName, dtype: torch.dtype, scale_bytes: int, shape: PoolShape
) -> None:
    kv = plan_kv(shape, kv_format=kv_format, block_size=16, budget_bytes=3 * MIB)
    layout = PoolShape(shape.num_layers, shape.num_kv_heads, shape.head_dim + scale_bytes // (2 * 16))
    device = torch.device("cpu")
    pool = KVPool(layout, dtype=dtype, device=device, block_size=16, segment_blocks=kv.segment_blocks)
    for num_blocks in kv.segments:
        pool.add_segment(num_blocks)
    assert (pool.num_tokens, pool.num_bytes) == (kv.pool_tokens, kv.pool_bytes)
    assert sum(s.data.untyped_storage().nbytes() for s in pool.cache.segments.values()) == kv.pool_bytes
