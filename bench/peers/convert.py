"""GGUF files of a model folder, made by llama.cpp's own tools.

    python -m bench.peers.convert MODEL_FOLDER --llama-source DIR --llama-bin DIR [--formats bf16,q8_0,q4_0,q4_k_m]

Writes MODEL_FOLDER-FORMAT.gguf beside the folder (or into --out); what is there already is kept. The converter is a
Python script of llama.cpp's source tree that imports torch, transformers and sentencepiece; this interpreter runs it.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FORMATS = ("bf16", "q8_0", "q4_0", "q4_k_m")


def convert(folder: Path, out: Path, source: Path, binaries: Path, formats: tuple[str, ...], threads: int) -> None:
    whole = out / f"{folder.name}-bf16.gguf"
    _make(whole, [sys.executable, source / "convert_hf_to_gguf.py", folder, "--outtype", "bf16", "--outfile"])
    for name in formats:
        if name != "bf16":
            quantise = [binaries / "llama-quantize", whole]
            _make(out / f"{folder.name}-{name}.gguf", quantise, [name.upper(), threads])


def _make(target: Path, before: Sequence[object], after: Sequence[object] = ()) -> None:
    """Run a command that writes `target`, under another name until it is whole."""
    if target.exists():
        print(f"{target}: is there")
        return
    part = target.with_name(f"{target.name}.part")
    command = [str(word) for word in (*before, part, *after)]
    print("$", *command, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}\nexit code {done.returncode}")
    part.rename(target)
    print(f"{target}: {target.stat().st_size:,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make GGUF files of a model folder with llama.cpp's tools.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--llama-source", type=Path, default=os.environ.get("LLAMA_CPP_SOURCE"), help="the source tree")
    parser.add_argument("--llama-bin", type=Path, default=os.environ.get("LLAMA_CPP_BIN"), help="with llama-quantize")
    parser.add_argument("--out", type=Path, help="where to; by default beside the folder")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if options.llama_source is None or options.llama_bin is None:
        parser.error("say where llama.cpp is: --llama-source and --llama-bin, or LLAMA_CPP_SOURCE and LLAMA_CPP_BIN")
    out = options.out or options.folder.parent
    formats = tuple(options.formats.split(","))
    convert(options.folder, out, options.llama_source, options.llama_bin, formats, options.threads)


if __name__ == "__main__":
    main()
