"""Wrong tokenizer metadata in a GGUF file is named, and no metadata whatever does worse than be refused."""

import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from edgekv.errors import ModelError
from edgekv.text import gguf_bpe
from edgekv.text.chat_template import load_chat_template
from edgekv.text.errors import TextError
from edgekv.text.tokenizer import Tokenizer, load_tokenizer
from tests.model.gguf_files import make_vocabulary, write_metadata


@pytest.mark.parametrize(("kind", "key", "value", "message"), [
    ("sentencepiece", "model", None, "is missing"),
    ("sentencepiece", "model", "bert", r"the tokenizer 'bert' \(WordPiece\) is not supported"),
    ("sentencepiece", "model", "t5", "unigram"),
    ("sentencepiece", "model", "rwkv", "RWKV"),
    ("sentencepiece", "model", "none", "none at all"),
    ("sentencepiece", "model", "else", "'else' is not supported; supported: llama, gpt2"),
    ("sentencepiece", "tokens", None, "is missing"),
    ("sentencepiece", "tokens", "text", "expected an array of strings"),
    ("sentencepiece", "tokens", [1, 2], "expected an array of strings"),
    ("sentencepiece", "token_type", [1], "1 entries for"),
    ("sentencepiece", "token_type", "x", "expected an array of integers"),
    ("sentencepiece", "scores", None, "is missing"),
    ("sentencepiece", "scores", [0.5], "1 entries for"),
    ("sentencepiece", "scores", ["a"] * 700, "floating-point"),
    ("sentencepiece", "bos_token_id", 10**6, "expected an integer from 0 to"),
    ("sentencepiece", "eos_token_id", -1, "expected an integer from 0 to"),
    ("sentencepiece", "eot_token_id", "x", "expected an integer"),
    ("sentencepiece", "add_bos_token", 1, "true or false"),
    ("sentencepiece", "add_space_prefix", 1, "true or false"),
    ("byte-level", "pre", None, "is missing, so nothing tells how texts are cut"),
    ("byte-level", "pre", "brand-new", "'brand-new' is not supported; supported: default, llama-bpe, "),
    ("byte-level", "pre", 1, "expected a string"),
    ("byte-level", "merges", None, "is missing"),
    ("byte-level", "merges", ["a b c d"], "not a vocabulary with its merges"),
    ("byte-level", "merges", ["a b", "ab"], "merge 1, 'ab', is not of two tokens"),
    ("byte-level", "merges", ["a \ufdd0"], "not a vocabulary with its merges"),
    ("byte-level", "merges", ["a "], "merge 0, 'a ', is not of two tokens"),
    ("byte-level", "merges", [1], "expected an array of strings"),
    ("byte-level", "unknown_token_id", 10**6, "expected an integer from 0 to"),
])  # fmt: skip
def test_wrong_metadata_is_named(
    kind: str, key: str, value: object, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    path = make_vocabulary(folders[kind], tmp_path / "model.gguf", metadata={f"tokenizer.ggml.{key}": value})
    with pytest.raises(ModelError, match=rf"model\.gguf: key 'tokenizer\.ggml\.{key}'.*{message}"):
        load_tokenizer(path)


SPM: dict[str, object] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", "ab"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.0, -3.0, -4.0],
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1],
}
BPE: dict[str, object] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "Ġ", "<|x|>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 1, 3],
    "tokenizer.ggml.merges": ["a b"],
}


def load(folder: Path, base: dict[str, object], /, **changes: Any) -> Tokenizer:
    changed = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return load_tokenizer(write_metadata(folder / "model.gguf", base | changed))


def test_what_contradicts_itself_is_refused(tmp_path: Path) -> None:
    assert load(tmp_path, SPM).vocab_size == 7
    assert load(tmp_path, SPM, scores=[0, 0, 0, -1, -2, -3, -4]).vocab_size == 7, "int32 scores"
    assert load(tmp_path, BPE).vocab_size == 5
    with pytest.raises(ModelError, match="'ab' is both token 2 and token 4"):
        load(tmp_path, BPE, tokens=["a", "b", "ab", "Ġ", "ab"])
    with pytest.raises(ModelError, match="'a' is both token 4 and token 5"):
        load(tmp_path, SPM, tokens=["<unk>", "<s>", "</s>", "▁", "a", "a", "ab"])
    with pytest.raises(ModelError, match="differ from others by their spaces alone"):
        load(tmp_path, SPM, tokens=["<unk>", "<s>", "</s>", "▁", "a", "b", " "], token_type=[2, 3, 3, 1, 1, 1, 4])
    with pytest.raises(ModelError, match="holds a NUL"):
        load(tmp_path, SPM, tokens=["<unk>", "<s>", "</s>", "▁", "a", "b", "\0"], token_type=[2, 3, 3, 1, 1, 1, 4])
    for score in (float("nan"), float("inf"), 1e32):
        with pytest.raises(ModelError, match="a score that is no number from"):
            load(tmp_path, SPM, scores=[0.0, 0.0, 0.0, -1.0, -2.0, score, -4.0])
    with pytest.raises(ModelError, match="1 of its tokens are bytes, but not <0x00> to <0xFF>"):
        load(tmp_path, SPM, token_type=[2, 3, 3, 1, 1, 1, 6])
    with pytest.raises(ModelError, match=r"unknown_token_id'.*is missing"):
        load(tmp_path, SPM, tokens=["x", "<s>", "</s>", "▁", "a", "b", "ab"], token_type=[1, 3, 3, 1, 1, 1, 1])
    for text in ("", "[PAD6]"):
        changes = {"tokens": ["<unk>", "<s>", "</s>", "▁", "a", "b", text], "token_type": [1, 3, 3, 1, 1, 1, 5]}
        with pytest.raises(ModelError, match="row 6 stands for no token"):
            load(tmp_path, SPM, **changes, unknown_token_id=6)


