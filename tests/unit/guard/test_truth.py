from typing import Any

from bench.guard.trace import MIB, Trace, Vendor, parse_trace
from bench.guard.truth import RESTORE_S, Truth, device_model

TICK_S = 0.02


def trace(vendor: Vendor, *points: dict[str, Any]) -> Trace:
    import json

    return parse_trace(json.dumps({"vendor": vendor, "total_mib": 1000, "points": [*points, {"t": 99}]}), "x", "x.json")


def play(trace: Trace, *owned: tuple[float, int]) -> list[Truth]:
    """Hold `owned` (until, MiB), each for as long as that says."""
    model, at, history = device_model(trace), 0.0, []
    for until, mib in owned:
        while at < until:
            history.append(model.advance(at, mib * MIB))
            at = round(at + TICK_S, 6)
    return history


def test_nvidia_refuses_others_what_does_not_fit_until_it_does() -> None:
    history = play(trace("nvidia", {"t": 0, "others_mib": 100}, {"t": 1, "others_mib": 600}), (2, 700), (3, 300))
    before, pressed, after = history[10], history[80], history[-1]
    assert (before.others // MIB, before.denied, before.free // MIB) == (100, False, 200)
    assert (pressed.others // MIB, pressed.denied, pressed.free) == (300, True, 0)
    assert (after.others // MIB, after.denied, after.spilled) == (600, False, 0)


def test_what_others_have_on_nvidia_is_not_taken_from_them_by_our_growth() -> None:
    history = play(trace("nvidia", {"t": 0, "others_mib": 600}), (1, 300), (2, 500))
    assert history[-1].others == 600 * MIB
    assert history[-1].free == -100 * MIB


def test_amdgpu_gives_others_what_they_want_and_moves_ours_out_for_good() -> None:
    moved = trace("amd", {"t": 0, "others_mib": 100}, {"t": 1, "others_mib": 500}, {"t": 2, "others_mib": 100})
    history = play(moved, (3, 700))
    pressed, later = history[80], history[-1]
    assert (pressed.others // MIB, pressed.spilled // MIB, pressed.free, pressed.denied) == (500, 200, 0, False)
    assert (later.others // MIB, later.spilled // MIB, later.gtt // MIB) == (100, 200, 200)


def test_amdgpu_brings_back_what_fits_again_before_our_queues_run_on() -> None:
    spike = trace("amd", {"t": 0, "others_mib": 100}, {"t": 1, "others_mib": 500}, {"t": 1.06, "others_mib": 100})
    history = play(spike, (3, 700))
    assert max(sample.spilled for sample in history) == 200 * MIB
    assert history[-1].spilled == 0


def test_our_queues_stop_for_one_restore_cycle_an_eviction() -> None:
    twice = trace("amd", {"t": 0, "others_mib": 100}, {"t": 1, "others_mib": 400}, {"t": 2, "others_mib": 500})
    history = play(twice, (3, 700))
    assert [sample.evicted_ms for sample in history if sample.at < 1][-1] == 0
    assert abs(next(sample.evicted_ms for sample in history if sample.at >= 1.5) - 1000 * RESTORE_S) <= 20
    assert abs(history[-1].evicted_ms - 2000 * RESTORE_S) <= 40


def test_a_spill_is_healed_by_freeing_as_much_and_not_spilled_again() -> None:
    spilling = trace("amd", {"t": 0, "others_mib": 100}, {"t": 1, "spill_mib": 200})
    history = play(spilling, (2, 700), (3, 600), (4, 500), (5, 700))
    assert [history[i].spilled // MIB for i in (40, 60, 110, 160, 210, 240)] == [0, 200, 100, 0, 0, 0]
    assert history[60].free == (1000 - 500 - 100) * MIB


def test_a_spill_that_the_trace_ends_goes_by_itself() -> None:
    passing = trace("amd", {"t": 0, "others_mib": 100}, {"t": 1, "spill_mib": 200}, {"t": 2, "spill_mib": 50})
    history = play(passing, (3, 700))
    assert [history[i].spilled // MIB for i in (60, 140)] == [200, 50]


def test_main_memory_swaps_out_what_does_not_fit_and_back_in_what_does() -> None:
    for vendor in ("cpu", "amd-apu"):
        pressed = trace(vendor, {"t": 0, "others_mib": 100}, {"t": 1, "others_mib": 500}, {"t": 2, "others_mib": 100})
        history = play(pressed, (3, 700))
        assert [history[i].spilled // MIB for i in (40, 60, 140)] == [0, 200, 0]
        assert history[60].free == 0


def test_memory_that_the_kernel_swapped_for_its_own_reasons_comes_on_top() -> None:
    swapped = trace("cpu", {"t": 0, "others_mib": 200, "spill_mib": 64})
    history = play(swapped, (1, 700), (2, 690), (3, 300))
    assert [history[i].spilled // MIB for i in (10, 60, 110)] == [64, 54, 0]


def test_while_the_driver_hangs_or_is_gone_nobody_is_told_anything() -> None:
    history = play(trace("amd", {"t": 0}, {"t": 1, "hang_s": 0.5}, {"t": 2, "gone": True}), (3, 100))
    assert [(sample.hanging, sample.gone) for sample in (history[0], history[60], history[120])] == [
        (False, False), (True, False), (False, True),
    ]  # fmt: skip
