"""A day of serving in minutes: the real actors and engine on a card that other programs use, on a clock that jumps.

    python -m bench.compressed [--steps 1000000] [--seed 1]

Everything is real but the model, the card and the clock: admission, streams, the engine's actor, the guard with its
policy, scheduler, blocks, segments, ledger. A step takes 80 ms of the clock, so that a million are a day. Clients of
both priorities come in crowds and leave when they like; games and browsers take memory, and the driver hangs, vanishes
and moves memory of ours out of the card. Prints a table; exit status 1 if any of these was broken:

- every request that has started ends with all its tokens, unless its client left;
- within a bound: no more than (1 + SPARED_AFTER) * its own steps, because it may be computed anew after each of so many
  preemptions, and after each of these and before the first it waits for its turn, in which one of the slots comes free
  (at most the steps of the longest request) as often as the other priority's weight lets others pass. A step counts by
  the part of the pool that there is, and not at all while the pool could not hold the request;
- no step begins while memory of ours is out of the card and the detector has said so (unless it cannot see any more);
- the leases never exceed the budget;
- somebody is served whenever the pool could hold any request;
- at the end no stream, claim, block or lease is left, and the process has not grown.
"""

import argparse
import gc
import logging
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
import trio
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from edgekv.actors.service import SequenceDraft
from edgekv.actors.stream import Failed
from edgekv.core.pressure import FROZEN_S
from edgekv.core.sampling import SamplingParams
from edgekv.core.scheduler import SPARED_AFTER, Limits
from edgekv.core.sequence import FinishReason
from edgekv.core.spill import State
from edgekv.core.step import Finished, Started, StepPlan, TokenOut
from edgekv.errors import QueueFull
from tests.actors.fakes import run_seeded
from tests.actors.guarded import Guarded
from tests.actors.simulated_card import BLOCK_SIZE, GIB, MIB, SEGMENT_BLOCKS, SimulatedCard, SimulatedEngine

STEP_S = 0.08
SEGMENTS = 24
SLOTS = 8
LIMITS = Limits(max_sequences=SLOTS, max_step_tokens=256, mixed_step_tokens=64)
MAX_WAIT_S = {0: 90.0, 10: 600.0}
MOST_PROMPT, MOST_OUTPUT = 600, 160
FAMILY_TOKENS = 200
IDLE_S = 60.0
LAST_S = 4 * 3600.0
ALLOWED_GROWTH_BYTES = 8 * MIB


