"""The table of cards, and how a person's words find one in it."""

import pytest

from edgekv.config.cards import UnknownCard, find_card, known_cards, live_card
from edgekv.config.units import GIB


def test_the_table_is_whole_and_plausible() -> None:
    cards = known_cards()
    assert len(cards) >= 60
    assert len({card.name for card in cards}) == len(cards)
    assert {card.vendor for card in cards} == {"nvidia", "amd"}
    for card in cards:
        assert 6 * GIB <= card.vram_bytes <= 128 * GIB
        assert 150e9 <= card.bandwidth <= 2000e9
        assert card.source.startswith("https://www." + card.vendor)
    assert {card.name for card in cards if card.unified} == {"Radeon 8050S", "Radeon 8060S"}


@pytest.mark.parametrize(
    ("name", "gib", "gigabytes"),
    [  # from the makers' announcements, as figures on their own
        ("RTX 2080 Ti", 11, 616), ("RTX 3080", 10, 760), ("RTX 3090", 24, 936), ("RTX 3090 Ti", 24, 1008),
        ("RTX 4080", 16, 716.8), ("RTX 4090", 24, 1008), ("RTX 5080", 16, 960), ("RTX 5090", 32, 1792),
        ("RTX A6000", 48, 768), ("RTX 6000 Ada", 48, 960), ("RX 6800 XT", 16, 512), ("RX 7800 XT", 16, 624),
        ("RX 7900 XT", 20, 800), ("RX 7900 XTX", 24, 960), ("RX 9070 XT", 16, 640), ("PRO W7900", 48, 864),
    ],
)  # fmt: skip
def test_well_known_figures(name: str, gib: int, gigabytes: float) -> None:
    card = find_card(name)
    assert (card.vram_bytes, card.bandwidth) == (gib * GIB, pytest.approx(gigabytes * 1e9))


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("7900xtx", "Radeon RX 7900 XTX"),
        ("NVIDIA GeForce RTX 3090", "GeForce RTX 3090"),
        ("4060 ti", "GeForce RTX 4060 Ti"),
        ("4060ti 16gb", "GeForce RTX 4060 Ti 16GB"),
        ("6000 ada", "RTX 6000 Ada Generation"),
        ("8060s", "Radeon 8060S"),
    ],
)
def test_a_card_is_found_by_what_people_call_it(said: str, meant: str) -> None:
    assert find_card(said).name == meant


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("RX 7900", "may be any of Radeon RX 7900 GRE, Radeon RX 7900 XT, Radeon RX 7900 XTX, Radeon PRO W7900: "),
        ("7900 xtz", "No card '7900 xtz' is known; did you mean Radeon RX 7900 XT or Radeon RX 7900 XTX"),
        ("Voodoo", "No card 'Voodoo' is known. Any other can be planned for by its memory: --vram 16GiB"),
        ("RTX", "No card 'RTX' is known"),
    ],
)
def test_what_is_not_found_is_told_with_what_is_near(said: str, told: str) -> None:
    with pytest.raises(UnknownCard) as caught:
        find_card(said)
    assert told in str(caught.value)


def test_a_laptops_card_is_not_the_desktops() -> None:
    card = live_card("NVIDIA GeForce RTX 4090", 24 * GIB)
    assert card is not None
    assert card.name == "GeForce RTX 4090"
    assert live_card("NVIDIA GeForce RTX 4090 Laptop GPU", 16 * GIB) is None
    assert live_card("NVIDIA H100 80GB HBM3", 80 * GIB) is None


@pytest.mark.parametrize(
    ("called", "mib", "meant"),
    [
        ("NVIDIA GeForce RTX 3080", 10_240, "GeForce RTX 3080"),
        ("NVIDIA GeForce RTX 3080", 12_288, "GeForce RTX 3080 12GB"),
        ("NVIDIA GeForce RTX 4060 Ti", 16_380, "GeForce RTX 4060 Ti 16GB"),
        ("NVIDIA RTX A2000 12GB", 12_282, "RTX A2000 12GB"),
        ("AMD Radeon RX 9060 XT", 16_304, "Radeon RX 9060 XT 16GB"),
    ],
)
def test_of_cards_that_drivers_call_by_one_name_the_memory_tells_which_it_is(called: str, mib: int, meant: str) -> None:
    card = live_card(called, mib << 20)
    assert card is not None
    assert card.name == meant
