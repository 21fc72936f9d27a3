"""Attention of a decode step: every format of the cache, against what plain torch and FlashInfer do.

Runs in: the main thread; owns: nothing.
"""

from collections.abc import Callable, Iterator
from functools import partial

from bench.gpu.bench import Bench, Calls, Compared
from bench.gpu.paged import Decode, PagedCache
from bench.gpu.peers import DenseDecode, flashinfer_decode
from bench.gpu.row import Row, Target, Times, best, of_bytes, ratio
from edgekv.kernels.attn.gpu_layout import BlockOrder, GpuKvFormat

FULL_SIZE = Target(0.85, 0.92)
FEWER_BITS = {
    GpuKvFormat.INT8: Target(1.7, 1.9),
    GpuKvFormat.E4M3: Target(1.7, 1.9),
    GpuKvFormat.INT4: Target(2.3, 3.0),
}
GATHERED, FLASHINFER = Target(3.0, 4.0), Target(0.95, 1.05)
LEAST_BYTES = 64_000_000  # of keys and values: targets speak of no fewer


def measure_decode(bench: Bench, sequences: int, context: int) -> Iterator[Row]:
    """One size of step."""
    wide = GpuKvFormat.BF16 if bench.rig.card.has_bf16_units else GpuKvFormat.F16
    steps: dict[GpuKvFormat, Decode] = {}
    dense: list[DenseDecode] = []

    def ours(kv_format: GpuKvFormat) -> Calls:
        steps[kv_format] = Decode(bench, PagedCache(bench, kv_format, sequences, context))
        return steps[kv_format].calls()

    def torchs() -> DenseDecode:
        if not dense:
            dense.append(DenseDecode(bench, sequences, context))
        return dense[0]

    works: dict[str, Callable[[], Calls]] = {each.name: partial(ours, each) for each in (wide, *FEWER_BITS)}
    works["contiguous"] = lambda: torchs().contiguous()
    works["gathered"] = lambda: torchs().gathered()
    for units in (False, True):
        works[f"flashinfer {units}"] = partial(flashinfer_decode, bench, sequences, context, tensor_cores=units)
    found = bench.compare(works)
    sizes = {kv_format: step.paged.layer_bytes for kv_format, step in steps.items()}
    yield from _rows(bench, f"{sequences} x {context:,}", wide, found, sizes)


def _rows(
    bench: Bench, size: str, wide: GpuKvFormat, found: Compared, sizes: dict[GpuKvFormat, int]
) -> Iterator[Row]:
    reasons = found.reasons
    if wide.name not in found.times:
        yield Row(f"{size}, {wide.name.lower()}", reason=reasons[wide.name])
        return
    own = found.times[wide.name]
    is_large = sizes[wide] >= LEAST_BYTES
    yield Row(
        f"{size}, {wide.name.lower()}", own, of_bytes(sizes[wide], own.median), bench.share_of_read(sizes[wide], own),
        "of read", FULL_SIZE if is_large else None, f"{sizes[wide] / 1e6:,.0f} MB a layer",
    )  # fmt: skip
    for kv_format, target in FEWER_BITS.items():
        name = f"{size}, {kv_format.name.lower()}"
        if kv_format.name not in found.times:
            yield Row(name, reason=reasons[kv_format.name])
            continue
        times = found.times[kv_format.name]
        share = bench.share_of_read(sizes[kv_format], times)
        note = "" if share is None else f"{share:.2f} of read"
        rate = of_bytes(sizes[kv_format], times.median)
        yield Row(name, times, rate, ratio(own, times), f"x {wide.name.lower()}", target if is_large else None, note)
    for name, said, target in (("contiguous", "SDPA, contiguous", None), ("gathered", "gather and SDPA", GATHERED)):
        if name not in found.times:
            yield Row(f"{size}, {said}", reason=reasons[name])
        else:
            times = found.times[name]
            yield Row(f"{size}, {said}", times, share=ratio(times, own), of="x ours", target=target)
    both = [times for name, times in found.times.items() if name.startswith("flashinfer")]
    if both:
        fastest: Times = best(both)
        yield Row(f"{size}, FlashInfer", fastest, share=ratio(fastest, own), of="x ours", target=FLASHINFER)
    else:
        yield Row(f"{size}, FlashInfer", reason=reasons["flashinfer False"])


def measure_orders(bench: Bench) -> Iterator[Row]:
    """Whether it costs anything that a block is one run of bytes, all layers of it."""
    sequences, context = bench.sizes.order
    wide = GpuKvFormat.BF16 if bench.rig.card.has_bf16_units else GpuKvFormat.F16
    layers = bench.sizes.model_layers
    steps = {
        order: Decode(bench, PagedCache(bench, wide, sequences, context, order=order, layers=layers))
        for order in BlockOrder
    }
    found = bench.compare({order.value: step.calls for order, step in steps.items()})
    other = found.of(BlockOrder.LAYER_MAJOR.value)
    for order, step in steps.items():
        times, size = found.of(order.value), step.paged.layer_bytes
        share = None if order is BlockOrder.LAYER_MAJOR else ratio(other, times)
        yield Row(
            f"{layers} layers, {sequences} x {context:,}, {order.value}", times, of_bytes(size, times.median), share,
            "x layer-major" if share is not None else "",
        )  # fmt: skip
