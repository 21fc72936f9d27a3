"""Programs through the compiled library: what is refused, what is measured, and what a call costs."""

import ctypes
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgekv.kernels.cpu import abi
from edgekv.kernels.cpu.abi import Error, Form, OpKind
from edgekv.kernels.cpu.formats import PanelFormat, panel_bytes
from edgekv.kernels.cpu.program import KernelError, Pool
from edgekv.kernels.cpu.threads import MOST_THREADS, asked_threads, default_threads, physical_cores, processor_quota
from tests.kernels.cpu.room import Room, f32_matrix, library, pool


def program_of(room: Room, *ops: abi.Op) -> abi.Program:
    array = (abi.Op * len(ops))(*ops)
    room.kept += [array, *ops]
    room.program.ops, room.program.num_ops = ctypes.addressof(array), len(ops)
    return room.program


def with_cache(room: Room, *, num_blocks: int = 4, block_size: int = 16) -> abi.Cache:
    """Two segments, the first of `num_blocks` blocks, the second not there; ids have two bits for the block."""
    head_dim, kv_heads = room.program.head_dim, room.program.kv_heads
    memory = torch.zeros(2 * kv_heads * num_blocks * head_dim * block_size)
    segments = (abi.Segment * 2)(abi.Segment(memory.data_ptr(), num_blocks))
    cache = abi.Cache(
        segments=ctypes.addressof(segments),
        num_segments=2,
        segment_shift=2,
        format=int(abi.KvFormat.F32),
        num_layers=1,
        kv_heads=kv_heads,
        head_dim=head_dim,
        block_size=block_size,
    )
    room.kept += [memory, segments, cache]
    room.blocks, room.table_starts = np.array([0, 1]), np.array([0, 2])
    room.set_batch()
    room.step.cache = ctypes.addressof(cache)
    return cache


def test_operations_run_in_their_order() -> None:
    tokens, hidden = 5, 64
    room = Room([hidden, hidden], tokens, samples=[4, 2])
    table, panels = f32_matrix(torch.randn(9, hidden, generator=torch.Generator().manual_seed(0)))
    room.kept.append(panels)
    room.token_ids = np.array([8, 1, 1, 0, 3])
    room.set_batch()
    weight = torch.linspace(0.5, 2, hidden)
    ops = (
        room.op(OpKind.EMBED, dst=0, width=hidden, parts=table),
        room.op(OpKind.NORM_ADD, src=0, dst=0, width=hidden, weight=weight, eps=1e-5),
        room.op(OpKind.GATHER, src=0, dst=1, width=hidden, of_samples=1),
        room.op(OpKind.SOFTCAP, dst=1, width=hidden, of_samples=1, softcap=3.0),
        room.op(OpKind.PREPARE, src=1, width=hidden, of_samples=1, forms=int(Form.F32)),
    )
    program = program_of(room, *ops)
    x = panels.transpose(1, 2).reshape(-1, hidden)[room.token_ids]
    x = (x + F.rms_norm(x, (hidden,), weight, 1e-5))[[4, 2]]
    for threads in (1, 2):
        pool(threads).run(program, room.step)
        torch.testing.assert_close(room.f32[:2, :hidden], 3 * (x / 3).tanh(), rtol=2e-6, atol=1e-6)


def test_what_each_operation_takes_adds_up() -> None:
    room = Room([4096, 4096], 64)
    room.rows(0).fill_(1.0)
    room.rows(1).fill_(1.0)
    ops = [room.op(OpKind.NORM_ADD, src=0, dst=1, width=4096, eps=1e-5), room.op(OpKind.SOFTCAP, dst=1, width=4096)]
    ops[1].softcap = 30.0
    program = program_of(room, *ops)
    spent = np.zeros(2, np.int64)
    room.step.op_ns = spent.ctypes.data
    for threads in (1, 2):
        before, began = spent.copy(), time.perf_counter_ns()
        for _ in range(20):
            pool(threads).run(program, room.step)
        took = time.perf_counter_ns() - began
        assert (spent > before).all()
        assert 0 < (spent - before).sum() < took


