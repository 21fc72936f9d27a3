"""A draft model's memory: given back before anybody else's, and taken again when there is room.

Runs in: engine thread; owns: the leases of the draft's weights and workspace, and the segments of its pool.

    given back    keys and values first, a segment at a time; then weights and workspace, in one piece
    taken again   weights and workspace, then keys and values, up to what was planned

Guesses wait meanwhile. While weights are read again everything does, so that where that takes long it is put off to a
moment without requests, for about a minute.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgekv.core.draft_plan import DRAFT_KV_LEASE, WEIGHTS_LEASE, WORKSPACE_LEASE, DraftPlan
from edgekv.core.ledger import Lease, Ledger
from edgekv.engine.draft import DraftModel
from edgekv.engine.driver import DeviceLost
from edgekv.engine.kv_pool import BlockMemory
from edgekv.engine.memory_errors import give_back_cached, is_out_of_memory
from edgekv.engine.protocols import Pipeline
from edgekv.engine.segments import Growth, Segments
from edgekv.errors import EdgeKVError, OverBudget

log = logging.getLogger(__name__)

MOST_SKIPPED = 63  # orders to grow, between two attempts at weights that the device had no memory for
LONG_LOAD_S = 0.2  # for which no stream is to stand still without need
MOST_PUT_OFF = 6  # orders to grow; the guard waits ten seconds or more after one that came to nothing


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A draft model with its weights: what runs its steps, and an empty pool for them."""

    pipeline: Pipeline
    memory: BlockMemory[Any]


LoadDraft = Callable[[], LoadedDraft]


