"""Texts are cut as the published tokenizer.json of each family cuts them."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from edgekv.text.gguf_pretokenizers import PRE_TOKENIZERS


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def byte_level(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def sequence(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


def digits(individual: bool) -> dict[str, Any]:
    return {"type": "Digits", "individual_digits": individual}


GPT_2 = byte_level(use_regex=True)
LLAMA_3 = sequence(
    split(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
        "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    ),
    byte_level(use_regex=False),
)
QWEN_2 = sequence(
    split(
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
        "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    ),
    byte_level(use_regex=False),
)
SMOLLM = sequence(digits(True), byte_level(use_regex=True))
DEEPSEEK_CODER = sequence(
    split("[\r\n]"), split("\\s?\\p{L}+"), split("\\s?\\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"), digits(True),
    byte_level(use_regex=False),
)  # fmt: skip
DEEPSEEK_V3 = sequence(
    split("\\p{N}{1,3}"),
    split("[一-龥぀-ゟ゠-ヿ]+"),
    split(
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
    ),
    byte_level(use_regex=False),
)
TEKKEN = sequence(
    split(
        "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
        "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*|\\p{N}"
        "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    ),
    byte_level(use_regex=False),
)
GPT_4O = sequence(
    split(
        "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+"
        "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*"
        "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    ),
    byte_level(use_regex=False),
)
PUBLISHED = {
    "llama-bpe": LLAMA_3, "dbrx": LLAMA_3, "qwen2": QWEN_2, "deepseek-r1-qwen": QWEN_2, "gpt-2": GPT_2, "olmo": GPT_2,
    "smollm": SMOLLM, "starcoder": SMOLLM, "command-r": SMOLLM, "deepseek-coder": DEEPSEEK_CODER,
    "deepseek-v3": DEEPSEEK_V3, "tekken": TEKKEN, "gpt-4o": GPT_4O,
}  # fmt: skip
PIECES = [
    *("I'm", "WE'LL", "don't", "HTMLParser", "camelCase", "a_b", "x", "é", "e\u0301", "Ж", "ǅ", "水", "日本", "한국"),
    *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "1", "1234567", "٣", "½", "!?", "...", "//", "</s>", "🙂"),
]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
)


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=120, deadline=None)
@given(text=texts)
@example(text="I'VE 12345 things,\n\n  and 水 … don't   ")
def test_cuts_equal_those_of_the_published_tokenizer(name: str, text: str) -> None:
    ours = PRE_TOKENIZERS[name].pre_tokenizer().pre_tokenize_str(text)
    assert ours == published(name).pre_tokenize_str(text)


def published(name: str) -> Any:
    library = Tokenizer(models.BPE())
    description = json.loads(library.to_str()) | {"pre_tokenizer": PUBLISHED[name]}
    return Tokenizer.from_str(json.dumps(description)).pre_tokenizer


def cut(name: str, text: str) -> list[str]:
    """The parts as texts."""
    return [text[start:end] for _, (start, end) in PRE_TOKENIZERS[name].pre_tokenizer().pre_tokenize_str(text)]


@pytest.mark.parametrize(("name", "text", "parts"), [
    # Its range of punctuation, :-~, holds the Latin letters: what follows one that is none of them is cut off.
    ("deepseek-llm", "Ünder 12345 水水x, ok\n", ["Ü", "nder", " ", "12345", " ", "水水", "x", ",", " ok", "\n"]),
    ("deepseek-llm", "ა b ~！ ", ["ა", " b", " ~！", " "]),
    ("default", "a$b 12345", ["a", "$", "b", " ", "123", "45"]),
])  # fmt: skip
def test_cuts_of_families_without_a_tokenizer_json_here(name: str, text: str, parts: list[str]) -> None:
    assert cut(name, text) == parts


def test_every_kind_keeps_every_character() -> None:
    text = "I've 12345 … 水 \U0001f642\r\n\t</s> A_b"
    for name in PRE_TOKENIZERS:
        assert "".join(cut(name, text)) == text, name