WRONG: dict[str, tuple[Error, Callable[[Room, abi.Op], object]]] = {
    "no such operation": (Error.KIND, lambda room, op: setattr(op, "kind", 99)),
    "no batch": (Error.NULL, lambda room, op: setattr(room.step, "batch", None)),
    "no buffers": (Error.NULL, lambda room, op: setattr(room.step, "buffers", None)),
    "no cache": (Error.NULL, lambda room, op: setattr(room.step, "cache", None)),
    "no source": (Error.SHAPE, lambda room, op: setattr(op, "src", -1)),
    "no width": (Error.SHAPE, lambda room, op: setattr(op, "width", 0)),
    "no tokens' ids": (Error.NULL, lambda room, op: setattr(room.batch, "token_ids", None)),
    "negative tokens": (Error.BATCH, lambda room, op: setattr(room.batch, "tokens", -1)),
    "more tokens than in spans": (Error.BATCH, lambda room, op: room.lengths.fill(19)),
    "a start before zero": (Error.BATCH, lambda room, op: room.starts.fill(-1)),
    "an empty span": (Error.BATCH, lambda room, op: room.lengths.fill(0)),
    "rows that are another span's": (Error.BATCH, lambda room, op: room.first_rows.fill(1)),
    "a sample past the end": (Error.BATCH, lambda room, op: room.sample_rows.fill(20)),
    "a table too short": (Error.BLOCK, lambda room, op: room.table_starts.__setitem__(1, 1)),
    "a context past its table": (Error.BLOCK, lambda room, op: room.starts.fill(13)),
    "a table that begins nowhere": (Error.BLOCK, lambda room, op: room.table_starts.fill(-1)),
    "a block past its segment": (Error.BLOCK, lambda room, op: room.blocks.fill(3)),
    "a block of a hole": (Error.BLOCK, lambda room, op: room.blocks.fill(4)),
    "a block of no segment": (Error.BLOCK, lambda room, op: room.blocks.fill(8)),
    "a negative block": (Error.BLOCK, lambda room, op: room.blocks.fill(-1)),
    "a layer that there is not": (Error.SHAPE, lambda room, op: setattr(op, "layer", 1)),
    "heads that share unevenly": (Error.SHAPE, lambda room, op: setattr(room.program, "heads", 3)),
    "another number of heads": (Error.SHAPE, lambda room, op: setattr(room.program, "kv_heads", 1)),
    "another head dim": (Error.SHAPE, lambda room, op: setattr(room.program, "head_dim", 32)),
    "a head dim too large": (Error.SHAPE, lambda room, op: wide_heads(room)),
    "an odd block size": (Error.SHAPE, lambda room, op: setattr(cache_of(room), "block_size", 24)),
    "no such format": (Error.KIND, lambda room, op: setattr(cache_of(room), "format", 4)),
    "no table of rotations": (Error.NULL, lambda room, op: setattr(room.step, "rope_tables", None)),
    "a negative shift": (Error.SHAPE, lambda room, op: setattr(cache_of(room), "segment_shift", -1)),
    "a shift of more than a number has": (Error.SHAPE, lambda room, op: setattr(cache_of(room), "segment_shift", 32)),
    "half a pair to turn": (Error.SHAPE, lambda room, op: setattr(room.program, "rope_dim", 15)),
    "more to turn than a head has": (Error.SHAPE, lambda room, op: setattr(room.program, "rope_dim", 18)),
    "less than nothing to turn": (Error.SHAPE, lambda room, op: setattr(room.program, "rope_dim", -2)),
    "no starts": (Error.NULL, lambda room, op: setattr(room.batch, "starts", None)),
    "no lengths": (Error.NULL, lambda room, op: setattr(room.batch, "lengths", None)),
    "no first rows": (Error.NULL, lambda room, op: setattr(room.batch, "first_rows", None)),
    "no blocks": (Error.NULL, lambda room, op: setattr(room.batch, "blocks", None)),
    "no starts of tables": (Error.NULL, lambda room, op: setattr(room.batch, "table_starts", None)),
}


