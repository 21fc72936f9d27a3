"""What loading costs and says: progress counts every byte, and memory holds the model once."""

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from edgekv.kernels.attn.dense import DenseAttention
from edgekv.kernels.quant.dequantise import dequantise
from edgekv.model.hf_config import SUPPORTED_ARCHITECTURES, read_spec
from edgekv.model.loader import ARCHITECTURES, load_model
from edgekv.model.open_weights import open_weights
from tests.model.test_packing import make_mixed_gguf
from tests.model.tiny_models import make_tiny

CPU = torch.device("cpu")


def test_every_readable_architecture_can_be_built() -> None:
    assert tuple(ARCHITECTURES) == SUPPORTED_ARCHITECTURES


def test_progress_reaches_the_total_and_never_goes_back(tmp_path: Path) -> None:
    folder = make_tiny("mistral", tmp_path, dtype=torch.bfloat16)
    heard: list[tuple[int, int, str]] = []
    load_model(folder, dtype=torch.float32, device=CPU, progress=lambda *report: heard.append(report))
    total = read_spec(folder).num_parameters * 2
    assert heard[0] == (0, 0, "checking files")
    assert heard[1] == (0, total, "reading weights")
    assert heard[-1] == (total, total, "reading weights")
    done = [report[0] for report in heard]
    assert done == sorted(done)


def test_an_error_in_progress_ends_the_load(tmp_path: Path) -> None:
    """How a load is cancelled."""

    def stop(done: int, total: int, stage: str) -> None:
        if done:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        load_model(make_tiny("llama", tmp_path), dtype=torch.float32, device=CPU, progress=stop)


MEASURE = """
import os, sys, torch
from pathlib import Path
from edgekv.model.loader import load_model

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

kept = []
for folder in sys.argv[1:]:
    before, peak = resident_bytes(), 0
    def watch(done, total, stage):
        global peak
        peak = max(peak, resident_bytes())
    model = load_model(Path(folder), dtype=torch.float32, device=torch.device("cpu"), progress=watch)
    print(peak - before)
    kept.append(model)  # what a freed model left to the allocator would hide the next one's need
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_holds_the_model_once(tmp_path: Path) -> None:
    shape: dict[str, Any] = {"vocab_size": 24_000, "hidden_size": 192, "intermediate_size": 20_000}
    folders = [
        make_tiny("llama", tmp_path / str(dtype), dtype=dtype, **shape) for dtype in (torch.bfloat16, torch.float32)
    ]
    model_bytes = read_spec(folders[0]).num_parameters * 4
    assert model_bytes > 170e6
    # A process of its own, for the same reason.
    measured = subprocess.run([sys.executable, "-c", MEASURE, *folders], capture_output=True, text=True, check=True)
    for peak_bytes in map(int, measured.stdout.split()):
        # 17e6 of staging; a second copy would be 97e6 more in bfloat16.
        assert 0.9 * model_bytes < peak_bytes < model_bytes + 45e6


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_tensors_larger_than_a_chunk_arrive_whole(
    saved: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_tiny("qwen2", tmp_path, dtype=saved)
    whole = some_logits(folder)
    monkeypatch.setattr("edgekv.model.weights._CHUNK_BYTES", 1000)  # neither a row nor a tensor
    assert torch.equal(some_logits(folder), whole)


def test_quantised_tensors_become_what_they_mean_whatever_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_mixed_gguf(tmp_path, {"*": "Q8_0", "blk.*.ffn_up*": "Q4_K", "blk.*.attn_v*": "F16"})
    model = load_model(path, dtype=torch.float32, device=CPU)
    with closing(open_weights(path)) as stored:
        table = stored.tensors["model.embed_tokens.weight"]
        raw = torch.empty(4096, table.num_bytes // 4096, dtype=torch.uint8)
        table.read_rows(0, raw.view(-1).numpy().data)
        assert torch.equal(model._embedding, dequantise(table.encoding, raw, 256))
    whole = some_logits(path)
    monkeypatch.setattr("edgekv.model.weights._CHUNK_BYTES", 5000)
    assert torch.equal(some_logits(path), whole)
    half = load_model(path, dtype=torch.bfloat16, device=CPU)
    assert torch.equal(half._embedding, model._embedding.bfloat16())


def some_logits(folder: Path) -> torch.Tensor:
    positions = torch.arange(20)
    model = load_model(folder, dtype=torch.float32, device=CPU)
    return model.forward(positions * 7, positions, DenseAttention(), positions)
