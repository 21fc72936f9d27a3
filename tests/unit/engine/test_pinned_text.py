"""The tokens of a pinned text are those that every request which begins with it begins with."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekv import demo
from edgekv.config.settings import PinnedPrompt as PinnedText
from edgekv.engine.pinned import PinnedPrompt, PinnedPromptRefused
from edgekv.engine.pinned_text import encode_pinned, message_tokens, raw_tokens
from edgekv.text.chat_template import ChatTemplate, load_chat_template
from edgekv.text.tokenizer import Tokenizer, load_tokenizer
from tests.unit.text.published_templates import PUBLISHED

TEXT = "You are the keeper of a small garden. You answer in short sentences, and you never give up on a plant."
FOLDER = Path(demo.__file__).parent / "target"
VARIABLES: Mapping[str, str] = {"bos_token": "<s>", "eos_token": "</s>"}
said = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    found = load_chat_template(FOLDER)
    assert found is not None
    return found


def written(**fields: object) -> PinnedText:
    return PinnedText.model_validate({"name": "house", "text": TEXT, **fields})


def begins(tokens: list[int], pinned: tuple[int, ...]) -> bool:
    return tuple(tokens[: len(pinned)]) == pinned


@settings(max_examples=60, deadline=None)
@given(user=said)
def test_every_conversation_of_the_demo_model_begins_with_its_pinned_system_message(user: str) -> None:
    tokenizer, template = load_once()
    pinned = message_tokens(TEXT, "system", tokenizer, template)
    talk = [{"role": "system", "content": TEXT}, {"role": "user", "content": user}]
    assert begins(template.encode(tokenizer, talk), pinned)
    talk += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    assert begins(template.encode(tokenizer, talk), pinned)
    assert tokenizer.decode(pinned, skip_special_tokens=False).endswith("a plant.<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize("name", ["llama-2", "llama-3", "llama-3.2", "gemma-3", "mistral-v3", "qwen3", "phi-3", "smol"])
def test_the_whole_message_is_shared_also_where_it_is_put_into_the_users_turn(name: str, tokenizer: Tokenizer) -> None:
    template = ChatTemplate({"default": PUBLISHED[name]}, VARIABLES)
    pinned = message_tokens(TEXT, "system", tokenizer, template)
    assert TEXT in tokenizer.decode(pinned, skip_special_tokens=False)
    for user in ("Hello", "  spaces", "\n\nlines", "1", "<b>", "水をやる", "."):
        talk = [{"role": "system", "content": TEXT}, {"role": "user", "content": user}]
        assert begins(template.encode(tokenizer, talk), pinned), user


@pytest.mark.parametrize("name", ["mistral", "gemma-2", "chatml", "llama-3"])
def test_a_text_that_users_begin_with_is_shared_by_all_turns_that_follow(name: str, tokenizer: Tokenizer) -> None:
    template = ChatTemplate({"default": PUBLISHED[name]}, VARIABLES)
    pinned = message_tokens(TEXT, "user", tokenizer, template)
    assert TEXT in tokenizer.decode(pinned, skip_special_tokens=False)
    talk = [{"role": "user", "content": TEXT}]
    assert begins(template.encode(tokenizer, talk), pinned)
    talk += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
    assert begins(template.encode(tokenizer, talk), pinned)


def test_a_template_that_appends_what_depends_on_the_whole_talk_shares_what_is_before_it(tokenizer: Tokenizer) -> None:
    source = "{{ messages | length }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    template = ChatTemplate({"default": "<s>{{ messages[-1].content }}" + source}, VARIABLES)
    assert tokenizer.decode(message_tokens(TEXT, "system", tokenizer, template), skip_special_tokens=False) == "<s>"


@settings(max_examples=60, deadline=None)
@given(rest=said)
def test_every_prompt_that_begins_with_a_raw_text_begins_with_its_tokens(rest: str) -> None:
    tokenizer, _ = load_once()
    for text in (TEXT, TEXT + " And", "<|im_start|>system\n" + TEXT):
        pinned = raw_tokens(text, tokenizer)
        tokens = tokenizer.encode(text + rest, add_special_tokens=True, parse_special=True)
        # What follows may change how the last words are cut; whole blocks before them are what is pinned.
        assert begins(tokens, pinned[:-3])
        assert len(tokenizer.decode(pinned)) >= len(text.removeprefix("<|im_start|>")) - 4


def test_an_entry_of_the_configuration_becomes_a_prompt(
    tmp_path: Path, tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    file = tmp_path / "house.txt"
    file.write_text(TEXT + "\n", encoding="utf-8")
    entry = PinnedText.model_validate({"name": "house", "file": str(file), "ttl": "1h", "priority": 3})
    tokens = message_tokens(TEXT, "system", tokenizer, template)
    assert encode_pinned(entry, tokenizer, template) == PinnedPrompt("house", tokens, ttl_s=3600.0, priority=3)
    raw = encode_pinned(written(raw=True), tokenizer, None)
    assert raw == PinnedPrompt("house", raw_tokens(TEXT, tokenizer))


def test_a_template_that_takes_no_system_message_says_what_to_do(tokenizer: Tokenizer) -> None:
    template = ChatTemplate({"default": PUBLISHED["gemma-2"]}, VARIABLES)
    with pytest.raises(PinnedPromptRefused, match=r"no system message \(System role not supported\). Try role: user"):
        encode_pinned(written(), tokenizer, template)


def test_a_model_without_a_template_takes_raw_texts_only(tokenizer: Tokenizer) -> None:
    with pytest.raises(PinnedPromptRefused, match=r"no chat template.*raw: true"):
        encode_pinned(written(), tokenizer, None)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, tokenizer: Tokenizer, template: ChatTemplate) -> None:
    entry = PinnedText.model_validate({"name": "house", "file": str(tmp_path / "gone.txt")})
    with pytest.raises(PinnedPromptRefused, match=r"'house' cannot be had: .*gone\.txt"):
        encode_pinned(entry, tokenizer, template)


_loaded: list[tuple[Tokenizer, ChatTemplate]] = []


def load_once() -> tuple[Tokenizer, ChatTemplate]:
    """Fixtures of a module are not for hypothesis' tests."""
    if not _loaded:
        found = load_chat_template(FOLDER)
        assert found is not None
        _loaded.append((load_tokenizer(FOLDER), found))
    return _loaded[0]
