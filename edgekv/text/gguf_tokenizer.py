"""The tokenizer and the chat templates that a GGUF file carries in its metadata.

Keys: docs/gguf.md of github.com/ggml-org/ggml.

Runs in: anywhere; owns: nothing.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from edgekv.formats.gguf_checkpoint import GgufCheckpoint
from edgekv.formats.gguf_values import Metadata
from edgekv.formats.gguf_vocabulary import GgufVocabulary, read_vocabulary
from edgekv.text.tokenizer_files import MAX_TEMPLATE_CHARS, TokenizerFiles

if TYPE_CHECKING:
    from edgekv.text.tokenizer import Tokenizer

_MODEL_KEY = "tokenizer.ggml.model"
_TEMPLATE_KEY = "tokenizer.chat_template"
_REFUSED = {
    "bert": "WordPiece",
    "t5": "a unigram model",
    "rwkv": "RWKV's",
    "plamo2": "PLaMo 2's",
    "gemma4": "Gemma 4's",
    "none": "none at all",
    "no_vocab": "none at all",
}


def load_gguf_tokenizer(path: Path, *, max_bytes: int) -> "Tokenizer":
    """The tokenizer; raises ModelError naming file and key."""
    metadata = _metadata(path)
    kind = metadata.text(_MODEL_KEY)
    if kind not in ("llama", "gpt2"):
        what = f" ({_REFUSED[kind]})" if kind in _REFUSED else ""
        raise metadata.fault(_MODEL_KEY, f"the tokenizer {kind!r:.80}{what} is not supported; supported: llama, gpt2")
    vocabulary = read_vocabulary(metadata)
    files = _tokenizer_files(metadata, vocabulary)
    if kind == "llama":
        from edgekv.text.gguf_sentencepiece import read_gguf_sentencepiece

        return read_gguf_sentencepiece(metadata, vocabulary, files, max_bytes=max_bytes)
    from edgekv.text.gguf_bpe import read_gguf_bpe

    return read_gguf_bpe(metadata, vocabulary, files, max_bytes=max_bytes)


def read_gguf_template_files(path: Path) -> TokenizerFiles:
    """What chat templates need; without templates, nothing else is read. Raises ModelError naming file and key."""
    metadata = _metadata(path)
    return _tokenizer_files(metadata, read_vocabulary(metadata) if _chat_templates(metadata) else None)


def _metadata(path: Path) -> Metadata:
    with GgufCheckpoint(path) as checkpoint:
        return checkpoint.metadata


def _tokenizer_files(metadata: Metadata, vocabulary: GgufVocabulary | None) -> TokenizerFiles:
    """The metadata in the form of the small files beside a tokenizer.json; whoever asks puts the added tokens in."""
    return TokenizerFiles(
        tokenizer_class="",
        model_type="",
        added={},
        named=vocabulary.named_texts if vocabulary is not None else {},
        extra=(),
        add_bos=_flag(metadata, "tokenizer.ggml.add_bos_token"),
        add_eos=_flag(metadata, "tokenizer.ggml.add_eos_token"),
        legacy=None,
        add_prefix_space=None,
        chat_templates=_chat_templates(metadata),
    )


def _flag(metadata: Metadata, key: str) -> bool | None:
    return metadata.flag(key, False) if key in metadata else None


def _chat_templates(metadata: Metadata) -> dict[str, str]:
    """Templates by name."""
    templates: dict[str, str] = {}
    for key in metadata:
        if key == _TEMPLATE_KEY or key.startswith(f"{_TEMPLATE_KEY}."):
            text = metadata.text(key)
            if len(text) > MAX_TEMPLATE_CHARS:
                raise metadata.fault(key, f"a chat template longer than {MAX_TEMPLATE_CHARS:,} characters")
            templates[key.removeprefix(_TEMPLATE_KEY).removeprefix(".") or "default"] = text
    return templates
