"""Damages GGUF files and opens them: `python -m tests.unit.formats.fuzz_gguf --count 60000 --seed 1`.

Each case is a good small file with one to four changes where they hurt: counts, lengths, types, extents and offsets,
whole records doubled, dropped or exchanged, the file cut short, bits flipped. Opening it, reading all its values and
all its tensors must succeed or raise ModelError, in a second, within 64 MiB that the process gets beyond what it has.

`--peer` gives the same files to gguf.GGUFReader instead and counts what becomes of it; `--case 17` repeats one.
"""

import argparse
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from edgekv.errors import ModelError
from edgekv.formats.gguf_checkpoint import GgufCheckpoint
from edgekv.model.gguf_tensors import GgufTensors
from tests.unit.formats import gguf_image as image
from tests.unit.formats.gguf_image import Image, Key, Tensor

MEMORY_BYTES = 64 << 20
PEER_MEMORY_BYTES = 1 << 30  # with less, the interpreter dies before the time is over
CASE_S = 1.0
BATCH = 2000
ODD = (0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 31, 32, 33, 40, 41, 63, 64, 65, 127, 128, 255, 256, 1 << 16, (1 << 16) + 1)
HUGE = tuple(value for bits in (31, 32, 34, 48, 61, 62, 63, 64) for value in ((1 << bits) - 1, 1 << bits))


def llama() -> Image:
    """A model with every kind of value and several kinds of tensor."""
    keys = [
        Key("general.architecture", image.STRING, "llama"),
        Key("llama.attention.head_count", image.U32, 4),
        Key("llama.attention.head_count_kv", image.U16, 2),
        Key("llama.rope.freq_base", image.F32, 500000.0),
        Key("tokenizer.ggml.tokens", image.ARRAY, ["<s>", "a", "ä", "", "abc"] * 8, image.STRING),
        Key("tokenizer.ggml.scores", image.ARRAY, [0.5] * 40, image.F32),
        Key("tokenizer.ggml.token_type", image.ARRAY, [1] * 40, image.I32),
        Key("tokenizer.ggml.add_bos_token", image.BOOL, True),
        Key("a.u8", image.U8, 200),
        Key("a.i8", image.I8, -3),
        Key("a.i16", image.I16, -300),
        Key("a.i64", image.I64, -1 << 60),
        Key("a.u64", image.U64, 1 << 60),
        Key("a.f64", image.F64, 1e300),
    ]
    layer = [
        Tensor("blk.0.attn_q.weight", "q8_0", (32, 32)),
        Tensor("blk.0.attn_k.weight", "f16", (16, 32)),
        Tensor("blk.0.attn_v.weight", "bf16", (16, 32)),
        Tensor("blk.0.attn_norm.weight", "f32", (32,)),
        Tensor("blk.0.ffn_down.weight", "q4_K", (2, 256)),
    ]
    return Image(keys, [Tensor("token_embd.weight", "q4_0", (8, 32)), *layer, Tensor("rope_freqs.weight", "f32", (4,))])


def gemma() -> Image:
    """Another alignment, the version before."""
    keys = [Key("general.architecture", image.STRING, "gemma3"), Key("general.alignment", image.U32, 64)]
    tensors = [Tensor("output_norm.weight", "f32", (7,)), Tensor("blk.3.attn_q_norm.weight", "f32", (8,))]
    return Image(keys, tensors, version=2, alignment=64)


def nested() -> Image:
    """Arrays in arrays."""
    deep = [[["a", "bc"], ["d"]], [["e"]]]
    keys = [
        Key("general.architecture", image.STRING, "qwen3"),
        Key("deep", image.ARRAY, deep, image.STRING),
        Key("flat", image.ARRAY, [[1, 2], [], [3]], image.U16),
    ]
    return Image(keys, [Tensor("blk.11.ffn_up.bias", "f32", (3,))])


def first_of_one() -> Image:
    """Says that it is split, into one part."""
    keys = [
        Key("split.no", image.U16, 0),
        Key("split.count", image.U16, 1),
        Key("split.tensors.count", image.I32, 1),
        Key("general.architecture", image.STRING, "qwen2"),
    ]
    return Image(keys, [Tensor("output.weight", "mxfp4", (4, 64))])


