"""What native steps take is what was planned for them, and what an idle pool gives back is gone at once."""

import ctypes
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import SequenceSpec
from edgekv.core.step import Resize
from edgekv.demo import target_path
from edgekv.engine.assemble import assemble
from edgekv.engine.native_runner import NativeRunner
from edgekv.engine.settings import EngineSettings
from edgekv.kernels.cpu import abi
from edgekv.kernels.cpu.library import KernelsUnavailable, load_library
from edgekv.model.spec import ModelSpec, RopeSpec
from edgekv.model.step_memory import attention_bytes
from edgekv.smi.device import Place
from edgekv.smi.main_memory import read_own

CPU = Place("cpu", "cpu", "CPU", free_bytes=4 << 30)
SEGMENT = 64 << 20


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    try:
        load_library()
    except KernelsUnavailable as error:
        pytest.skip(str(error))


def spec(heads: int, kv_heads: int, head_dim: int) -> ModelSpec:
    return ModelSpec(
        "LlamaForCausalLM", 1000, heads * head_dim, 64, 2, heads, kv_heads, head_dim, 1 << 20, (None,) * 2,
        (RopeSpec(1e4),) * 2, 1e-5, 0.1, False, "bfloat16",
    )  # fmt: skip


def taken(shape: ModelSpec, lengths: list[int], contexts: list[int]) -> int:
    """What the library asks for, of spans of so many tokens at the end of so many."""
    starts = np.array(contexts, np.int64) - np.array(lengths, np.int64)
    numbers = np.array(lengths, np.int64)
    cache = abi.Cache(None, 0, 10, 2, 2, shape.num_kv_heads, shape.head_dim, 16)
    batch = abi.Batch(
        tokens=sum(lengths), spans=len(lengths), starts=starts.ctypes.data, lengths=numbers.ctypes.data
    )
    attend = abi.Attend(cache=ctypes.addressof(cache), batch=ctypes.addressof(batch), heads=shape.num_heads)
    found: int = load_library().functions.ek_attend_shared_bytes(ctypes.byref(attend), 8)
    return found


@pytest.mark.parametrize("shape", [(32, 8, 128), (32, 32, 128), (14, 2, 64), (71, 1, 64), (130, 2, 16), (4, 1, 256)])
@pytest.mark.parametrize("max_sequences", [1, 3, 16, 300])
def test_attentions_scratch_is_never_more_than_planned(shape: tuple[int, int, int], max_sequences: int) -> None:
    model = spec(*shape)
    tightest = 1 << 60
    for context, length in product((40, 513, 8192, 131_072), (1, 2, 3, 7, 16, 64, 65, 512)):
        length = min(length, context)
        spans = min(max_sequences, 512 // length)
        planned = attention_bytes(model, max_step_tokens=512, max_sequences=max_sequences, context_tokens=context)
        needed = taken(model, [length] * spans, [context] * spans)
        assert needed <= planned, (context, length)
        tightest = min(tightest, planned - needed)
    mixed = [1] * min(max_sequences - 1, 200) + [300]
    planned = attention_bytes(model, max_step_tokens=512, max_sequences=max_sequences, context_tokens=9000)
    assert taken(model, mixed, [9000] * len(mixed)) <= planned
    assert tightest < 6 << 20, "as much as longer spans may take, and little more"


def test_memory_of_an_idle_pool_is_gone_as_soon_as_it_is_given_back() -> None:
    settings = replace(EngineSettings(target_path(), CPU), kv_budget=6 * SEGMENT, native=True)
    core, _ = assemble(settings, progress=lambda done, total, stage: None)
    assert isinstance(core.runner, NativeRunner)
    core.submit(SequenceSpec(1, (5,) * 20, SamplingParams(max_tokens=2, temperature=0.0)))
    while core.busy:
        core.step()
    before = read_own().resident_bytes
    core.resize(Resize(1 << 40, shrink_bytes=4 * SEGMENT))
    memory = core.step().stats.memory
    assert memory is not None
    given_back = memory.facts.given_back_bytes
    assert given_back >= 4 * SEGMENT
    assert before - read_own().resident_bytes > 0.9 * given_back


def test_scratch_grows_with_the_longest_step() -> None:
    """What the library writes to is what it asked for, step by step."""
    core, _ = assemble(
        replace(EngineSettings(target_path(), CPU), kv_budget=SEGMENT, native=True),
        progress=lambda done, total, stage: None,
    )
    asked: list[int] = []
    pool = core.runner.model._pool  # type: ignore[attr-defined]
    ask = pool.attend_shared_bytes

    def noted(attend: abi.Attend) -> int:
        asked.append(ask(attend))
        return asked[-1]

    pool.attend_shared_bytes = noted
    model, held = core.runner.model, core.runner.model._shared.num_bytes  # type: ignore[attr-defined]
    for number in range(4):
        core.submit(SequenceSpec(number, (5,) * 3000, SamplingParams(max_tokens=3, temperature=0.0)))
    while core.busy:
        core.step()
    assert model._shared.num_bytes == max(asked) > held
    assert core.runner.workspace_bytes == model._arena.num_bytes + max(asked)  # type: ignore[attr-defined]
