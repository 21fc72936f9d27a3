"""How speculation goes, in lines for `edgekv status`. Runs in: anywhere; owns: nothing."""

from collections.abc import Iterator
from typing import Any

from edgekv.core.step import SpeculationState


def speculation_lines(told: dict[str, Any] | None) -> Iterator[str]:
    """Who drafts and what that gains; none where nobody does. `told`: as /api/edgekv/memory has it."""
    if told is None:
        return
    who = "n-grams" if told["method"] == "ngram" else told["drafter"] or "a model"
    most = "" if told["most_tokens"] is None else f", up to {_tokens(told['most_tokens'])} at once"
    is_on = told["state"] == SpeculationState.ON
    measured = ", ".join(_measured(told, is_on=is_on))
    yield f"draft   {who}{most}, {told['state']}: {told['detail'] or measured or 'nothing was measured yet'}"
    if told["detail"] and measured:
        yield f"        when last tried: {measured}"
    if told["pool"] is not None and told["pool"]["total_blocks"]:
        yield f"        {blocks_line(told['pool'])}"
    counts = [
        f"{done} {told[name]:,} time{'s' if told[name] > 1 else ''}"
        for name, done in (("pauses", "paused"), ("yields", "gave its memory back"), ("returns", "took it again"))
        if told[name]
    ]
    if counts:
        yield f"        {', '.join(counts)}"


def blocks_line(pool: dict[str, Any]) -> str:
    """What a pool of blocks holds."""
    total, size = pool["total_blocks"], pool["block_size"]
    return (
        f"{total * size:,} tokens in {total:,} blocks: {pool['active_blocks']:,} in use, "
        f"{pool['cached_blocks']:,} cached, {pool['free_blocks']:,} free"
    )


def _measured(told: dict[str, Any], *, is_on: bool) -> Iterator[str]:
    if told["acceptance"] is not None:
        if is_on:  # else the mean has faded, for the steps since have proposed nothing
            yield f"{told['tokens']:.1f} proposed for a sequence"
        yield f"{100 * told['acceptance']:.0f} % accepted"
    if told["tokens_a_step"] is not None:
        yield f"{told['tokens_a_step']:.1f} tokens a step"
    if told["speedup"] is not None:
        yield f"{told['speedup']:.2f}x as fast as without"


def _tokens(count: int) -> str:
    return f"{count} token{'s' if count > 1 else ''}"
