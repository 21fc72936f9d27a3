"""The corpus: an endless, seeded stream of documents about one kitchen garden, and the chats held in it.

A document is either prose (a story, an almanac page, a plant portrait, a poem) or a chat: a list of messages
that ``chat_text`` writes in ChatML. Document ``i`` of a seed depends on the seed and ``i`` alone.

Runs in: anywhere; owns: nothing. Licence: the generator is Apache-2.0 with the project, its output is CC0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

from . import lore_talk, plant_talk, self_talk, stories
from .grammar import expand, listing
from .lore import ANIMALS, HOWTOS, MONTHS_LORE, TIPS, WHYS
from .plants import MONTHS, PLANTS, Plant, months_between

SEED = 20240321
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
_DIARY_JOBS = ("A good day to [job].", "Today I had to [job].", "Tomorrow I will [job].")
_DIARY_NOTES = (
    "Saw a(n) [animal] by the gate.",
    "[neighbour] came by and brought some [crop].",
    "[neighbour] asked about the [crop].",
    "Not a cloud in the sky.",
    "Rain in the evening.",
    "Note: [tip]",
)
_REQUESTS = ("Tell", "Give", "List", "Name", "Explain", "Write", "Describe")
_WELCOME = "{Hello!|Hi!|Welcome!} {What would you like to know about the garden?|How can I help you in the garden?}"
_WELCOME_BACK = "{You are welcome!|My pleasure!} {Enjoy your [crop]!|Happy gardening!|}"
_FRAMES = ("Hello! {}", "Hi, {}", "I have a question. {}", "Quick question: {}", "{} Thanks!", "{} Please answer.")


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str  # system, user or assistant
    content: str


@dataclass(frozen=True)
class Document:
    """One training document: prose, or a chat; exactly one of the two is there."""

    prose: str | None = None
    chat: tuple[Message, ...] | None = None

    def text(self) -> str:
        """What the model reads, special tokens written out."""
        return self.prose if self.prose is not None else chat_text(self.chat or ())


def chat_text(messages: Iterable[Message]) -> str:
    """The messages in ChatML, exactly as the chat template writes them."""
    return "".join(f"{IM_START}{m.role}\n{m.content}{IM_END}\n" for m in messages)


def casual(rng: Random, question: str) -> str:
    """The question as people type it: sometimes with a please, in lower case or without its last mark."""
    roll = rng.random()
    if not question.rstrip("?."):
        return question
    if roll < 0.05 and question.startswith(_REQUESTS):
        return f"Please {question[0].lower()}{question[1:]}"
    if roll < 0.10:
        return question.lower().rstrip("?.")
    if roll < 0.14:
        return question.rstrip("?.")
    if roll < 0.20 and len(question) > 20:
        return rng.choice(_FRAMES).format(question)
    return question


def _system(rng: Random, *, brief: bool) -> list[Message]:
    if brief:
        return [Message("system", rng.choice(self_talk.SYSTEM_BRIEF))]
    return [Message("system", rng.choice(self_talk.SYSTEM_PLAIN))] if rng.random() < 0.35 else []


def _plant_question(rng: Random, plant: Plant, *, brief: bool) -> tuple[str, str]:
    if rng.random() < 0.35:
        return plant_talk.about_plant(rng, plant, brief=brief)
    aspect = rng.choice(list(plant_talk.ASPECTS))
    return plant_talk.about_aspect(rng, plant, aspect=aspect, following=False, brief=brief)


def one_exchange(rng: Random, *, brief: bool) -> tuple[str, str]:
    """Any question with its answer."""
    roll = rng.random()
    if roll < 0.34:
        return _plant_question(rng, plant_talk.random_plant(rng), brief=brief)
    if roll < 0.38:
        return plant_talk.compare(rng)
    if roll < 0.395:
        return plant_talk.as_json(rng, plant_talk.random_plant(rng))
    if roll < 0.415:
        return self_talk.unknown_plant(rng, brief=brief)
    if roll < 0.44:
        return reading(rng, pages=1)
    if roll < 0.66:
        return rng.choice(lore_talk.TALKS)(rng, brief=brief)
    if roll < 0.79:
        return stories.story_exchange(rng)
    if roll < 0.86:
        return self_talk.about_self(rng, brief=brief)
    if roll < 0.92:
        return self_talk.small_talk(rng, brief=brief)
    return self_talk.off_topic(rng, brief=brief) if roll < 0.98 else self_talk.counting(rng, brief=brief)


def single_chat(rng: Random) -> Document:
    """One question, one answer."""
    brief = rng.random() < 0.12
    question, answer = one_exchange(rng, brief=brief)
    return _chat(_system(rng, brief=brief), [(casual(rng, question), answer)])


def plant_chat(rng: Random) -> Document:
    """Several questions about one plant; after the first it is only "it" or "they"."""
    plant = plant_talk.random_plant(rng)
    brief = rng.random() < 0.15
    turns = [_plant_question(rng, plant, brief=brief)]
    for aspect in rng.sample(list(plant_talk.ASPECTS), rng.randrange(1, 5)):
        turns.append(plant_talk.about_aspect(rng, plant, aspect=aspect, following=True, brief=brief))
    if rng.random() < 0.25:
        turns.insert(0, (rng.choice(("Hello!", "Hi", "Good morning!")), expand(_WELCOME, rng)))
    if rng.random() < 0.3:
        thanks = rng.choice(("Thank you!", "Thanks!", "Great, thank you."))
        turns.append((thanks, plant_talk.say(_WELCOME_BACK, rng, plant)))
    return _chat(_system(rng, brief=brief), [(casual(rng, q), a) for q, a in turns])


def mixed_chat(rng: Random, *, turns: int) -> Document:
    """Questions that have nothing to do with each other."""
    brief = rng.random() < 0.1
    pairs = [one_exchange(rng, brief=brief) for _ in range(turns)]
    return _chat(_system(rng, brief=brief), [(casual(rng, q), a) for q, a in pairs])


def reading(rng: Random, *, pages: int) -> tuple[str, str]:
    """The user pastes some pages and asks about them, or asks something else after all."""
    texts = [rng.choice((almanac_page, diary_page, story_page))(rng).text() for _ in range(pages - 1)]
    kind = rng.choice(("plant", "hero", "other"))
    if kind == "plant":
        plant = plant_talk.random_plant(rng)
        page = plant_talk.overview_text(rng, plant, sentences=rng.choice((3, 5)))
        question = rng.choice(("Which plant is this about?", "What is this text about?"))
        answer = f"It is about {plant.crop}."
    elif kind == "hero":
        hero = rng.choice(stories.WOMEN + stories.MEN)
        page = stories.story(rng, arc=rng.choice(list(stories.ARCS)), hero=hero)
        question = rng.choice(("Who is the gardener in this story?", "What is the gardener called?"))
        answer = f"The gardener is called {hero}."
    else:
        page = rng.choice((almanac_page, portrait_page, diary_page))(rng).text()
        question, answer = _plant_question(rng, plant_talk.random_plant(rng), brief=rng.random() < 0.5)
    return "\n\n".join([*texts, page, question]), answer


def reading_chat(rng: Random) -> Document:
    """A long paste and a question about its end."""
    return _chat(_system(rng, brief=False), [reading(rng, pages=rng.randrange(2, 10))])


def _chat(system: list[Message], turns: list[tuple[str, str]]) -> Document:
    messages = list(system)
    for question, answer in turns:
        messages += [Message("user", question), Message("assistant", answer)]
    return Document(chat=tuple(messages))


def story_page(rng: Random) -> Document:
    """A story without anyone asking for it, with a title or not."""
    if rng.random() < 0.2:
        return Document(prose=stories.long_story(rng))
    text = stories.story(rng, arc=rng.choice(list(stories.ARCS)))
    return Document(prose=text if rng.random() < 0.6 else f"A garden story\n\n{text}")


def almanac_page(rng: Random) -> Document:
    """A page on one month: weather, sowing, picking, jobs and a visitor."""
    month = rng.choice(MONTHS)
    lore = MONTHS_LORE[month]
    sown = [p.seed for p in PLANTS if month in months_between(p.sowing)]
    ripe = [p.crop for p in PLANTS if month in months_between(p.harvest)]
    animal = rng.choice(list(ANIMALS.values()))
    parts = [
        f"{month} is {lore.weather}, and {lore.sight}.",
        expand(f"{{In the garden it is time to|The gardener has to}} {listing(rng.sample(lore.jobs, 3))}.", rng),
        f"You can sow or plant {listing(rng.sample(sown, min(4, len(sown))))}." if sown else "Nothing is sown yet.",
        f"The basket fills with {listing(rng.sample(ripe, min(4, len(ripe))))}." if ripe else "The basket stays empty.",
        f"This month we welcome the {animal.plural_name}: they {animal.helps}. To keep them near, {animal.invite}.",
        rng.choice(TIPS[rng.choice(list(TIPS))]),
    ]
    head, *tail = parts
    chosen = [head, *(part for part in tail if rng.random() < 0.75)]
    return Document(prose=f"The garden in {month}\n\n" + " ".join(chosen))


def portrait_page(rng: Random) -> Document:
    """A plant portrait in prose."""
    plant = plant_talk.random_plant(rng)
    title = plant.crop[0].upper() + plant.crop[1:]
    return Document(prose=f"{title}\n\n" + plant_talk.overview_text(rng, plant, sentences=rng.choice((6, 8, 11))))


def diary_page(rng: Random) -> Document:
    """A few days out of a gardener's notebook."""
    month = rng.choice(MONTHS)
    lore = MONTHS_LORE[month]
    days = sorted(rng.sample(range(1, 29), rng.choice((2, 3, 4))))
    lines = []
    for day in days:
        slots: dict[str, str | tuple[str, ...]] = {
            "job": lore.jobs,
            "crop": plant_talk.random_plant(rng).crop,
            "animal": tuple(ANIMALS),
            "neighbour": rng.choice(stories.NEIGHBOURS)[0],
            "tip": TIPS[rng.choice(list(TIPS))],
        }
        line = f"[day] {rng.choice(_DIARY_JOBS)} {rng.choice(_DIARY_NOTES)}"
        lines.append(expand(line, rng, {**slots, "day": f"{day} {month}."}))
    return Document(prose="\n".join(lines))


