"""What models are asked while speculation is measured: random text would say nothing of it.

Runs in: anywhere; owns: nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from edgekv.errors import EdgeKVError

Chat: TypeAlias = list[Mapping[str, Any]]


class BadPrompts(EdgeKVError):
    """A file of prompts cannot be read or makes no sense."""


# What the demo model was trained to talk of (packaging/demo_model), in words that it may not have seen.
_QUESTIONS = (
    "When do I sow carrots?",
    "How do I keep slugs off my lettuce?",
    "Tell me about tomatoes.",
    "What should I do in the garden in March?",
    "How deep should I plant garlic?",
    "What grows well with runner beans?",
    "When can I harvest onions?",
    "How often should I water courgettes?",
    "What soil do potatoes need?",
    "Why should I water in the morning?",
    "Tell me about bumblebees.",
    "How do I make compost?",
    "What are the garden jobs for October?",
    "What can I sow in April?",
    "How much sun does basil need?",
    "What pests attack cabbages?",
    "How do I know when peas are ready?",
    "Give me a tip for strawberries.",
    "What is January like in the garden?",
    "Who are you, and what can you do?",
    "Describe parsley as JSON.",
    "How should I look after my spade?",
    "What can I harvest in September?",
    "My neighbour has no garden, only a balcony. What could she grow?",
)
_STORIES = (
    "Tell me a story about a hedgehog.",
    "Tell me a long story about a gardener and a robin.",
    "Write a short story about pumpkins.",
    "Tell me a story about a storm in the garden.",
    "Write a little story about two neighbours.",
    "Write a poem about autumn.",
)
_PAGES = (
    "One misty morning in October, Rosa went out to look at the leeks and found a small hedgehog under the hedge. She "
    "fetched a dish of water and set it down in the shade. Every evening after that the hedgehog came back.",
    "Carrots like full sun and light, sandy soil without stones. Sow the seed in April, one centimetre deep, and keep "
    "the soil moist until the first leaves come up. Good neighbours for carrots are onions, leeks and lettuce.",
    "March is windy and changeable, with sun and hail on the same day. It is the time to sow tomatoes indoors, to "
    "plant onion sets and to rake the seed beds fine. The first bumblebees visit the crocuses.",
)
_ORDERS = ("Repeat this text word for word.", "Write this text again with every full stop made an exclamation mark.")


def demo_chats(*, quoting: bool) -> list[Chat]:
    """Questions of the demo model's world and stories; where `quoting`, also texts to say again, which n-grams suit."""
    quotes = [f"{page}\n\n{order}" for page in _PAGES for order in _ORDERS] if quoting else []
    return [[{"role": "user", "content": text}] for text in (*_QUESTIONS, *_STORIES, *quotes)]


def read_chats(path: Path) -> list[Chat]:
    """A prompt a line: text, or as JSON a list of messages or an object with "messages". Raises BadPrompts."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadPrompts(f"{path}: cannot be read: {error}") from None
    chats = [_chat(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not chats:
        raise BadPrompts(f"{path}: has no prompts; give one a line")
    return chats


def _chat(path: Path, number: int, line: str) -> Chat:
    if line.lstrip()[0] not in "[{":
        return [{"role": "user", "content": line}]
    try:
        found = json.loads(line)
    except ValueError as error:
        raise BadPrompts(f"{path}:{number}: a line that begins with {line.lstrip()[0]} is JSON: {error}") from None
    chat = found.get("messages") if isinstance(found, dict) else found
    if not (isinstance(chat, list) and chat and all(isinstance(message, dict) for message in chat)):
        raise BadPrompts(f'{path}:{number}: give a list of messages, or an object with "messages"')
    return chat
