import json
import math
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench.peers import compare, rows
from bench.peers.compare import Comparison, Quiet, Servers, Sitting
from bench.peers.process import ServerFailed
from bench.peers.rows import Measure, Result, Row, RowFailed, Task, decode, prefill
from bench.peers.systems import Paths, launch
from edgekv.cli.machine import LoadWatch, OtherLoad
from edgekv.config.load import load_config
from edgekv.demo import target_path


def paths(tmp_path: Path, *, llama: bool = False) -> Paths:
    return Paths(tmp_path / "model", tmp_path, tmp_path if llama else None, None, threads=2)


def task(tmp_path: Path, system: str = "llama.cpp", weights: str = "q4_0") -> Task:
    return Task(system, weights, 7, paths(tmp_path, llama=True), vocab_size=100, tokens_per_word=1.5)


def executable(file: Path, script: str) -> None:
    file.write_text(f"#!{sys.executable}\n{script}")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)


HEALTHY = """
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args): pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class Turns:
    """A row whose measurement is written down."""

    def __init__(self) -> None:
        self.taken: list[tuple[str, int]] = []
        self.broken: set[str] = set()

    def row(self) -> Row:
        return Row("noted", False, self.measure)

    def measure(self, task: Task) -> Result:
        self.taken.append((task.system, task.seed))
        if task.system in self.broken:
            raise RowFailed("it broke")
        return Result({"speed": Measure("tok/s", [1.0])}, "a command")


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    (tmp_path / "demo-q4_0.gguf").touch()
    return make(tmp_path)


def make(tmp_path: Path, rounds: int = 2, most_others: float = math.inf) -> Comparison:
    folder = tmp_path / "demo"
    if not folder.exists():
        folder.symlink_to(target_path(), target_is_directory=True)
    where = replace(paths(tmp_path, llama=True), folder=folder)
    return Comparison(Sitting(tmp_path / "out.jsonl", most_others), where, rounds)


def test_systems_take_turns_another_first_each_round_with_one_seed_a_round(comparison: Comparison) -> None:
    turns = Turns()
    comparison.run("q4_0", [turns.row()])
    systems = [system for system, _ in turns.taken]
    assert sorted(systems[:3]) == sorted(systems[3:]) == ["edgekv", "edgekv int4", "llama.cpp"]
    assert systems[0] != systems[3]
    seeds = [seed for _, seed in turns.taken]
    assert seeds[0] == seeds[1] == seeds[2] != seeds[3] == seeds[4] == seeds[5]


def test_a_run_that_broke_off_goes_on_where_it_was(comparison: Comparison, tmp_path: Path) -> None:
    first, second = Turns(), Turns()
    first.broken = {"edgekv"}
    comparison.run("q4_0", [first.row()])
    seeds = dict(first.taken[:3])
    make(tmp_path).run("q4_0", [second.row()])
    assert [system for system, _ in second.taken] == ["edgekv", "edgekv"]
    assert second.taken[0][1] == seeds["llama.cpp"]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert "machine" in lines[0]
    assert len(lines) == 1 + 6
    assert all({"seed", "others_cores", "stolen_cores", "seconds", "command"} <= line.keys() for line in lines[1:])


def test_in_a_row_of_many_turns_systems_alternate_with_one_seed(comparison: Comparison, tmp_path: Path) -> None:
    turns = Turns()
    comparison.run("q4_0", [replace(turns.row(), turns=4)])
    a_round, seeds = turns.taken[:12], {seed for _, seed in turns.taken}
    assert len(turns.taken) == 24
    assert len(seeds) == 2
    for system in ("edgekv", "edgekv int4", "llama.cpp"):
        at = [i for i, (name, _) in enumerate(a_round) if name == system]
        assert [i // 3 for i in at] == [0, 1, 2, 3]
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()][1:]
    assert [line["measures"]["speed"]["samples"] for line in lines] == [[1.0] * 4] * 6


def test_who_fails_in_one_of_its_turns_is_left_out_of_the_others(comparison: Comparison, tmp_path: Path) -> None:
    turns = Turns()
    turns.broken = {"edgekv"}
    comparison.run("q4_0", [replace(turns.row(), turns=4)])
    assert sum(system == "edgekv" for system, _ in turns.taken) == 2  # once a round
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()][1:]
    assert [line["turn"][2] for line in lines].count("edgekv") == 0
    assert len(lines) == 4


def test_a_row_that_nobody_takes_part_in_is_passed_over(comparison: Comparison) -> None:
    turns = Turns()
    comparison.run("q4_0", [replace(turns.row(), weights=("bf16",)), turns.row()])
    assert len(turns.taken) == 6


def test_a_disturbed_turn_is_taken_again_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = iter([0.0, 0.0, 0.9, 0.0])
    monkeypatch.setattr(LoadWatch, "read", lambda watch: OtherLoad(next(loads), 0.0))
    (tmp_path / "demo-q4_0.gguf").touch()
    first, second = Turns(), Turns()
    make(tmp_path, rounds=1, most_others=0.5).run("q4_0", [first.row()])
    make(tmp_path, rounds=1, most_others=0.5).run("q4_0", [second.row()])
    assert len(first.taken) == 3
    assert second.taken == [first.taken[-1]]
    make(tmp_path, rounds=1, most_others=0.5).run("q4_0", [second.row()])
    assert len(second.taken) == 1


def test_a_turn_waits_for_others_to_be_quiet_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "LOOK_S", 0.001)
    loads = [1.0, 1.0, 0.1, 1.0]
    seen: list[float] = []

    def read(watch: LoadWatch) -> OtherLoad:
        seen.append(loads[min(len(seen), 3)])
        return OtherLoad(seen[-1], 0.0)

    monkeypatch.setattr(LoadWatch, "read", read)
    Quiet(0.2, patience_s=60).wait()
    assert seen == [1.0, 1.0, 0.1]
    Quiet(0.2, patience_s=0.05).wait()
    assert seen[-1] == 1.0


def test_who_is_not_installed_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = Turns()
    make(tmp_path, rounds=1).run("q4_0", [turns.row()])
    assert [system for system, _ in turns.taken] == ["edgekv int4"]
    assert "demo-q4_0.gguf is not there" in capsys.readouterr().out


def test_peers_with_slots_are_measured_with_several_numbers_of_them(tmp_path: Path) -> None:
    [prefix] = [row for row in rows.ROWS if row.name == "prefix"]
    assert prefix.systems("bf16") == (
        "llama.cpp -np 8", "llama.cpp -np 8 -kvu", "llama.cpp -np 1", "vLLM", "vLLM preloaded", "edgekv",
    )  # fmt: skip
    assert prefix.systems("q4_k_m") == ()
    [engine] = [row for row in rows.ROWS if row.name == "decode"]
    assert engine.systems("bf16") == ("llama.cpp", "edgekv")
    [alone] = [row for row in rows.ROWS if row.name == "outside"]
    assert alone.systems("q4_0") == ("edgekv", "edgekv int4")


def test_llama_bench_is_asked_and_read(tmp_path: Path) -> None:
    lines = [{"n_depth": depth, "samples_ts": [depth + 0.5, depth + 1.5]} for depth in (128, 2048)]
    executable(tmp_path / "llama-bench", f"print({chr(10).join(map(json.dumps, lines))!r})")
    found = decode(task(tmp_path))
    assert {name: list(measure.samples) for name, measure in found.measures.items()} == {
        "decode, context 128": [128.5, 129.5], "decode, context 2048": [2048.5, 2049.5],
    }  # fmt: skip
    assert found.command.startswith("llama-bench -m model-q4_0.gguf -t 2")
    assert str(tmp_path) not in found.command


def test_edgekv_bench_gets_as_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    said = "json.dumps({'decode': [], 'n': os.environ['OMP_NUM_THREADS']})"
    executable(tmp_path / "python", f"import json, os; print({said})")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    found = decode(task(tmp_path, system="edgekv"))
    assert found.detail["n"] == "2"


def test_a_program_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    executable(tmp_path / "llama-bench", "raise SystemExit('cannot load the model')")
    with pytest.raises(RowFailed, match="cannot load the model"):
        prefill(task(tmp_path))


def test_edgekv_is_served_as_a_configuration_says(tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(target_path(), target_is_directory=True)
    started = launch("edgekv int4", "q4_0", paths(tmp_path))
    config = load_config(Path(started.command[4]), [], {}, warn=pytest.fail)
    [model] = config.models.values()
    assert (model.weights, model.path, model.max_num_seqs) == ("int4", tmp_path / "model", 16)
    assert started.environ == {"OMP_NUM_THREADS": "2"}
    assert started.url == f"http://127.0.0.1:{started.port}/v1"


def test_a_server_that_fails_is_not_started_again_and_again(tmp_path: Path) -> None:
    where = paths(tmp_path, llama=True)
    executable(tmp_path / "llama-server", f"open({str(tmp_path / 'starts')!r}, 'a').write('.')\nraise SystemExit(1)")
    servers = Servers("q4_0", where)
    for _ in range(2):
        with pytest.raises(ServerFailed), servers.awake("llama.cpp"):
            pass
    assert (tmp_path / "starts").read_text() == "."


def test_a_server_whose_row_failed_is_replaced(tmp_path: Path) -> None:
    servers = Servers("q4_0", paths(tmp_path, llama=True))
    serve = "import http.server, sys; port = int(sys.argv[sys.argv.index('--port') + 1])"
    executable(tmp_path / "llama-server", f"{serve}\n{HEALTHY}")
    with pytest.raises(RowFailed), servers.awake("llama.cpp") as first:
        raise RowFailed("it broke")
    with servers.awake("llama.cpp") as second:
        assert first != second
    servers.stop()
