"""The threads of the compiled library, and running programs on them.

Runs in: engine thread; owns: the worker threads. A program and a step are structures of abi.py; whoever fills them in
keeps alive what they point to, and nothing of it may change during a run.
"""

import ctypes
import weakref
from collections.abc import Sequence

from edgekv.kernels.cpu.abi import Attend, Error, Linear, Op, Program, Step
from edgekv.kernels.cpu.library import Library


class KernelError(ValueError):
    """The library refused what it was given, and did nothing: sizes, token ids or block tables that do not fit."""

    def __init__(self, function: str, error: Error) -> None:
        super().__init__(f"{function}: {_REASONS[error]}")
        self.error = error


_REASONS = {
    Error.NULL: "a pointer that is needed is null",
    Error.KIND: "an operation, format or epilogue that there is not",
    Error.SHAPE: "sizes that contradict each other",
    Error.TOKEN: "a token id that the embedding has no row for",
    Error.BATCH: "spans, positions or sample rows that contradict each other",
    Error.BLOCK: "a block table that does not cover its span, or names a block of no segment",
    Error.BUSY: "the pool is in another run",
}


class Pool:
    """`threads` threads, the caller of `run` among them; one run at a time. Ends with the object.

    A run leaves the GIL to other Python threads. Waiting workers poll for a millisecond, giving way to whoever wants
    their core, and sleep from then on. In a forked child runs work on one thread, the caller.
    """

    def __init__(
        self, library: Library, threads: int, *, tier: str | None = None, cpus: Sequence[int] | None = None
    ) -> None:
        """`tier` is one of `library.tiers`, the best if not said. Worker i is kept on processor `cpus[i]`; the caller,
        thread 0, stays where it is.

        Raises ValueError for a tier that there is not or an absurd number of threads, OSError where there is no memory.
        """
        if not 1 <= threads <= 1024 or (cpus is not None and len(cpus) != threads):
            raise ValueError(f"{threads} threads on processors {cpus}")
        if tier is not None and tier not in library.tiers:
            raise ValueError(f"there is no tier {tier} here, only {', '.join(library.tiers)}")
        self.library, functions = library, library.functions
        places = None if cpus is None else (ctypes.c_int32 * threads)(*cpus)
        self.handle: int | None = functions.ek_pool_new(None if tier is None else tier.encode(), threads, places)
        if self.handle is None:
            raise OSError(f"there is no memory for {threads} threads")
        self.tier: str = functions.ek_pool_tier_name(self.handle).decode()
        self.threads: int = functions.ek_pool_threads(self.handle)
        """Fewer than asked for where the system gives no more."""
        self._run, self._byref = functions.ek_run, ctypes.byref
        self._end = weakref.finalize(self, functions.ek_pool_free, self.handle)
        # A thread may be in the middle of a run when the interpreter ends; the threads end with the process anyway.
        self._end.atexit = False

    def close(self) -> None:
        """End the threads now; the pool can run nothing more. May be called again."""
        self._end()
        self.handle = None

    def run(self, program: Program, step: Step) -> None:
        """All operations of a program, in order. Raises KernelError."""
        error = self._run(self.handle, self._byref(program), self._byref(step))
        if error:
            raise KernelError("ek_run", Error(error))

    def run_op(self, program: Program, op: Op, step: Step) -> None:
        """One operation, of `program`'s shape. Raises KernelError."""
        self._check("ek_rows_run", ctypes.byref(program), ctypes.byref(op), ctypes.byref(step))

    def run_linear(self, linear: Linear) -> None:
        """One linear layer over activations that are prepared already. Raises KernelError."""
        self._check("ek_linear_run", ctypes.byref(linear))

    def run_attend(self, attend: Attend, *, append: bool = True, attends: bool = True) -> None:
        """A step's k and v into the cache, its q over the cache, or one after the other. Raises KernelError."""
        self._check("ek_attend_run", ctypes.byref(attend), append, attends)

    def attend_shared_bytes(self, attend: Attend) -> int:
        """What `Step.attend_shared` must have room for; of `attend`, the cache's shape, heads and batch are read."""
        num_bytes: int = self.library.functions.ek_attend_shared_bytes(ctypes.byref(attend), self.threads)
        return num_bytes

    def read(self, address: int, num_bytes: int) -> None:
        """Read memory once, on all threads, and do nothing with it: what kernels that read as much are compared with.

        Raises ValueError for less than 64 bytes, or an address that is no multiple of 64.
        """
        if self.library.functions.ek_read(self.handle, address, num_bytes) < 0:
            raise ValueError(f"cannot read {num_bytes:,} bytes from {address:#x}")

    def _check(self, function: str, *arguments: object) -> None:
        error = getattr(self.library.functions, function)(self.handle, *arguments)
        if error:
            raise KernelError(function, Error(error))
