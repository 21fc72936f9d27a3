"""The comparison as one Markdown table: medians, the better of the peers, and the ratio to it.

    python -m bench.peers.table results.jsonl

Runs in: anywhere; owns: nothing.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.peers.rows import OUTSIDE
from bench.peers.systems import EDGEKV, LLAMA, VLLM, family, on_load
from edgekv.cli.percentile import percentile


@dataclass(slots=True)
class Quantity:
    """One quantity of one kind of weights: its samples by system."""

    unit: str
    more: bool
    paired: bool = False
    samples: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    rounds: dict[tuple[str, int, str], list[float]] = field(default_factory=dict)

    def median(self, system: str) -> float:
        return statistics.median(self.samples[system])

    def good(self, system: str) -> float:
        """The tenth percentile of times: what it does when nothing disturbs it."""
        found = percentile(self.samples[system], 90 if self.more else 10)
        assert found is not None
        return found

    def best(self, *families: str) -> str | None:
        """Of these families' systems the one with the best median; None if none was measured."""
        known = [system for system in self.samples if family(system) in families]
        if not known:
            return None
        return max(known, key=lambda system: self.median(system) if self.more else -self.median(system))

    def ratio(self, system: str) -> float | None:
        """Of a system of ours to the best peer, of medians; None if one is missing."""
        peer = self.best(LLAMA, VLLM)
        if peer is None or system not in self.samples or not self.median(peer):
            return None
        if self.paired:
            ratios = self._pairs(system, peer)
            return statistics.median(ratios) if ratios else None
        return self.median(system) / self.median(peer)

    def _pairs(self, system: str, peer: str) -> list[float]:
        """Ratios of samples that were taken at the same time: what the machine does meanwhile cancels out.

        Of a round that was broken off and gone on with later there are none.
        """
        ratios = []
        for (name, number, sitting), own in self.rounds.items():
            theirs = self.rounds.get((peer, number, sitting), ()) if name == system else ()
            ratios += [ours / other for ours, other in zip(own, theirs, strict=False)]
        return ratios


def gather(lines: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], Quantity]:
    """By weights and the quantity's name, in the order of the file."""
    found: dict[tuple[str, str], Quantity] = {}
    for line in lines:
        for name, measure in line.get("measures", {}).items():
            weights, _, system, number = line["turn"]
            made = Quantity(measure["unit"], measure["more"], measure.get("paired", False))
            quantity = found.setdefault((weights, name), made)
            quantity.samples[system] += measure["samples"]
            quantity.rounds[system, number, line.get("sitting", "")] = measure["samples"]
    return found


def markdown(lines: list[dict[str, Any]]) -> str:
    """The whole table with the line about the machine above it."""
    text: list[str] = []
    turns = [line for line in lines if "turn" in line]
    machines = [line["machine"] for line in lines if "machine" in line]
    text += [f"Machine: {machine}." for machine in dict.fromkeys(machines)]
    if turns:
        others = [line["others_cores"] for line in turns]
        stolen = [line["stolen_cores"] for line in turns]
        text.append(
            f"{turns[0]['at']} to {turns[-1]['at']}; other programs used {statistics.median(others):.2f} cores in the "
            f"median turn and {max(others):.2f} in the worst, other virtual machines {statistics.median(stolen):.2f} "
            f"and {max(stolen):.2f}."
        )
    text += [
        "Median, and in parentheses the best tenth and the number of samples. Ratio: edgekv's median to the better "
        "peer's; where less is better (ms), below 1 is better. In turns: the median of the ratios of samples taken "
        "within seconds of each other.",
        "",
        "| weights | what | llama.cpp | vLLM | edgekv | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for (weights, name), quantity in gather(lines).items():
        if name == OUTSIDE:
            continue
        cells = [_cell(quantity, LLAMA), _cell(quantity, VLLM), _cell(quantity, EDGEKV)]
        text.append(f"| {weights} | {name}, {quantity.unit} | {' | '.join(cells)} | {_ratios(quantity)} |")
    return "\n".join(text)


def overheads(lines: list[dict[str, Any]]) -> str:
    """What of one stream's time is not the model's kernels: in the engine alone, and served over HTTP.

    Both are shares of times taken together, so that it does not matter how fast the machine was meanwhile. A server
    counts a step's preparation to its forward pass; its share is the engine's.
    """
    engine: dict[tuple[str, str], list[float]] = defaultdict(list)
    prepared: dict[tuple[str, str], list[float]] = defaultdict(list)
    for line in lines:
        if "turn" in line and line["turn"][1] == "decode" and family(line["turn"][2]) == EDGEKV:
            weights, _, system, _ = line["turn"]
            row = next(row for row in line["detail"]["decode"] if row["context"] == 128)
            total = sum(row["parts_us"].values())
            engine[weights, system].append(100 * (1 - row["parts_us"]["model"] / total))
            prepared[weights, system].append(100 * row["parts_us"]["prepare"] / total)
    found = gather(lines)
    text = []
    for (weights, system), shares in engine.items():
        served = found.get((weights, OUTSIDE))
        if served is not None and served.samples.get(system):
            both = served.median(system) + statistics.median(prepared[weights, system])
            text.append(f"| {weights} | {system} | {statistics.median(shares):.1f} % | **{both:.1f} %** |")
    head = ["| weights | edgekv | a step in the engine | a chat over HTTP, its prompt and its client included |"]
    return "\n".join([*head, "|---|---|---|---|", *text]) if text else ""


def show(lines: list[dict[str, Any]]) -> None:
    print(f"\n{markdown(lines)}")
    if shares := overheads(lines):
        print(f"\nOne stream, and what of its time is not the model's kernels:\n\n{shares}")


def _ratios(quantity: Quantity) -> str:
    """With the same weights as the peer's, in bold, and with those that edgekv made."""
    cells = []
    for system in sorted(system for system in quantity.samples if family(system) == EDGEKV):
        ratio, made = quantity.ratio(system), on_load(system)
        if ratio is not None:
            cells.append(f"{made}: {ratio:.2f}" if made else f"**{ratio:.2f}**")
    return "<br>".join(cells)


def _cell(quantity: Quantity, name: str) -> str:
    """All systems of a family, the best first, by what their names add to the family's."""
    systems = [system for system in quantity.samples if family(system) == name]
    systems.sort(key=quantity.median, reverse=quantity.more)
    cells = []
    for system in systems:
        variant = system.removeprefix(name).strip()
        count = len(quantity.samples[system])
        value = f"{quantity.median(system):,.1f} ({quantity.good(system):,.1f}; {count})"
        cells.append(f"{variant}: {value}" if variant else value)
    return "<br>".join(cells)


def undisturbed(lines: Iterable[dict[str, Any]], most_others: float) -> list[dict[str, Any]]:
    """Without the turns during which other programs used more cores than that."""
    return [line for line in lines if line.get("others_cores", 0.0) <= most_others]


def main() -> None:
    parser = argparse.ArgumentParser(description="The comparison as a Markdown table.")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--most-others", type=float, default=math.inf, help="leave out turns in which others used more")
    options = parser.parse_args()
    lines = [json.loads(line) for file in options.results for line in file.read_text().splitlines() if line.strip()]
    show(undisturbed(lines, options.most_others))


if __name__ == "__main__":
    main()