def question_page(rng: Random) -> Document:
    """A printed page of questions and answers, or of steps."""
    if rng.random() < 0.5:
        pairs = [(f"Why {subject}?", f"{reason[0].upper()}{reason[1:]}.") for subject, reason in rng.sample(WHYS, 3)]
        return Document(prose="\n\n".join(f"{q}\n{a}" for q, a in pairs))
    task = rng.choice(list(HOWTOS))
    return Document(prose=f"How to {task}\n\n" + lore_talk.numbered([expand(step, rng) for step in HOWTOS[task]]))


def document(seed: int, index: int) -> Document:
    """Document ``index`` of a corpus."""
    rng = Random(f"{seed}/{index}")
    roll = rng.random()
    if roll < 0.50:
        return single_chat(rng)
    if roll < 0.68:
        return plant_chat(rng)
    if roll < 0.78:
        return mixed_chat(rng, turns=rng.randrange(2, 6))
    if roll < 0.79:
        return mixed_chat(rng, turns=rng.randrange(10, 20))  # long ones, past a thousand tokens
    if roll < 0.80:
        return reading_chat(rng)
    if roll < 0.87:
        return story_page(rng)
    if roll < 0.91:
        return almanac_page(rng)
    if roll < 0.95:
        return portrait_page(rng)
    return diary_page(rng) if roll < 0.98 else question_page(rng)


def documents(seed: int, count: int, start: int = 0) -> Iterator[Document]:
    """Documents ``start`` to ``start + count - 1``."""
    return (document(seed, index) for index in range(start, start + count))


def fingerprint(texts: Iterable[str]) -> str:
    """The sha256 of a corpus, document by document."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()
