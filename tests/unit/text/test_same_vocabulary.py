"""A draft's token ids are its target's, or it is refused with the ids that are not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from edgekv.errors import ModelError
from edgekv.text.same_vocabulary import DifferentPieces, VocabularyMismatch, check_same_vocabulary
from edgekv.text.tokenizer import Tokenizer, load_tokenizer
from tests.model.gguf_files import make_vocabulary
from tests.unit.text.tiny_tokenizers import write_byte_bpe, write_config, write_sentencepiece

DEMO = Path(__file__).parents[3] / "edgekv/demo"
LARGE = 200_000


def edited(folder: Path, copy: Path, **config: Any) -> Path:
    """A copy with other fields in tokenizer_config.json."""
    shutil.copytree(folder, copy)
    path = copy / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return copy


def with_vocabulary(folder: Path, pieces: list[str]) -> Tokenizer:
    """A byte-level tokenizer of these pieces."""
    folder.mkdir()
    tokenizer = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    nothing = dict.fromkeys(("bos_token", "eos_token", "unk_token", "chat_template"))
    write_config(folder, tokenizer_class="PreTrainedTokenizerFast", **nothing)
    return load_tokenizer(folder)


def test_the_demos_draft_is_of_its_targets_family() -> None:
    check_same_vocabulary(load_tokenizer(DEMO / "target"), load_tokenizer(DEMO / "draft"))


def test_the_form_of_the_file_makes_no_difference(tmp_path: Path) -> None:
    """tokenizer.json against tokenizer.model, either way round, with another chat template beside it."""
    folder = edited(DEMO / "draft", tmp_path / "sentencepiece", chat_template="{{ messages }}")
    (folder / "tokenizer.json").unlink()
    target, draft = load_tokenizer(DEMO / "target"), load_tokenizer(folder)
    assert type(target) is not type(draft)
    check_same_vocabulary(target, draft)
    check_same_vocabulary(draft, target)


def test_a_gguf_file_may_go_with_a_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["byte-level"]
    target = load_tokenizer(folder)
    file = make_vocabulary(folder, tmp_path / "draft.gguf", num_tokens=target.vocab_size + 5)  # with padding
    check_same_vocabulary(target, load_tokenizer(file))


def test_the_same_piece_may_be_written_otherwise(tmp_path: Path) -> None:
    """A space as U+2581 or as "Ġ", a byte by its number or as a character."""
    byte_level = with_vocabulary(tmp_path / "bytes", ["a", "Ġ", "Ġwater", "Ċ"])
    pieces = ["a", "▁", "▁water", "<0x0A>"]
    marked = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    marked.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    shutil.copytree(tmp_path / "bytes", tmp_path / "marked")
    marked.save(str(tmp_path / "marked/tokenizer.json"))
    check_same_vocabulary(byte_level, load_tokenizer(tmp_path / "marked"))


def test_alike_pieces_of_unlike_decoders_are_spelled_out(tmp_path: Path) -> None:
    """ "Ġ" is a space to one and itself to the other."""
    byte_level = with_vocabulary(tmp_path / "bytes", ["a", "Ġ"])
    plain = tokenizers.Tokenizer(models.BPE({"a": 0, "Ġ": 1}, []))
    plain.decoder = decoders.Fuse()
    shutil.copytree(tmp_path / "bytes", tmp_path / "plain")
    plain.save(str(tmp_path / "plain/tokenizer.json"))
    with pytest.raises(DifferentPieces, match="token 1 is ' ' in the target and 'Ġ' in the draft"):
        check_same_vocabulary(byte_level, load_tokenizer(tmp_path / "plain"))


def test_exchanged_pieces_are_named(tmp_path: Path) -> None:
    pieces = ["a", "b", "Ġwater", "Ġ", "Ã"]
    target = with_vocabulary(tmp_path / "target", pieces)
    draft = with_vocabulary(tmp_path / "draft", ["a", "b", "Ã", "Ġ", "Ġwater"])
    with pytest.raises(DifferentPieces) as refusal:
        check_same_vocabulary(target, draft, target_name="garden-8b", draft_name="garden-1b", draft_at=Path("/m"))
    assert str(refusal.value) == (
        "garden-1b /m: token 2 is ' water' in garden-8b and b'\\xc3' in garden-1b; 2 of 5 token ids differ. "
        "A draft must come from the same family: its tokenizer must be the target's. Take another, or go without one "
        "(--draft off, or in a configuration draft: off)."
    )
    assert (refusal.value.token_id, refusal.value.num_different, refusal.value.num_shared) == (2, 2, 5)
    assert isinstance(refusal.value, ModelError)


def test_another_family_is_refused(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(DifferentPieces, match="token 0 is"):
        check_same_vocabulary(tokenizers["sentencepiece"], tokenizers["byte-level"])


def test_one_may_have_more_tokens_at_its_end(tmp_path: Path) -> None:
    small = load_tokenizer(write_byte_bpe(tmp_path / "small"))
    added = {str(small.vocab_size + 3): {"content": "<|tool|>", "special": True}}
    large = load_tokenizer(edited(tmp_path / "small", tmp_path / "large", added_tokens_decoder=added))
    assert large.vocab_size > small.vocab_size
    check_same_vocabulary(small, large)
    check_same_vocabulary(large, small)


def test_ids_without_a_token_are_nobodys(tmp_path: Path) -> None:
    """Rows that one pads its table with, and the other has tokens for."""
    folder = write_sentencepiece(tmp_path / "sentencepiece")
    size = load_tokenizer(folder).vocab_size
    gapped = {str(size + i): {"content": f"<|{i}|>", "special": True} for i in (1, 3)}
    filled = {str(size + i): {"content": f"<|{i}|>", "special": True} for i in range(4)}
    draft = load_tokenizer(edited(folder, tmp_path / "gapped", added_tokens_decoder=gapped))
    target = load_tokenizer(edited(folder, tmp_path / "filled", added_tokens_decoder=filled))
    assert draft.token_bytes(size) == b""
    check_same_vocabulary(target, draft)
    check_same_vocabulary(draft, target)


@pytest.mark.parametrize(("name", "what"), [("bos_token", "begins"), ("eos_token", "ends")])
def test_another_special_token_is_named(name: str, what: str, tmp_path: Path) -> None:
    target = load_tokenizer(DEMO / "target")
    named = {"bos_token": target.bos_id, "eos_token": target.eos_id}[name]
    draft = load_tokenizer(edited(DEMO / "draft", tmp_path / "draft", **{name: "</s>"}))
    wanted = rf"that {what} a text is {named} '.*' in the target and \d+ '</s>' in the draft\. A draft must come from"
    with pytest.raises(VocabularyMismatch, match=wanted) as refusal:
        check_same_vocabulary(target, draft)
    assert refusal.value.target_id == named != refusal.value.draft_id


def test_a_model_without_a_beginning_says_nothing_about_it(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["byte-level"]
    silent = edited(folder, tmp_path / "silent", bos_token=None)
    draft = load_tokenizer(silent)
    assert draft.bos_id is None
    check_same_vocabulary(load_tokenizer(folder), draft)
    check_same_vocabulary(draft, load_tokenizer(folder))


def test_a_large_vocabulary_is_not_spelled_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second, and tens of megabytes that the tokenizers would keep."""
    pieces = [f"w{i}" for i in range(LARGE)]
    target = with_vocabulary(tmp_path / "target", pieces)
    draft = with_vocabulary(tmp_path / "draft", [*pieces[:-1], "other"])
    spelled: list[int] = []
    spell = type(target).token_bytes
    monkeypatch.setattr(type(target), "token_bytes", lambda self, i: spelled.append(i) or spell(self, i))
    check_same_vocabulary(target, target)
    assert not spelled
    with pytest.raises(DifferentPieces, match=f"; 1 of {LARGE:,} token ids differ"):
        check_same_vocabulary(target, draft)
    assert set(spelled) == {LARGE - 1}
