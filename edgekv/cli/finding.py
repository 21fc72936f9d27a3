"""One thing that `edgekv doctor` looked at. Runs in: anywhere; owns: nothing (frozen data)."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found. `fix` is empty where nothing has to be done."""

    verdict: Verdict
    subject: str
    found: str
    fix: str = ""
