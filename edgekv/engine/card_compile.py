"""All kernels of a model, compiled on all cores before the first one is loaded.

Runs in: engine thread, and threads that compile and nothing else; owns: nothing once it returns.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed

from edgekv.kernels.rt.registry import KernelSpec, Loader

_MOST_THREADS = 16


def compile_all(loader: Loader, specs: Iterable[KernelSpec], progress: Callable[[int, int], None]) -> None:
    """Have the loader's cache hold the code of every kernel. `progress` hears of (kernels done, kernels in all).

    What `progress` raises ends it once the compilations that run are over. Raises KernelUnavailable, CompileFailed.
    """
    wanted = list(dict.fromkeys(specs))
    threads = max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)), len(wanted)))
    progress(0, len(wanted))
    with ThreadPoolExecutor(threads, thread_name_prefix="edgekv-compile") as pool:
        futures = [pool.submit(loader.code, spec) for spec in wanted]
        try:
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress(done, len(wanted))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
