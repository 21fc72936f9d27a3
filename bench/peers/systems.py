"""What is compared, and how each is started with its best flags. Runs in: anywhere; owns: nothing.

A system is a server or a program under a name; some names are the same program with other flags. Where they are
installed is said by arguments, or by LLAMA_CPP_BIN and VLLM_VENV.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.peers.process import Launch, free_port

EDGEKV, LLAMA, VLLM = "edgekv", "llama.cpp", "vLLM"
PRELOADED = "vLLM preloaded"
CONTEXT = 4096
STREAMS = 16

# The weights of each format, and who has them: our own quantisation on load stands beside the files.
SYSTEMS: Mapping[str, tuple[str, ...]] = {
    "bf16": (LLAMA, VLLM, PRELOADED, EDGEKV),
    "q8_0": (LLAMA, EDGEKV, "edgekv int8"),
    "q4_0": (LLAMA, EDGEKV, "edgekv int4"),
    "q4_k_m": (LLAMA, EDGEKV),
}

# llama-server's slots do not share what they have computed, so for prompts with one beginning it matters how many there
# are: with one, all requests queue for a slot that knows the beginning.
LLAMA_SLOTS: Mapping[str, tuple[str, ...]] = {
    LLAMA: ("-np", str(STREAMS), "-c", str(STREAMS * CONTEXT)),
    "llama.cpp -np 8": ("-np", "8", "-c", str(8 * CONTEXT)),
    "llama.cpp -np 8 -kvu": ("-np", "8", "-kvu", "-c", str(8 * CONTEXT)),
    "llama.cpp -np 1": ("-np", "1", "-c", str(CONTEXT)),
}


@dataclass(frozen=True, slots=True)
class Paths:
    """Where things are. `folder` is the model; its GGUF files lie beside it as FOLDER-FORMAT.gguf.

    `logs` is for what the servers say, and for edgekv's configurations.
    """

    folder: Path
    logs: Path
    llama_bin: Path | None
    vllm_venv: Path | None
    threads: int
    preload: str = ""

    def gguf(self, weights: str) -> Path:
        """The file of a format."""
        return self.folder.with_name(f"{self.folder.name}-{weights}.gguf")

    def lacks(self, system: str, weights: str) -> str | None:
        """Why a system cannot be measured with these weights; None if it can."""
        if family(system) == LLAMA:
            if self.llama_bin is None:
                return "--llama-bin is not given"
            return None if self.gguf(weights).exists() else f"{self.gguf(weights)} is not there"
        if family(system) == VLLM:
            if system == PRELOADED and not self.preload:
                return "--preload is not given"
            return "--vllm is not given" if self.vllm_venv is None else None
        path = edgekv_path(self, system, weights)
        return None if path.exists() else f"{path} is not there"


def family(system: str) -> str:
    """Whose program it is."""
    return next(name for name in (EDGEKV, LLAMA, VLLM) if system.startswith(name))


def edgekv_path(paths: Paths, system: str, weights: str) -> Path:
    """What edgekv loads: the folder for bf16 and for what is quantised on load, else the file."""
    return paths.folder if weights == "bf16" or system != EDGEKV else paths.gguf(weights)


def on_load(system: str) -> str | None:
    """What edgekv is to make of the weights."""
    return system.removeprefix(EDGEKV).strip() or None


def launch(system: str, weights: str, paths: Paths) -> Launch:
    """The server of a system."""
    if family(system) == LLAMA:
        return _llama(system, weights, paths)
    return _vllm(system, paths) if family(system) == VLLM else _edgekv(system, weights, paths)


def llama_bench(weights: str, paths: Paths, *options: str) -> list[str]:
    """The command of llama.cpp's own measurement."""
    assert paths.llama_bin is not None
    model = str(paths.gguf(weights))
    return [str(paths.llama_bin / "llama-bench"), "-m", model, "-t", str(paths.threads), "-o", "jsonl", *options]


def edgekv_bench(system: str, weights: str, paths: Paths, *options: str) -> list[str]:
    """The command of ours."""
    made = on_load(system)
    kind = ["--weights", made] if made else []
    model = str(edgekv_path(paths, system, weights))
    return [sys.executable, "-m", "edgekv", "bench", "engine", model, "--json", *kind, *options]


def _llama(system: str, weights: str, paths: Paths) -> Launch:
    assert paths.llama_bin is not None
    port = free_port()
    command = [
        str(paths.llama_bin / "llama-server"), "-m", str(paths.gguf(weights)), "--host", "127.0.0.1",
        "--port", str(port), "-t", str(paths.threads), "-a", "bench", "--no-webui", *LLAMA_SLOTS[system],
    ]  # fmt: skip
    return Launch(command, port, health="/health")


def _vllm(system: str, paths: Paths) -> Launch:
    assert paths.vllm_venv is not None
    port = free_port()
    command = [
        str(paths.vllm_venv / "bin" / "vllm"), "serve", str(paths.folder), "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", "bench", "--dtype", "bfloat16", "--max-model-len", str(CONTEXT),
        "--max-num-seqs", str(STREAMS), "--disable-uvicorn-access-log", "--enable-prompt-tokens-details",
    ]  # fmt: skip
    environ = {
        # By itself vLLM keeps a core free for its HTTP side, which is half of two.
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{paths.threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "4",
        "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    if system == PRELOADED:
        environ["LD_PRELOAD"] = paths.preload
    return Launch(command, port, environ=environ)


def _edgekv(system: str, weights: str, paths: Paths) -> Launch:
    port = free_port()
    made = on_load(system)
    config = paths.logs / f"{system.replace(' ', '-')}-{weights}.yaml"
    lines = [
        "version: 1",
        "logging: {level: warning}",
        "kv: {budget: 4GiB}",
        "models:",
        "  bench:",
        f"    path: '{edgekv_path(paths, system, weights)}'",
        f"    context: {CONTEXT}",
        f"    max_num_seqs: {STREAMS}",
        *([f"    weights: {made}"] if made else []),
    ]
    config.write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "edgekv", "serve", str(config), "--port", str(port)]
    return Launch(command, port, environ=edgekv_environ(paths))


def edgekv_environ(paths: Paths) -> dict[str, str]:
    """As many threads as its peers get."""
    return {"OMP_NUM_THREADS": str(paths.threads)}
