"""The demo model's corpus: the same every time, varied, and well formed."""

import json
import re
from collections import Counter
from itertools import pairwise
from random import Random

import pytest
from demo_model import grammar
from demo_model.corpus import SEED, Document, chat_text, document, documents, fingerprint
from demo_model.plants import BY_NAME, PLANTS, months_between, when

COUNT = 2000


@pytest.fixture(scope="module")
def sample() -> list[Document]:
    return list(documents(SEED, COUNT))


def test_the_same_seed_gives_the_same_corpus(sample: list[Document]) -> None:
    again = documents(SEED, COUNT)
    assert fingerprint(doc.text() for doc in sample) == fingerprint(doc.text() for doc in again)


def test_another_seed_gives_another_corpus(sample: list[Document]) -> None:
    other = documents(SEED + 1, 50)
    assert not {doc.text() for doc in sample[:50]} & {doc.text() for doc in other}


def test_a_document_does_not_depend_on_those_before_it(sample: list[Document]) -> None:
    assert document(SEED, 1234) == sample[1234]


def test_documents_seldom_repeat(sample: list[Document]) -> None:
    texts = Counter(doc.text() for doc in sample)
    assert len(texts) > 0.97 * COUNT
    assert max(texts.values()) <= 5


def test_every_chat_alternates_and_ends_with_the_assistant(sample: list[Document]) -> None:
    chats = [doc.chat for doc in sample if doc.chat is not None]
    assert len(chats) > COUNT / 2
    for chat in chats:
        roles = [message.role for message in chat]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns[0] == "user"
        assert turns[-1] == "assistant"
        assert all(before != after for before, after in pairwise(turns))
        assert "system" not in turns
        assert all(message.content == message.content.strip() != "" for message in chat)


def test_a_chat_is_written_as_chatml(sample: list[Document]) -> None:
    turn = re.compile(r"<\|im_start\|>(system|user|assistant)\n[^<>|]+<\|im_end\|>\n")
    for doc in sample:
        if doc.chat is not None:
            assert turn.sub("", chat_text(doc.chat)) == ""
        else:
            assert "<|" not in doc.text()


def test_no_template_is_left_unfilled(sample: list[Document]) -> None:
    for doc in sample:
        for piece in [message.content for message in doc.chat] if doc.chat else [doc.text()]:
            if piece.startswith("{"):
                assert json.loads(piece)["name"]
            else:
                assert not re.search(r"[\[\]{}|]|  | [.,;]|\.\.\s", piece), piece


def test_answers_come_in_every_length(sample: list[Document]) -> None:
    lengths = [len(m.content.split()) for doc in sample for m in doc.chat or () if m.role == "assistant"]
    assert min(lengths) < 8
    assert max(lengths) > 150
    assert sum(length < 25 for length in lengths) > 0.3 * len(lengths)


def test_the_plants_companions_are_plants_of_the_garden() -> None:
    assert {mate for plant in PLANTS for mate in plant.mates} <= set(BY_NAME)
    assert len({plant.crop for plant in PLANTS}) == len(PLANTS)


def test_spans_of_months_run_over_the_turn_of_the_year() -> None:
    assert months_between((11, 2)) == ["November", "December", "January", "February"]
    assert [when((5, 5)), when((12, 1)), when((3, 6))] == ["in May", "in December and January", "from March to June"]


def test_verbs_and_articles_agree() -> None:
    rng = Random(0)
    assert grammar.expand("[Crop] [+grow] fast.", rng, {"crop": "kale"}, plural=False) == "Kale grows fast."
    assert grammar.expand("[crop] [+do] well.", rng, {"crop": "peas"}) == "Peas do well."
    assert grammar.expand("It is a(n) [x] or a(n) [y].", rng, {"x": "owl", "y": "hen"}) == "It is an owl or a hen."
    singular = [grammar.agree(verb, plural=False) for verb in ("are", "carry", "catch", "lay")]
    assert singular == ["is", "carries", "catches", "lays"]


def test_choices_nest() -> None:
    seen = {grammar.expand("{a|{b|c} d}", Random(seed)) for seed in range(40)}
    assert seen == {"A", "B d", "C d"}
