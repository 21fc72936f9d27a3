"""edgekv beside its peers: same machine, same weights, same client, in turns.

    python -m bench.peers.compare MODEL_FOLDER --llama-bin DIR --vllm VENV --out results.jsonl

Each line of the output is one row of one system in one round; what is there already is not measured again, so a run
that was broken off goes on where it was. In every round the systems take turns, another one first each time, with a
seed of the round's own; servers that are not measured are frozen. `python -m bench.peers.table results.jsonl` makes
the table; what the servers said is in results.jsonl.logs.

Runs in: the main thread; owns: every process that it starts.
"""

import argparse
import contextlib
import json
import math
import os
import secrets
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from bench.peers.process import Server, ServerFailed
from bench.peers.rows import ROWS, Result, Row, RowFailed, Task
from bench.peers.systems import SYSTEMS, Paths, launch
from bench.peers.table import show, undisturbed
from edgekv.cli.load import TOKENS_PER_WORD, WORDS
from edgekv.cli.machine import LoadWatch, OtherLoad, machine_line
from edgekv.kernels.cpu.threads import default_threads
from edgekv.model.hf_config import read_spec
from edgekv.text.tokenizer import load_tokenizer

LOOK_S = 2.0


class Sitting:
    """The results so far. Invariant: the file has a line for each, and never two that count for the same turn.

    A turn counts unless other programs used more than `most_others` cores during it.
    """

    def __init__(self, out: Path, most_others: float = math.inf) -> None:
        self._out, self._most_others = out, most_others
        self.id = secrets.token_hex(4)
        self.lines: list[dict[str, Any]] = []
        if out.exists():
            self.lines = [json.loads(line) for line in out.read_text().splitlines() if line.strip()]
        if not self.lines:
            self.add({"machine": machine_line(), "at": _now()})

    def has(self, weights: str, row: str, system: str, number: int) -> bool:
        """Whether this turn was taken, and counts."""
        return any(line.get("turn") == [weights, row, system, number] for line in self.counting())

    def counting(self) -> list[dict[str, Any]]:
        """The lines that count."""
        return undisturbed(self.lines, self._most_others)

    def seed(self, weights: str, row: str, number: int) -> int:
        """The round's: the same for all systems, and never used before it."""
        for line in self.counting():
            if "turn" in line and line["turn"][:2] + line["turn"][3:] == [weights, row, number]:
                return int(line["seed"])
        return secrets.randbelow(1 << 31)

    def add(self, line: dict[str, Any]) -> None:
        with self._out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)


class Quiet:
    """Waits, at most `patience_s`, until other programs use no more than `most_others` cores."""

    def __init__(self, most_others: float, patience_s: float) -> None:
        self._most_others, self._patience_s = most_others, patience_s

    def wait(self) -> None:
        """Returns in any case."""
        watch, deadline = LoadWatch(), time.monotonic() + self._patience_s
        while time.monotonic() < deadline:
            time.sleep(LOOK_S)
            if watch.read().busy_cores <= self._most_others:
                return


class Servers:
    """The servers of one kind of weights, started when they are first needed and frozen in between."""

    def __init__(self, weights: str, paths: Paths) -> None:
        self._weights, self._paths = weights, paths
        self._running: dict[str, Server] = {}
        self._failed: dict[str, str] = {}

    @contextlib.contextmanager
    def awake(self, system: str) -> Iterator[str]:
        """The endpoint of a system. Raises ServerFailed, at once for one that failed before."""
        if system in self._failed:
            raise ServerFailed(self._failed[system])
        if system not in self._running:
            log = self._paths.logs / f"{system.replace(' ', '-')}-{self._weights}.log"
            _say(f"starting {system}")
            try:
                server = Server(launch(system, self._weights, self._paths), log)
            except ServerFailed as error:
                self._failed[system] = str(error)
                raise
            server.freeze()
            self._running[system] = server
        try:
            with self._running[system].awake() as url:
                yield url
        except (RowFailed, ServerFailed):
            # Whatever is wrong with it, the next row gets a fresh one.
            self._running.pop(system).stop()
            raise

    def stop(self) -> None:
        for server in self._running.values():
            server.stop()
        self._running.clear()


