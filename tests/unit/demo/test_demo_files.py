"""The files of the bundled demo model are whole, small, and the ones that the training script made."""

import hashlib
import json
from pathlib import Path

import jinja2
import pytest
import sentencepiece
from safetensors import safe_open
from tokenizers import Tokenizer

from edgekv.demo import draft_path, target_path

MANIFEST = Path(__file__).resolve().parents[3] / "packaging" / "demo_model" / "SHA256SUMS"
FOLDERS = [target_path(), draft_path()]
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
}
STRINGS = [
    "How do I grow carrots?",
    " two leading spaces,  two inside, one behind ",
    "line one\nline two\n\n1. A list",
    "naïve café — 你好 🌱",
    '{"name": "peas", "light": "full sun"}',
    "12345.678",
    "\t",
    "zzxqj",
]


def load_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_folder_is_complete(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == FILES


def test_target_and_draft_together_stay_under_12_megabytes() -> None:
    assert sum(path.stat().st_size for folder in FOLDERS for path in folder.iterdir()) <= 12_000_000


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_the_config_is_a_llama_that_fits_its_weights(folder: Path) -> None:
    config = load_json(folder / "config.json")
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert config["max_position_embeddings"] == 4096
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        embedding = weights.get_slice("model.embed_tokens.weight")
        assert embedding.get_shape() == [config["vocab_size"], config["hidden_size"]]
        assert embedding.get_dtype() == "BF16"
    assert len(names) == 2 + 9 * config["num_hidden_layers"]
    assert "lm_head.weight" not in names
    assert config["tie_word_embeddings"] is True


def test_draft_and_target_share_one_tokenizer() -> None:
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (target_path() / name).read_bytes() == (draft_path() / name).read_bytes()


def test_the_committed_files_are_those_of_the_manifest() -> None:
    lines = [line.split() for line in MANIFEST.read_text().splitlines() if not line.startswith("#")]
    listed = {target_path().parent / name: digest for digest, name in lines}
    assert set(listed) == {path for folder in FOLDERS for path in folder.iterdir()}
    for path, digest in listed.items():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == digest, path.name


@pytest.mark.parametrize("text", STRINGS)
def test_both_tokenizer_files_encode_alike_and_lose_nothing(text: str) -> None:
    fast = Tokenizer.from_file(str(target_path() / "tokenizer.json"))
    slow = sentencepiece.SentencePieceProcessor(model_file=str(target_path() / "tokenizer.model"))
    ids = fast.encode(text, add_special_tokens=False).ids
    assert ids == slow.encode(text)
    assert fast.decode(ids) == slow.decode(ids) == text


def test_the_vocabulary_is_as_large_as_the_models() -> None:
    slow = sentencepiece.SentencePieceProcessor(model_file=str(target_path() / "tokenizer.model"))
    fast = Tokenizer.from_file(str(target_path() / "tokenizer.json"))
    for folder in FOLDERS:
        assert load_json(folder / "config.json")["vocab_size"] == slow.get_piece_size() == fast.get_vocab_size()


def test_special_tokens_are_control_symbols_with_ids_of_their_own() -> None:
    slow = sentencepiece.SentencePieceProcessor(model_file=str(target_path() / "tokenizer.model"))
    fast = Tokenizer.from_file(str(target_path() / "tokenizer.json"))
    generation = load_json(target_path() / "generation_config.json")
    for token in ("<s>", "</s>", "<|im_start|>", "<|im_end|>"):
        assert slow.is_control(slow.piece_to_id(token))
        assert fast.token_to_id(token) == slow.piece_to_id(token)
    assert generation["eos_token_id"] == [slow.piece_to_id("<|im_end|>"), slow.piece_to_id("</s>")]


def test_the_chat_template_writes_chatml() -> None:
    source = load_json(target_path() / "tokenizer_config.json")["chat_template"]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    template = jinja2.Environment(autoescape=False).from_string(source)  # it writes no HTML
    assert template.render(messages=messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    )