def vocabulary_only() -> Image:
    """No tensors, as llama.cpp's own vocabulary files."""
    keys = [
        Key("general.architecture", image.STRING, "gemma2"),
        Key("tokenizer.ggml.merges", image.ARRAY, ["a b"] * 200, image.STRING),
    ]
    return Image(keys)


SEEDS = [seed() for seed in (llama, llama, gemma, nested, first_of_one, vocabulary_only)]


def case(seed: int, index: int) -> bytes:
    """The damaged file of this number."""
    rng = random.Random(f"{seed}/{index}")
    source = rng.choice(SEEDS)
    damaged = bytearray(source.build())
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        rng.choice((_number, _number, _number, _number, _bits, _run, _cut, _grow, _double, _drop, _exchange))(
            rng, damaged, source
        )
    return bytes(damaged)


def _number(rng: random.Random, data: bytearray, source: Image) -> None:
    """One number of the header becomes another that is often on an edge."""
    mark = rng.choice(source.marks)
    if mark.offset + mark.size > len(data):
        return
    before = int.from_bytes(data[mark.offset : mark.offset + mark.size], "little")
    left = len(data) - mark.offset - mark.size
    near = (before - 1, before + 1, before * 2, before // 2, left, left - 1, left + 1, left // 8, left // 4, len(data))
    value = rng.choice(rng.choice((ODD, HUGE, near, (rng.getrandbits(mark.size * 8),))))
    data[mark.offset : mark.offset + mark.size] = (value % (1 << mark.size * 8)).to_bytes(mark.size, "little")


def _bits(rng: random.Random, data: bytearray, source: Image) -> None:
    for _ in range(rng.randint(1, 8) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _run(rng: random.Random, data: bytearray, source: Image) -> None:
    start, size = rng.randrange(len(data) + 1), rng.randint(1, 32)
    data[start : start + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))


def _cut(rng: random.Random, data: bytearray, source: Image) -> None:
    edges = [mark.offset for mark in source.marks] + [end for _, end in source.records]
    del data[rng.choice((rng.choice(edges), rng.randrange(len(data) + 1), max(0, len(data) - rng.randint(1, 64)))) :]


def _grow(rng: random.Random, data: bytearray, source: Image) -> None:
    start = rng.choice((len(data), rng.randrange(len(data) + 1)))
    data[start:start] = rng.choice((bytes, rng.randbytes))(rng.choice((1, 7, 32, 4096)))


def _record(rng: random.Random, source: Image) -> slice:
    return slice(*rng.choice(source.records))


def _double(rng: random.Random, data: bytearray, source: Image) -> None:
    """A key or tensor once more, in place of another or before it."""
    one, other = _record(rng, source), _record(rng, source)
    data[other if rng.random() < 0.5 else slice(other.start, other.start)] = data[one]


def _drop(rng: random.Random, data: bytearray, source: Image) -> None:
    del data[_record(rng, source)]


def _exchange(rng: random.Random, data: bytearray, source: Image) -> None:
    first, second = sorted((_record(rng, source), _record(rng, source)), key=lambda record: record.start)
    if first.stop <= second.start:
        data[second], data[first] = data[first], data[second]


def read_with_ours(path: Path) -> None:
    """Everything there is in the file; ModelError where it is refused."""
    with GgufCheckpoint(path) as checkpoint:
        end = 0
        for located in sorted(checkpoint.tensors.values(), key=lambda located: located.info.offset):
            info = located.info
            assert end <= info.offset, "tensors overlap"
            end = info.offset + info.num_bytes
            located.file.read_into(info, 0, memoryview(bytearray(info.num_bytes)))
        assert end <= path.stat().st_size, "a tensor reaches out of the file"
        refusals: list[ModelError] = []
        for key in checkpoint.metadata:
            try:
                image.value_of(checkpoint.metadata, key)
            except ModelError as refusal:
                refusals.append(refusal)
        tensors = GgufTensors(checkpoint)
        for tensor in tensors.tensors.values():
            tensor.read_rows(0, memoryview(bytearray(tensor.num_bytes)))
        if refusals:
            raise refusals[0]


def read_with_peer(path: Path) -> None:
    """The same of the gguf package; it has no error of its own, ValueError and KeyError are those that it raises."""
    import gguf

    reader = gguf.GGUFReader(path)
    for key in reader.fields.values():
        key.contents()
    for tensor in reader.tensors:
        tensor.data.tobytes()


class TooLong(BaseException):
    """A case took longer than it may."""


@dataclass
class Tally:
    """What became of the cases; `faults` are those that must not be."""

    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def add(self, index: int, outcome: str, expected: bool, took_s: float) -> None:
        self.outcomes[outcome] += 1
        self.slowest_s = max(self.slowest_s, took_s)
        if not expected:
            self.faults.append(f"case {index}: {outcome}")


def run_batch(
    seed: int, cases: range, read: Callable[[Path], None], allowed: tuple[type[Exception], ...], memory_bytes: int
) -> Tally:
    """The cases in this process, whose memory is limited from here on."""
    read_one(read, allowed, SEEDS[0].build())  # what is imported on the way is not the file's doing
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + memory_bytes, resource.RLIM_INFINITY))
    tally = Tally()
    for index in cases:
        start = time.process_time()
        outcome, expected = read_one(read, allowed, case(seed, index))
        tally.add(index, outcome, expected, time.process_time() - start)
    return tally