class Comparison:
    """All rows of all formats, in turns."""

    def __init__(
        self, sitting: Sitting, paths: Paths, rounds: int, systems: tuple[str, ...] = (), quiet: Quiet | None = None
    ) -> None:
        self._sitting, self._paths, self._rounds, self._systems = sitting, paths, rounds, systems
        self._quiet = quiet
        tokenizer = load_tokenizer(paths.folder)
        words = len(tokenizer.encode(" ".join(WORDS), add_special_tokens=False, parse_special=False))
        self._tokens_per_word = words / len(WORDS) if words else TOKENS_PER_WORD
        self._vocab_size = read_spec(paths.folder).vocab_size

    def run(self, weights: str, rows: list[Row]) -> None:
        """What is missing of these rows."""
        servers = Servers(weights, self._paths)
        try:
            for number in range(1, self._rounds + 1):
                for row in rows:
                    self._round(weights, row, number, servers)
        finally:
            servers.stop()

    def _round(self, weights: str, row: Row, number: int, servers: Servers) -> None:
        systems = [system for system in row.systems(weights) if not self._systems or system in self._systems]
        waiting = [system for system in systems if self._takes_part(weights, row, system, number)]
        if not waiting:
            return
        seed, taken = self._sitting.seed(weights, row.name, number), defaultdict[str, list[Turn]](list)
        for turn in range(row.turns):
            first = (number + turn) % len(systems)
            for system in systems[first:] + systems[:first]:
                if system not in waiting:
                    continue
                if self._quiet is not None and turn == 0:
                    self._quiet.wait()
                try:
                    taken[system].append(self._turn(weights, row, system, seed, servers))
                except (RowFailed, ServerFailed) as error:
                    _say(f"{weights} {row.name} {system}: {error}")
                    waiting.remove(system)
                    continue
                if len(taken[system]) == row.turns:
                    self._note([weights, row.name, system, number], seed, merged(taken[system]))

    def _takes_part(self, weights: str, row: Row, system: str, number: int) -> bool:
        if self._sitting.has(weights, row.name, system, number):
            return False
        lacking = self._paths.lacks(system, weights)
        if lacking is not None:
            _say(f"{weights} {row.name} {system}: left out, {lacking}")
        return lacking is None

    def _turn(self, weights: str, row: Row, system: str, seed: int, servers: Servers) -> "Turn":
        with servers.awake(system) if row.is_http else contextlib.nullcontext("") as url:
            task = Task(system, weights, seed, self._paths, self._vocab_size, self._tokens_per_word, url)
            watch, begun = LoadWatch(), time.monotonic()
            result = row.measure(task)
            return Turn(result, watch.read(), time.monotonic() - begun)

    def _note(self, key: list[object], seed: int, turn: "Turn") -> None:
        line = {
            "turn": key, "seed": seed, "sitting": self._sitting.id, "at": _now(), "seconds": round(turn.seconds, 1),
            "others_cores": round(turn.others.busy_cores, 2), "stolen_cores": round(turn.others.stolen_cores, 2),
            **asdict(turn.result),
        }  # fmt: skip
        self._sitting.add(line)
        weights, row, system, number = key
        _say(f"{weights} {row} {system}, round {number}: {_summary(turn.result)} ({turn.seconds:.0f} s, {turn.others})")


@dataclass(frozen=True, slots=True)
class Turn:
    """What one system did in its turn, and who else was busy."""

    result: Result
    others: OtherLoad
    seconds: float


def merged(turns: Sequence[Turn]) -> Turn:
    """All samples of one system's turns in their order; of the loads the averages over time."""
    last = turns[-1].result
    measures = {
        name: replace(measure, samples=[sample for turn in turns for sample in turn.result.measures[name].samples])
        for name, measure in last.measures.items()
    }
    seconds = sum(turn.seconds for turn in turns)
    busy = sum(turn.others.busy_cores * turn.seconds for turn in turns) / max(seconds, 1e-9)
    stolen = sum(turn.others.stolen_cores * turn.seconds for turn in turns) / max(seconds, 1e-9)
    return Turn(replace(last, measures=measures), OtherLoad(busy, stolen), seconds)


def _summary(result: Result) -> str:
    return "; ".join(
        f"{name} {' '.join(f'{sample:,.1f}' for sample in measure.samples)} {measure.unit}"
        for name, measure in result.measures.items()
    )


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _chosen(asked: str, known: list[str]) -> list[str]:
    """The asked names in the order in which they are known. Raises ArgumentTypeError for one that is not."""
    names = asked.split(",") if asked else known
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
    return [name for name in known if name in names]


def main() -> None:
    row_names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description="Measure edgekv beside llama.cpp and vLLM.")
    parser.add_argument("folder", type=Path, help="a model folder with its GGUF files beside it (bench.peers.convert)")
    parser.add_argument("--llama-bin", type=Path, default=os.environ.get("LLAMA_CPP_BIN"))
    parser.add_argument("--vllm", type=Path, default=os.environ.get("VLLM_VENV"), help="its virtual environment")
    parser.add_argument("--preload", default=os.environ.get("VLLM_PRELOAD", ""), help="LD_PRELOAD of a second vLLM")
    parser.add_argument("--out", type=Path, required=True, help="results, one JSON object a line; may exist")
    parser.add_argument("--rows", type=lambda asked: _chosen(asked, row_names), default=row_names)
    parser.add_argument("--weights", type=lambda asked: _chosen(asked, list(SYSTEMS)), default=list(SYSTEMS))
    parser.add_argument("--systems", default="", help="only these, by their names in the table, with commas between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--most-others", type=float, default=math.inf, help="turns in which others used more cores are taken again"
    )
    parser.add_argument("--patience", type=float, default=0.0, help="seconds to wait for that before each turn")
    parser.add_argument("--threads", type=int, default=default_threads(), help="of every system")
    options = parser.parse_args()
    rows = [row for row in ROWS if row.name in options.rows]
    systems = tuple(options.systems.split(",")) if options.systems else ()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # so that no server is left behind, frozen for ever
    logs = options.out.with_name(f"{options.out.name}.logs")
    logs.mkdir(exist_ok=True)
    paths = Paths(options.folder.resolve(), logs, options.llama_bin, options.vllm, options.threads, options.preload)
    sitting = Sitting(options.out, options.most_others)
    quiet = Quiet(options.most_others, options.patience) if options.patience else None
    comparison = Comparison(sitting, paths, options.rounds, systems, quiet)
    for weights in options.weights:
        comparison.run(weights, rows)
    show(sitting.counting())


if __name__ == "__main__":
    main()