def own_steps(prompt_tokens: int, output_tokens: int) -> int:
    """The most steps that a request takes once it has a slot: prompts share what decodes leave of a step."""
    return -(-prompt_tokens * SLOTS // (LIMITS.mixed_step_tokens - SLOTS)) + output_tokens


def bound_steps(prompt_tokens: int, output_tokens: int, priority: int) -> int:
    """The most steps of a whole pool between a request's first and its last (see above)."""
    weights = LIMITS.weights
    passed_by = sum(weight for other, weight in weights.items() if other != priority) / weights[priority]
    turns = (1 + SPARED_AFTER) * (1 + passed_by)
    own = (1 + SPARED_AFTER) * own_steps(prompt_tokens, output_tokens)
    return round(own + turns * own_steps(MOST_PROMPT, MOST_OUTPUT))


@dataclass
class Result:
    """What happened, and what should not have."""

    broken: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    events: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    clock_s: float = 0.0
    wall_s: float = 0.0
    worst: dict[int, float] = field(default_factory=lambda: {0: 0.0, 10: 0.0})
    rss: list[tuple[int, int]] = field(default_factory=list)

    @property
    def growth_bytes(self) -> float:
        """By how much the process grows in the second half, at the slope of its resident memory then."""
        half = [(step, num_bytes) for step, num_bytes in self.rss if step >= self.steps / 2]
        if len(half) < 3:
            return 0.0
        slope = statistics.linear_regression([step for step, _ in half], [num_bytes for _, num_bytes in half]).slope
        return slope * self.steps / 2


class Soak:
    """One run."""

    def __init__(self, steps: int, dice: random.Random, on_progress: Callable[[int], None]) -> None:
        self.dice = dice
        self.target_steps = steps
        self.on_progress = on_progress
        self.card = SimulatedCard(total_bytes=8 * GIB, others_bytes=1 * GIB, stray_share=0.5)
        engine = SimulatedEngine(
            self.card, pool_segments=SEGMENTS, ceiling_segments=SEGMENTS, limits=LIMITS, on_step=self.before_step
        )
        self.server = Guarded(self.card, engine=engine, max_queue=24, max_wait_s=MAX_WAIT_S, step_s=STEP_S)
        self.result = Result()
        self.served_at = 0.0
        self.steps_by_segments = [0.0] * (SEGMENTS + 1)
        self.said_spilled_at: float | None = None
        self.games_bytes = 0
        self.families = [[self.dice.randrange(1000) for _ in range(FAMILY_TOKENS)] for _ in range(6)]

    @property
    def is_over(self) -> bool:
        return self.result.steps >= self.target_steps

    def expect(self, holds: bool, what: str) -> None:
        if not holds and len(self.result.broken) < 20:
            self.result.broken.append(f"step {self.result.steps}: {what}")

    async def run(self) -> Result:
        began = time.perf_counter()
        async with self.server.running():
            async with trio.open_nursery() as world:
                for task in (self.others, self.games, self.spills, self.trouble, self.listen, self.look_after):
                    world.start_soon(task)
                async with trio.open_nursery() as clients:
                    await self.crowds(clients)
                    clients.cancel_scope.deadline = trio.current_time() + LAST_S
                self.expect(not clients.cancel_scope.cancelled_caught, f"requests have not ended after {LAST_S:.0f} s")
                await trio.sleep(IDLE_S)  # the last that left are still being told to the engine
                world.cancel_scope.cancel()
            self.check_end()
        self.result.clock_s = trio.current_time()
        self.result.wall_s = time.perf_counter() - began
        growth = self.result.growth_bytes
        self.expect(growth <= ALLOWED_GROWTH_BYTES, f"the process grew by {growth / MIB:.1f} MiB in the second half")
        return self.result

    # ---- the engine's steps

    def before_step(self, plan: StepPlan) -> None:
        result, now = self.result, trio.current_time()
        result.steps += 1
        self.served_at = now
        core = self.server.simulated.core
        pool = core.scheduler.cache.pool
        num_segments = pool.total_blocks // SEGMENT_BLOCKS
        self.steps_by_segments[num_segments] += num_segments / SEGMENTS
        ledger = self.server.simulated.ledger
        self.expect(ledger.leased_bytes <= ledger.budget_bytes, "more is leased than the budget holds")
        said = self.said_spilled_at
        if said is not None and said < now - STEP_S - 1e-6:
            spilled = self.card.spilled_bytes
            self.expect(not spilled, f"a step with {spilled / MIB:.0f} MiB out of the card")
        if result.steps % 500 == 0:
            self.on_progress(result.steps)
            core.scheduler.cache.check_integrity(core.scheduler.running)
            self.server.simulated.segments.check_integrity()
        if result.steps % max(1, self.target_steps // 40) == 0:
            gc.collect()
            result.rss.append((result.steps, psutil.Process().memory_info().rss))

    def credit(self, tokens: int) -> float:
        """Steps so far of pools that could hold so many tokens, each counting by the size of its pool."""
        return sum(self.steps_by_segments[-(-tokens // (BLOCK_SIZE * SEGMENT_BLOCKS)) :])

    # ---- clients

    async def crowds(self, nursery: trio.Nursery) -> None:
        """Arrivals: quiet hours, ordinary ones, rushes."""
        dice = self.dice
        while not self.is_over:
            per_s, for_s = dice.choice([(0.02, 200), (0.4, 400), (0.8, 300), (3.0, 30)])
            until = trio.current_time() + dice.uniform(0.5, 1.5) * for_s
            while trio.current_time() < until and not self.is_over:
                await trio.sleep(dice.expovariate(per_s))
                nursery.start_soon(self.client)

    async def client(self) -> None:
        dice, counts = self.dice, self.result.counts
        prompt = [dice.randrange(1000) for _ in range(dice.randint(1, MOST_PROMPT - FAMILY_TOKENS))]
        if dice.random() < 0.6:
            prompt = dice.choice(self.families) + prompt
        output = min(MOST_OUTPUT, 1 + int(dice.expovariate(1 / 50)))
        draft = SequenceDraft(tuple(prompt), SamplingParams(max_tokens=output), dice.choice([0, 0, 10]))
        leaves_after = dice.randrange(output + 1) if dice.random() < 0.15 else None
        for _ in range(3):
            try:
                (stream,) = await self.server.service.open([draft])
                break
            except QueueFull as error:
                counts["refused"] += 1
                self.expect(1 <= error.retry_after_s <= 600, f"come back in {error.retry_after_s} s")
                await trio.sleep(error.retry_after_s)
        else:
            counts["gave up"] += 1
            return
        counts["let in"] += 1
        tokens, started, last = 0, None, None
        try:
            while events := await stream.take():
                for event in events:
                    if isinstance(event, Started):
                        started = self.credit(draft.needed_tokens)
                    elif isinstance(event, TokenOut):
                        tokens += 1
                    else:
                        last = event
                if leaves_after is not None and tokens >= leaves_after and last is None:
                    counts["left"] += 1
                    return
        finally:
            stream.close()
        match last:
            case Finished(reason=FinishReason.LENGTH):
                counts["finished"] += 1
                self.expect(tokens == output, f"{tokens} of {output} tokens")
                took = self.credit(draft.needed_tokens) - (started or 0.0)
                used = took / bound_steps(len(prompt), output, draft.priority)
                self.result.worst[draft.priority] = max(self.result.worst[draft.priority], used)
                self.expect(used <= 1, f"{took:.0f} steps for {len(prompt)} + {output} tokens")
            case Failed(code="kv_cache_full"):
                counts["waited too long"] += 1
                self.expect(started is None, "timed out after it had started")
            case _:
                self.expect(False, f"a stream ended with {last}")

    # ---- everything else on the machine

    async def others(self) -> None:
        """A browser that creeps, a few hundred MiB up and down, and the games on top."""
        base = float(self.card.others_bytes)
        while True:
            base = min(2.5 * GIB, max(0.5 * GIB, base + self.dice.gauss(0, 40 * MIB)))
            self.card.others_bytes = min(self.card.total_bytes, int(base) + self.games_bytes)
            await trio.sleep(self.dice.uniform(0.05, 2.0))

    async def games(self) -> None:
        dice = self.dice
        while True:
            await trio.sleep(dice.expovariate(1 / 900))
            for _ in range(dice.choice([1, 1, 1, 6])):  # one that is tried out again and again
                size = int(dice.uniform(1, 5.5) * GIB)
                for part in range(4):
                    self.games_bytes = size * (part + 1) // 4
                    await trio.sleep(0.05)
                await trio.sleep(dice.uniform(5, 400))
                self.games_bytes = 0
                await trio.sleep(dice.uniform(1, 60))

    async def spills(self) -> None:
        """The driver moves something of ours out of the card although there is room."""
        while True:
            await trio.sleep(self.dice.expovariate(1 / 400))
            if self.card.kv_bytes:
                self.card.stray_bytes = min(self.card.kv_bytes, int(self.dice.uniform(40, 600) * MIB))

    async def trouble(self) -> None:
        """The driver hangs, or vanishes for a while."""
        while True:
            await trio.sleep(self.dice.expovariate(1 / 500))
            if self.dice.random() < 0.7:
                self.card.hangs_until = trio.current_time() + self.dice.choice([0.3, 1, 5, 45])
            else:
                self.card.is_gone = True
                await trio.sleep(self.dice.uniform(1, 60))
                self.card.is_gone = False

    async def listen(self) -> None:
        """What the guard says, as it says it."""
        latest = 0.0
        async for view in self.server.watch.view.watch():
            now, reading = trio.current_time(), view.reading
            spilled = view.decision is not None and view.decision.condition.state is State.SPILLED
            if not spilled or reading is None or now - reading.at > FROZEN_S:
                self.said_spilled_at = None
            elif self.said_spilled_at is None:
                self.said_spilled_at = now
            for event in view.events:
                if event.at > latest:
                    self.result.events[event.kind] += 1
                    self.result.counts[f"MiB {event.kind}"] += event.num_bytes // MIB
            latest = max((event.at for event in view.events), default=latest)

    async def look_after(self) -> None:
        """Somebody is served whenever anybody could be."""
        can_since: float | None = None
        need = MOST_PROMPT + MOST_OUTPUT
        while True:
            await trio.sleep(1)
            stats = self.server.service.stats()
            memory = None if stats is None else stats.memory
            can = (
                stats is not None
                and self.server.admission.num_open > 0
                and stats.pool.total_blocks * BLOCK_SIZE >= need
                and not (memory is not None and memory.held)
            )
            now = trio.current_time()
            can_since = (can_since or now) if can else None
            if can_since is not None:
                idle_s = now - max(can_since, self.served_at)
                self.expect(idle_s < IDLE_S, f"nobody has been served for {idle_s:.0f} s")

    def check_end(self) -> None:
        core, server = self.server.simulated.core, self.server
        cache = core.scheduler.cache
        left = {
            "streams": len(server.engine._streams),
            "claims": server.admission.num_open,
            "claims that wait": server.admission.num_waiting,
            "sequences": core.scheduler.num_waiting + core.scheduler.num_running,
            "held blocks": cache.pool.active_blocks,
            "chains": len(cache._chains),
            "keys awaited": len(core.scheduler._prefilling_keys),
        }
        for what, number in left.items():
            self.expect(number == 0, f"{number} {what} left at the end")
        server.simulated.segments.check_integrity()
        leased = server.simulated.ledger.leased_bytes
        self.expect(leased == self.card.own_bytes, f"{leased} bytes leased, {self.card.own_bytes} on the card")
        stats = core.stats()
        self.result.counts["preempted"] = stats.preemptions
        self.result.counts["evicted blocks"] = stats.evictions
        self.result.counts["cached prompt tokens"] = stats.cached_prompt_tokens


def soak(steps: int, seed: int, on_progress: Callable[[int], None] = lambda steps: None) -> Result:
    """Run it; the same seed is the same run."""
    return run_seeded(seed, lambda dice: Soak(steps, dice, on_progress).run())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # the guard's own words, by the thousand
    console = Console()
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("a day goes by", total=args.steps)
        result = soak(args.steps, args.seed, lambda steps: progress.update(bar, completed=steps))
    table = Table("what", "how much", title=f"seed {args.seed}")
    table.add_row("steps", f"{result.steps:,}")
    table.add_row("hours on the clock", f"{result.clock_s / 3600:.1f}")
    table.add_row("minutes on the wall", f"{result.wall_s / 60:.1f}")
    for what, number in [*sorted(result.counts.items()), *sorted(result.events.items())]:
        table.add_row(what, f"{number:,}")
    for priority, used in result.worst.items():
        table.add_row(f"longest of priority {priority}, of its bound", f"{used:.0%}")
    if result.rss:
        first, last = result.rss[0][1], result.rss[-1][1]
        table.add_row("resident MiB, first and last", f"{first / MIB:.1f}, {last / MIB:.1f}")
    table.add_row("growth in the second half, MiB", f"{result.growth_bytes / MIB:.2f}")
    console.print(table)
    for broken in result.broken:
        console.print(f"[red]broken:[/] {broken}", highlight=False)
    console.print("[red]promises were broken" if result.broken else "[green]every promise was kept")
    return 1 if result.broken else 0


if __name__ == "__main__":
    sys.exit(main())
