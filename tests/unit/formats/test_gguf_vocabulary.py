"""The vocabulary of a GGUF file: kinds, names and ends, and what contradicts itself."""

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from edgekv.errors import ModelError
from edgekv.formats.gguf import GgufFile
from edgekv.formats.gguf_vocabulary import GgufVocabulary, TokenKind, read_vocabulary
from tests.unit.formats.gguf_image import ARRAY, I32, STRING, U8, U32, Image, Key

TEXTS = ["<unk>", "<s>", "</s>", "a", "", "[PAD5]", "[PAD5 ]", "<|im_end|>", "<end_of_turn>", "<|end|>"]
KINDS = [2, 3, 4, 1, 1, 5, 5, 3, 4, 1]


def read(folder: Path, texts: list[str], kinds: list[int] | None, **ids: int) -> GgufVocabulary:
    keys = [Key("tokenizer.ggml.tokens", ARRAY, texts, STRING)]
    keys += [Key("tokenizer.ggml.token_type", ARRAY, kinds, I32)] if kinds is not None else []
    keys += [Key(f"tokenizer.ggml.{name}_token_id", U32, token_id) for name, token_id in ids.items()]
    path = folder / "model.gguf"
    path.write_bytes(Image(keys=keys).build())
    with GgufFile(path) as file:
        return read_vocabulary(file.metadata)


def test_names_and_ends(tmp_path: Path) -> None:
    found = read(tmp_path, TEXTS, KINDS, bos=1, eos=3, unknown=0, eot=7, eom=2)
    assert found.named == {"bos_token": 1, "eos_token": 3, "unk_token": 0}
    assert found.named_texts == {"bos_token": "<s>", "eos_token": "a", "unk_token": "<unk>"}
    # Those that the file names, then those that end a turn by their text and are more than text.
    assert found.end_ids == (3, 7, 2, 8)
    assert found.is_typed


def test_rows_that_stand_for_no_token(tmp_path: Path) -> None:
    found = read(tmp_path, TEXTS, KINDS, bos=4, eos=5)
    assert [found.is_padding(token_id) for token_id in range(10)] == [False] * 4 + [True, True] + [False] * 4
    assert found.named_texts == {}, "and none of them is a name"


def test_without_kinds_all_are_words(tmp_path: Path) -> None:
    found = read(tmp_path, ["a", "<|im_end|>"], None)
    assert set(found.kinds) == {TokenKind.NORMAL}
    assert not found.is_typed
    assert found.end_ids == ()


@pytest.mark.parametrize(
    ("texts", "kinds", "ids", "message"),
    [
        ([], None, {}, r"tokens'.*0 tokens, which must be 1 to 4,194,304"),
        (["a", "b", "a"], None, {}, r"tokens'.*'a' is both token 0 and token 2"),
        (["a", "b" * 65537], None, {}, r"tokens'.*a token of 65,537 characters"),
        (["a", "", "", "b"], [1], {}, r"token_type'.*1 entries for 4 tokens"),
        (["a"], [7], {}, r"token_type'.*from 0 to 6, found 7"),
        (["a"], [-1], {}, r"token_type'.*from 0 to 6"),
        (["a"], None, {"bos": 1}, r"bos_token_id'.*from 0 to 0, found 1"),
        (["a"], None, {"eot": 1}, r"eot_token_id'.*from 0 to 0, found 1"),
    ],
)
def test_what_contradicts_itself_is_refused(
    texts: list[str], kinds: list[int] | None, ids: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=rf"model\.gguf: key 'tokenizer\.ggml\.{message}"):
        read(tmp_path, texts, kinds, **ids)


def test_several_empty_tokens_are_no_twins(tmp_path: Path) -> None:
    found = read(tmp_path, ["", "a", ""], None)
    assert [found.is_padding(token_id) for token_id in range(3)] == [True, False, True]


@pytest.mark.parametrize("name", ["tokenizer.ggml.tokens", "tokenizer.ggml.token_type"])
def test_arrays_of_another_length_are_refused_unread(name: str, tmp_path: Path) -> None:
    count = (1 << 22) + 1
    keys = {"tokenizer.ggml.tokens": Key("tokenizer.ggml.tokens", ARRAY, ["a"], STRING)}
    kind, size = (U8, count) if name == "tokenizer.ggml.token_type" else (STRING, 8 * count)
    keys[name] = Key(name, ARRAY, [], kind)
    data = Image(list(keys.values())).build()
    data = data[:-8] + count.to_bytes(8, "little") + bytes(size)
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with GgufFile(path) as file:
        metadata = file.metadata
    tracemalloc.start()
    with pytest.raises(ModelError, match=r"4,194,305 (entries for 1 tokens|tokens, which must be 1 to 4,194,304)"):
        read_vocabulary(metadata)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
