from typing import Any

import pytest

from bench.peers.rows import OUTSIDE
from bench.peers.systems import family
from bench.peers.table import gather, markdown, overheads


def turn(
    weights: str, system: str, name: str, samples: list[float], *, more: bool = True, number: int = 1
) -> dict[str, Any]:
    measures = {name: {"unit": "tok/s" if more else "ms", "samples": samples, "more": more}}
    return {
        "turn": [weights, "row", system, number], "seed": 1, "at": "2026-11-22 09:00:00", "others_cores": 0.1,
        "stolen_cores": 0.0, "measures": measures,
    }  # fmt: skip


def test_a_cell_is_the_median_over_all_rounds_and_the_best_tenth() -> None:
    lines = [turn("bf16", "edgekv", "decode", [10.0, 30.0]), turn("bf16", "edgekv", "decode", [20.0], number=2)]
    assert "| bf16 | decode, tok/s |  |  | 20.0 (28.0; 3) |  |" in markdown(lines)


def test_the_ratio_is_to_the_better_of_the_peers() -> None:
    lines = [
        turn("bf16", "llama.cpp", "decode", [20.0]),
        turn("bf16", "vLLM", "decode", [25.0]),
        turn("bf16", "edgekv", "decode", [30.0]),
    ]
    [quantity] = gather(lines).values()
    assert quantity.ratio("edgekv") == pytest.approx(1.2)
    assert markdown(lines).endswith("| **1.20** |")


def test_where_less_is_better_the_better_peer_is_the_lower_one() -> None:
    lines = [
        turn("bf16", "llama.cpp", "first token", [900.0], more=False),
        turn("bf16", "vLLM", "first token", [700.0], more=False),
        turn("bf16", "edgekv", "first token", [350.0, 350.0, 100.0], more=False),
    ]
    [quantity] = gather(lines).values()
    assert quantity.ratio("edgekv") == pytest.approx(0.5)
    assert quantity.good("edgekv") == pytest.approx(150.0)


def test_variants_of_a_system_share_a_cell_the_best_first() -> None:
    lines = [
        turn("bf16", "llama.cpp -np 8", "output", [9.0]),
        turn("bf16", "llama.cpp -np 1", "output", [30.0]),
        turn("bf16", "edgekv", "output", [60.0]),
    ]
    shown = markdown(lines)
    assert "-np 1: 30.0 (30.0; 1)<br>-np 8: 9.0 (9.0; 1)" in shown
    assert shown.endswith("| **2.00** |")


def test_weights_that_edgekv_made_have_a_ratio_of_their_own() -> None:
    lines = [
        turn("q4_0", "llama.cpp", "decode", [50.0]),
        turn("q4_0", "edgekv int4", "decode", [80.0]),
        turn("q4_0", "edgekv", "decode", [60.0]),
    ]
    assert markdown(lines).endswith("| **1.20**<br>int4: 1.60 |")


def test_of_samples_taken_in_turns_the_ratios_count_and_not_the_medians() -> None:
    # The machine was twice as fast in the second round, of which the peer has one sample less.
    lines = [
        turn("bf16", "llama.cpp", "decode", [10.0, 10.0]),
        turn("bf16", "llama.cpp", "decode", [20.0], number=2),
        turn("bf16", "edgekv", "decode", [22.0, 22.0], number=2),
        turn("bf16", "edgekv", "decode", [11.0, 11.0]),
    ]
    for line in lines:
        line["measures"]["decode"]["paired"] = True
    [quantity] = gather(lines).values()
    assert quantity.ratio("edgekv") == pytest.approx(1.1)
    assert quantity.median("edgekv") / quantity.median("llama.cpp") == pytest.approx(1.65)
    lines[0]["sitting"] = lines[1]["sitting"] = "another day"
    [quantity] = gather(lines).values()
    assert quantity.ratio("edgekv") is None


def test_without_a_peer_there_is_no_ratio() -> None:
    assert markdown([turn("bf16", "edgekv", "decode", [1.0])]).endswith("|  |")


def test_the_machine_and_what_else_it_did_stand_above() -> None:
    shown = markdown([{"machine": "2 cores", "at": "now"}, turn("bf16", "edgekv", "decode", [1.0])])
    assert "Machine: 2 cores." in shown
    assert "other programs used 0.10 cores in the median turn" in shown


def test_what_of_a_token_is_not_the_models_is_told() -> None:
    detail = {"decode": [{"context": 128, "parts_us": {"model": 48_750.0, "prepare": 1_000.0, "sample": 250.0}}]}
    engine = turn("bf16", "edgekv", "decode, context 128", [20.4])
    engine["turn"][1] = "decode"
    http = turn("bf16", "edgekv", OUTSIDE, [3.1, 5.0, 3.5], more=False)
    shown = overheads([engine | {"detail": detail}, http])
    assert shown.endswith("| bf16 | edgekv | 2.5 % | **5.5 %** |")
    assert OUTSIDE not in markdown([http])
    assert overheads([engine | {"detail": detail}]) == ""


@pytest.mark.parametrize(
    ("system", "whose"),
    [
        ("llama.cpp -np 8 -kvu", "llama.cpp"),
        ("edgekv int8", "edgekv"),
        ("vLLM", "vLLM"),
        ("vLLM preloaded", "vLLM"),
        ("edgekv", "edgekv"),
    ],
)
def test_a_variant_belongs_to_its_family(system: str, whose: str) -> None:
    assert family(system) == whose
