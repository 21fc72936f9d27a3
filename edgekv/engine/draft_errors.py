"""What is wrong with a draft model, told as its and with what to do. Runs in: anywhere (no torch); owns: nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgekv.config.draft_forms import WITHOUT_DRAFT
from edgekv.config.model_path import why_no_model
from edgekv.config.units import format_size
from edgekv.core.kv_format import KVPlan
from edgekv.errors import EdgeKVError, ModelError
from edgekv.text.same_vocabulary import VocabularyMismatch


class DraftUnusable(ModelError):
    """A draft model cannot be used, `reason` says why; its target may well be."""

    def __init__(self, folder: Path, reason: str) -> None:
        reason = reason.removeprefix(f"{folder}: ")
        # A file in it has the folder in its name.
        whose = "the draft model" if str(folder) in reason else f"the draft model {folder}"
        super().__init__(f"{whose}: {reason.rstrip('.')}. Take another, or {WITHOUT_DRAFT}.")
        self.folder, self.reason = folder, reason


class DraftPoolTooSmall(EdgeKVError):
    """The pool that `draft.kv.budget` asks for holds too little for any proposal; `advice` leaves the name out."""

    def __init__(self, budget_bytes: int, pool: KVPlan, least_tokens: int) -> None:
        blocks = -(-least_tokens // pool.block_size)
        least_bytes = blocks * pool.block_bytes
        self.advice = (
            f"{format_size(budget_bytes)} holds {pool.pool_tokens} tokens of the draft model, which proposes nothing "
            f"to speak of with fewer than {least_tokens}. Set draft.kv.budget to {-(-least_bytes // 1024)}KiB or more, "
            f"or to auto; or {WITHOUT_DRAFT}"
        )
        super().__init__(f"draft.kv.budget: {self.advice}")
        self.budget_bytes, self.least_bytes = budget_bytes, least_bytes


@contextmanager
def told_of_draft(folder: Path) -> Iterator[None]:
    """Whatever is wrong with the model files that are read meanwhile is told as the draft's in `folder`."""
    try:
        yield
    except (DraftUnusable, VocabularyMismatch):
        raise
    except ModelError as error:
        raise DraftUnusable(folder, str(error)) from error


def check_is_model(folder: Path) -> None:
    """Raise DraftUnusable where the path is none of a model."""
    if fault := why_no_model(folder):
        raise DraftUnusable(folder, fault)
