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
from edgekv.smi.cards import Card, Survey
from edgekv.smi.torch_build import TorchBuild

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
    return tmp_path


def test_the_plan_of_llama_3_8b(llama: Path) -> None:
    result = run(app, ["plan", str(llama), "--vram", "24GiB"])
    assert result.exit_code == 0, result.output
    assert "one token: 131,072 bytes (128.00 KiB) = 2 × 32 layers × 8 KV heads × 128 × 2 bytes" in result.stdout
    assert "8,030,261,248 × 2 bytes" in result.stdout
    plan = json.loads(run(app, ["plan", str(llama), "--vram", "24GiB", "--json"]).stdout)
    tokens = plan["kv"]["pool_tokens"]
    assert plan["kv"]["bytes_per_token"] == 128 * 1024
    assert plan["weight_bytes"] == 2 * 8_030_261_248
    assert f"GPU KV cache size: {tokens:,} tokens" in result.stdout.splitlines()
    assert f"Maximum concurrency for 8,192 tokens per request: {tokens / 8192:.2f}x" in result.stdout.splitlines()


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        (["--vram", "16GiB"], "more than there is; use a smaller model or a card with more memory"),
        (["--vram", "24GiB", "--dtype", "float32"], "--dtype bfloat16 would take 14.96 GiB off the weights"),
        (
            ["--vram", "24GiB", "--kv-budget", "512MiB"],
            "--context 4096 is the most that fits; --kv-budget 1024MiB would",
        ),
        (["--vram", "24GiB", "--kv-budget", "512MiB", "--kv-dtype", "float32"], "--kv-dtype bfloat16 would hold 4,096"),
    ],
)
def test_what_does_not_fit_is_told_with_a_remedy(llama: Path, options: list[str], remedy: str) -> None:
    result = run(app, ["plan", str(llama), *options])
    assert result.exit_code == 1
    assert "does not fit:" in result.stdout
    assert remedy in result.stdout


def test_the_remedy_works(llama: Path) -> None:
    for options in (["--context", "4096", "--kv-budget", "512MiB"], ["--kv-budget", "1024MiB"]):
        assert run(app, ["plan", str(llama), "--vram", "24GiB", *options]).exit_code == 0


@pytest.mark.parametrize(
    "options", [["--vram", "16"], ["--kv-dtype", "fp8"], ["--kv-budget", "x"], ["--device", "tpu"]]
)
def test_a_bad_option_is_refused(llama: Path, options: list[str]) -> None:
    assert run(app, ["plan", str(llama), *options]).exit_code == 2


def test_the_plan_for_this_machine_leaves_the_headroom(llama: Path) -> None:
    plan = json.loads(run(app, ["plan", str(llama), "--device", "cpu", "--json"]).stdout)
    assert plan["device"] == "cpu"
    assert plan["headroom_bytes"] == max(512 << 20, plan["total_bytes"] * 6 // 100)


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
    "arguments", [["--help"], ["check", "config.yaml"], ["plan", "{llama}", "--device", "cpu"], ["doctor", "--json"]]
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


def test_doctor_looks_at_everything_and_gives_a_fix_with_every_complaint() -> None:
    findings = list(examine())
    subjects = [finding.subject for finding in findings]
    assert subjects[:4] == ["Python", "torch", "processor", "memory"]
    assert subjects[-1] == "demo model"
    assert all(finding.fix for finding in findings if finding.verdict != "ok")
    assert all(not finding.fix for finding in findings if finding.verdict == "ok")


def test_doctor_sees_a_card_that_the_installed_torch_cannot_drive() -> None:
    card = Card("amd", 0, "Radeon RX 7900 XTX", 24 << 30, 1 << 30, "6.12")
    [finding] = doctor_module._cards(Survey("amd", (card,)), TorchBuild("2.13.0+cu130", "13.0", None))
    assert (finding.verdict, finding.fix) == ("warn", "install torch's ROCm build")
    [finding] = doctor_module._cards(Survey("amd", (card,)), TorchBuild("2.13.0+rocm7", None, "7.0"))
    assert finding.verdict == "ok"


def test_doctor_sees_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = doctor_module._port("127.0.0.1", port)
    assert (finding.verdict, f"--port {port + 1}" in finding.fix) == ("warn", True)
    assert doctor_module._port("127.0.0.1", port).verdict == "ok"
