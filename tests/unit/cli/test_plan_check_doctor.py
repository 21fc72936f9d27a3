"""The commands that answer without torch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgekv.cli import doctor as doctor_module
from edgekv.cli.app import app
from edgekv.cli.doctor import examine
from edgekv.demo import draft_path, target_path

run = CliRunner().invoke

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    asked = f"kv: {{dtype: int8}}\nmodels: {{m: {{path: {target_path()}, weights: int4}}}}\n"
    (tmp_path / "asked.yaml").write_text(asked)
    drafted = f"models: {{m: {{path: {target_path()}, draft: {{path: {draft_path()}}}}}}}\n"
    (tmp_path / "drafted.yaml").write_text(drafted)
    return tmp_path


def test_check_prints_every_fault_as_json_too(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("server: {prot: 1, port: x}\n")
    result = run(app, ["check", str(file), "--json"])
    assert result.exit_code == 1
    assert len(json.loads(result.stdout)["faults"]) == 2
    file.write_text("")
    assert run(app, ["check", str(file)]).stdout.endswith("is fine: serves the demo model on 127.0.0.1:8181\n")
    assert run(app, ["check"]).exit_code == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["check", "config.yaml"],
        ["check", "{llama}/asked.yaml"],
        ["plan", "{llama}", "--device", "cpu"],
        ["plan", "{llama}", "--card", "RTX 4090", "--draft", "demo"],
        ["plan", "config.yaml", "--vram", "8GiB"],
        ["plan", "demo", "--device", "cpu"],
        ["check", "{llama}/drafted.yaml"],
        ["doctor", "--json"],
    ],
)
def test_these_start_without_torch_trio_or_http(llama: Path, arguments: list[str]) -> None:
    script = (
        "import sys; from edgekv.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'trio', 'starlette', 'httpx2', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", script, *(argument.format(llama=llama) for argument in arguments)]
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[3], env=os.environ | {"PYTHONPATH": "."}
    )
    assert ended.returncode == 0, ended.stderr


def test_what_a_person_got_wrong_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "edgekv", "plan", str(tmp_path / "nothing")],
        capture_output=True, text=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: ")


def test_a_warning_may_hold_brackets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.yaml").write_text("version: 1\n")
    monkeypatch.setenv("EDGEKV_[/B]", "1")
    checked = CliRunner().invoke(app, ["check", str(tmp_path / "c.yaml")])
    assert checked.exit_code == 0
    assert "EDGEKV_[/B] matches no setting" in checked.stderr.replace("\n", " ")


def test_doctor_looks_at_everything_and_gives_a_fix_with_every_complaint() -> None:
    findings = list(examine())
    subjects = [finding.subject for finding in findings]
    assert subjects[:4] == ["Python", "torch", "processor", "memory"]
    assert "swap" in subjects
    assert subjects[-1] == "demo model"
    assert all(finding.fix for finding in findings if finding.verdict != "ok")
    assert all(not finding.fix for finding in findings if finding.verdict == "ok")


def test_doctor_sees_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = doctor_module._port("127.0.0.1", port)
    assert (finding.verdict, f"--port {port + 1}" in finding.fix) == ("warn", True)
    assert doctor_module._port("127.0.0.1", port).verdict == "ok"