def cache_of(room: Room) -> abi.Cache:
    return abi.Cache.from_address(room.step.cache)


def wide_heads(room: Room) -> None:
    cache_of(room).head_dim = room.program.head_dim = 272


@pytest.mark.parametrize("wrong", WRONG)
def test_contradictions_are_refused_before_anything_is_done(wrong: str) -> None:
    width = (4 + 2 * 2) * 16
    room = Room([width], 20, samples=[3], heads=4, kv_heads=2)
    with_cache(room, num_blocks=3)
    room.rows(0).fill_(1.0)
    room.tables.zero_()
    op = room.op(OpKind.ROPE_APPEND, src=0, width=width)
    error, change = WRONG[wrong]
    change(room, op)
    with pytest.raises(KernelError) as caught:
        pool(1).run(program_of(room, op), room.step)
    assert caught.value.error is error
    assert (room.rows(0) == 1).all()


@pytest.mark.parametrize(("shift", "rope_dim"), [(2, 16), (31, 16), (2, 0)])
def test_the_same_without_a_contradiction_runs(shift: int, rope_dim: int) -> None:
    width = (4 + 2 * 2) * 16
    room = Room([width], 20, samples=[3], heads=4, kv_heads=2, rope_dim=rope_dim)
    with_cache(room, num_blocks=3).segment_shift = shift
    room.rows(0).fill_(1.0)
    room.tables.zero_()
    pool(1).run(program_of(room, room.op(OpKind.ROPE_APPEND, src=0, width=width)), room.step)
    assert (room.rows(0).view(20, -1, 16)[:, :6] == (1 if rope_dim == 0 else 0)).all()


def refusal(room: Room, op: abi.Op) -> Error:
    with pytest.raises(KernelError) as caught:
        pool(1).run_op(room.program, op, room.step)
    return caught.value.error


def test_a_norm_that_nobody_keeps_finds_room_in_the_scratch_or_is_refused() -> None:
    width = abi.SCRATCH_BYTES // 4
    room = Room([width + 1], 1)
    room.rows(0).fill_(3.0)
    op = room.op(OpKind.NORM, src=0, width=width, forms=int(Form.F32))
    pool(1).run_op(room.program, op, room.step)
    assert (room.f32[0, :width] == 1).all()
    op.width = width + 1
    assert refusal(room, op) is Error.SHAPE


def test_a_norm_without_memory_to_go_to_is_refused() -> None:
    room = Room([16], 1)
    buffers = (abi.Buffer * 2)(abi.Buffer(room.memory[0].data_ptr(), 16), abi.Buffer(None, 16))
    room.step.buffers = ctypes.addressof(buffers)
    assert refusal(room, room.op(OpKind.NORM, src=0, dst=1, width=16)) is Error.NULL


@pytest.mark.parametrize(("width", "rope"), [(9, 1), (8, -1), (1 << 30, 0)])
def test_a_table_of_rotations_has_a_place_and_as_many_as_heads_have_pairs(width: int, rope: int) -> None:
    room = Room([16], 1, head_dim=16, ropes=3)
    op = room.op(OpKind.ROPE_TABLE, width=width, rope=rope, weight=torch.ones(16))
    assert refusal(room, op) is Error.SHAPE
    assert room.tables.isnan().all()


@pytest.mark.parametrize("width", [32, 64])
def test_an_embedding_is_as_wide_as_its_rows(width: int) -> None:
    room = Room([64], 1)
    parts, panels = f32_matrix(torch.ones(16, 48))
    room.kept.append(panels)
    assert refusal(room, room.op(OpKind.EMBED, dst=0, width=width, parts=parts)) is Error.SHAPE
    assert room.memory[0].isnan().all()


