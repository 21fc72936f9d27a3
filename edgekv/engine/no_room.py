"""What a person is told when a plan does not fit its device: where the bytes go, and which setting to lower to what.

Runs in: anywhere; owns: nothing.
"""

from edgekv.config.units import format_size, setting_size
from edgekv.core.draft_plan import DraftPlan
from edgekv.core.memory_plan import MemoryPlan
from edgekv.errors import EdgeKVError, OverBudget


class NoRoomForKV(EdgeKVError):
    """Not one block of the KV pool fits."""

    def __init__(self, memory: MemoryPlan) -> None:
        kv = memory.kv
        block = f"one block of {kv.block_size} tokens takes {format_size(kv.block_bytes)}"
        if memory.missing_bytes:
            missing = format_size(memory.missing_bytes)
            remedies = _from_draft(memory, memory.missing_bytes) + _remedies(memory, memory.missing_bytes)
            super().__init__(
                f"The model leaves no room for its KV cache: {missing} more would be needed, and {block}. "
                f"{_account(memory)}. {_sentence([*remedies, 'see what would make it fit with: edgekv plan MODEL'])}"
            )
        else:
            super().__init__(f"The KV budget holds no block: {block}. Raise kv.budget.")
        self.missing_bytes, self.block_bytes = memory.missing_bytes, kv.block_bytes


class KVBudgetTooLarge(OverBudget):
    """The KV pool that was asked for is more than all else leaves."""

    def __init__(self, memory: MemoryPlan, over: OverBudget) -> None:
        asked, left = over.asked_bytes, over.free_bytes
        remedies = [f"set kv.budget to {setting_size(left)} or less, or leave it out"]
        remedies += _from_draft(memory, asked - left) + _remedies(memory, asked - left)
        super().__init__(
            over.name,
            asked,
            left,
            over.budget_bytes,
            f"kv.budget: a KV pool of {format_size(asked)} does not fit, {format_size(left)} are left for it. "
            f"{_account(memory)}. {_sentence(remedies)}",
        )


class NoRoomForDraft(EdgeKVError):
    """The draft model's pool would hold no block."""

    def __init__(self, draft: DraftPlan) -> None:
        block = format_size(draft.kv.block_bytes)
        super().__init__(
            f"draft.kv.budget: not one block of the draft model's keys and values fits, which takes {block}. "
            "Give it more, or leave the draft out (--draft off)."
        )
        self.draft = draft


def _account(memory: MemoryPlan) -> str:
    """Where the device's bytes go that the KV pool does not get."""
    device = "main memory" if memory.device == "cpu" else "the card's memory"
    taken = []
    if memory.others_bytes:
        taken.append(f"others hold {format_size(memory.others_bytes)}")
    taken.append(f"{format_size(memory.headroom_bytes)} stay free for others")
    if memory.withheld_bytes:
        taken.append(f"vram_budget leaves them another {format_size(memory.withheld_bytes)}")
    parts = [f"{name} {format_size(size)}" for name, size in memory.leases.items() if name != "kv.target"]
    taken.append(f"the model takes {format_size(memory.fixed_bytes)} ({', '.join(parts)})")
    return f"Of {format_size(memory.total_bytes)} of {device}, {', '.join(taken)}"


def _remedies(memory: MemoryPlan, short_bytes: int) -> list[str]:
    """What could be had from others, each enough by itself."""
    most = memory.total_bytes if memory.most_bytes is None else memory.most_bytes
    if memory.withheld_bytes >= short_bytes:
        return [f"raise vram_budget, which is {format_size(most)}"]
    if memory.others_bytes >= short_bytes and memory.budget_bytes + short_bytes <= most:
        return [f"close other programs until {format_size(short_bytes)} more are free"]
    return []


def _from_draft(memory: MemoryPlan, short_bytes: int) -> list[str]:
    """What the draft could give, each enough by itself."""
    draft = memory.draft
    if draft is None or draft.num_bytes < short_bytes:
        return []
    remedies = [f"leave the draft out (--draft off), which takes {format_size(draft.num_bytes)}"]
    left_bytes = draft.kv.pool_bytes - short_bytes
    if memory.missing_bytes:
        # Room for what was asked for, or a whole context: in main memory a pool that is not told its size takes half.
        kv = memory.kv
        context_bytes = -(-memory.context_tokens // kv.block_size) * kv.block_bytes
        left_bytes -= max(kv.pool_bytes, 2 * context_bytes)
    if left_bytes >= draft.kv.block_bytes:
        remedies.insert(0, f"lower draft.kv.budget to {setting_size(left_bytes)} or less")
    return remedies


def _sentence(remedies: list[str]) -> str:
    text = "; or ".join(remedies)
    return text[0].upper() + text[1:]
