"""Counter-based random numbers: the n-th of a seed, with no generator to keep. Runs in: anywhere; owns: nothing."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def uniform(seed: int, counter: int) -> float:
    """The `counter`-th number of stream `seed`: uniform in [0, 1), a multiple of 2**-53.

    A pure function of its arguments, so that a sequence draws the same numbers whoever shares its batch, whatever the
    device, and also after a preemption. Seeds and counters are taken modulo 2**64.

    Source: the SplitMix64 output function (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
    2014, constants of Stafford's mix 13). It is applied to the seed first, so that the streams of neighbouring seeds
    begin at unrelated places, then to the stream's `counter`-th state.
    """
    start = _mix((seed + _GOLDEN) & _MASK)
    return (_mix((start + (counter + 1) * _GOLDEN) & _MASK) >> 11) * 2.0**-53


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
