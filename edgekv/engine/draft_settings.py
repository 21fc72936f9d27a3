"""Who proposes tokens for a model to verify. Runs in: anywhere (no torch); owns: nothing."""

from dataclasses import dataclass
from pathlib import Path

from edgekv.config.model_path import model_name
from edgekv.config.settings import ModelDraft
from edgekv.config.units import Share
from edgekv.core.kv_format import KVDtypeName
from edgekv.demo import draft_path


@dataclass(frozen=True, slots=True)
class DraftSettings:
    """Who proposes tokens for the model to verify: the draft model of `folder`; where that is None, n-grams.

    `tokens`: the most proposed for a sequence in one step. `kv_dtype`, `kv_budget`: of the draft model's pool, as in
    `EngineSettings`. `min_acceptance`: where a first proposal is accepted less often, none are made for a while,
    even where they would pay.
    """

    folder: Path | None = None
    tokens: int = 8
    kv_dtype: KVDtypeName | None = None
    kv_budget: int | float | None = None
    min_acceptance: float = 0.0

    @classmethod
    def from_config(cls, draft: ModelDraft) -> "DraftSettings":
        """What a model's configuration asks for."""
        budget, dtype = draft.kv.budget, draft.kv.dtype
        return cls(
            folder=draft.path,  # which n-grams have not
            tokens=draft.tokens,
            kv_dtype=None if dtype == "auto" else dtype,
            kv_budget=None if budget == "auto" else budget.fraction if isinstance(budget, Share) else budget,
            min_acceptance=draft.min_acceptance,
        )


def drafter_name(folder: Path) -> str:
    """What a draft model is called: "demo" for the demo model's, else as its folder or GGUF file is."""
    return "demo" if folder == draft_path() else model_name(folder)