@pytest.mark.parametrize(("dst", "of_samples"), [(1, 0), (0, 1)])
def test_rows_are_gathered_for_samples_and_to_elsewhere(dst: int, of_samples: int) -> None:
    room = Room([8, 8], 3, samples=[2, 0, 1])
    op = room.op(OpKind.GATHER, src=0, dst=dst, width=8, of_samples=of_samples)
    assert refusal(room, op) is Error.SHAPE


def test_attention_needs_the_memory_that_threads_share() -> None:
    room = Room([48, 16], 20)
    with_cache(room)
    assert refusal(room, room.op(OpKind.ATTEND, src=0, dst=1, width=48)) is Error.NULL


NEEDED = {"append": ("k", "v"), "attends": ("q", "out", "shared")}


@pytest.mark.parametrize("half", NEEDED)
def test_appending_and_attending_need_what_is_theirs(half: str) -> None:
    room = Room([16, 16, 16, 16], 20)
    cache = with_cache(room)
    pointers = {name: room.rows(i).fill_(1.0).data_ptr() for i, name in enumerate(("q", "k", "v", "out"))}
    strides = {f"{name}_stride": room.rows(0).stride(0) for name in pointers}
    attend = abi.Attend(
        cache=ctypes.addressof(cache), batch=ctypes.addressof(room.batch), heads=1, scale=1.0, **pointers, **strides
    )
    shared = torch.zeros(pool(1).attend_shared_bytes(attend), dtype=torch.uint8)
    attend.shared = shared.data_ptr()
    only = {name: name == half for name in NEEDED}
    for name in NEEDED[half]:
        kept = getattr(attend, name)
        setattr(attend, name, None)
        with pytest.raises(KernelError, match="null"):
            pool(1).run_attend(attend, **only)
        setattr(attend, name, kept)
    for name in {*NEEDED["append"], *NEEDED["attends"]} - {*NEEDED[half]}:
        setattr(attend, name, None)
    pool(1).run_attend(attend, **only)


@pytest.mark.parametrize(
    ("panels", "cols", "group"),
    [
        *((PanelFormat.Q4Z, 128, group) for group in (0, 1, 16, 96, 256, -32)),
        (PanelFormat.Q4Z, 192, 128),
        (PanelFormat.Q4, 128, 32),
        (PanelFormat.F32, 128, 128),
        (PanelFormat.Q4, 48, 0),
        (PanelFormat.Q6K, 128, 0),
    ],
)
def test_matrices_of_no_whole_groups_are_refused(panels: PanelFormat, cols: int, group: int) -> None:
    room = Room([256, 256], 1)
    memory = torch.zeros(panel_bytes(PanelFormat.F32, 16, 256), dtype=torch.uint8)
    parts = (abi.Matrix * 1)(abi.Matrix(memory.data_ptr(), int(panels), 16, cols, group))
    for kind in (OpKind.LINEAR, OpKind.EMBED):
        assert refusal(room, room.op(kind, dst=1, width=cols, parts=parts)) is Error.SHAPE


def test_parts_that_do_not_fit_each_other_are_refused() -> None:
    room = Room([64, 64], 1)
    parts = (abi.Matrix * 2)(*(f32_matrix(torch.ones(32, cols))[0][0] for cols in (64, 32)))
    room.kept.append(parts)
    linear = room.op(OpKind.LINEAR, dst=1, width=64, parts=parts)
    with pytest.raises(KernelError, match="sizes"):
        pool(1).run_op(room.program, linear, room.step)
    parts[1].cols, parts[1].format = 64, 77
    with pytest.raises(KernelError, match="format"):
        pool(1).run_op(room.program, linear, room.step)
    parts[1].format, linear.epilogue = 0, int(abi.Epilogue.SILU_MUL)
    with pytest.raises(KernelError, match="sizes"):  # gate and up are one part
        pool(1).run_op(room.program, linear, room.step)


