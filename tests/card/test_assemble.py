"""From a model folder to an engine on a card: what is planned is what is taken, and a load that fails keeps nothing."""

import gc
import weakref
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from edgekv.config.settings import PinnedPrompt
from edgekv.core.sampling import SamplingParams
from edgekv.core.sequence import SequenceSpec
from edgekv.core.speculation import Controller
from edgekv.demo import draft_path
from edgekv.engine import assemble as assembling
from edgekv.engine import card_load
from edgekv.engine.assemble import assemble
from edgekv.engine.card_load import open_card
from edgekv.engine.card_runner import CardRunner
from edgekv.engine.core import EngineCore
from edgekv.engine.draft_settings import DraftSettings
from edgekv.engine.kernel_needs import Lacking, NotServedHere
from edgekv.engine.runner import Runner
from edgekv.engine.runtime import Runtime
from edgekv.engine.settings import EngineSettings
from edgekv.model.hf_config import read_spec
from edgekv.smi.device import Place
from edgekv.text.tokenizer import load_tokenizer
from tests.card.host_card import HostCard
from tests.card.test_card_engine import greedy, prompts

DRAFT = draft_path()

MIB = 1 << 20
CARD = Place("card", "cuda:0", "Some Card", 900 * MIB, total_bytes=1024 * MIB, reserve_bytes=64 * MIB)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> HostCard:
    made = HostCard()
    monkeypatch.setattr(card_load, "open_card", lambda settings, spec, progress: made)
    monkeypatch.setattr(assembling, "measure_runtime", lambda place, planned, sources: Runtime(planned, "as planned"))
    return made


def settings(**changes: object) -> EngineSettings:
    asked = EngineSettings(DRAFT, CARD, max_sequences=4, max_step_tokens=48, context_tokens=256, kv_budget=8 * MIB)
    return replace(asked, **changes)  # type: ignore[arg-type]


def quiet(done: int, total: int, stage: str) -> None: ...


def answer(core: EngineCore, prompt: list[int], count: int) -> list[int]:
    core.submit(SequenceSpec(1, tuple(prompt), SamplingParams(count, temperature=0.0)))
    tokens = []
    while core.busy:
        tokens += [each.sampled.token_id for each in core.step().tokens]
    return tokens


def test_an_engine_on_the_cards_kernels(card: HostCard) -> None:
    core, assembly = assemble(settings(dtype="float32"), quiet, sources=())
    assert assembly.kernels == "the card's kernels"
    assert isinstance(core.runner, CardRunner)
    assert core.runner.graphs.sizes == (1, 2, 4)
    [prompt] = prompts(21, 30)
    assert answer(core, prompt, 6) == greedy(DRAFT, prompt, 6)
    planned = assembly.leases["weights"] + assembly.leases["workspace"]
    assert card.taken_bytes <= planned
    assert {"runtime", "weights", "workspace", "graphs", "kv.target"} <= set(assembly.leases)


def test_a_context_that_is_longer_than_planned_is_refused(card: HostCard) -> None:
    core, _ = assemble(settings(context_tokens=64), quiet, sources=())
    core.submit(SequenceSpec(1, (5,) * 40, SamplingParams(25)))
    [finished] = core.step().finished
    assert finished.detail == "sequence 1: 40 + 25 tokens are more than the context of 64 tokens"
    core.submit(SequenceSpec(2, (5,) * 40, SamplingParams(24, temperature=0.0)))
    while core.busy:
        core.step()


def test_pinned_prompts_do_not_share_a_row_of_the_block_tables(card: HostCard) -> None:
    texts = ["When do I sow carrots? " * 12, "How often do I water tomatoes in a pot? " * 12]
    pins = tuple(PinnedPrompt(name=f"p{i}", text=text, raw=True) for i, text in enumerate(texts))
    core, _ = assemble(settings(pinned_prompts=pins, dtype="float32"), quiet, sources=())
    plain, _ = assemble(settings(dtype="float32"), quiet, sources=())
    tokenizer = load_tokenizer(DRAFT)
    for text in texts:
        prompt = tokenizer.encode(text + "Answer:", add_special_tokens=True, parse_special=False)
        assert answer(core, prompt, 4) == answer(plain, prompt, 4)
    assert core.stats().cached_prompt_tokens > 0


def test_every_program_ran_before_anybody_asks(card: HostCard) -> None:
    core, _ = assemble(settings(), quiet, sources=())
    assert isinstance(core.runner, CardRunner)
    assert set(core.runner.kernels()) <= set(card.launched)
    prefills = [spec for spec in card.launched if spec.source == "attn/prefill_paged.h"]
    layers, ragged = 2, (16, 32, 48)
    assert len(prefills) >= layers * len(ragged)


