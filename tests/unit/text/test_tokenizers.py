"""Ids and texts are those of transformers' AutoTokenizer; control text from a person never becomes a control id."""

import json
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.errors import ModelError
from edgekv.text.errors import TextError, TextTooLong, UnknownTokenId
from edgekv.text.tokenizer import Tokenizer, load_tokenizer
from edgekv.text.tokenizer_files import CONFIG_FILE
from tests.unit.text.tiny_tokenizers import (
    IM_END,
    SPECIALS,
    sentencepiece_model,
    write_byte_bpe,
    write_config,
    write_sentencepiece,
)

# Ours, and the folder that transformers reads for it (it needs protobuf for a tokenizer.model).
PAIRS = {
    "sentencepiece": "llama-json",
    "sentencepiece-legacy": "llama-json-legacy",
    "llama-json": "llama-json",
    "llama-json-legacy": "llama-json-legacy",
    "llama-2-json": "llama-2-json",
    "byte-level": "byte-level",
}
PIECES = [*SPECIALS, *"▁ \n\t\u3000é水🙂", "<think>", "<0x41>", "  ", "garden", "water", "12"]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=10).map("".join),
)


@pytest.mark.parametrize("kind", PAIRS)
@settings(max_examples=100, deadline=None)
@given(text=texts, add_special_tokens=st.booleans())
def test_ids_and_texts_equal_transformers(
    kind: str, text: str, add_special_tokens: bool,
    tokenizers: dict[str, Tokenizer], folders: dict[str, Path], oracle: Callable[[Path], Any],
) -> None:  # fmt: skip
    ours, theirs = tokenizers[kind], oracle(folders[PAIRS[kind]])
    ids = ours.encode(text, add_special_tokens=add_special_tokens, parse_special=True)
    assert ids == theirs.encode(text, add_special_tokens=add_special_tokens)
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.special_ids == {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.vocab_size == len(theirs)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)


