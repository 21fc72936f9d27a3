"""Attention's kernels read and write nothing beside their memory, and do nothing that C++ leaves undefined."""

import pytest

from tests.kernels.fibers.harness import run_sanitized


@pytest.mark.slow
def test_attention_stays_within_its_memory() -> None:
    done = run_sanitized("tests.kernels.fibers.sanitized_attention")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split("\n")[:-1] == [
        "decode_split, lse_merge", "kv_append", "gather_dequant", "prefill_paged", "block_copy",
    ]  # fmt: skip