@pytest.mark.parametrize("form", Form)
def test_activations_that_nobody_made_room_for_are_refused(form: Form) -> None:
    room = Room([64, 64], 1)
    room.rows(0).fill_(1.0)
    for name in {Form.F32: ["f32"], Form.BF16: ["bf16"], Form.Q8: ["q8", "q8_scale", "q8_sum"]}[form]:
        kept = getattr(room.step.prepared, name)
        setattr(room.step.prepared, name, None)
        for kind in (OpKind.NORM, OpKind.PREPARE):
            op = room.op(kind, src=0, width=64, forms=int(form), eps=1e-5)
            with pytest.raises(KernelError, match="null"):
                pool(1).run_op(room.program, op, room.step)
        part = {Form.F32: abi.Format.F16, Form.BF16: abi.Format.BF16, Form.Q8: abi.Format.Q4K}[form]
        parts = (abi.Matrix * 1)(abi.Matrix(panels_of_zeros(room), int(part), 64, 256, 0))
        with pytest.raises(KernelError, match="null"):
            pool(1).run_op(room.program, room.op(OpKind.LINEAR, dst=1, width=64, parts=parts), room.step)
        setattr(room.step.prepared, name, kept)


def panels_of_zeros(room: Room) -> int:
    room.kept.append(zeros := torch.zeros(64 * 256))
    return zeros.data_ptr()


def test_an_empty_program_and_an_empty_step_are_nothing() -> None:
    room = Room([8], 1)
    pool(2).run(program_of(room), room.step)
    room.batch.tokens = 0
    pool(2).run(program_of(room, room.op(OpKind.SOFTCAP, dst=0, width=8, softcap=1.0)), room.step)
    assert room.memory[0].isnan().all()


@pytest.mark.parametrize("tier", library().tiers)
def test_a_pool_says_what_it_is(tier: str) -> None:
    made = Pool(library(), 3, tier=tier)
    assert (made.tier, made.threads) == (tier, 3)
    made.close()
    made.close()
    with pytest.raises(KernelError):
        made.run(abi.Program(), abi.Step())


def test_a_pool_is_of_the_best_tier_if_nobody_says() -> None:
    assert pool(1).tier == library().tiers[0]


@pytest.mark.parametrize("threads", [0, -1, 1025])
def test_absurd_numbers_of_threads_are_refused(threads: int) -> None:
    with pytest.raises(ValueError, match="threads"):
        Pool(library(), threads)


def test_tiers_that_there_are_not_are_refused() -> None:
    with pytest.raises(ValueError, match="no tier sse9"):
        Pool(library(), 1, tier="sse9")
    with pytest.raises(ValueError, match="processors"):
        Pool(library(), 2, cpus=[0])


def test_threads_end_with_the_pool() -> None:
    def workers() -> int:
        names = (path.read_text() for path in Path("/proc/self/task").glob("*/comm"))
        return sum(name.startswith("ek-cpu-") for name in names)

    before = workers()
    made = Pool(library(), 4)
    gone = weakref.ref(made)
    while workers() < before + 3:
        time.sleep(0.001)  # they name themselves
    del made
    gc.collect()
    assert gone() is None
    assert workers() == before


def test_other_python_threads_go_on_during_a_run() -> None:
    room = Room([8192], 4096)
    room.rows(0).fill_(1.0)
    program = program_of(room, *(room.op(OpKind.SOFTCAP, dst=0, width=8192, softcap=30.0) for _ in range(4)))
    done, steps = threading.Event(), []

    def watch() -> None:
        while not done.is_set():
            steps.append(time.perf_counter())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    pool(1).run(program, room.step)
    ended = time.perf_counter()
    done.set()
    watcher.join()
    assert sum(began < step < ended for step in steps) > 3


def test_memory_is_read_from_an_aligned_address() -> None:
    data = torch.zeros(1 << 18)
    pool(2).read(data.data_ptr(), data.nbytes)
    pool(1).read(data.data_ptr(), 100)
    with pytest.raises(ValueError, match="cannot read"):
        pool(1).read(data.data_ptr() + 4, 4096)
    with pytest.raises(ValueError, match="cannot read"):
        pool(1).read(data.data_ptr(), 63)


