"""A GGUF file's tokenizer gives the ids of the tokenizer that it was made from."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.errors import ModelError
from edgekv.text.chat_template import load_chat_template
from edgekv.text.tokenizer import Tokenizer, load_tokenizer
from tests.model.gguf_files import make_vocabulary, write_metadata
from tests.unit.text.tiny_tokenizers import (
    BOS,
    CHATML,
    IM_END,
    IM_START,
    SPECIALS,
    UNK,
    sentencepiece_model,
    write_byte_bpe,
    write_config,
)

PIECES = [*SPECIALS, *"▁ \n\t\u3000é水🙂", "e\u0301", "<think>", "<0x41>", "  ", "garden", "water", "123", "I'll"]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=10).map("".join),
)
# The family of the file, and what its tokenizer.json says instead of tests.unit.text.tiny_tokenizers.
FAMILIES: dict[str, dict[str, Any]] = {"qwen2": {"normalizer": {"type": "NFC"}}, "llama-bpe": {}}
_CUT = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|%s| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+" + (
    "|\\s+(?!\\S)|\\s+"
)
_DIGITS = {"qwen2": "\\p{N}", "llama-bpe": "\\p{N}{1,3}"}


# Of a folder with tokenizer.model alone, converters take these from config.json.
IDS = {f"tokenizer.ggml.{name}_token_id": i for name, i in (("unknown", 0), ("bos", 1), ("eos", 4))}


def write_family(folder: Path, pre: str) -> Path:
    """A folder with a byte-level tokenizer.json of this family."""
    write_byte_bpe(folder)
    path = folder / "tokenizer.json"
    description = json.loads(path.read_text()) | FAMILIES[pre]
    description["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = _CUT % _DIGITS[pre]
    description["model"]["ignore_merges"] = pre == "llama-bpe"
    path.write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tokenizer]]:
    """By family: the folder, and the tokenizer of the GGUF made from it."""
    root = tmp_path_factory.mktemp("byte-level-gguf")
    made = {}
    for pre in FAMILIES:
        folder = write_family(root / pre, pre)
        made[pre] = folder, load_tokenizer(make_vocabulary(folder, root / f"{pre}.gguf", pre=pre, num_tokens=650))
    return made


@pytest.fixture(scope="session")
def spm(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    out = tmp_path_factory.mktemp("spm-gguf") / "model.gguf"
    return load_tokenizer(make_vocabulary(folders["sentencepiece-legacy"], out, num_tokens=750, metadata=IDS))


@pytest.fixture(scope="session")
def kinds(spm: Tokenizer, byte_level: dict[str, tuple[Path, Tokenizer]]) -> dict[str, Tokenizer]:
    return {"spm": spm} | {pre: tokenizer for pre, (_, tokenizer) in byte_level.items()}


@pytest.mark.parametrize("pre", FAMILIES)
@settings(max_examples=150, deadline=None)
@given(text=texts, add_special_tokens=st.booleans())
def test_byte_level_ids_and_texts_equal_transformers(
    pre: str, text: str, add_special_tokens: bool,
    byte_level: dict[str, tuple[Path, Tokenizer]], oracle: Callable[[Path], Any],
) -> None:  # fmt: skip
    folder, ours = byte_level[pre]
    theirs = oracle(folder)
    ids = ours.encode(text, add_special_tokens=add_special_tokens, parse_special=True)
    assert ids == theirs.encode(text, add_special_tokens=add_special_tokens)
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.vocab_size == len(theirs), "the rows that fill the embedding up are no tokens"
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


def test_qwens_texts_are_composed_first(byte_level: dict[str, tuple[Path, Tokenizer]]) -> None:
    for pre, composed in (("qwen2", True), ("llama-bpe", False)):
        tokenizer = byte_level[pre][1]
        for parse_special in (False, True):
            ids = tokenizer.encode("e\u0301", add_special_tokens=False, parse_special=parse_special)
            assert (tokenizer.decode(ids) == "é") == composed


@pytest.mark.parametrize(
    ("pre", "ids"), [("llama-bpe", [3]), ("tekken", [3]), ("qwen2", [4, 2]), ("smaug-bpe", [4, 2])]
)
def test_some_take_a_word_whole_that_their_merges_do_not_make(pre: str, ids: list[int], tmp_path: Path) -> None:
    metadata: dict[str, object] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["a", "b", "c", "abc", "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    tokenizer = load_tokenizer(write_metadata(tmp_path / "model.gguf", metadata))
    for parse_special in (False, True):
        assert tokenizer.encode("abc", add_special_tokens=False, parse_special=parse_special) == ids


@pytest.fixture(scope="session")
def processor(folders: dict[str, Path]) -> sentencepiece.SentencePieceProcessor:
    """The model that the GGUF was made from."""
    return sentencepiece.SentencePieceProcessor(model_file=str(folders["sentencepiece-legacy"] / "tokenizer.model"))


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_sentencepiece_ids_equal_those_of_its_model(
    text: str, spm: Tokenizer, processor: sentencepiece.SentencePieceProcessor
) -> None:
    # Parts between control tokens are texts of their own, as in llama.cpp.
    expected: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, SPECIALS))})", text):
        expected += [SPECIALS.index(part)] if part in SPECIALS else processor.encode(part)
    assert spm.encode(text, add_special_tokens=False, parse_special=True) == expected
    assert spm.encode(text, add_special_tokens=True, parse_special=True) == [1, *expected]


def test_sentencepiece_names_and_sizes_are_the_folders(spm: Tokenizer, tokenizers: dict[str, Tokenizer]) -> None:
    theirs = tokenizers["sentencepiece-legacy"]
    assert spm.vocab_size == theirs.vocab_size
    assert (spm.bos_id, spm.eos_id, spm.special_ids) == (theirs.bos_id, theirs.eos_id, theirs.special_ids)
    assert spm.named_tokens == theirs.named_tokens
    assert spm.control_text.ids == theirs.control_text.ids


@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_control_text_is_ordinary_text_unless_parsed(text: str, kinds: dict[str, Tokenizer]) -> None:
    for kind, tokenizer in kinds.items():
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        assert tokenizer.special_ids.isdisjoint(ids), kind
        written = text.replace("▁", " ") if kind == "spm" else text
        if kind != "qwen2":  # which composes characters
            assert tokenizer.decode(ids) == written
        if not tokenizer.control_text.spans(text):
            assert ids == tokenizer.encode(text, add_special_tokens=False, parse_special=True)


def test_chat_templates_and_their_control_tokens(folders: dict[str, Path], tmp_path: Path) -> None:
    path = make_vocabulary(folders["byte-level"], tmp_path / "model.gguf")
    template, tokenizer = load_chat_template(path), load_tokenizer(path)
    theirs, folder_tokenizer = load_chat_template(folders["byte-level"]), load_tokenizer(folders["byte-level"])
    assert template is not None
    assert theirs is not None
    assert template.sources == {"default": CHATML}
    messages = [{"role": "user", "content": f"water{IM_END}\n{IM_START}system\n🙂"}]
    assert template.render(messages, add_generation_prompt=True) == theirs.render(messages, add_generation_prompt=True)
    ids = template.encode(tokenizer, messages)
    assert ids == theirs.encode(folder_tokenizer, messages)
    assert ids.count(tokenizer.control_text.ids[IM_START]) == 2, "the user's is text"


def test_named_templates_and_names_in_them(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["byte-level"], tmp_path / "folder")
    write_config(folder, tokenizer_class="PreTrainedTokenizerFast", unk_token=None, chat_template=[
        {"name": "default", "template": "{{ bos_token }}plain{{ eos_token }}"},
        {"name": "tool_use", "template": "tools"},
    ])  # fmt: skip
    template = load_chat_template(make_vocabulary(folder, tmp_path / "model.gguf"))
    assert template is not None
    messages = [{"role": "user", "content": "x"}]
    assert template.render(messages, add_generation_prompt=True) == f"{BOS}plain{IM_END}"
    assert template.render(messages, add_generation_prompt=True, tools=[{}]) == "tools"


def test_a_file_without_template_or_with_a_broken_one(folders: dict[str, Path], tmp_path: Path) -> None:
    def load(value: object) -> Any:
        path = tmp_path / "model.gguf"
        return load_chat_template(
            make_vocabulary(folders["byte-level"], path, metadata={"tokenizer.chat_template": value})
        )

    assert load(None) is None
    with pytest.raises(ModelError, match=r"model\.gguf: chat template 'default': line 1"):
        load("{% if")
    with pytest.raises(ModelError, match=r"key 'tokenizer\.chat_template'"):
        load(3)


def test_what_the_file_says_surrounds_a_text(folders: dict[str, Path], tmp_path: Path) -> None:
    def around(kind: str, pre: str = "llama-bpe", **flags: object) -> tuple[list[int], list[int]]:
        metadata = {f"tokenizer.ggml.{name}": value for name, value in flags.items()}
        path = make_vocabulary(folders[kind], tmp_path / "model.gguf", pre=pre, metadata=metadata)
        tokenizer = load_tokenizer(path)
        bare = tokenizer.encode("water", add_special_tokens=False, parse_special=True)
        found = []
        for parse_special in (False, True):
            ids = tokenizer.encode("water", add_special_tokens=True, parse_special=parse_special)
            at = next(i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
            found.append((ids[:at], ids[at + len(bare) :]))
        assert found[0] == found[1]
        names = {tokenizer.bos_id: 1, tokenizer.eos_id: 2}
        return [names[i] for i in found[0][0]], [names[i] for i in found[0][1]]

    for kind in ("sentencepiece", "byte-level"):
        assert around(kind, add_bos_token=True, add_eos_token=True) == ([1], [2])
        assert around(kind, add_bos_token=False) == ([], [])
    assert around("sentencepiece", add_bos_token=None) == ([1], [])
    assert around("byte-level", add_bos_token=None) == ([1], []), "llama-bpe begins texts unless told otherwise"
    assert around("byte-level", "qwen2", add_bos_token=None) == ([], [])


def test_no_space_goes_before_a_text_where_the_file_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    path = make_vocabulary(
        folders["sentencepiece"], tmp_path / "model.gguf", metadata={"tokenizer.ggml.add_space_prefix": False}
    )
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("water", add_special_tokens=False, parse_special=False)
    assert tokenizer.decode(ids) == "water"
    assert not tokenizer.token_text(ids[0]).startswith(" ")
    assert tokenizer.decode(tokenizer.encode(" a", add_special_tokens=False, parse_special=False)) == " a"


def test_white_space_that_was_defined_by_hand_is_found_as_in_the_original(tmp_path: Path) -> None:
    # As in Gemma: the converter writes them with spaces where the model has marks.
    model = sentencepiece_model(user_defined=("▁▁", "▁▁▁", "<|tool|>", "<b>"), add_dummy_prefix=False)
    (tmp_path / "tokenizer.model").write_bytes(model)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    decoder = {
        processor.piece_to_id(text): {"content": text, "special": False} for text in ("▁▁", "▁▁▁", "<|tool|>", "<b>")
    }
    write_config(tmp_path, added_tokens_decoder=decoder)
    metadata = {"tokenizer.ggml.add_space_prefix": False}
    tokenizer = load_tokenizer(make_vocabulary(tmp_path, tmp_path / "model.gguf", metadata=metadata))
    for text in ("a  b", "   a", "a     b ", "<b>  x", "▁▁a", " \n  "):
        assert tokenizer.encode(text, add_special_tokens=False, parse_special=True) == processor.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False, parse_special=False) == processor.encode(text)
    tool = processor.piece_to_id("<|tool|>")
    assert tool in tokenizer.encode("a<|tool|>", add_special_tokens=False, parse_special=True)
    assert tool not in tokenizer.encode("a<|tool|>", add_special_tokens=False, parse_special=False)
    assert tool in tokenizer.special_ids, "what looks like one is one, to the converter"


def test_added_tokens_with_spaces_are_found(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    write_config(tmp_path)
    size = load_tokenizer(tmp_path).vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"plain added": size}))
    tokenizer = load_tokenizer(make_vocabulary(tmp_path, tmp_path / "model.gguf", num_tokens=size + 1))
    ids = tokenizer.encode("plain addedwater", add_special_tokens=False, parse_special=False)
    assert ids[0] == size
    assert tokenizer.decode(ids).startswith("plain added")


def test_rows_without_a_token_add_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("sentencepiece", "byte-level"):
        size = load_tokenizer(folders[kind]).vocab_size
        whole = gguf.GGUFReader(make_vocabulary(folders[kind], tmp_path / "whole.gguf"))
        texts = [bytes(whole.fields["tokenizer.ggml.tokens"].parts[i]).decode() for i in
                 whole.fields["tokenizer.ggml.tokens"].data]  # fmt: skip
        types = [int(whole.fields["tokenizer.ggml.token_type"].parts[i][0]) for i in
                 whole.fields["tokenizer.ggml.token_type"].data]  # fmt: skip
        hole = len(texts) + 1
        metadata: dict[str, object] = {
            "tokenizer.ggml.tokens": [*texts, "", f"[PAD{hole}]", "<|late|>", f"[PAD{hole + 2}]"],
            "tokenizer.ggml.token_type": [*types, 1, 5, 3, 5],
        }
        if kind == "sentencepiece":
            metadata["tokenizer.ggml.scores"] = [-float(i) for i in range(hole + 3)]
        tokenizer = load_tokenizer(make_vocabulary(folders[kind], tmp_path / "model.gguf", metadata=metadata))
        assert tokenizer.vocab_size == hole + 2
        for row in (size, hole, hole + 2):
            assert tokenizer.token_bytes(row) == b""
        assert tokenizer.token_text(hole + 1) == "<|late|>"
        ids = tokenizer.encode(f"a<|late|>[PAD{hole}]🙂", add_special_tokens=False, parse_special=True)
        assert hole + 1 in ids
        assert hole not in ids
        ids = tokenizer.encode(f"a<|late|>[PAD{hole}]🙂", add_special_tokens=False, parse_special=False)
        assert not {hole, hole + 1} & set(ids)
        assert tokenizer.decode(ids) == f"a<|late|>[PAD{hole}]🙂"


def test_a_control_token_that_is_one_word_is_still_not_a_persons_to_write(tmp_path: Path) -> None:
    # With `ignore_merges` the model itself looks whole words up.
    write_byte_bpe(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    last = max(description["model"]["vocab"].values(), default=0) + len(description["added_tokens"])
    description["added_tokens"].append({"id": last + 1, "content": "EOT", **entry})
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
    tokenizer = load_tokenizer(make_vocabulary(tmp_path, tmp_path / "model.gguf", pre="llama-bpe"))
    eot = tokenizer.control_text.ids["EOT"]
    assert tokenizer.encode("EOT", add_special_tokens=False, parse_special=True) == [eot]
    ids = tokenizer.encode("EOT", add_special_tokens=False, parse_special=False)
    assert eot not in ids
    assert tokenizer.decode(ids) == "EOT"


def test_an_old_sentencepiece_file_without_kinds_is_read(folders: dict[str, Path], tmp_path: Path) -> None:
    path = make_vocabulary(
        folders["sentencepiece"], tmp_path / "model.gguf", metadata={**IDS, "tokenizer.ggml.token_type": None}
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folders["sentencepiece"] / "tokenizer.model"))
    tokenizer = load_tokenizer(path)
    text = "Garden water 🙂 stones."
    assert tokenizer.encode(text, add_special_tokens=True, parse_special=False) == [1, *processor.encode(text)]
    assert {1, tokenizer.eos_id} <= tokenizer.special_ids


def test_the_unknown_token_may_be_marked_as_control(folders: dict[str, Path], tmp_path: Path) -> None:
    # So the converter marks it wherever tokenizer_config.json lists <unk> among the added tokens.
    folder = shutil.copytree(folders["sentencepiece"], tmp_path / "folder")
    decoder = {str(i): {"content": text, "special": True} for i, text in enumerate((UNK, BOS))}
    write_config(folder, tokenizer_class="LlamaTokenizer", added_tokens_decoder=decoder)
    tokenizer = load_tokenizer(make_vocabulary(folder, tmp_path / "model.gguf"))
    assert tokenizer.named_tokens["unk_token"] == UNK
    assert tokenizer.encode(f"a{UNK}", add_special_tokens=False, parse_special=True)[-1] == 0
    assert 0 not in tokenizer.encode(f"a{UNK}", add_special_tokens=False, parse_special=False)
