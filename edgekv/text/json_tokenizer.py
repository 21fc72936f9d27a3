"""tokenizer.json through the `tokenizers` library, with the ids `transformers.AutoTokenizer` gives; and, from whatever
else it was put together, any tokenizer of that library.

Ordinary text that spells a control token is encoded by a second tokenizer over the same model, in which control tokens
are reachable only by secret texts drawn at loading.

Runs in: anywhere; owns: the two tokenizers, unchanged after loading (encoding releases the GIL).
"""

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers import decoders, pre_tokenizers

from edgekv.errors import ModelError
from edgekv.text.control_text import ControlText
from edgekv.text.errors import TextError
from edgekv.text.tokenizer_files import NAMED_TOKENS, AddedToken, TokenizerFiles, added_token, read_text
from edgekv.text.vocabulary import SPACE_MARK, DecodeRules, Vocabulary, rules_of_decoder
from edgekv.text.vocabulary_tokenizer import VocabularyTokenizer

_LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


class JsonTokenizer(VocabularyTokenizer):
    """A tokenizer of the library.

    Args:
        name: what errors call the file.
        tokenizer: taken over, and given the added tokens of `files`.
        rules: how its pieces become text.
        named: "bos_token" … as templates see them.
        files: what lies beside it.
        empty_ids: ids whose pieces are no tokens, and never in a text.
        max_bytes: the longest text.

    Raises:
        ModelError: control tokens past any real ones.
    """

    def __init__(
        self,
        name: str,
        tokenizer: tokenizers.Tokenizer,
        rules: DecodeRules,
        named: Mapping[str, str],
        files: TokenizerFiles,
        *,
        empty_ids: Collection[int] = (),
        max_bytes: int,
    ) -> None:
        self._tokenizer = tokenizer
        added = _add_tokens(tokenizer, files, named)
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        pieces: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for piece, token_id in vocabulary.items():
            pieces[token_id] = piece
        for token_id, token in added.items():
            pieces[token_id] = token.content
        for token_id in empty_ids:
            pieces[token_id] = None
        super().__init__(
            Vocabulary(pieces, (token_id for token_id, token in added.items() if token.special), rules),
            ControlText(files.control_ids(name, added)),
            {key: named[key] for key in NAMED_TOKENS if key in named},
            {key: vocabulary[text] for key, text in named.items() if text in vocabulary},
            max_bytes=max_bytes,
        )
        self._added = added
        self._prefix, self._suffix = self._affixes()
        self._build_plain()

    @classmethod
    def read(cls, path: Path, files: TokenizerFiles, *, max_bytes: int) -> Self:
        """The tokenizer of a tokenizer.json.

        Raises:
            ModelError: not a tokenizer, or one whose text cannot be streamed.
        """
        source = read_text(path)
        try:
            description = json.loads(source)
            tokenizer = tokenizers.Tokenizer.from_str(source)
        except Exception as error:  # the library raises bare Exception
            raise ModelError(f"{path}: not a tokenizer: {error}") from error
        named = dict(files.named)
        if _is_rebuilt_by_transformers(files, description):
            named = _LLAMA_NAMES | named
            rules = _as_llama(tokenizer, files)
        else:
            try:
                rules = rules_of_decoder(description.get("decoder") or {"type": "none"})
            except (ValueError, KeyError) as error:
                raise ModelError(f"{path}: decoder: {error}") from error
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(str(path), tokenizer, rules, named, files, max_bytes=max_bytes)

    def encode(self, text: str, *, add_special_tokens: bool, parse_special: bool) -> list[int]:
        """Token ids of a text."""
        self._check(text)
        if parse_special:
            return _ids(self._tokenizer, text, add_special_tokens=add_special_tokens)
        ids = self._encode_parts(text, ())
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def encode_parts(self, text: str, control: Sequence[tuple[int, int]]) -> list[int]:
        """Token ids of a text in which only the `control` spans are control tokens."""
        self._check(text)
        return self._encode_parts(text, control)

    def _encode_parts(self, text: str, control: Sequence[tuple[int, int]]) -> list[int]:
        ids = self._encode_secretly(text, control, [])
        if self._forbidden.isdisjoint(ids):
            return self._reveal(ids)
        # The model itself knows the piece (a unigram vocabulary does): cut what spells it in two.
        taken = set(control)
        cuts = [start + 1 for start, end in self.control_text.spans(text) if (start, end) not in taken]
        ids = self._encode_secretly(text, control, cuts)
        if not self._forbidden.isdisjoint(ids):
            raise TextError("The text spells a control token that this tokenizer cannot write as ordinary text.")
        return self._reveal(ids)

    def _encode_secretly(self, text: str, control: Sequence[tuple[int, int]], cuts: Sequence[int]) -> list[int]:
        parts: list[str] = []
        position = 0
        edits = [(start, end, self._secrets[text[start:end]]) for start, end in control]
        for start, end, secret in sorted([*edits, *((cut, cut, self._cut) for cut in cuts)]):
            parts += [text[position:start], secret]
            position = end
        return _ids(self._plain, "".join([*parts, text[position:]]), add_special_tokens=False)

    def _reveal(self, ids: list[int]) -> list[int]:
        if self._revealed.keys().isdisjoint(ids):
            return ids
        revealed = self._revealed
        return [known for token_id in ids if (known := revealed.get(token_id, token_id)) is not None]

    def _affixes(self) -> tuple[list[int], list[int]]:
        body = _ids(self._tokenizer, "a", add_special_tokens=False)
        full = _ids(self._tokenizer, "a", add_special_tokens=True)
        for at in range(len(full) - len(body) + 1):
            if full[at : at + len(body)] == body:
                return full[:at], full[at + len(body) :]
        return [], []

    def _build_plain(self) -> None:
        """The second tokenizer: no control token can be spelled in it except by its secret."""
        plain = tokenizers.Tokenizer(self._tokenizer.model)
        if self._tokenizer.normalizer is not None:
            plain.normalizer = self._tokenizer.normalizer
        if self._tokenizer.pre_tokenizer is not None:
            plain.pre_tokenizer = self._tokenizer.pre_tokenizer
        key = secrets.token_hex(16)
        self._cut = f"\ufdd0{key}\ufdd1"
        self._secrets: dict[str, str] = {}
        self._revealed: dict[int, int | None] = {}
        stand_ins: list[tuple[AddedToken, int | None]] = [(AddedToken(self._cut), None)]
        for token_id, token in sorted(self._added.items()):
            content = token.content
            if content in self.control_text.ids:
                secret = self._secrets[content] = f"\ufdd0{key}{len(stand_ins)}\ufdd1"
                token = AddedToken(secret, lstrip=token.lstrip, rstrip=token.rstrip)
            stand_ins.append((token, token_id))
        plain.add_tokens([_library_token(token) for token, _ in stand_ins])
        for token, known_id in stand_ins:
            own_id = plain.token_to_id(token.content)
            if own_id is not None:
                self._revealed[own_id] = known_id
        unknown = self._named_ids.get("unk_token")
        self._forbidden = set(self.control_text.ids.values()) - {unknown} - self._revealed.keys()
        self._plain = plain


