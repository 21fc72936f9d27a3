"""Which texts are control text, and how a token that a person wrote in pieces is recognised, at a bounded cost."""

import time
import tracemalloc
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv.errors import ModelError
from edgekv.text import tokenizer_files
from edgekv.text.control_text import ControlText
from edgekv.text.tokenizer_files import MAX_CONTROL_CHARS, AddedToken, TokenizerFiles

words = st.text("ab<", min_size=1, max_size=5)


def files(**templates: str) -> TokenizerFiles:
    return TokenizerFiles("", "", {}, {}, (), None, None, None, None, templates)


def control_ids(added: Mapping[int, AddedToken], **templates: str) -> dict[str, int]:
    return files(**templates).control_ids("tokenizer.json", added)


@given(tokens=st.lists(words, max_size=6), texts=st.lists(st.text("ab< ", max_size=7), max_size=3))
def test_pieces_of_tokens_are_recognised(tokens: list[str], texts: list[str]) -> None:
    def begins(text: str) -> bool:
        text = text.rstrip()
        return any(text.endswith(token[:k]) for token in tokens for k in range(1, len(token)))

    def ends(text: str) -> bool:
        text = text.lstrip()
        return any(text.startswith(token[k:]) for token in tokens for k in range(1, len(token)))

    whole = any(token in text for token in tokens for text in texts)
    control = ControlText(dict.fromkeys(tokens, 0))
    assert control.occurs_in(texts) == (whole or (any(map(begins, texts)) and any(map(ends, texts))))


def test_long_tokens_take_no_more_than_their_length() -> None:
    tokens = {f"<|{i}{'x' * 250}|>": i for i in range(300)}
    tracemalloc.start()
    control = ControlText(tokens)
    assert tracemalloc.get_traced_memory()[0] < 3 << 20  # the pattern, for the most part
    tracemalloc.stop()
    assert control.occurs_in(["<|7xx", "xx|>"])
    assert not control.occurs_in(["<|7xx", "xx|"])


def test_what_is_control_text() -> None:
    added = {
        1: AddedToken("special", special=True), 2: AddedToken("<|tool|>"), 3: AddedToken("<｜a｜>"),
        4: AddedToken("<b>"), 5: AddedToken("<think>"), 6: AddedToken("  "), 7: AddedToken(""),
        8: AddedToken(" ", special=True),
    }  # fmt: skip
    assert control_ids(added) == {"special": 1, "<|tool|>": 2, "<｜a｜>": 3, " ": 8}
    named = control_ids(added, default="{{ x }}", tool_use="  <think>")
    assert named == {"special": 1, "<|tool|>": 2, "<｜a｜>": 3, "<think>": 5, " ": 8}


@pytest.mark.parametrize("long", ["x" * 257, "<|" + "x" * 70_000 + "|>"])
def test_a_control_token_that_no_real_model_has_is_named(long: str) -> None:
    assert control_ids({3: AddedToken("x" * MAX_CONTROL_CHARS, special=True)}) == {"x" * MAX_CONTROL_CHARS: 3}
    with pytest.raises(ModelError, match=rf"^tokenizer\.json: token 9: a control token of {len(long):,} characters"):
        control_ids({3: AddedToken("a", special=True), 9: AddedToken(long, special=True)})
    assert control_ids({9: AddedToken("x" * 257)}) == {}, "of ordinary text"
    with pytest.raises(ModelError, match=r"token 9: a control token of 257 characters"):
        control_ids({9: AddedToken("x" * 257)}, default="a" + "x" * 300)


def test_all_control_tokens_together_are_bounded() -> None:
    spoken = {i: AddedToken(f"<|speech_{i}|>", special=True) for i in range(70_000)}
    assert len(control_ids(spoken)) == 70_000, "as many as the largest real vocabularies have"
    with pytest.raises(ModelError, match="its 8,500 control tokens have 2,167,500 characters, over the limit"):
        control_ids({i: AddedToken(f"{i:0255}", special=True) for i in range(8_500)})


def test_more_tokens_than_can_be_looked_for_in_the_templates_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    added = {i: AddedToken(f"zz{i}") for i in range(40_000)}
    began = time.thread_time()
    with pytest.raises(ModelError, match="40,000 added tokens cannot be looked for in chat templates as long as these"):
        control_ids(added, default="zy" * 500_000)
    assert time.thread_time() - began < 1
    assert control_ids(added, default="{{ zz77 }}") == {"zz7": 7, "zz77": 77}
    monkeypatch.setattr(tokenizer_files, "_MAX_SEARCHED_CHARS", 39_999)
    with pytest.raises(ModelError, match="40,000 added tokens"):
        control_ids(added, default="x")
    assert len(control_ids({i: AddedToken(f"<|{i}|>") for i in range(40_000)}, default="xx")) == 40_000
