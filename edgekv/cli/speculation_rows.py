"""What turns with and without speculation come to: the rows of a result.

Runs in: the main thread; owns: nothing.
"""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from edgekv.cli.operation_times import by_operation
from edgekv.cli.percentile import percentile

if TYPE_CHECKING:
    from edgekv.engine.measure_speculation import Way
    from edgekv.engine.step_sums import StepSums, Turn


def row(rounds: Sequence[Sequence["Turn"]], plain: Sequence[Sequence["Turn"]]) -> dict[str, Any]:
    """What a way came to over its rounds of turns, beside the turns that were taken without speculation."""
    from edgekv.engine.step_sums import Turn

    total = Turn()
    for turn in (turn for turns in rounds for turn in turns):
        total.add(turn)
    samples, plain_samples = [_tok_s(turns) for turns in rounds], [_tok_s(turns) for turns in plain]
    paired = [
        turn.tok_s / other.tok_s
        for turns, others in zip(rounds, plain, strict=True)
        for turn, other in zip(turns, others, strict=True)
    ]
    steps, decoding = total.steps, total.decoding
    parts = {"draft": steps.propose_s, "model": steps.forward_s, "sampling": steps.sample_s}
    parts["rest"] = steps.total_s - sum(parts.values())
    return {
        "tokens": steps.tokens,
        "tok_s": round(statistics.median(samples), 2),
        "samples_tok_s": [round(sample, 2) for sample in samples],
        "ratio": round(statistics.median(samples) / statistics.median(plain_samples), 3),
        "paired_ratio": {f"p{percent}": round(percentile(paired, percent) or 0.0, 3) for percent in (10, 50, 90)},
        "acceptance": _share(total.accepted, total.proposed),
        "first_accepted": _share(total.first_right, total.verifications),
        "tokens_a_step": _share(decoding.tokens, decoding.sequences),
        "proposed_a_step": _share(decoding.proposed, decoding.sequences),
        "sequences_a_step": _share(decoding.sequences, decoding.steps),
        "shares": {name: _share(part_s, steps.total_s) for name, part_s in parts.items()},
        "steps": {kind.value: _steps(sums) for kind, sums in total.kinds.items()},
    }


def _tok_s(turns: Sequence["Turn"]) -> float:
    steps = [turn.steps for turn in turns]
    return sum(each.tokens for each in steps) / sum(each.total_s for each in steps)


def _share(part: float, whole: float) -> float | None:
    return round(part / whole, 4) if whole else None


def _steps(sums: "StepSums") -> dict[str, Any]:
    """Of one kind of step: how many, and the mean one in milliseconds."""
    parts = {
        "ms": sums.total_s,
        "proposing_ms": sums.propose_s,
        "kernels_ms": sums.model_s,
        "preparing_ms": sums.forward_s - sums.model_s,
        "sampling_ms": sums.sample_s,
        "deciding_ms": sums.decide_s,
        "planning_ms": sums.plan_s,
        "reporting_ms": sums.report_s,
        "rest_ms": sums.rest_s,
    }
    return {
        "steps": sums.steps,
        "sequences": round(sums.sequences / sums.steps, 2),
        "rows": round(sums.rows / sums.steps, 2),
        "tokens": round(sums.tokens / sums.steps, 2),
        **{name: round(seconds / sums.steps * 1e3, 4) for name, seconds in parts.items()},
    }


def operations(way: "Way", turns: Sequence["Turn"]) -> dict[str, dict[str, float]]:
    """For each kind of step, milliseconds of one by operation; of native kernels only."""
    from edgekv.engine.step_sums import OF_DRAFT, Turn
    from edgekv.model.native_lm import NativeLM

    total = Turn()
    for turn in turns:
        total.add(turn)
    profile: dict[str, dict[str, float]] = {}
    for kind, sums in total.kinds.items():
        model = way.meter.draft if kind in OF_DRAFT else way.meter.model
        if sums.operation_ns is not None and isinstance(model, NativeLM):
            seconds, _ = by_operation(model.lowered.operations, sums.operation_ns.tolist(), sums.steps)
            profile[kind.value] = {name: round(spent * 1e3, 4) for name, spent in seconds.items()}
    return profile
