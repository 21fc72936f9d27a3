"""The whole engine on the card: the same tokens as the processor in float32, and logits near them in other types."""

from pathlib import Path

import pytest
import torch

from edgekv.core.sequence import FinishReason
from tests.gpu.bed import Bed
from tests.gpu.models import ARCHITECTURES, SMALL, make_model

engines = pytest.importorskip("tests.gpu.engines", exc_type=ImportError)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """Makes a model once. `shape`: "tiny" or "small"."""
    made: dict[tuple[str, str], Path] = {}

    def make(arch: str, shape: str = "tiny") -> Path:
        if (arch, shape) not in made:
            folder = tmp_path_factory.mktemp(f"gpu-{arch}-{shape}")
            made[arch, shape] = make_model(arch, folder, SMALL) if shape == "small" else make_model(arch, folder)
        return made[arch, shape]

    return make


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_tokens_in_float32_equal_the_processors(arch: str, folders, bed: Bed) -> None:
    folder, own = folders(arch), engines.prompts(1, *bed.sized(card=(40, 7, 61, 130), host=(40, 7, 61)))
    count = bed.sized(card=24, host=6)
    engine = engines.make_engine(bed, folder)
    for prompt in own:
        engine.submit(prompt, count)
    got = engines.run(engine)
    wanted = engines.reference_tokens(folder, own, count)
    assert got == [[each.token_id for each in one] for one in wanted]
    assert engine.core.stats().ahead_steps > 0, "no step was begun ahead of the one before"
    assert engine.runner.graphs.sizes == (1, 2, 4)
    if engines.has_transformers():
        assert got[0] == engines.transformers_tokens(folder, own[0], count)


