"""The commands as a person runs them: a real server in a process of its own, over loopback."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from edgekv.demo import draft_path

REPOSITORY = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


PLAN = ("plan", str(draft_path()), "--device", "cpu", "--draft", "demo")
DRAFT_LEASES = ("weights.draft", "workspace.draft", "kv.draft")


def edgekv(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "edgekv", *arguments]
    return subprocess.run(command, input=text, capture_output=True, text=True, env=ENVIRONMENT, timeout=120)


class Served:
    """A running `edgekv serve`: what it has printed, where it listens."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "edgekv", "serve", "--port", "0", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True
        )
        self.lines: list[str] = []
        self.errors: list[str] = []
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self.errors.extend, args=(self.process.stderr,))
        self._reader.start()
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("edgekv is ready: "):
                self.url = line.split()[3]
                return
        self.stop(signal.SIGKILL)
        raise AssertionError("".join(self.errors))

    def stop(self, number: int = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        self._reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        return code


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served("--model", str(draft_path()), "--draft", "demo")
    yield server
    server.stop()


def test_it_tells_what_a_person_needs(served: Served) -> None:
    text = "\n".join(served.lines)
    assert re.search(r"^GPU KV cache size: [\d,]+ tokens$", text, re.MULTILINE)
    assert re.search(r"^Maximum concurrency for [\d,]+ tokens per request: \d+\.\d\dx$", text, re.MULTILINE)
    assert f"curl {served.url.removesuffix('/v1')}/v1/chat/completions" in text
    owners = {word for line in served.lines for word in line.split()[1:2]}
    assert owners >= {"runtime", "weights", "workspace", "kv.target", "unused", "headroom", "others", *DRAFT_LEASES}
    assert re.search(r"^draft: LlamaForCausalLM, .*; its pool holds [\d,]+ tokens$", text, re.MULTILINE)
    assert any(line.startswith("loading: ") for line in served.errors)


def test_what_was_planned_is_what_was_loaded(served: Served) -> None:
    plan = json.loads(edgekv(*PLAN, "--json").stdout)
    loaded = int(re.sub(r"\D", "", next(line for line in served.lines if line.startswith("GPU KV cache size"))))
    assert loaded == pytest.approx(plan["kv"]["pool_tokens"], rel=0.01)


def test_what_was_planned_is_what_the_ledger_holds(served: Served) -> None:
    plan = json.loads(edgekv(*PLAN, "--json").stdout)
    told = json.loads(edgekv("status", "--url", served.url, "--json").stdout)
    leases = told["ledger"]["leases"]
    for name in ("weights", "workspace", "kv.target", *DRAFT_LEASES):
        assert leases[name] == pytest.approx(plan["leases"][name], rel=0.01), name
    assert told["ledger"]["leased_bytes"] == sum(leases.values()) <= told["ledger"]["budget_bytes"]


def test_status_tells_who_owns_the_memory(served: Served) -> None:
    shown = edgekv("status", "--url", served.url)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert re.match(r"CPU  ok: [\d,]+ MiB free, headroom [\d,]+ MiB  \(read \d+\.\d s ago by host\)\n", shown.stdout)
    told = json.loads(edgekv("status", "--url", served.url, "--json").stdout)
    assert told["state"] == "ok"
    assert sum(told["owners"].values()) == pytest.approx(told["reading"]["total_bytes"], rel=0.01)
    elastic = [told["owners"][name] for name in ("kv.target", *DRAFT_LEASES)]
    assert sum(elastic) == told["pool"]["kv_bytes"]
    assert min(elastic) > 0
    assert (told["speculation"]["method"], told["speculation"]["state"]) == ("model", "on")
    assert "\ndraft   demo, up to 8 tokens at once, on: " in shown.stdout


def test_status_without_a_server_is_one_line_and_exit_code_1() -> None:
    ended = edgekv("status", "--url", "http://127.0.0.1:1")
    assert (ended.returncode, ended.stdout) == (1, "")
    told = r"error: no server answers at http://127.0.0.1:1 \(.*\); start one with: edgekv serve\n"
    assert re.fullmatch(told, ended.stderr)


def test_the_openai_client_talks_to_it(served: Served) -> None:
    with OpenAI(base_url=served.url, api_key="none") as client:
        [model] = client.models.list().data
        answer = client.chat.completions.create(
            model=model.id,
            messages=[{"role": "user", "content": "When do I sow carrots?"}],
            max_tokens=8,
            temperature=0,
        )
    assert answer.usage is not None
    assert 1 <= answer.usage.completion_tokens <= 8
    assert answer.choices[0].message.content


def test_chat_and_bench_talk_to_it(served: Served) -> None:
    talk = edgekv("chat", "--url", served.url, "--max-tokens", "8", text="Hello!\n/quit\n")
    assert (talk.returncode, talk.stderr) == (0, "")
    bench = edgekv(
        "bench", "serve", "--url", served.url, "-n", "3", "--max-tokens", "4", "--system-tokens", "40",
        "--tail-tokens", "16", "--json",
    )  # fmt: skip
    summary = json.loads(bench.stdout)
    assert (bench.returncode, summary["ok"], summary["errors"]) == (0, 3, 0)
    assert summary["cached_tokens_mean"] >= 16


def test_a_port_that_is_taken_is_one_line_and_exit_code_1(served: Served) -> None:
    port = served.url.split(":")[2].removesuffix("/v1")
    ended = edgekv("serve", "--port", port, "--model", str(draft_path()), "--set", "logging.format=text")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert f"port {port}: another program listens there" in ended.stderr.splitlines()[-1]


def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    for file in draft_path().iterdir():
        (tmp_path / file.name).write_bytes(
            file.read_bytes()[:5000] if file.suffix == ".safetensors" else file.read_bytes()
        )
    ended = edgekv("serve", "--port", "0", "--model", str(tmp_path), "--set", "logging.format=text")
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert "model.safetensors" in ended.stderr.splitlines()[-1]


def test_a_budget_that_holds_nothing_is_refused_before_loading() -> None:
    ended = edgekv("serve", "--port", "0", "--model", str(draft_path()), "--set", "kv.budget=1KiB")
    assert ended.returncode == 1
    assert re.fullmatch(r"error: The KV budget holds no block: .* Raise kv.budget.\n", ended.stderr)


def test_ctrl_c_ends_it_cleanly(served: Served) -> None:
    assert served.stop() == 0
    assert served.errors[-1] == "edgekv has stopped\n"
