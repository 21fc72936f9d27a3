"""The reason that is given for a dtype is true, whatever the checkpoint holds and whatever runs it."""

from typing import Any

import pytest

from edgekv.core.dtype_choice import choose_dtype

LARGE = 1 << 33


@pytest.mark.parametrize(
    ("checkpoint", "stored", "device", "native", "name", "reason"),
    [
        ("bfloat16", ["bfloat16"], "cpu", True, "bfloat16", "as the checkpoint"),
        ("bfloat16", [], "card", False, "bfloat16", "as the checkpoint"),
        (
            "float16", ["float16"], "cpu", True, "bfloat16",
            "the checkpoint's float16 is rounded to bfloat16; dtype float16 keeps it",
        ),
        (
            "float16", [], "cpu", False, "bfloat16",
            "float16 is slow on CPUs; the checkpoint's float16 is rounded to bfloat16",
        ),
        ("float16", ["float16"], "card", False, "float16", "as the checkpoint"),
        # GGUF files that mix say bfloat16 of themselves.
        (
            "bfloat16", ["float16", "bfloat16"], "cpu", True, "bfloat16",
            "the checkpoint's float16 is rounded to bfloat16",
        ),
        (
            "bfloat16", ["float16", "float32"], "cpu", False, "bfloat16",
            "the checkpoint's float16 and float32 are rounded to bfloat16",
        ),
        (
            "bfloat16", ["float16", "float32"], "card", False, "bfloat16",
            "the checkpoint's float16 and float32 are rounded to bfloat16",
        ),
        # A configuration may be wrong about its own files.
        ("float16", ["bfloat16"], "cpu", True, "bfloat16", "as the checkpoint"),
        ("float32", ["bfloat16"], "cpu", True, "float32", "the checkpoint's bfloat16 is kept in float32"),
        ("bfloat16", ["float16"], "card", False, "bfloat16", "the checkpoint's float16 is rounded to bfloat16"),
    ],
)  # fmt: skip
def test_what_becomes_of_plain_weights(
    checkpoint: Any, stored: Any, device: Any, native: bool, name: str, reason: str
) -> None:
    choice = choose_dtype(checkpoint, LARGE, device, native=native, stored=stored)
    assert (choice.name, choice.keeps_stored) == (name, False)
    assert choice.reason.startswith(reason)
    assert reason != "as the checkpoint" or choice.reason == reason


def test_a_small_model_is_exact_whatever_it_is_in() -> None:
    for stored in (["float16"], ["float16", "bfloat16"]):
        choice = choose_dtype("bfloat16", 1 << 20, "cpu", native=True, stored=stored)  # type: ignore[arg-type]
        assert (choice.name, choice.reason[:13]) == ("float32", "a small model")
