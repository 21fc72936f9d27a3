"""Our own kernels for one engine: whether they run its model, and how it is loaded for those of the processor.

Runs in: the thread that loads; owns: nothing once it returns.
"""

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from edgekv.core.dtype_choice import DtypeChoice
from edgekv.core.memory_plan import MemoryPlan
from edgekv.engine.card_device import Card
from edgekv.engine.kernel_needs import CARD_KERNELS, Lacking, NotServedHere, not_served
from edgekv.engine.native_pool import NativeKVPool
from edgekv.engine.settings import EngineSettings, weight_form
from edgekv.kernels.cpu.abi import Matrix
from edgekv.kernels.cpu.library import KernelsUnavailable, load_library
from edgekv.kernels.cpu.program import Pool
from edgekv.kernels.cpu.threads import asked_threads, default_threads
from edgekv.kernels.quant.encodings import Encoding
from edgekv.model.lowering import lower, unsupported
from edgekv.model.native_lm import NativeLM
from edgekv.model.packed_weights import PackedPart
from edgekv.model.packing import load_packed
from edgekv.model.spec import ModelSpec

log = logging.getLogger(__name__)

COMPILING = "compiling the CPU kernels (once)"


@dataclass(frozen=True, slots=True)
class Kernels:
    """What runs the model: the kernels of `pool` on the processor, those of `card`, or torch where there is neither.

    `title` is short, for people: "avx512 kernels, 2 threads". `loss`: why torch runs a model that kernels could, what
    that costs and what can be done.
    """

    pool: Pool | None
    title: str
    loss: str | None = None
    card: Card | None = None


def choose_kernels(
    settings: EngineSettings, spec: ModelSpec, progress: Callable[[int, int, str], None]
) -> tuple[EngineSettings, Kernels]:
    """The kernels of an engine, compiled first if need be, and its settings with `native` decided.

    Where they cannot run a model, torch does, and the log says so once. `progress` is called while they are compiled,
    and may raise to stop that. Raises WrongTorch for a card that torch itself has
    no code for, and NotServedHere where the settings need kernels that a card does not get.
    """
    if settings.native is False:
        return replace(settings, native=False), Kernels(None, "torch")
    if settings.place.kind == "card":
        return _choose_card(settings, spec, progress)
    reason = unsupported(spec, settings.block_size)
    remedy = ""
    if reason is None:
        try:
            library = load_library(lambda: progress(0, 0, COMPILING))
            pool = Pool(library, _threads())
        except KernelsUnavailable as error:
            reason, remedy = error.reason, error.remedy
        except OSError as error:
            reason = str(error)
        else:
            threads = f"{pool.threads} thread{'s' if pool.threads != 1 else ''}"
            return replace(settings, native=True), Kernels(pool, f"{pool.tier} kernels, {threads}")
    loss = f"{reason}. torch runs it, several times slower"
    if remedy:
        loss += f"; {remedy}"
    log.warning("the native CPU kernels cannot run this model: %s", loss)
    return replace(settings, native=False), Kernels(None, "torch", loss)


def _choose_card(
    settings: EngineSettings, spec: ModelSpec, progress: Callable[[int, int, str], None]
) -> tuple[EngineSettings, Kernels]:
    from edgekv.engine.card_load import is_driven_by_torch, open_card

    if not is_driven_by_torch(settings):
        return replace(settings, native=False), Kernels(None, "torch")
    card = open_card(settings, spec, progress)
    if not isinstance(card, Lacking):
        return replace(settings, native=True), Kernels(None, "the card's kernels", card=card)
    if (unmet := next(not_served(settings, native=False), None)) is not None:
        raise NotServedHere(*unmet, replace(card, needed=CARD_KERNELS))
    loss = f"{card.reason}. torch runs it, several times slower"
    if card.remedy:
        loss += f"; {card.remedy}"
    log.warning("the card's kernels cannot run this model: %s", loss)
    return replace(settings, native=False), Kernels(None, "torch", loss)


def _threads() -> int:
    try:
        asked_threads()
    except ValueError as error:
        log.warning("%s", error)
    return default_threads()


class LibraryPacker:
    """Packs rows with the library, on the pool's threads."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def pack(
        self,
        encoding: Encoding,
        rows: npt.NDArray[np.uint8],
        part_rows: npt.NDArray[np.int64],
        part: PackedPart,
    ) -> None:
        """Row i of `rows` [rows, row bytes] becomes row part_rows[i] of `part`, whose memory was zeros."""
        matrix = Matrix(part.data.ctypes.data, part.format, part.rows, part.cols, part.group)
        error = self._pool.library.functions.ek_pack(
            self._pool.handle,
            encoding.number,
            encoding.group,
            rows.ctypes.data,
            rows.shape[1],
            rows.shape[0],
            part_rows.ctypes.data,
            ctypes.byref(matrix),
        )
        if error:
            raise ValueError(f"cannot pack {encoding.name} rows of {part.cols} columns: error {error}")


def load_native(
    settings: EngineSettings,
    spec: ModelSpec,
    choice: DtypeChoice,
    pool: Pool,
    progress: Callable[[int, int, str], None],
) -> NativeLM:
    """The model in panels. Raises ModelError naming the file and the tensor."""
    lowered = load_packed(
        settings.folder,
        spec,
        lower,
        form=weight_form(settings, choice),
        packer=LibraryPacker(pool),
        progress=progress,
    )
    return NativeLM(lowered, pool)


def native_kv_pool(spec: ModelSpec, memory: MemoryPlan) -> NativeKVPool:
    """An empty pool in the plan's format."""
    return NativeKVPool(
        spec,
        kv_format=memory.kv_dtype,
        block_size=memory.kv.block_size,
        segment_blocks=memory.kv.segment_blocks,
    )