def read_one(read: Callable[[Path], None], allowed: tuple[type[Exception], ...], data: bytes) -> tuple[str, bool]:
    """What became of one file, and whether it may."""

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TooLong

    folder = Path("/dev/shm") if Path("/dev/shm").is_dir() else Path(tempfile.gettempdir())
    path = folder / f"fuzz-{os.getpid()}.gguf"
    path.write_bytes(data)
    signal.signal(signal.SIGPROF, too_long)
    signal.setitimer(signal.ITIMER_PROF, CASE_S, CASE_S)  # of the processor's time: others may be at work here
    try:
        try:
            read(path)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    except allowed:
        return "refused", True
    except (Exception, TooLong) as fault:
        return type(fault).__name__, False
    finally:
        path.unlink()
    return "read", True


def main() -> int:
    """Runs batches in processes of their own, one after the other, and prints what became of the cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="write this case to the working folder and read it without limits")
    parser.add_argument("--peer", action="store_true", help="read with gguf.GGUFReader")
    parser.add_argument("--batch", action="store_true", help="run all in this process")
    options = parser.parse_args()
    read, allowed, memory_bytes = read_with_ours, (ModelError,), MEMORY_BYTES
    if options.peer:
        read, allowed, memory_bytes = read_with_peer, (ValueError, KeyError), PEER_MEMORY_BYTES
    if options.case is not None:
        path = Path(f"case-{options.seed}-{options.case}.gguf")
        path.write_bytes(case(options.seed, options.case))
        print(path)
        read(path)
        return 0
    if options.batch:
        cases = range(options.first, options.first + options.count)
        tally = run_batch(options.seed, cases, read, allowed, memory_bytes)
        print(f"{tally.slowest_s:.4f}", *(f"{count} {outcome}" for outcome, count in tally.outcomes.items()), sep="\n")
        print("", *tally.faults, sep="\n")
        return 0
    return run_batches(options.seed, options.first, options.count, ["--peer"] if options.peer else [])


def run_batches(seed: int, first: int, count: int, flags: list[str]) -> int:
    """A process that dies is a fault too. Answers the exit status."""
    total, start = Tally(), time.perf_counter()
    for begin in range(first, first + count, BATCH):
        size = min(BATCH, first + count - begin)
        command = [sys.executable, "-W", "error", "-m", "tests.unit.formats.fuzz_gguf", "--batch", *flags]
        command += ["--seed", str(seed), "--first", str(begin), "--count", str(size)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=600)
        if done.returncode:
            total.outcomes["died"] += size
            total.faults.append(f"cases {begin} to {begin + size - 1}: the process ended with {done.returncode}")
            continue
        told, faults = done.stdout.split("\n\n", 1)
        slowest, *outcomes = told.splitlines()
        total.slowest_s = max(total.slowest_s, float(slowest))
        total.outcomes.update({name: int(number) for number, name in (line.split() for line in outcomes)})
        total.faults += faults.split("\n")[:-1] if faults.strip() else []
    outcomes = ", ".join(f"{number:,} {name}" for name, number in total.outcomes.most_common())
    print(
        f"{count:,} files in {time.perf_counter() - start:.0f} s, slowest {total.slowest_s * 1000:.0f} ms: {outcomes}"
    )
    print(*total.faults[:20], f"{len(total.faults):,} faults", sep="\n")
    return 1 if total.faults else 0


if __name__ == "__main__":
    sys.exit(main())