def test_a_call_costs_little(capsys: pytest.CaptureFixture[str]) -> None:
    """Python, ctypes, the checks and an operation of nothing, on one thread; a bound that holds on a busy machine."""
    room = Room([16], 1)
    room.rows(0).fill_(1.0)
    program = program_of(room, room.op(OpKind.SOFTCAP, dst=0, width=16, softcap=30.0))
    best = {}
    for threads in (1, 2):
        run, step, rounds = pool(threads).run, room.step, []
        for _ in range(50):
            began = time.perf_counter_ns()
            for _ in range(20):
                run(program, step)
            rounds.append((time.perf_counter_ns() - began) / 20)
        best[threads] = min(rounds)
    with capsys.disabled():
        print(f" [a call: {best[1] / 1000:.2f} µs on one thread, {best[2] / 1000:.2f} µs on two]", end="")
    assert max(best.values()) < 15_000


def folder_of(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_threads_of_one_core_count_once(tmp_path: Path) -> None:
    siblings = {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5"}
    files = {f"devices/system/cpu/cpu{cpu}/topology/core_cpus_list": text for cpu, text in siblings.items()}
    sysfs = folder_of(tmp_path, files)
    assert physical_cores({0, 4, 1}, sysfs) == 2
    assert physical_cores({0, 1, 4, 5}, sysfs) == 2
    assert physical_cores({7, 8, 0}, sysfs) == 3  # nothing is known of 7 and 8


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "350000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
          "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"proc/self/cgroup": "4:cpu,cpuacct:/job\n", "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "600000\n",
          "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n"}, 6),
        ({"proc/self/cgroup": "4:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "odd\n"}, None),
    ],
)  # fmt: skip
def test_the_tightest_quota_counts(tmp_path: Path, files: dict[str, str], quota: int | None) -> None:
    folder_of(tmp_path, files)
    assert processor_quota(tmp_path / "sys", tmp_path / "proc") == quota


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (4, 4), (5, 4), (16, 15)])
def test_one_of_many_cores_is_kept_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert default_threads(tmp_path, tmp_path) == threads


@pytest.mark.parametrize(("cpu_max", "threads"), [("200000 100000", 2), ("max 100000", 63)])
def test_a_container_of_few_processors_does_not_start_threads_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu_max: str, threads: int
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    folder_of(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": cpu_max})
    assert default_threads(tmp_path / "sys", tmp_path / "proc") == threads


def test_a_pool_takes_as_many_threads_as_there_can_be_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2000)))
    assert default_threads(tmp_path, tmp_path) == MOST_THREADS
    with suppress(OSError):  # where so many threads find no memory
        Pool(library(), MOST_THREADS).close()
    with pytest.raises(ValueError, match="1025 threads"):
        Pool(library(), MOST_THREADS + 1)


@pytest.mark.parametrize("asked", ["0", "-1", "all", "1025", "5000", "9" * 5000, "1e3", "٣"])
def test_what_cannot_be_asked_for_is_named_and_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(ValueError, match=r"^OMP_NUM_THREADS=.{1,41} is ignored: it must be .* from 1 to 1024$"):
        asked_threads()
    assert default_threads(tmp_path, tmp_path) == 2


@pytest.mark.parametrize(("asked", "threads"), [("3", 3), ("4,2", 4), (" 1024 ", 1024), ("", 2)])
def test_what_is_asked_for_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert default_threads(tmp_path, tmp_path) == threads


EXIT = """
import sys
from edgekv.kernels.cpu.program import Pool
from tests.kernels.cpu.room import library

library().functions.ek_pool_free = lambda handle: print("freed")
pool = Pool(library(), 2)
other = Pool(library(), 1)
del other
sys.exit(70)
"""


def test_a_pool_is_not_freed_by_the_end_of_the_process() -> None:
    """A thread may be in the middle of a run: the engine's is left where it is when it does not come back."""
    root = Path(__file__).parents[3]
    ended = subprocess.run([sys.executable, "-c", EXIT], cwd=root, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (70, "freed\n"), ended.stderr
