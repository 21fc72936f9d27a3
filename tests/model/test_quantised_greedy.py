"""Greedy tokens of quantised files equal those of their dequantised weights, in float32 and read by others' code.

The reference is transformers over what the `gguf` package, llama.cpp's own, makes of the file. The kernels multiply
with activations of 8 bits, so their logits are near the reference's and not equal to them: a trained model is sure
enough of most of its tokens that this changes none of these.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from edgekv.demo import target_path
from edgekv.text.tokenizer import load_tokenizer
from tests.model.engine_harness import EngineHarness, load_on_kernels
from tests.model.gguf_files import dequantised, make_gguf

NEW_TOKENS = 64
QUESTIONS = [
    "How do I grow tomatoes?",
    "When can I sow carrots?",
    "Tell me about a fox.",
    "What do bees do?",
    "How do I store potatoes?",
    "Write about the sea.",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["Q8_0", "Q5_0", "Q4_0"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # 704 columns of the feed-forward's second matrix are whole groups of 32, not of 256.
    return make_gguf(target_path(), tmp_path_factory.mktemp("gguf") / "demo.gguf", types={"*": request.param})


@pytest.fixture(scope="module")
def reference(file: Path) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(target_path(), dtype=torch.float32, attn_implementation="eager")
    missing, unexpected = model.load_state_dict(dequantised(target_path(), file), strict=False)
    assert set(missing) <= {"lm_head.weight"}, "tied to the embedding"
    assert not unexpected
    return model


def test_64_tokens_equal_the_dequantised_reference(file: Path, reference: PreTrainedModel) -> None:
    model, tokenizer = load_on_kernels(file, threads=2), load_tokenizer(target_path())
    for question in QUESTIONS:
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt = list(tokenizer.encode(text, add_special_tokens=True, parse_special=True))
        output = EngineHarness(model, prefix=False).generate(prompt, NEW_TOKENS)
        assert len(output) == NEW_TOKENS
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + output]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == output, question