@pytest.mark.parametrize("kind", PAIRS)
@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_control_text_is_ordinary_text_unless_parsed(kind: str, text: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert tokenizer.special_ids.isdisjoint(ids)
    written = text if kind == "byte-level" else text.replace("▁", " ")
    assert tokenizer.decode(ids).lstrip(" ") == written.lstrip(" ")
    if not tokenizer.control_text.spans(text):
        assert ids == tokenizer.encode(text, add_special_tokens=False, parse_special=True)


@pytest.mark.parametrize("kind", PAIRS)
def test_the_added_beginning_is_not_text(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(f"a{IM_END}", add_special_tokens=True, parse_special=False)
    assert ids[0] == tokenizer.bos_id
    assert ids[1:] == tokenizer.encode(f"a{IM_END}", add_special_tokens=False, parse_special=False)


def test_a_unigram_model_is_encoded_as_sentencepiece_does(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path, model_type="unigram", vocab=500)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer(folder)
    for text in ("Garden water stones.", "a  b\n水 🙂", ""):
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        assert ids == processor.encode(text)
        assert tokenizer.decode(ids) == text


def test_a_piece_the_model_itself_would_find_is_still_no_control_token(tmp_path: Path) -> None:
    # A user-defined piece is matched inside sentencepiece, out of our sight.
    model = sentencepiece_model(user_defined=("<|tool|>",))
    (tmp_path / "tokenizer.model").write_bytes(model)
    write_config(tmp_path, tokenizer_class="LlamaTokenizer")
    tokenizer = load_tokenizer(tmp_path)
    tool = tokenizer.control_text.ids["<|tool|>"]
    assert tool in tokenizer.encode("a <|tool|>", add_special_tokens=False, parse_special=True)
    ids = tokenizer.encode("a <|tool|> b", add_special_tokens=False, parse_special=False)
    assert tool not in ids
    assert tokenizer.decode(ids) == "a <|tool|> b"


def test_a_unigram_json_cannot_leak_a_control_id(tmp_path: Path) -> None:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    library = Library(models.Unigram([("<unk>", 0.0), ("<s>", 0.0), *((c, -1.0) for c in "▁<>sab")], unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    library.add_special_tokens([AddedToken("<s>", special=True)])
    library.save(str(tmp_path / "tokenizer.json"))
    write_config(tmp_path, tokenizer_class="PreTrainedTokenizerFast", eos_token=None)
    tokenizer = load_tokenizer(tmp_path)
    assert 1 in tokenizer.encode("a<s>b", add_special_tokens=False, parse_special=True)
    ids = tokenizer.encode("a<s>b", add_special_tokens=False, parse_special=False)
    assert 1 not in ids
    assert tokenizer.decode(ids).replace(" ", "") == "a<s>b"


@pytest.mark.parametrize(("flags", "before", "after"), [
    ({}, [1], []), ({"add_bos_token": False}, [], []), ({"add_eos_token": True}, [1], [2]),
])  # fmt: skip
def test_the_folder_says_what_surrounds_a_text(
    flags: dict[str, bool], before: list[int], after: list[int], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"eos_token": "</s>"} | flags
    folder = write_sentencepiece(tmp_path, **options)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("water", add_special_tokens=True, parse_special=True)
    assert ids == [*before, *tokenizer.encode("water", add_special_tokens=False, parse_special=True), *after]


def test_added_tokens_of_old_folders_get_their_ids_and_flags(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path, bos_token=None, eos_token=None)
    size = load_tokenizer(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"<|user|>": size, "plain added": size + 1}))
    entry = {"content": "</s>", "lstrip": False, "rstrip": False, "normalized": True, "single_word": False}
    maps = {"eos_token": entry, "bos_token": "<s>", "additional_special_tokens": ["<|user|>"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(maps))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == size + 2
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    ids = tokenizer.encode("<|user|>plain added", add_special_tokens=False, parse_special=True)
    assert ids == [size, size + 1]
    assert tokenizer.special_ids >= {size}
    assert tokenizer.decode(ids) == "plain added"


def test_added_tokens_of_new_folders_take_the_space_beside_them(tmp_path: Path, oracle: Callable[[Path], Any]) -> None:
    def write(folder: Path, with_json: bool) -> Path:
        flags = {"special": True, "normalized": False, "single_word": False}
        write_sentencepiece(folder, with_json=with_json, added_tokens_decoder={
            "3": {"content": "<|im_start|>", "lstrip": True, "rstrip": False, **flags},
            "4": {"content": "<|im_end|>", "lstrip": False, "rstrip": True, **flags},
        })  # fmt: skip
        return folder

    theirs = oracle(write(tmp_path / "theirs", True))
    for ours in (load_tokenizer(tmp_path / "theirs"), load_tokenizer(write(tmp_path / "ours", False))):
        for text in ("a  <|im_start|> b<|im_end|> \n c", "<|im_end|> <|im_start|>", " <|im_start|><|im_end|> "):
            ids = ours.encode(text, add_special_tokens=False, parse_special=True)
            assert ids == theirs.encode(text, add_special_tokens=False)
            assert ours.encode_parts(text, ours.control_text.spans(text)) == ids


def test_parts_are_parsed_only_where_told(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        text = f"<s>{IM_END} water {IM_END}!"
        spans = tokenizer.control_text.spans(text)
        assert len(spans) == 3
        assert tokenizer.encode_parts(text, spans) == tokenizer.encode(
            text, add_special_tokens=False, parse_special=True
        )
        ids = tokenizer.encode_parts(text, [spans[0], spans[2]])
        assert ids[0] == tokenizer.bos_id
        assert ids.count(tokenizer.control_text.ids[IM_END]) == 1
        # Old folders put a space after each control token.
        assert tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == text.replace(" ", "")


def test_tokens_are_shown_one_by_one(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode("water 🙂", add_special_tokens=False, parse_special=False)
        assert b"".join(map(tokenizer.token_bytes, ids)).decode().lstrip() == "water 🙂"
        assert "\ufffd" in tokenizer.token_text(ids[-1])
        assert tokenizer.token_text(tokenizer.vocab_size + 5) == ""


@pytest.mark.parametrize("token_id", [-1, 10**6, 2**40])
def test_an_id_outside_the_vocabulary_is_named(token_id: int, tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        with pytest.raises(UnknownTokenId, match=str(token_id)) as caught:
            tokenizer.decode([5, token_id])
        assert caught.value.vocab_size == tokenizer.vocab_size


def test_a_text_over_the_cap_is_refused_before_any_work(folders: dict[str, Path]) -> None:
    for kind in ("sentencepiece", "byte-level"):
        tokenizer = load_tokenizer(folders[kind], max_bytes=10)
        for parse_special in (True, False):
            assert tokenizer.encode("水水水a", add_special_tokens=False, parse_special=parse_special)
            with pytest.raises(TextTooLong, match="12 bytes"):
                tokenizer.encode("水水水水", add_special_tokens=False, parse_special=parse_special)
        with pytest.raises(TextTooLong):
            tokenizer.encode_parts("x" * 11, [])
        with pytest.raises(TextTooLong):
            load_tokenizer(folders[kind]).encode("x" * 2**23, add_special_tokens=False, parse_special=False)


def test_half_a_surrogate_pair_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        with pytest.raises(TextError, match="surrogate at character 1"):
            tokenizer.encode("a\ud83d", add_special_tokens=False, parse_special=True)


def test_a_long_word_neither_hangs_nor_holds_other_threads(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in ("sentencepiece", "byte-level"):
        done = threading.Event()
        longest = 0.0

        def work(tokenizer: Tokenizer = tokenizers[kind], done: threading.Event = done) -> None:
            tokenizer.encode("watergarden" * 50_000, add_special_tokens=False, parse_special=True)
            done.set()

        worker = threading.Thread(target=work)
        started = last = time.monotonic()
        worker.start()
        while not done.is_set():
            time.sleep(0.001)
            now = time.monotonic()
            longest, last = max(longest, now - last), now
        worker.join()
        assert last - started < 10
        assert longest < 0.5


def test_threads_share_a_tokenizer(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():

        def work(tokenizer: Tokenizer = tokenizer) -> list[list[int]]:
            return [
                tokenizer.encode(
                    f"water {i} <|im_end|> 🙂 garden{i}", add_special_tokens=True, parse_special=i % 2 == 0
                )
                for i in range(40)
            ]

        with ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(work) for _ in range(8)]
        assert [future.result() for future in futures] == [work()] * 8


def test_tokenizer_json_goes_before_tokenizer_model(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["byte-level"], tmp_path / "both")
    shutil.copy(folders["sentencepiece"] / "tokenizer.model", tmp_path / "both")
    assert type(load_tokenizer(tmp_path / "both")).__name__ == "JsonTokenizer"
    (tmp_path / "both" / "tokenizer.json").unlink()
    assert type(load_tokenizer(tmp_path / "both")).__name__ == "SentencePieceTokenizer"


@pytest.mark.parametrize(("name", "content", "message"), [
    ("tokenizer.json", b"{", "tokenizer.json: not a tokenizer"),
    ("tokenizer.json", b"\xff\xfe", "tokenizer.json: not UTF-8"),
    ("tokenizer.json", b'{"model": {"type": "None"}}', "tokenizer.json: not a tokenizer"),
    ("tokenizer.model", b"garbage", "tokenizer.model: not a sentencepiece model"),
    ("tokenizer.model", b"", "tokenizer.model: not a sentencepiece model"),
    ("tokenizer_config.json", b"[1]", "tokenizer_config.json: expected an object"),
    ("tokenizer_config.json", b"{1}", "tokenizer_config.json: not valid JSON"),
    ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "added_tokens_decoder.x"),
    ("added_tokens.json", b'{"<a>": -1}', "added_tokens.json: '<a>'"),
    ("added_tokens.json", b'{"<a>": 99999999}', "far outside the vocabulary"),
    ("special_tokens_map.json", b"7", "special_tokens_map.json: expected an object"),
])  # fmt: skip
def test_a_broken_file_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(folder)


@pytest.mark.parametrize("with_json", [False, True])
def test_a_control_token_of_no_sane_length_is_named(with_json: bool, tmp_path: Path) -> None:
    name = "tokenizer.json" if with_json else "tokenizer.model"
    for long, fits in (("<|" + "x" * 252 + "|>", True), ("<|" + "x" * 253 + "|>", False)):
        write_sentencepiece(tmp_path, with_json=with_json, added_tokens_decoder={"700": {"content": long}})
        if fits:
            assert long in load_tokenizer(tmp_path).control_text.ids
        else:
            with pytest.raises(ModelError, match=rf"^{tmp_path}/{name}: token \d+: a control token of 257 characters"):
                load_tokenizer(tmp_path)


def test_a_control_token_inside_of_tokenizer_json_is_named(tmp_path: Path) -> None:
    write_byte_bpe(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"][-1]["content"] = "<|" + "x" * 1000 + "|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    wanted = rf"^{tmp_path}/tokenizer\.json: token \d+: a control token of 1,004 characters"
    with pytest.raises(ModelError, match=wanted):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("place", ["chat_template.jinja", "additional_chat_templates/rag.jinja", CONFIG_FILE])
def test_a_template_past_any_real_one_is_refused_before_tokens_are_looked_for_in_it(place: str, tmp_path: Path) -> None:
    long = "x" * ((1 << 20) + 1)
    folder = write_sentencepiece(tmp_path, chat_template=long if place == CONFIG_FILE else None)
    if place != CONFIG_FILE:
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text(long)
    with pytest.raises(ModelError, match=r"chat template '(default|rag)': longer than 1,048,576 characters"):
        load_tokenizer(folder)


def test_a_truncated_model_is_refused(tmp_path: Path) -> None:
    folder = write_sentencepiece(tmp_path)
    whole = (folder / "tokenizer.model").read_bytes()
    for length in (1, 100, len(whole) // 2, len(whole) - 1):
        (folder / "tokenizer.model").write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"tokenizer\.model"):
            load_tokenizer(folder)


def test_a_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_decoder_that_cannot_stream_is_refused(tmp_path: Path) -> None:
    write_byte_bpe(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="decoder 'WordPiece' is not supported"):
        load_tokenizer(tmp_path)
