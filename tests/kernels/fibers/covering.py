"""A few cases for many choices: any two choices of different kinds meet in one of them."""

import random
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

_TRIES = 40  # for each case; of them the one with the most pairs that had not met


def covering(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Cases, each with one choice of every kind: the same at each call.

    Cohen et al., The AETG system (IEEE Transactions on Software Engineering, 1997).
    """
    generator = random.Random(0)
    names = list(choices)
    missing = {
        ((a, i), (b, j))
        for a, b in combinations(names, 2)
        for i, j in product(range(len(choices[a])), range(len(choices[b])))
    }
    cases = []
    while missing:
        tries = [_attempt(missing, choices, generator) for _ in range(_TRIES)]
        best = max(tries, key=lambda case: len(_pairs(case) & missing))
        missing -= _pairs(best)
        cases.append({name: choices[name][best[name]] for name in names})
    return cases


_Pair = tuple[tuple[str, int], tuple[str, int]]


def _attempt(
    missing: set[_Pair], choices: dict[str, Sequence[Any]], generator: random.Random
) -> dict[str, int]:
    case = {name: generator.randrange(len(values)) for name, values in choices.items()}
    case.update(generator.choice(sorted(missing)))
    return case


def _pairs(case: dict[str, int]) -> set[_Pair]:
    return set(combinations(case.items(), 2))