def test_long_prompts_in_float32_equal_the_processors(folders, bed: Bed) -> None:
    folder = folders("qwen3", bed.sized(card="small", host="tiny"))
    lengths, most = bed.sized(card=(1500, 40, 700, 9, 333, 1024), host=(70, 9)), bed.sized(card=7990, host=190)
    own = engines.prompts(2, *lengths, most=most)
    own.append(own[0][: lengths[0] * 4 // 5] + own[1])
    count = bed.sized(card=32, host=4)
    engine = engines.make_engine(bed, folder, **engines.roomy())
    for prompt in own:
        engine.submit(prompt, count)
    got = engines.run(engine)
    assert got == [[each.token_id for each in one] for one in engines.reference_tokens(folder, own, count)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_graphs_change_nothing(dtype: str, folders, bed: Bed) -> None:
    _skip_without_units(bed, dtype)
    found = []
    for graphs in (True, False):
        engine = engines.make_engine(bed, folders("llama"), dtype=dtype, kv_format=dtype, graphs=graphs)
        for prompt, sampling in zip(engines.prompts(3, 30, 11, 45, 5), engines.SAMPLING.values(), strict=False):
            engine.submit(prompt, bed.sized(card=20, host=4), **sampling)
        found.append(engines.run(engine))
        assert bool(engine.runner.graphs.sizes) == graphs
    assert found[0] == found[1]


def test_every_way_of_sampling_equals_the_processors(folders, bed: Bed) -> None:
    folder, own = folders("llama"), engines.prompts(4, *(9 + 3 * i for i in range(len(engines.SAMPLING))))
    engine, count = engines.make_engine(bed, folder), bed.sized(card=16, host=6)
    settings = list(engines.SAMPLING.values())
    for prompt, sampling in zip(own, settings, strict=True):
        engine.submit(prompt, count, **sampling)
    got = engines.run(engine)
    wanted = engines.reference_tokens(folder, own, count, settings)
    assert got == [[each.token_id for each in one] for one in wanted]
    logged = list(engines.SAMPLING).index("logprobs")
    for ours, theirs in zip(engine.sampled[logged + 1], wanted[logged], strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)
        assert [token for token, _ in ours.top_logprobs] == [token for token, _ in theirs.top_logprobs]


@pytest.mark.parametrize("k", [1, 3, 7])
def test_what_is_proposed_and_verified_changes_nothing(k: int, folders, bed: Bed) -> None:
    folder, own = folders("llama"), engines.prompts(4, *(9 + 3 * i for i in range(len(engines.SAMPLING))))
    settings, count = list(engines.SAMPLING.values()), bed.sized(card=16, host=6)
    wanted = [[each.token_id for each in said] for said in engines.reference_tokens(folder, own, count, settings)]
    guesser = engines.Guesser({tuple(prompt): said for prompt, said in zip(own, wanted, strict=True)}, k, 0.7)
    engine = engines.make_engine(bed, folder, limits=engines.verifying(), proposer=guesser)
    for prompt, sampling in zip(own, settings, strict=True):
        engine.submit(prompt, count, **sampling)
    assert engines.run(engine) == wanted
    assert 0 < guesser.accepted < guesser.proposed
    assert engine.runner.graphs.sizes == (1, 2, 4, 8, 16)


def test_a_chain_of_steps_that_nobody_reads_says_what_steps_one_by_one_say(folders, bed: Bed) -> None:
    counts = [bed.sized(card=16, host=3), 2, 2, 1]
    plain = engines.make_engine(bed, folders("llama"))
    for prompt, count, sampling in zip(engines.CHAINED, counts, engines.CHAINED_OPTIONS, strict=True):
        plain.submit(prompt, count, **sampling)
    wanted = engines.run(plain)
    engine = engines.make_engine(bed, folders("llama"), in_flight=max(counts))
    said: list[list[int]] = [[] for _ in counts]
    for plan, pending in engines.begin_chain(engine, counts):
        for chunk, sampled in zip(plan.chunks, pending.result(), strict=True):
            said[chunk.sequence.id].append(sampled.token_id)
    assert said == wanted


@pytest.mark.parametrize(("arch", "dtype", "kv_format", "weights", "bound"), engines.BOUNDS)
def test_logits_are_within_their_bound(
    arch: str, dtype: str, kv_format: str, weights: str, bound: float, folders, bed: Bed
) -> None:
    """The bounds of tests/card/test_card_formats.py, of the largest difference in units of the deviation."""
    from edgekv.kernels.cpu.library import KernelsUnavailable

    _skip_without_units(bed, dtype)
    folder = folders(arch)
    engine = engines.make_engine(bed, folder, dtype=dtype, weights=weights, kv_format=kv_format, blocks=16)
    engine.memory.poison(engine.block_ids())
    got = engines.forced_logits(engine.runner.forward, tuple(engine.block_ids()[1:8:2])).cpu()
    try:
        want = engines.reference_logits(folder, weights, (0, 1, 2))
    except KernelsUnavailable as error:
        pytest.skip(f"there is nothing to compare with: {error}")
    error = float((got - want).abs().max() / want.std())
    print(f"{arch} {dtype} KV {kv_format} weights {weights}: {error:.2g} of {bound}")
    assert error <= bound
    if dtype == "float32" and kv_format == "float32":
        assert torch.equal(got.argmax(1), want.argmax(1))


def test_preempted_moved_and_shrunk_sequences_go_on_as_if_nothing_was(folders, bed: Bed) -> None:
    folder, own = folders("llama"), engines.prompts(5, 50, 33, 20, 41)
    count = bed.sized(card=24, host=12)
    engine = engines.make_engine(bed, folder, blocks=16, segment_blocks=4)
    size = engine.memory.block_bytes

    def squeeze(step: int) -> None:
        if step in (4, 17):
            engine.resize(shrink_bytes=8 * size)
        if step in (9, 23):
            engine.resize(grow_bytes=8 * size)

    for prompt in own:
        engine.submit(prompt, count)
    got = engines.run(engine, squeeze)
    assert engine.core.stats().preemptions > 0
    assert got == [[each.token_id for each in one] for one in engines.reference_tokens(folder, own, count)]


def test_logits_that_are_not_finite_end_their_own_sequence(folders, bed: Bed) -> None:
    folder = folders("llama")
    [healthy, sick] = engines.prompts(6, 21, 18)
    [wanted] = engines.reference_tokens(folder, [healthy], 8)
    seen = {*healthy, *(each.token_id for each in wanted)}
    poison = next(token for token in range(3, 190) if token not in seen)
    engine = engines.make_engine(bed, folder)
    table = engine.runner.model.operations[0].op.matrix
    table.parts[0].plain[poison] = torch.nan
    well, ill = engine.submit(healthy, 8), engine.submit([*sick[:-1], poison], 8)
    engine.run()
    assert engine.ended[ill] is FinishReason.ERROR
    assert engine.outputs[well] == [each.token_id for each in wanted]


def _skip_without_units(bed: Bed, dtype: str) -> None:
    if dtype == "bfloat16" and not bed.card.has_bf16_units:
        pytest.skip("this card's matrix units multiply no bfloat16; models compute in float16 there")
