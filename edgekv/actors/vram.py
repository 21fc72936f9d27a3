"""Keeps an eye on the device's memory and tells the engine when to give some back or take some.

Runs in: trio (what may block: in threads); owns: the sources' feeds, the pressure policy, the events.

    feeds ── Reading ──► PressurePolicy ── Decision ──► Resize ──► EngineActor
                               ▲                                       │
                               └──────────── PoolFacts ◄── EngineStats ┘

No request and no step ever waits for it. Without a reading the last one counts, marked stale: nothing grows then.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace

import trio

from edgekv.actors.engine import EngineActor, Phase
from edgekv.actors.feed import Feed, InThread, OffLoop
from edgekv.actors.kernel import ActorGone
from edgekv.actors.latest import Latest
from edgekv.actors.memory_log import MemoryLog
from edgekv.actors.service import MemoryView
from edgekv.core.pressure import CALM_S, FROZEN_S, Decision, PressurePolicy
from edgekv.core.reading import Reading
from edgekv.core.step import EngineStats, Resize
from edgekv.smi.reader import Source

DEADLINE_S = 0.25
CALM_DEADLINE_S = 1.0  # a card that sleeps takes its time to wake
LEAST_PERIOD_S = 0.05
BLIND_S = 30.0
BUDGET_MOVES = 0.01


class VramWatch:
    """Reads, decides, orders, for as long as it runs; it may be run again after it has crashed.

    Args:
        engine: who carries the orders out.
        sources: ways to read the device, the best first.
        policy: decides; built with the headroom of the place that the engine computes on.
        device: the device's title, for people.
        is_busy: whether requests are open.
        unix_time: the clock of the events.
        off_loop: makes what runs a source's calls.
    """

    def __init__(
        self,
        engine: EngineActor,
        sources: Sequence[Source],
        policy: PressurePolicy,
        device: str,
        *,
        is_busy: Callable[[], bool],
        unix_time: Callable[[], float] = time.time,
        off_loop: Callable[[], OffLoop] = InThread,
    ) -> None:
        self._engine = engine
        self._policy = policy
        self._is_busy = is_busy
        # A line outlives a crash, so that a call that hangs still is the only one of its source.
        self._lines = [(source, off_loop()) for source in sources]
        self._log = MemoryLog(unix_time)
        self.view = Latest(MemoryView(device, policy.headroom.num_bytes, problem="nothing has been read yet"))
        self._feeds: list[Feed] = []
        self._reading: Reading | None = None
        self._decision: Decision | None = None
        self._sent: Resize | None = None
        self._since: float | None = None
        self._wakened = trio.Event()

    @property
    def is_blind(self) -> bool:
        """Whether nothing has been read for so long that a person should know."""
        since = self._since if self._reading is None else self._reading.at
        return since is not None and trio.current_time() - since > BLIND_S

    def latest(self) -> MemoryView:
        """The view, with the engine's own figures and the reading's age as they are now."""
        view, stats = self.view.value, self._stats()
        return replace(
            view,
            age_s=None if view.reading is None else trio.current_time() - view.reading.at,
            memory=None if stats is None else stats.memory,
            pool=None if stats is None else stats.pool,
        )

    def wake(self) -> None:
        """Read soon, whenever the next reading was meant to be. Never raises."""
        self._wakened.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        if self._since is None:
            self._since = trio.current_time()
        self._feeds = [Feed(source, line, self.wake) for source, line in self._lines]
        self._sent = None
        try:
            async with trio.open_nursery() as nursery:
                for feed in self._feeds:
                    nursery.start_soon(feed.run)
                nursery.start_soon(self._follow_engine)
                await self._watch()
        finally:
            # Nobody else would ever let the engine go on.
            self._let_go()

    async def _watch(self) -> None:
        while True:
            self._wakened = trio.Event()
            began = trio.current_time()
            reading = await self._read(began)
            period_s = self._take_in(reading)
            await trio.sleep_until(began + LEAST_PERIOD_S)
            with trio.move_on_at(began + period_s):
                await self._wakened.wait()

    async def _follow_engine(self) -> None:
        """What the engine has become matters at once: its next life knows nothing of what this one was told."""
        async for _ in self._engine.status.watch():
            self.wake()

    def _stats(self) -> EngineStats | None:
        """The engine's figures; those of a life that has ended mean nothing."""
        serves = self._engine.status.value.phase in (Phase.SERVING, Phase.DRAINING)
        return self._engine.stats.value if serves else None

    # ---- reading

    async def _read(self, at: float) -> Reading | None:
        """A reading from the best source that gives one."""
        calm = self._decision is None or self._decision.next_poll_s >= CALM_S
        deadline_s = CALM_DEADLINE_S if calm and not self._is_busy() else DEADLINE_S
        for feed in self._feeds:
            reading = await feed.read(at, deadline_s)
            if reading is not None:
                return reading
            at = trio.current_time()
        return None

    def _problem(self) -> str | None:
        """What is wrong with the sources before the one that was read last, or with all, in one line."""
        if not self._feeds:
            return "there is no way to read it"
        problems = []
        for feed in self._feeds:
            if feed.problem is None:
                break
            problems.append(f"{feed.name}: {feed.problem}")
        return "; ".join(problems) or None

    # ---- deciding

    def _take_in(self, fresh: Reading | None) -> float:
        """Decide, order and publish; the seconds until the next reading."""
        now = trio.current_time()
        problem = self._problem()
        if fresh is not None:
            self._reading, reading = fresh, fresh
            self._log.freshened(fresh.source)
        elif self._reading is not None:
            reading = replace(self._reading, stale=True)
            if now - reading.at > FROZEN_S:
                self._log.aged(now - reading.at, problem)
        else:
            self.view.set(replace(self.view.value, problem=problem))
            return CALM_S
        stats = self._stats()
        memory = None if stats is None else stats.memory
        facts = None if memory is None else memory.facts
        starved = stats is not None and stats.waiting > 0 and stats.running == 0
        decision = self._policy.observe(reading, facts, busy=self._is_busy(), now=now, starved=starved)
        self._decision = decision
        # First of all: the policy asks for nothing more before it has heard of what it asked for.
        if facts is not None:
            self._order(decision)
        else:
            self._sent = None
        if fresh is not None:
            pool_tokens = 0 if stats is None else stats.pool.total_blocks * stats.pool.block_size
            self._log.decided(decision, facts, pool_tokens, now)
        self.view.set(
            replace(self.view.value, reading=reading, decision=decision, problem=problem, events=self._log.events)
        )
        return decision.next_poll_s

    def _order(self, decision: Decision) -> None:
        sent = self._sent
        budget = decision.budget_bytes
        moved = sent is None or abs(budget - sent.budget_bytes) > BUDGET_MOVES * sent.budget_bytes
        turned = decision.hold != (sent is not None and sent.hold)
        if decision.shrink_bytes or decision.grow_bytes or turned or moved:
            self._send(Resize(budget, decision.shrink_bytes, decision.grow_bytes, decision.hold))

    def _let_go(self) -> None:
        if self._sent is not None and self._sent.hold:
            self._send(Resize(self._sent.budget_bytes))

    def _send(self, order: Resize) -> None:
        self._sent = order
        with suppress(ActorGone):
            self._engine.insist(order)
