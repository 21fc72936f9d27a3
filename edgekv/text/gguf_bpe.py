"""The byte-level BPE that a GGUF file carries, as a tokenizer of the `tokenizers` library. GGUF calls it "gpt2".

Runs in: anywhere; owns: nothing.
"""

from dataclasses import replace
from itertools import repeat

import tokenizers
from tokenizers import models, processors

from edgekv.formats.gguf_values import Metadata
from edgekv.formats.gguf_vocabulary import GgufVocabulary, TokenKind
from edgekv.text.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer
from edgekv.text.json_tokenizer import JsonTokenizer
from edgekv.text.tokenizer_files import AddedToken, TokenizerFiles
from edgekv.text.vocabulary import DecodeRules

_MERGES_KEY = "tokenizer.ggml.merges"
_PRE_KEY = "tokenizer.ggml.pre"
_MAX_MERGES = 1 << 21


def read_gguf_bpe(
    metadata: Metadata, vocabulary: GgufVocabulary, files: TokenizerFiles, *, max_bytes: int
) -> JsonTokenizer:
    """The tokenizer; raises ModelError naming file and key."""
    cut = _pre_tokenizer(metadata)
    texts = list(vocabulary.texts)
    padding = [token_id for token_id in range(len(texts)) if vocabulary.is_padding(token_id)]
    while padding and padding[-1] == len(texts) - 1:
        texts.pop()
        padding.pop()
    for token_id in padding:
        texts[token_id] = f"\ufdd0{token_id}"  # no byte is written so: no text becomes it
    ids = {text: token_id for token_id, text in enumerate(texts)}
    merges = _merges(metadata)
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=cut.ignore_merges))
    except Exception as error:  # the library raises bare Exception
        raise metadata.fault(_MERGES_KEY, f"not a vocabulary with its merges: {error}") from error
    if (normalizer := cut.normalizer()) is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = cut.pre_tokenizer()
    add_bos = cut.add_bos if files.add_bos is None else files.add_bos
    _surround(tokenizer, vocabulary, files.named, add_bos=add_bos, add_eos=bool(files.add_eos))
    files = replace(files, added=files.added | _added(vocabulary))
    rules, name = DecodeRules(byte_level=True), metadata.path.name
    return JsonTokenizer(name, tokenizer, rules, files.named, files, empty_ids=padding, max_bytes=max_bytes)


def _pre_tokenizer(metadata: Metadata) -> PreTokenizer:
    known = ", ".join(PRE_TOKENIZERS)
    if _PRE_KEY not in metadata:
        raise metadata.fault(
            _PRE_KEY,
            "is missing, so nothing tells how texts are cut into words: the file was made by a converter of before May "
            f"2024, convert or download it again; supported: {known}",
        )
    name = metadata.text(_PRE_KEY)
    if name not in PRE_TOKENIZERS:
        raise metadata.fault(_PRE_KEY, f"{name!r:.80} is not supported; supported: {known}")
    return PRE_TOKENIZERS[name]


def _merges(metadata: Metadata) -> list[tuple[str, str]]:
    """Each is "left right", since no byte is written as a space; whether they are tokens the library will say."""
    metadata.check_count(_MERGES_KEY, 0, _MAX_MERGES, "merges")
    lines = metadata.texts(_MERGES_KEY)
    merges = [(left, right) for left, _, right in map(str.partition, lines, repeat(" "))]
    for index, (left, right) in enumerate(merges):
        if not left or not right:
            raise metadata.fault(_MERGES_KEY, f"merge {index}, {lines[index]!r:.80}, is not of two tokens")
    return merges


def _added(vocabulary: GgufVocabulary) -> dict[int, AddedToken]:
    """Tokens that are found in a text before it is cut."""
    added = {}
    for token_id, (text, kind) in enumerate(zip(vocabulary.texts, vocabulary.kinds, strict=True)):
        if kind in (TokenKind.CONTROL, TokenKind.USER_DEFINED):
            special = kind == TokenKind.CONTROL or token_id in vocabulary.end_ids
            added[token_id] = AddedToken(text, special=special)
    return added


def _surround(
    tokenizer: tokenizers.Tokenizer, vocabulary: GgufVocabulary, named: dict[str, str], *, add_bos: bool, add_eos: bool
) -> None:
    bos = ["bos_token"] if add_bos and "bos_token" in named else []
    eos = ["eos_token"] if add_eos and "eos_token" in named else []
    if bos or eos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos], special_tokens=[(name, vocabulary.named[name]) for name in {*bos, *eos}]
        )
