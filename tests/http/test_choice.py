"""A choice shows exactly the text before the first stop string, however the engine's tokens are cut and batched."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv.actors.stream import Failed
from edgekv.core.sequence import FinishReason
from edgekv.core.step import Finished, Sampled, Started, TokenOut
from edgekv.core.stop import StopStrings
from edgekv.http.choice import Choice, Delta, joined
from tests.http.fakes import EOS, ByteTokenizer

TOKENIZER = ByteTokenizer()


def choice(*stops):
    return Choice(0, TOKENIZER.detokenizer(), StopStrings(stops), keep_tokens=True)


def tokens(text):
    return [TokenOut(1, Sampled(byte, -1.0)) for byte in text.encode()]


def first_stop(text, stops):
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return min(ends)[1] if ends else None


@settings(deadline=None)
@given(
    text=st.text(alphabet="ab\u00e9\U0001f600", max_size=30),
    stops=st.lists(st.text(alphabet="ab\u00e9\U0001f600", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 120), max_size=10),
)
def test_text_and_tokens_are_those_before_the_first_stop_string(text, stops, cuts):
    events = [Started(1, 5), *tokens(text), TokenOut(1, Sampled(EOS), is_stop=True), Finished(1, FinishReason.STOP)]
    shown, it = [], choice(*stops)
    edges = sorted({0, len(events), *(cut for cut in cuts if cut < len(events))})
    for start, end in pairwise(edges):
        shown.append(it.feed(events[start:end]))
        so_far = "".join(delta.text for delta in shown)
        assert not any(stop in so_far for stop in stops)
    whole = joined(shown)
    at = first_stop(text, stops)
    expected = text if at is None else text[:at]
    assert whole.text == expected
    assert it.finish_reason == "stop"
    assert it.cached_tokens == 5
    # Bytes are tokens here: those shown spell the text, and a character cut by nothing is not split either.
    spelt = bytes(token.sampled.token_id for token in whole.tokens)
    assert spelt.startswith(expected.encode())
    assert at is not None or spelt == text.encode()
    assert [token.offset for token in whole.tokens] == sorted(token.offset for token in whole.tokens)
    if at is None:
        assert it.num_generated == len(text.encode()) + 1


def test_a_token_comes_with_its_first_character_or_not_at_all():
    it = choice("STOP")
    assert it.feed(tokens("aS")) == Delta("a", it_tokens("a"), 2)
    assert it.feed(tokens("TO")).is_empty
    later = it.feed(tokens("x"))
    assert later.text == "STOx"
    assert [token.sampled.token_id for token in later.tokens] == list(b"STOx")
    assert [token.offset for token in later.tokens] == [1, 2, 3, 4]
    assert it.feed(tokens("STOP and more")).is_empty
    assert it.has_ended
    assert it.feed(tokens("more")).is_empty


def it_tokens(text):
    return choice().feed(tokens(text)).tokens


def test_held_text_comes_out_at_the_end_of_its_own():
    it = choice("STOP")
    assert it.feed(tokens("ST")).is_empty
    last = it.feed([Finished(1, FinishReason.LENGTH)])
    assert last.text == "ST"
    assert len(last.tokens) == 2
    assert it.finish_reason == "length"


def test_half_a_character_at_the_end_is_shown_as_such():
    it = choice()
    assert it.feed([TokenOut(1, Sampled(0xE2))]).is_empty
    last = it.feed([Finished(1, FinishReason.LENGTH)])
    assert last.text == "\ufffd"
    assert len(last.tokens) == 1


def test_a_stop_token_is_counted_but_never_shown():
    it = choice()
    assert it.feed([TokenOut(1, Sampled(65), is_stop=True), Finished(1, FinishReason.STOP)]) == Delta("", (), 1)
    assert it.num_generated == 1


@pytest.mark.parametrize(
    ("event", "status", "code"),
    [
        (Finished(1, FinishReason.OUT_OF_MEMORY), 503, "insufficient_memory"),
        (Finished(1, FinishReason.ABORT), 503, "aborted"),
        (Finished(1, FinishReason.ERROR, "internals"), 500, "engine_error"),
        (Failed("device_lost", "The card is gone."), 503, "device_lost"),
    ],
)
def test_what_goes_wrong_is_a_failure_not_a_finish(event, status, code):
    it = choice()
    it.feed([*tokens("ab"), event])
    assert it.finish_reason is None
    assert it.failure is not None
    assert (it.failure.status, it.failure.code) == (status, code)
    assert "internals" not in it.failure.message


def test_a_stop_string_within_the_minimum_is_text():
    it = Choice(0, TOKENIZER.detokenizer(), StopStrings(("b",)), keep_tokens=True, min_tokens=3)
    assert it.feed([Started(1, 0), *tokens("ab")]).text == "ab"
    assert it.feed(tokens("aab")).text == "aa"
    assert it.finish_reason == "stop"
    assert it.num_generated == 5
