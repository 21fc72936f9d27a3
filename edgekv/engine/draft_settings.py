"""Who proposes tokens for a model to verify. Runs in: anywhere (no torch); owns: nothing."""

from dataclasses import dataclass
from pathlib import Path

from edgekv.config.model_path import model_name
from edgekv.config.settings import ModelDraft
from edgekv.config.units import Share
from edgekv.core.kv_format import KVDtypeName
from edgekv.demo import draft_path

LAG_TOKENS = 24
"""What a draft may lag behind a sequence and still begin a guess at once: what one verification leaves, and more."""


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

    @property
    def least_pool_tokens(self) -> int:
        """What the pool of a draft model has to hold for a whole guess behind the shortest texts that there are.

        A draft has blocks for all of a sequence and its guess, or none for it (see `draft_views`). Hardly a prompt in
        its chat template is shorter than LAG_TOKENS.
        """
        return LAG_TOKENS + self.tokens

    @classmethod
    def from_config(cls, draft: ModelDraft) -> "DraftSettings | None":
        """What a model's configuration, which was checked, asks for; None where it is off."""
        if draft.method == "off":
            return None
        assert draft.method == "ngram" or draft.path is not None, "a draft model without a path is no n-grams"
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
