import random
import time
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edgekv.core.stop import StopStrings


def shown_and_matched(text: str, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """The rule in one line over the whole text: the first complete stop string wins, of these the longest."""
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    if not found:
        return text, None
    _, start, stop = min(found)
    return text[:start], stop


def run(pieces: list[str], stops: tuple[str, ...]) -> tuple[str, str | None]:
    stream = StopStrings(stops)
    shown = ""
    for piece in pieces:
        text, stopped = stream.feed(piece)
        shown += text
        assert stopped == (stream.matched is not None)
    return shown + stream.flush(), stream.matched


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


SMALL = st.text(alphabet="ab", min_size=1, max_size=5)


@given(
    text=st.text(alphabet="abc", max_size=40),
    stops=st.lists(SMALL, min_size=1, max_size=5).map(tuple),
    places=st.lists(st.integers(0, 1000), max_size=20),
)
@example(text="aabaabaaab", stops=("aabaaa", "ba"), places=[1, 2, 3])
@example(text="abcd", stops=("abcd", "bc"), places=[2])
def test_any_cut_of_the_text_gives_what_the_whole_text_gives(
    text: str, stops: tuple[str, ...], places: list[int]
) -> None:
    assert run(cut(text, places), stops) == shown_and_matched(text, stops)


@given(text=st.text(alphabet="ab", max_size=30), stops=st.lists(SMALL, min_size=1, max_size=4).map(tuple))
def test_exactly_the_longest_possible_beginning_is_held_back(text: str, stops: tuple[str, ...]) -> None:
    stream, shown = StopStrings(stops), ""
    for end, char in enumerate(text, start=1):
        piece, stopped = stream.feed(char)
        shown += piece
        if stopped:
            return
        seen = text[:end]
        beginnings = [n for stop in stops for n in range(len(stop)) if seen.endswith(stop[:n])]
        assert shown == seen[: len(seen) - max(beginnings)]


@given(text=st.text(max_size=40), places=st.lists(st.integers(0, 1000), max_size=10), data=st.data())
def test_any_character_may_stand_in_a_stop_string(text: str, places: list[int], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    stop = text[start : start + data.draw(st.integers(1, 5))] or "\N{SNOWMAN}"
    assert run(cut(text, places), (stop,)) == shown_and_matched(text, (stop,))


def test_a_stop_string_over_several_pieces_is_never_shown() -> None:
    stream = StopStrings(("<|end|>",))
    assert stream.feed("Hello <") == ("Hello ", False)
    assert stream.feed("|e") == ("", False)
    assert stream.feed("nd|> and more") == ("", True)
    assert stream.matched == "<|end|>"
    assert stream.flush() == ""


def test_what_turns_out_to_be_no_stop_string_is_shown() -> None:
    stream = StopStrings(("\n\nUser:",))
    assert stream.feed("a\n\nUs") == ("a", False)
    assert stream.feed("ual") == ("\n\nUsual", False)
    assert stream.feed("\n") == ("", False)
    assert stream.flush() == "\n"
    assert stream.flush() == ""
    assert stream.matched is None


def test_the_first_complete_stop_string_wins_and_of_these_the_longest() -> None:
    assert run(["xabcd"], ("abcd", "bc")) == ("xa", "bc")
    assert run(["xabcd"], ("bc", "abc")) == ("x", "abc")
    assert run(["xabcd"], ("abc", "bc")) == ("x", "abc")
    assert run(["xabcd"], ("abc", "ab")) == ("x", "ab")


def test_nothing_comes_after_the_end() -> None:
    stream = StopStrings(("b",))
    assert stream.feed("ab") == ("a", True)
    assert stream.feed("ccc") == ("", True)
    assert stream.feed("b") == ("", True)
    assert stream.matched == "b"


def test_without_stop_strings_everything_is_shown_at_once() -> None:
    stream = StopStrings(())
    assert stream.feed("anything") == ("anything", False)
    assert stream.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        StopStrings(("a", ""))


@pytest.mark.parametrize("piece", [1, 4, 50_000])
def test_time_is_linear_for_the_worst_stop_strings(piece: int) -> None:
    # Sixteen stops of 1,000 characters, of which only the last differs, over a text that nearly matches all the time:
    # a search from every place would compare 50,000 * 16 * 1,000 characters.
    stops = tuple("a" * (984 + n) + "b" * (16 - n) for n in range(16))
    rng = random.Random(0)
    text = "".join("a" * rng.randrange(900, 1100) + "c" for _ in range(50))
    begin = time.process_time()
    shown, matched = run([text[at : at + piece] for at in range(0, len(text), piece)], stops)
    assert (shown, matched) == (text, None)
    assert time.process_time() - begin < 2.0  # 0.05 s on an idle machine