@pytest.mark.parametrize(("base", "kind"), [(SPM, 3), (BPE, 3), (SPM, 4), (BPE, 4)])
def test_a_control_token_of_no_sane_length_is_refused(base: dict[str, object], kind: int, tmp_path: Path) -> None:
    texts, kinds = base["tokenizer.ggml.tokens"], base["tokenizer.ggml.token_type"]
    assert isinstance(texts, list)
    assert isinstance(kinds, list)
    long = "<|" + "x" * 2_000 + "|>"
    tracemalloc.start()
    with pytest.raises(ModelError, match=rf"^model\.gguf: token {len(texts)}: a control token of 2,004 characters"):
        load(tmp_path, base, tokens=[*texts, long], token_type=[*kinds, kind], scores=[0.0] * (len(texts) + 1))
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_merges_past_any_real_vocabulary_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_bpe, "_MAX_MERGES", 1)
    assert load(tmp_path, BPE).vocab_size == 5
    with pytest.raises(ModelError, match=r"key 'tokenizer\.ggml\.merges'.*2 merges, which must be 0 to 1"):
        load(tmp_path, BPE, merges=["a b", "b a"])


def test_a_template_past_any_real_one_is_refused_before_tokens_are_looked_for_in_it(tmp_path: Path) -> None:
    template = {"tokenizer.chat_template": "x" * ((1 << 20) + 1)}
    for base in (SPM, BPE):
        with pytest.raises(ModelError, match=r"key 'tokenizer\.chat_template'.*longer than 1,048,576 characters"):
            load(tmp_path, base | template)
    with pytest.raises(ModelError, match=r"key 'tokenizer\.chat_template'.*longer than 1,048,576 characters"):
        load_chat_template(tmp_path / "model.gguf")


@pytest.mark.parametrize("base", [SPM, BPE], ids=["spm", "bpe"])
def test_no_mutated_vocabulary_does_anything_but_load_or_raise_a_model_error(
    base: dict[str, object], tmp_path: Path
) -> None:
    rng = random.Random(0)
    strings = ["", " ", "a", "b", "ab", "a b", "\0", "▁▁", "<0x41>", "<unk>", "<s>", "\ufdd0", "🙂", "x" * 300]
    strings += ["[PAD3]", "[PAD4]"]
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(300):
        metadata = dict(base)
        for _ in range(rng.randint(1, 3)):
            key = rng.choice([*base, "tokenizer.ggml.bos_token_id", "tokenizer.ggml.unknown_token_id"])
            value = metadata.get(key, 0)
            if isinstance(value, list) and value:
                value = list(value)
                at = rng.randrange(len(value))
                match value[at]:
                    case str():
                        value[at] = rng.choice(strings)
                    case int():
                        value[at] = rng.randint(-1, 8)
                    case float():
                        value[at] = rng.choice([float("inf"), -1e38, 0.0, 5.0])
            elif isinstance(value, int):
                value = rng.randint(-2, 9)
            elif rng.random() < 0.1:
                value = rng.choice(["llama", "gpt2", "qwen2", "", 7])
            metadata[key] = value
        try:
            tokenizer = load_tokenizer(write_metadata(tmp_path / "model.gguf", metadata))
            for parse_special in (False, True):
                for text in ("ab a<s>b <|x|>", " \0▁▁🙂<0x41>", "".join(map(str, strings))):
                    ids = tokenizer.encode(text, add_special_tokens=True, parse_special=parse_special)
                    tokenizer.decode(ids)
            outcomes["loaded"] += 1
        except TextError as fault:
            if "spells a control token" not in str(fault):  # one of a single byte, say
                raise
        except ModelError as fault:
            if "model.gguf" not in str(fault):
                raise
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 30, outcomes