class DraftMemory:
    """What a draft model has of the device.

    Invariant: its leases are its weights and workspace, both or neither, and its pool's segments; without weights it
    has no segment. The pool never has more than was planned for it.

    Args:
        model: guesses while it has memory.
        plan: what it was planned to have.
        ledger: of the device.
        load: reads the weights (again). Raises ModelError, MemoryError and torch's like.
    """

    def __init__(self, model: DraftModel, plan: DraftPlan, ledger: Ledger, load: LoadDraft) -> None:
        self.model = model
        self._plan, self._ledger, self._load = plan, ledger, load
        self._leases: list[Lease] = []
        self._segments: Segments | None = None
        self._most_bytes = plan.num_bytes
        self._given_back_bytes = self._taken_bytes = 0
        self._failures = self._orders_to_skip = self._put_off = 0
        self._load_s = 0.0
        self.shortfall: str | None = None
        """Why the latest growth was less than asked for."""

    @property
    def num_bytes(self) -> int:
        """Bytes leased for it."""
        return sum(lease.num_bytes for lease in self._leases) + self.kv_bytes

    @property
    def kv_bytes(self) -> int:
        """Of these, for keys and values."""
        return 0 if self._segments is None else self._segments.num_bytes

    @property
    def ceiling_bytes(self) -> int:
        """The most that it may have."""
        return self._most_bytes

    @property
    def next_bytes(self) -> int:
        """The least that it can grow by; 0 where it has all."""
        if self.num_bytes >= self._most_bytes:
            return 0
        kv = self._plan.kv
        segment = min(kv.segment_blocks, kv.num_blocks) * kv.block_bytes
        return min(segment if self._leases else self._fixed_bytes + segment, self._most_bytes - self.num_bytes)

    @property
    def given_back_bytes(self) -> int:
        """In all so far."""
        return self._given_back_bytes + (0 if self._segments is None else self._segments.given_back_bytes)

    @property
    def taken_bytes(self) -> int:
        """Taken again in all so far."""
        return self._taken_bytes + (0 if self._segments is None else self._segments.taken_bytes)

    def adopt(
        self, loaded: LoadedDraft, weights: Lease, workspace: Lease, segments: list[Lease], *, load_s: float = 0.0
    ) -> None:
        """Begin with what was loaded, in so many seconds, and leased. Raises MemoryError, or torch's like."""
        self._load_s = load_s
        self._leases = [weights, workspace]
        self._segments = self._use(loaded)
        for num_blocks, lease in zip(self._plan.kv.segments, segments, strict=True):
            self._segments.add(num_blocks, lease)

    def shrink(self, num_bytes: int) -> int:
        """Give back at least `num_bytes` or all that there is; returns the bytes given back."""
        was_here = self.model.has_memory
        given_back = 0
        if self._segments is not None and self.kv_bytes and num_bytes > 0:
            given_back = self._segments.shrink(self.model.views, num_bytes, keep_promises=False)
        if given_back < num_bytes and self._leases:
            given_back += self._unload()
        if was_here and not self.model.has_memory:
            self.model.yields += 1
            log.info("speculation pauses: %s", self.model.away)
        return given_back

    def wait(self) -> None:
        """What it has given back unasked was needed: let some orders to grow go by, more of them each time."""
        self._failures += 1
        self._orders_to_skip = min(2**self._failures - 1, MOST_SKIPPED)

    def grow(self, num_bytes: int, *, is_busy: bool = False) -> Growth:
        """Take at most `num_bytes`, weights and workspace first, and these only with some room for keys and values.

        Nothing where weights could not be loaded the last times for want of memory: that takes long, and nobody else
        can go on meanwhile. It is tried less and less often. While requests run (`is_busy`), weights that take long to
        read wait for a moment without any, though not for ever.
        """
        was_away = not self.model.has_memory
        if not 0 < self.next_bytes <= num_bytes:
            self.shortfall = None
            return Growth(0)
        if self._orders_to_skip > 0:
            self._orders_to_skip -= 1
            return Growth(0, self.shortfall)
        taken, self.shortfall = 0, None
        if not self._leases:
            if is_busy and self._load_s > LONG_LOAD_S and self._put_off < MOST_PUT_OFF:
                self._put_off += 1
                return Growth(0)
            self._put_off = 0
            self.shortfall = self._reload()
            if self.shortfall is not None:
                return Growth(0, self.shortfall)
            taken = self._fixed_bytes
            self._taken_bytes += taken
        assert self._segments is not None
        growth = self._segments.grow(min(num_bytes - taken, self._most_bytes - self.num_bytes))
        self.shortfall = growth.shortfall
        if was_away and self.model.has_memory:
            self.model.returns += 1
            log.info("speculation is back")
        return Growth(taken + growth.num_bytes, growth.shortfall)

    def stay_small(self) -> None:
        """What it has lost does not come back; weights that have no keys and values any more go as well."""
        if self._leases and not self.kv_bytes:
            self._unload()
        if self._segments is not None:
            self._segments.stay_small()
        self._most_bytes = self.num_bytes
        if not self._leases:
            self.model.gone = "the draft model's memory was needed for good"

    def check_integrity(self) -> None:
        """Raise AssertionError where the invariant does not hold."""
        assert self.num_bytes <= self._plan.num_bytes, f"{self.num_bytes} bytes of {self._plan.num_bytes} planned"
        assert self.kv_bytes <= self._plan.kv.pool_bytes, "more keys and values than were planned"
        assert bool(self._leases) == (self.model.pipeline is not None), "weights without a lease, or a lease for none"
        if self._segments is not None and self._leases:
            self._segments.check_integrity()
        else:
            assert self.kv_bytes == 0, "keys and values without a model"
        self.model.check_integrity()

    def _give_up(self, error: Exception) -> str:
        log.warning("the draft model cannot be loaded again: %s", error)
        self._most_bytes = 0
        self.model.gone = f"the draft model cannot be loaded again: {error}"
        return str(error)

    @property
    def _fixed_bytes(self) -> int:
        return self._plan.weight_bytes + self._plan.workspace_bytes

    def _use(self, loaded: LoadedDraft) -> Segments:
        self.model.pipeline = loaded.pipeline
        return Segments(
            self.model.cache.pool,
            loaded.memory,
            self._ledger,
            ceiling_blocks=(self._most_bytes - self._fixed_bytes) // loaded.memory.block_bytes,
            lease_name=DRAFT_KV_LEASE,
        )

    def _unload(self) -> int:
        self._given_back_bytes, self._taken_bytes = self.given_back_bytes, self.taken_bytes
        self.model.pipeline = self._segments = None
        given_back = sum(lease.num_bytes for lease in self._leases)
        give_back_cached()
        for lease in self._leases:
            self._ledger.release(lease)
        self._leases = []
        self._given_back_bytes += given_back
        return given_back

    def _reload(self) -> str | None:
        """Read the weights again; why not, where that cannot be."""
        leases: list[Lease] = []
        try:
            leases.append(self._ledger.reserve(WEIGHTS_LEASE, self._plan.weight_bytes))
            leases.append(self._ledger.reserve(WORKSPACE_LEASE, self._plan.workspace_bytes))
            begun_s = time.monotonic()
            self._segments = self._use(self._load())
            self._load_s = time.monotonic() - begun_s
        except DeviceLost:
            raise
        except OverBudget as error:
            reason = str(error)
        except (EdgeKVError, ValueError, OSError) as error:
            # Its files are gone, or others by now. The model itself goes on without.
            reason = self._give_up(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                for lease in leases:
                    self._ledger.release(lease)
                raise
            reason = f"the draft model was within the budget, but the device had not enough memory: {error}"
            self.wait()
        except Exception as error:  # of compilers and drivers: the model itself goes on without
            reason = self._give_up(error)
        else:
            self._leases = leases
            self._failures = 0
            return None
        # With the error gone nobody holds what was loaded before it.
        give_back_cached()
        for lease in leases:
            self._ledger.release(lease)
        return reason
