"""The demo model's training: deterministic, resumable, and readable by transformers."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_model import loop
from demo_model.build import train_rounds
from demo_model.corpus import SEED, documents
from demo_model.data import Phase, batch_at
from demo_model.export import export, load_weights, save_weights
from demo_model.loop import Recipe, train
from demo_model.model import Llama, LlamaShape
from demo_model.steps import Progress
from safetensors.torch import load_file

SHAPE = LlamaShape(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
RECIPE = Recipe(steps=8, peak_rate=1e-2, batch_tokens=64, warmup_steps=2, phases=(Phase(0.0, 16, 2), Phase(0.5, 32, 1)))
ROW = (np.arange(8 * 64 + 1) % 7).astype(np.uint16)  # a row that can be learnt
VALIDATION = torch.from_numpy(ROW[:66].astype(np.int64)).view(2, 33)


def run(folder: Path, stop_after: int | None = None) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Train a tiny model; with ``stop_after`` the run is broken off by an exception, as by a pulled plug."""
    losses: list[float] = []

    def watch(progress: Progress) -> None:
        losses.append(progress.loss)
        if progress.step == stop_after:
            raise KeyboardInterrupt

    model = Llama(SHAPE, seed=1)
    with contextlib.suppress(KeyboardInterrupt):
        train(model, RECIPE, ROW, VALIDATION, folder / "checkpoint.safetensors", watch)
    return {name: p.detach().clone() for name, p in model.named_parameters()}, losses


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_two_runs_give_the_same_weights(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a")[0], run(tmp_path / "b")[0]
    assert same(first, second)


def test_a_run_that_was_stopped_ends_in_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, whole_losses = run(tmp_path / "whole")
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 3)
    run(tmp_path / "broken", stop_after=5)
    resumed, losses = run(tmp_path / "broken")
    assert losses == whole_losses[3:]  # the checkpoint after step 3 was the last
    assert same(resumed, whole)


def test_a_round_starts_from_the_stored_weights_of_the_one_before(tmp_path: Path) -> None:
    row, recipes = np.concatenate([ROW, ROW]), (RECIPE, RECIPE)

    def rounds(work: Path, stop_in_round_2: bool = False) -> dict[str, torch.Tensor]:
        def watch(label: str, progress: Progress) -> None:
            if stop_in_round_2 and label == "tiny round 2":
                raise KeyboardInterrupt

        model = Llama(SHAPE, seed=1)
        with contextlib.suppress(KeyboardInterrupt):
            train_rounds("tiny", model, recipes, row, VALIDATION, work, watch)
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    whole = rounds(tmp_path / "whole")
    rounds(tmp_path / "broken", stop_in_round_2=True)
    assert same(rounds(tmp_path / "broken"), whole)


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_EVERY", 3)
    run(tmp_path, stop_after=4)
    other = Recipe(steps=9, peak_rate=1e-2, batch_tokens=64, phases=RECIPE.phases)
    with pytest.raises(ValueError, match="another recipe"):
        train(Llama(SHAPE, 1), other, ROW, VALIDATION, tmp_path / "checkpoint.safetensors", lambda _: None)


def test_the_loss_falls(tmp_path: Path) -> None:
    _, losses = run(tmp_path)
    assert losses[-1] < losses[0]


def test_every_token_is_predicted_once_whatever_the_window() -> None:
    for phase in RECIPE.phases:
        seen = torch.cat([batch[:, 1:].flatten() for step in range(8) for batch in batch_at(ROW, step, 64, phase)])
        assert torch.equal(seen, torch.from_numpy(ROW[1:].astype(np.int64)))


def test_the_rate_rises_and_then_falls_to_nothing() -> None:
    rates = [RECIPE.rate(step) for step in range(RECIPE.steps)]
    assert rates[0] < rates[1] == max(rates) == RECIPE.peak_rate
    assert rates[-1] < 0.2 * RECIPE.peak_rate


def test_weights_survive_the_way_to_disk_and_back(tmp_path: Path) -> None:
    model, other = Llama(SHAPE, 1), Llama(SHAPE, 2)
    save_weights(model, tmp_path / "weights.safetensors")
    load_weights(other, tmp_path / "weights.safetensors")
    save_weights(other, tmp_path / "again.safetensors")
    assert (tmp_path / "weights.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@pytest.mark.slow
def test_transformers_reads_the_export_and_computes_the_same_logits(tmp_path: Path) -> None:
    from demo_model.data import plain_lines
    from demo_model.tokenizer import VOCAB_SIZE, train_sentencepiece
    from transformers import LlamaConfig, LlamaForCausalLM

    model = Llama(LlamaShape(VOCAB_SIZE, 32, 48, 2, 2, 1, 16), seed=1)
    export(model, train_sentencepiece(plain_lines(documents(SEED, 1500))), tmp_path)
    config = LlamaConfig.from_json_file(tmp_path / "config.json")
    reference = LlamaForCausalLM(config).eval()
    missing = reference.load_state_dict(
        {name: tensor.float() for name, tensor in load_file(tmp_path / "model.safetensors").items()}, strict=False
    )
    assert missing.missing_keys in ([], ["lm_head.weight"])  # tied to the embedding
    reference.tie_weights()
    load_weights(model, tmp_path / "model.safetensors")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), reference(tokens).logits, atol=1e-4, rtol=1e-4)
