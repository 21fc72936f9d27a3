"""What would make a model fit: every remedy is planned like the model itself, so its numbers hold.

Runs in: anywhere; owns: nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from edgekv.config.units import MIB, format_size
from edgekv.core.dtype_choice import DeviceKind
from edgekv.core.kv_format import KV_FORMATS, KVFormatName, context_need_bytes, kv_alignment, plan_kv
from edgekv.core.memory_plan import MemoryPlan
from edgekv.engine.draft_errors import DraftPoolTooSmall
from edgekv.engine.kernel_needs import BLOCK_SIZE, kv_engine
from edgekv.engine.settings import DraftFiles, EngineSettings, plan_engine
from edgekv.model.card_layout import card_bytes
from edgekv.model.card_shape import has_kernels, unsupported_on_card
from edgekv.model.matrix_layout import WeightForm, WeightsName
from edgekv.model.native_shape import unsupported
from edgekv.model.weight_plan import native_bytes
from edgekv.model.weight_table import WeightTable

if TYPE_CHECKING:
    from edgekv.model.spec import ModelSpec

SHORTEST_CONTEXT = 256
QUANTISED: tuple[WeightsName, ...] = ("int8", "int4")
OWN_KERNELS: dict[DeviceKind, str] = {"cpu": "with the native CPU kernels", "card": "with the card's kernels"}


@dataclass(frozen=True, slots=True)
class Remedy:
    """One change: the options that make it (some have none) and what it brings. `is_here`: whether it can be made."""

    options: str
    brings: str
    fits: bool
    is_here: bool = True

    def __str__(self) -> str:
        return f"{self.options}: {self.brings}" if self.options else self.brings


def remedies(
    settings: EngineSettings,
    spec: "ModelSpec",
    result: MemoryPlan,
    table: WeightTable,
    draft: DraftFiles | None = None,
) -> list[Remedy]:
    """What helps, in the order of what costs least; nothing where the model fits."""
    return [] if result.fits else list(_Search(settings, spec, result, table, draft).each())


@dataclass(frozen=True, slots=True)
class _Search:
    """A plan that does not fit, and what it was made from."""

    settings: EngineSettings
    spec: "ModelSpec"
    result: MemoryPlan
    table: WeightTable
    draft: DraftFiles | None

    def each(self) -> Iterator[Remedy]:
        yield from self._other_settings()
        longest = self._longest_context(self.settings)
        if longest is not None:
            yield Remedy(f"--context {longest}", "the longest that fits as it is", True)
        if self.result.others_bytes:
            alone = replace(self.settings, place=replace(self.settings.place, free_bytes=self.result.total_bytes))
            if self._plan(alone).fits:
                held = format_size(self.result.others_bytes)
                yield Remedy("", f"closing other programs, which hold {held}, would do", True)
        yield from self._not_here()
        yield from self._smaller_model()

    def _plan(self, settings: EngineSettings) -> MemoryPlan:
        return plan_engine(settings, self.spec, self.table, self.draft)[1]

    def _other_settings(self) -> Iterator[Remedy]:
        settings, result = self.settings, self.result
        yield from self._smaller_draft()
        if settings.draft is not None:
            without = replace(settings, draft=None)
            less = format_size(result.fixed_bytes - self._plan(without).fixed_bytes)
            yield from self._tried("--draft off", f"without the draft, {less} less", without)
        if result.kv_dtype == "float32":
            changed = replace(settings, kv_dtype="bfloat16")
            yield from self._tried("--kv-dtype bfloat16", "half the memory for each token", changed)
        for name in ("int8", "int4"):
            kept, bits = KV_FORMATS[name], KV_FORMATS[result.kv_dtype].bits
            if settings.native and settings.place.kind in kept.engines and kept.bits < bits:
                changed = replace(settings, kv_dtype=name)
                yield from self._tried(f"--kv-dtype {name}", f"{kept.bits} bits for each number", changed)
        if result.dtype == "float32":
            changed = replace(settings, dtype="bfloat16")
            yield from self._tried("--dtype bfloat16", self._less(changed), changed)
        if settings.native and settings.weight_format == "auto" and not self.table.is_quantised:
            for weights in QUANTISED:
                changed = replace(settings, weight_format=weights)
                yield from self._tried(f"--weights {weights}", self._less(changed), changed)
        yield from self._other_budget()

    def _less(self, settings: EngineSettings) -> str:
        made = self._plan(settings)
        less = self.result.weight_bytes - made.weight_bytes
        more = made.workspace_bytes - self.result.workspace_bytes
        told = f"{format_size(less)} less for the weights"
        return f"{told}, {format_size(more)} more for a step" if 10 * more > less else told

    def _smaller_draft(self) -> Iterator[Remedy]:
        """The largest pool of the draft model beside which all else fits, up to what it would get unless told."""
        drafted, draft = self.settings.draft, self.result.draft
        if drafted is None or draft is None:
            return
        usual = self._plan(replace(self.settings, draft=replace(drafted, kv_budget=None))).draft
        # Where nothing is left it would get nothing, and a part of what was asked for may fit all the same.
        most_bytes = draft.kv.pool_bytes - 1
        if usual is not None and usual.kv.num_blocks:
            most_bytes = min(most_bytes, usual.kv.pool_bytes)
        low, high = -(-draft.kv.block_bytes // MIB), most_bytes // MIB
        found: tuple[EngineSettings, int, int] | None = None
        while low <= high:
            middle = (low + high) // 2
            changed = replace(self.settings, draft=replace(drafted, kv_budget=middle * MIB))
            try:
                made = self._plan(changed)
            except DraftPoolTooSmall:
                low = middle + 1
                continue
            if made.fits and made.draft is not None:
                found, low = (changed, middle, made.draft.kv.pool_tokens), middle + 1
            else:
                high = middle - 1
        if found is not None:
            changed, budget, tokens = found
            yield from self._tried(f"--draft-kv {budget}MiB", f"{tokens:,} tokens of the draft", changed)

    def _other_budget(self) -> Iterator[Remedy]:
        settings, result = self.settings, self.result
        if settings.kv_budget is None or result.missing_bytes:
            return
        need = self._context_need()
        room = result.kv.pool_bytes + result.free_bytes
        budget, brings = -(-need // MIB), "one request of the whole context"
        if result.free_bytes < 0:
            budget, brings = room // MIB, "all that there is room for"
        if need <= room:
            changed = replace(settings, kv_budget=budget * MIB)
            yield from self._tried(f"--kv-budget {budget}MiB", brings, changed)

    def _tried(self, options: str, brings: str, settings: EngineSettings) -> Iterator[Remedy]:
        """What a change comes to; nothing where as much would be missing as without it, as far as that is told."""
        made, before = self._plan(settings), self.result
        if made.missing_bytes:
            if _is_less(made.missing_bytes, before.missing_bytes):
                missing = format_size(made.missing_bytes)
                yield Remedy(options, f"{brings}; {missing} would still be missing", False)
            return
        if made.free_bytes < 0:
            if before.missing_bytes or _is_less(-made.free_bytes, -before.free_bytes):
                over = format_size(-made.free_bytes)
                yield Remedy(options, f"{brings}; the KV budget would still be {over} too much", False)
            return
        brings += f"; the pool would hold {made.kv.pool_tokens:,} tokens"
        if made.fits:
            yield Remedy(options, f"{brings}: it fits then", True)
            return
        if not before.missing_bytes and before.free_bytes >= 0 and made.kv.pool_tokens <= before.kv.pool_tokens:
            return
        longest = self._longest_context(settings)
        yield Remedy(options, brings + (f": it fits with --context {longest} then" if longest else ""), False)

    def _longest_context(self, settings: EngineSettings) -> int | None:
        """In whole blocks, the longest of which one request fits; None where that is too short to be of use."""
        size = settings.block_size
        low, high = SHORTEST_CONTEXT // size, (settings.context_tokens or self.spec.max_position_embeddings) // size
        found = None
        while low <= high:
            middle = (low + high) // 2
            if self._plan(replace(settings, context_tokens=middle * size)).fits:
                found, low = middle * size, middle + 1
            else:
                high = middle - 1
        return found

    def _not_here(self) -> Iterator[Remedy]:
        """What only our own kernels can do, where they do not run the model and could."""
        result, kv = self.result, self.result.kv
        if self.settings.native or not kernels_have(self.settings, self.spec):
            return
        lacking = OWN_KERNELS[self.settings.place.kind]
        if kv.num_blocks and not result.missing_bytes and result.free_bytes >= 0:
            plan = plan_kv(self.spec, kv_format="int8", block_size=kv.block_size, budget_bytes=kv.pool_bytes)
            brings = f"int8 KV ({lacking}) would hold {plan.pool_tokens:,} tokens in the same memory"
            yield Remedy("", brings, plan.pool_tokens >= result.context_tokens, is_here=False)
        for name, brought in self._packed_weights():
            tokens = max(0, self._room() - brought) // kv.block_bytes * kv.block_size
            if brought < result.weight_bytes and tokens:
                brings = f"{name} ({lacking}) would take {format_size(brought)} and leave {tokens:,} tokens"
                yield Remedy("", brings, tokens >= result.context_tokens, is_here=False)

    def _packed_weights(self) -> Iterator[tuple[str, int]]:
        if self.table.is_quantised:
            yield "the weights as they are in the file", self._packed_bytes("auto")
            return
        for name in QUANTISED:
            yield f"{name} weights", self._packed_bytes(name)

    def _packed_bytes(self, weights: WeightsName) -> int:
        form = WeightForm(None, weights)
        if self.settings.place.kind == "card":
            return card_bytes(self.table, self.spec, form, self.result.dtype).total
        return native_bytes(self.table, self.spec, form).total

    def _smaller_model(self) -> Iterator[Remedy]:
        result = self.result
        room = self._room() - self._context_need()
        if room > 0 and result.weight_bytes > room:
            most = room / (result.weight_bytes / self.spec.num_parameters) / 1e9
            kept = f"in {result.dtype}" if len(result.weights.kinds) == 1 else "kept as this one's are"
            yield Remedy("", f"a model of at most {most:.1f} B parameters {kept} leaves room for this context", True)

    def _room(self) -> int:
        """What weights and KV pool may have together."""
        return self.result.budget_bytes - (self.result.fixed_bytes - self.result.weight_bytes)

    def _context_need(self) -> int:
        kv = self.result.kv
        return context_need_bytes(
            self.spec,
            kv_format=self.result.kv_dtype,
            block_size=kv.block_size,
            context_tokens=self.result.context_tokens,
            alignment=alignment_of(self.settings),
        )


def _is_less(num_bytes: int, than_bytes: int) -> bool:
    """Whether it also reads as less."""
    return num_bytes < than_bytes and format_size(num_bytes) != format_size(than_bytes)


def kernels_have(settings: EngineSettings, spec: "ModelSpec") -> bool:
    """Whether our own kernels could run a model of this shape there, if in blocks of another size."""
    if settings.place.kind == "card":
        return has_kernels(settings.place.target) and unsupported_on_card(spec, BLOCK_SIZE) is None
    return unsupported(spec, BLOCK_SIZE) is None


def alignment_of(settings: EngineSettings) -> int:
    """Of the parts of a block, for what runs the model."""
    return kv_alignment(kv_engine(settings, native=bool(settings.native)))


@dataclass(frozen=True, slots=True)
class FormatRow:
    """A format of keys and values in the memory that the pool has; `served`: by what runs the model."""

    name: KVFormatName
    bytes_per_token: int
    block_bytes: int
    pool_tokens: int
    served: bool


def kv_formats(settings: EngineSettings, result: MemoryPlan, spec: "ModelSpec") -> list[FormatRow]:
    """All that there are."""
    rows = []
    engine, size, budget = kv_engine(settings, native=bool(settings.native)), result.kv.block_size, result.kv.pool_bytes
    for name, form in KV_FORMATS.items():
        served = engine in form.engines
        alignment = kv_alignment(engine if served else settings.place.kind)
        kv = plan_kv(spec, kv_format=name, block_size=size, budget_bytes=budget, alignment=alignment)
        rows.append(FormatRow(name, kv.bytes_per_token, kv.block_bytes, kv.pool_tokens, served))
    return rows
