"""Whether a draft model speaks its target's token ids: the same id must be the same piece of text in both.

The draft proposes ids, and the target takes them as its own. Ids that mean something else would give no wrong answer,
for the target checks each proposal, but hardly one would ever be accepted.

Runs in: anywhere; owns: nothing.
"""

from collections.abc import Iterable
from pathlib import Path

from edgekv.config.draft_forms import WITHOUT_DRAFT
from edgekv.errors import ModelError
from edgekv.text.tokenizer import Tokenizer
from edgekv.text.vocabulary import DecodeRules
from edgekv.text.vocabulary_tokenizer import VocabularyTokenizer

REMEDY = (
    "A draft must come from the same family: its tokenizer must be the target's. "
    f"Take another, or {WITHOUT_DRAFT}."
)


class VocabularyMismatch(ModelError):
    """A draft's token ids are not its target's; the ids are the two that should be one."""

    def __init__(self, message: str, target_id: int, draft_id: int) -> None:
        super().__init__(f"{message} {REMEDY}")
        self.target_id, self.draft_id = target_id, draft_id


class DifferentPieces(VocabularyMismatch):
    """Of `num_shared` ids that are tokens in both, `num_different` are not the same one, `token_id` the first."""

    def __init__(self, message: str, token_id: int, num_different: int, num_shared: int) -> None:
        super().__init__(message, token_id, token_id)
        self.token_id, self.num_different, self.num_shared = token_id, num_different, num_shared


def check_same_vocabulary(
    target: Tokenizer,
    draft: Tokenizer,
    *,
    target_name: str = "the target",
    draft_name: str = "the draft",
    draft_at: Path | None = None,
) -> None:
    """Raise where an id does not mean the same in both; the names are what errors call the models.

    `draft_at`: where the draft lies, for errors to tell.

    Their bytes decide, however the pieces are written. One may have more tokens than the other: only ids that are
    tokens in both are compared. How text is cut into tokens, and chat templates, make no difference to a draft.

    Raises:
        DifferentPieces: an id is another piece of text.
        VocabularyMismatch: another id begins or ends a text.
    """
    whose = draft_name if draft_at is None else f"{draft_name} {draft_at}"
    shared = range(min(target.vocab_size, draft.vocab_size))
    different = [
        token_id
        for token_id in _suspects(target, draft, shared)
        # No bytes: no token in this one, as the padding rows of an embedding table.
        if (of_target := target.token_bytes(token_id)) != (of_draft := draft.token_bytes(token_id))
        and of_target
        and of_draft
    ]
    if different:
        first = different[0]
        raise DifferentPieces(
            f"{whose}: token {first} is {_piece(target, first)} in {target_name} and {_piece(draft, first)} in "
            f"{draft_name}; {len(different):,} of {len(shared):,} token ids differ.",
            first,
            len(different),
            len(shared),
        )
    for what, of, from_ in (("begins", target.bos_id, draft.bos_id), ("ends", target.eos_id, draft.eos_id)):
        if of is not None and from_ is not None and of != from_:
            raise VocabularyMismatch(
                f"{whose}: the token that {what} a text is {of} {_piece(target, of)} in {target_name} and "
                f"{from_} {_piece(draft, from_)} in {draft_name}.",
                of,
                from_,
            )


def _suspects(target: Tokenizer, draft: Tokenizer, shared: range) -> Iterable[int]:
    """The ids that may be different bytes. Pieces that are written alike and read alike are not spelled out for it."""
    if not isinstance(target, VocabularyTokenizer) or not isinstance(draft, VocabularyTokenizer):
        return shared
    ours, theirs = target.vocabulary, draft.vocabulary
    if _spelling(ours.rules) != _spelling(theirs.rules):
        return shared
    pairs = zip(shared, ours.pieces, theirs.pieces, strict=False)
    return [token_id for token_id, of_target, of_draft in pairs if of_target != of_draft]


def _spelling(rules: DecodeRules) -> tuple[object, ...]:
    """All that decides the bytes of a piece that does not begin a text."""
    return rules.byte_level, rules.replacements, rules.byte_fallback


def _piece(tokenizer: Tokenizer, token_id: int) -> str:
    """As a person reads it; bytes where it is no whole text."""
    raw = tokenizer.token_bytes(token_id)
    try:
        return repr(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(raw)
