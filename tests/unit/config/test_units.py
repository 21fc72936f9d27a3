"""Sizes, shares and durations."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekv.config.units import (
    GIB,
    MIB,
    Share,
    format_size,
    parse_duration,
    parse_share,
    parse_size,
    parse_size_or_share,
    setting_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [("768MiB", 768 * MIB), ("16 GiB", 16 * GIB), ("1.5gib", GIB * 3 // 2), ("500MB", 500_000_000), ("12B", 12)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["16", "16G", "GiB", "-1GiB", "1e3MiB", 16, None, "16 GiB more", "٣GiB"])
def test_a_size_without_a_clear_unit_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a size with its unit"):
        parse_size(text)


def test_shares() -> None:
    assert parse_size_or_share("94%") == Share(0.94)
    assert parse_size_or_share("1GiB") == GIB
    for text in ("0%", "101%", "%", "94"):
        with pytest.raises(ValueError, match="expected a percentage"):
            parse_share(text)


@pytest.mark.parametrize(
    ("text", "seconds"), [("250ms", 0.25), ("5s", 5), ("10m", 600), ("2h", 7200), ("1.5d", 129600)]
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["5", 5, "5 seconds", "s", "5M", None])
def test_a_duration_without_a_clear_unit_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration(text)


@given(st.integers(0, 1 << 45))
def test_what_is_printed_can_be_read_back_to_a_percent(size: int) -> None:
    assert parse_size(format_size(size).replace(",", "")) == pytest.approx(size, rel=0.01, abs=0.6)


@given(st.integers(0, 1 << 45))
def test_what_a_setting_can_ask_for_is_never_more_and_hardly_less(size: int) -> None:
    asked = parse_size(setting_size(size))
    assert 0.99 * size <= asked <= size


def test_sizes_for_settings_are_short() -> None:
    assert [setting_size(size) for size in (7, 1536, 512 * MIB, GIB * 7 // 2)] == ["7B", "1.5KiB", "512MiB", "3.5GiB"]