def _ids(tokenizer: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    # The batch call releases the GIL and computes no offsets.
    ids: list[int] = tokenizer.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    return ids


def _library_token(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=token.special,
    )


def _add_tokens(
    tokenizer: tokenizers.Tokenizer, files: TokenizerFiles, named: Mapping[str, str]
) -> dict[int, AddedToken]:
    """Add what the files beside tokenizer.json declare, in transformers' order; returns all added tokens by id."""
    tokenizer.add_tokens([_library_token(token) for _, token in sorted(files.added.items())])
    declared = {token.content: token for token in files.added.values()}
    special = [
        declared.get(content) or AddedToken(content, special=True) for content in [*named.values(), *files.extra]
    ]
    tokenizer.add_special_tokens([_library_token(token) for token in special])
    return {
        token_id: added_token(
            {
                "content": token.content,
                "special": token.special,
                "normalized": token.normalized,
                "lstrip": token.lstrip,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
            }
        )
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
    }


def _is_rebuilt_by_transformers(files: TokenizerFiles, description: dict[str, Any]) -> bool:
    """Whether transformers 5 builds LlamaTokenizer from the vocabulary and ignores the file's own normalizer.

    It does for that class, unless the file is byte-level or the model is of the Mistral family.
    """
    if files.tokenizer_class.removesuffix("Fast") != "LlamaTokenizer" or files.model_type.startswith("mi"):
        return False
    model = description.get("model") or {}
    steps = [description.get("pre_tokenizer") or {}, description.get("decoder") or {}]
    steps += [inner for step in steps for inner in [*step.get("pretokenizers", ()), *step.get("decoders", ())]]
    return model.get("type") == "BPE" and not any(step.get("type") == "ByteLevel" for step in steps)


def _as_llama(tokenizer: tokenizers.Tokenizer, files: TokenizerFiles) -> DecodeRules:
    """LlamaTokenizer: a space mark before the first word, or before each part when `legacy`."""
    prefix = files.add_prefix_space is not False
    scheme = "never" if not prefix else "always" if files.legacy else "first"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE_MARK, prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.ByteFallback()
    return DecodeRules(replacements=((SPACE_MARK, " "),), byte_fallback=True, strip_left=int(prefix))
