"""A stream of tokens gives the text of all of them, in whole characters."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.text.tokenizer import Tokenizer, load_tokenizer
from tests.unit.text.tiny_tokenizers import write_sentencepiece

KINDS = ["sentencepiece", "llama-2-json", "byte-level"]
seeds = st.lists(st.one_of(st.integers(0, 9999), st.integers(0, 300)), max_size=40)


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int], skip: bool) -> list[str]:
    detokenizer = tokenizer.detokenizer(prompt, skip_special_tokens=skip)
    return [*(detokenizer.push(token_id) for token_id in ids), detokenizer.finish()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=200, deadline=None)
@given(numbers=seeds, skip=st.booleans())
def test_pushes_join_to_the_decoding(
    kind: str, numbers: list[int], skip: bool, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[kind]
    ids = [number % tokenizer.vocab_size for number in numbers]
    assert "".join(stream(tokenizer, ids, [], skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(prompt=seeds, numbers=seeds, skip=st.booleans())
def test_output_continues_the_prompt(
    kind: str, prompt: list[int], numbers: list[int], skip: bool, tokenizers: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizers[kind]
    before = [number % tokenizer.vocab_size for number in prompt]
    ids = [number % tokenizer.vocab_size for number in numbers]
    whole = tokenizer.decode([*before, *ids], skip_special_tokens=skip)
    # What the prompt left unfinished belongs to the output.
    detokenizer = tokenizer.detokenizer([], skip_special_tokens=skip)
    finished = "".join(map(detokenizer.push, before))
    assert finished + "".join(stream(tokenizer, ids, before, skip)) == whole


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd▁"), max_size=30))
def test_no_character_comes_in_halves(kind: str, text: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    parts = stream(tokenizer, ids, [], True)
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) == tokenizer.decode(ids)
    # As early as possible: after each token, every character that is complete is out.
    spelled, out = b"", ""
    for token_id, part in zip(ids, parts, strict=False):
        spelled, out = spelled + tokenizer.token_bytes(token_id), out + part
        assert len(out.encode()) >= len(spelled) - 4


def test_a_character_of_four_bytes_waits_for_its_last(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in KINDS:
        tokenizer = tokenizers[kind]
        detokenizer = tokenizer.detokenizer()
        ids = tokenizer.encode("x🙂", add_special_tokens=False, parse_special=False)
        assert [detokenizer.push(token_id) for token_id in ids[-4:]] == ["", "", "", "🙂"]
        detokenizer.push(ids[-4])
        assert detokenizer.finish() == "\ufffd"


def test_only_a_text_of_its_own_loses_its_first_space(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentencepiece"]
    ids = tokenizer.encode("garden water", add_special_tokens=False, parse_special=False)
    assert "".join(stream(tokenizer, ids, [], True)) == "garden water"
    assert "".join(stream(tokenizer, ids, [1], True)) == "garden water"  # a prompt without text
    assert "".join(stream(tokenizer, ids, [1, *ids], True)) == " garden water"


def test_special_tokens_are_shown_on_request(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        end = tokenizer.eos_id
        assert end is not None
        assert stream(tokenizer, [end], [], True) == ["", ""]
        assert stream(tokenizer, [end], [], False) == ["<|im_end|>", ""]


def test_ids_of_an_embedding_table_s_padding_add_nothing(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        assert stream(tokenizer, [tokenizer.vocab_size, tokenizer.vocab_size + 100], [], True) == ["", "", ""]


def test_metaspace_drops_the_first_mark_alone(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    pieces = ["<unk>", "▁a", "▁▁b", "c", "▁"]
    library = Library(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=0))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    folder = write_sentencepiece(tmp_path, tokenizer_class="PreTrainedTokenizerFast", bos_token=None, eos_token=None)
    library.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    for ids in ([1, 1], [2, 2], [3, 1], [4, 4, 2], [4], []):
        assert tokenizer.decode(ids) == library.decode(ids)
        assert "".join(stream(tokenizer, ids, [], True)) == library.decode(ids)


def test_the_work_per_token_does_not_grow(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["sentencepiece"]
    detokenizer = tokenizer.detokenizer(range(3, 500))
    ids = tokenizer.encode("garden water 🙂 " * 4000, add_special_tokens=False, parse_special=False)
    started = time.monotonic()
    for token_id in ids:
        detokenizer.push(token_id)
    assert time.monotonic() - started < len(ids) * 50e-6