def test_what_libraries_took_since_the_plan_has_a_lease(card: HostCard, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(place: Place, planned: int, sources: object) -> Runtime:
        return Runtime(planned + (0 if card.num_launches == 0 else 7 * MIB), "as measured")

    monkeypatch.setattr(assembling, "measure_runtime", measure)
    _, assembly = assemble(settings(), quiet, sources=())
    assert assembly.leases["libraries"] == 7 * MIB


@pytest.mark.parametrize("kv_dtype", ["fp8", "int8", "int4"])
def test_formats_that_only_kernels_have(kv_dtype: str, card: HostCard) -> None:
    core, assembly = assemble(settings(kv_dtype=kv_dtype, weight_format="int4"), quiet, sources=())
    assert assembly.memory.kv_dtype == kv_dtype
    assert assembly.memory.weights.kinds.keys() >= {"q4_0", "q8_0"}
    assert len(answer(core, prompts(22, 20)[0], 4)) == 4


def test_out_of_memory_at_any_allocation_of_a_load_keeps_nothing(card: HostCard) -> None:
    asked = settings(dtype="float32")
    failed = 0
    kept: list[weakref.ref[torch.UntypedStorage]] = []
    allocate = card.allocate

    def watched(num_bytes: int) -> torch.Tensor:
        made = allocate(num_bytes)
        kept.append(weakref.ref(made.untyped_storage()))
        return made

    card.allocate = watched  # type: ignore[method-assign]
    for allocation in range(40):
        card.fail_allocation = allocation
        kept.clear()
        try:
            core, _ = assemble(asked, quiet, sources=())
        except torch.OutOfMemoryError as error:
            failed += 1
            error.__traceback__ = None
            del error
            gc.collect()
            assert not [ref for ref in kept if ref() is not None], "memory of a load that failed"
        else:
            if card.fail_allocation is not None:  # it had fewer allocations than that
                break
            del core  # a graph that was not captured is no failure
    assert failed >= 3, "matrices, vectors, buffers"
    card.fail_allocation = None
    assert answer(assemble(asked, quiet, sources=())[0], prompts(23, 9)[0], 2)


def test_torch_runs_it_where_the_kernels_cannot_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    lacking = Lacking("there is no compiler", "install one")
    monkeypatch.setattr(card_load, "open_card", lambda settings, spec, progress: lacking)
    monkeypatch.setattr(assembling, "measure_runtime", lambda place, planned, sources: Runtime(planned, "as planned"))
    # Of torch's own path only the choice is looked at: there is no card to go on.
    monkeypatch.setattr(assembling, "load_model", lambda *_, **__: pytest.fail("as far as it is to come"))
    with pytest.raises(pytest.fail.Exception):
        assemble(settings(), quiet, sources=())
    [told] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told.endswith("there is no compiler. torch runs it, several times slower; install one")
    with pytest.raises(NotServedHere):
        assemble(settings(kv_dtype="int8"), quiet, sources=())


def test_a_shape_that_the_kernels_do_not_have() -> None:
    asked = settings()
    found = open_card(asked, replace(read_spec(asked.folder), head_dim=80), quiet)
    assert isinstance(found, Lacking)
    assert "head dim of 80" in found.reason


def test_a_card_that_main_memory_plays_is_run_by_torch() -> None:
    place = replace(CARD, torch_name="cpu")
    core, assembly = assemble(settings(place=place), quiet, sources=())
    assert (assembly.kernels, type(core.runner)) == ("torch", Runner)


class Always(Controller):
    """Does not look at how quick fibers are."""

    def is_in_debt(self, decodes: int) -> bool:
        return False

    def choose(self, most: Mapping[int, int], *_: object) -> dict[int, int]:
        return {number: min(left, self.most) for number, left in most.items()}


def test_a_draft_model_on_the_same_card(card: HostCard) -> None:
    """It is the model itself, in another type; what it proposes is mostly right, whatever the outputs are."""
    core, assembly = assemble(settings(dtype="float32", draft=DraftSettings(DRAFT, 5)), quiet, sources=())
    assert core._speculation is not None
    core._speculation._controller = Always(5)
    assert isinstance(core.runner, CardRunner)
    assert core.runner.graphs.sizes == (1, 2, 4, 8, 9)
    plain, _ = assemble(settings(dtype="float32"), quiet, sources=())
    params = [SamplingParams(12, temperature=0.0), SamplingParams(12, temperature=0.8, seed=3, repetition_penalty=1.2)]
    said: list[dict[int, list[int]]] = []
    for each in (plain, core):
        said.append({})
        for number, (prompt, sampling) in enumerate(zip(prompts(24, 40, 21), params, strict=True)):
            each.submit(SequenceSpec(number, tuple(prompt), sampling))
        while each.busy:
            for token in each.step().tokens:
                said[-1].setdefault(token.sequence_id, []).append(token.sampled.token_id)
    assert said[0] == said[1]
    stats = core.stats()
    assert stats.proposed_tokens > 0
    assert stats.accepted_tokens > 0.6 * stats.proposed_tokens
    assert {"weights.draft", "workspace.draft", "kv.draft"} <= set(assembly.leases)
