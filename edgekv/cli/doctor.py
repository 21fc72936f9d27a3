"""`edgekv doctor`: what is here, what is missing, and how to fix it. Runs in: the main thread; owns: nothing."""

import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import typer
from rich.markup import escape

from edgekv.cli.console import print_json, stdout, table
from edgekv.cli.doctor_cards import card_findings
from edgekv.cli.finding import Finding
from edgekv.config.units import GIB, format_size

if TYPE_CHECKING:
    from edgekv.smi.torch_build import TorchBuild

PORT = 8181


def doctor(
    as_json: bool = typer.Option(False, "--json", help="Print the findings as JSON."),
    record: Path | None = typer.Option(None, help="Instead, write a recording of the card's memory to this file."),
    seconds: float = typer.Option(60.0, help="How long to record."),
) -> None:
    """Look at Python, torch, processor, memory, kernels, cards, port and demo model; say how to fix what is wrong."""
    if record is not None:
        from edgekv.cli.record import record as write_recording

        write_recording(record, seconds)
        return
    findings = list(examine())
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        _print(findings)
    if any(finding.verdict == "fail" for finding in findings):
        raise typer.Exit(1)


def examine() -> Iterator[Finding]:
    """Everything there is to look at, in order."""
    from edgekv.smi.cards import survey_amd, survey_nvidia
    from edgekv.smi.torch_build import read_torch_build

    build = read_torch_build()
    yield _python()
    yield _torch(build)
    yield from _host()
    yield _kernels()
    for survey in (survey_nvidia(), survey_amd()):
        yield from card_findings(survey, build)
    yield _port("127.0.0.1", PORT)
    yield _demo()


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("ok", "Python", f"{version} in {sys.prefix}")


def _torch(build: "TorchBuild | None") -> Finding:
    if build is None:
        return Finding("fail", "torch", "not installed", "pip install edgekv brings it; or: pip install torch")
    kind = f"CUDA {build.cuda}" if build.cuda else f"ROCm {build.hip}" if build.hip else "CPU build"
    return Finding("ok", "torch", f"{build.version} ({kind})")


def _host() -> Iterator[Finding]:
    from edgekv.core.spill import Headroom
    from edgekv.smi.control_group import read_group
    from edgekv.smi.host import PROC, SYSFS, read_memory, read_processor

    processor = read_processor()
    features = ", ".join(processor.features) or "no vector extensions known"
    yield Finding("ok", "processor", f"{processor.name}, {processor.cores} cores, {features}")
    memory = read_memory()
    found = f"{format_size(memory.available_bytes)} free of {format_size(memory.total_bytes)}"
    found += f", headroom {format_size(Headroom.of(memory.total_bytes).num_bytes)}"
    if memory.available_bytes < GIB:
        yield Finding("warn", "memory", found, "close other programs: the demo model alone wants about 1 GiB")
    else:
        yield Finding("ok", "memory", found)
    machine = psutil.virtual_memory().total
    if read_group(SYSFS, PROC, machine) is not None:
        limit = f"this control group may have {format_size(memory.total_bytes)} of {format_size(machine)}"
        yield Finding("ok", "memory limit", f"{limit}: it counts as all there is")
    yield _swap(*_swap_bytes())


def _kernels() -> Finding:
    from edgekv.kernels.cpu.build import build_seconds
    from edgekv.kernels.cpu.library import KernelsUnavailable, available, is_ready, load_library
    from edgekv.kernels.cpu.threads import VARIABLE, asked_threads, default_threads

    if available() and not is_ready():  # looking at things should not take that long
        return Finding("ok", "cpu kernels", f"compiled when first needed, about {build_seconds():.0f} s")
    try:
        library = load_library()
    except KernelsUnavailable as error:
        lost = f"none: {error.reason}; models on the processor run several times slower, through torch"
        return Finding("warn", "cpu kernels", lost, error.remedy)
    threads = default_threads()
    found = f"{library.tiers[0]}, {threads} thread{'s' if threads != 1 else ''}"
    try:
        asked_threads()
    except ValueError as error:
        return Finding("warn", "cpu kernels", f"{found}; {error}", f"correct {VARIABLE}, or unset it")
    return Finding("ok", "cpu kernels", found)


def _swap_bytes() -> tuple[int, int]:
    swap = psutil.swap_memory()
    return swap.total, swap.used


def _swap(total: int, used: int) -> Finding:
    if not total:
        return Finding("ok", "swap", "none")
    found = f"{format_size(used)} used of {format_size(total)}"
    if used > total // 2:
        return Finding("warn", "swap", found, "close other programs: memory is short, and what is swapped out is slow")
    return Finding("ok", "swap", found)


def _port(host: str, port: int) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            fix = f"stop what listens there, or: edgekv serve --port {port + 1}"
            return Finding("warn", f"port {port}", f"taken ({error.strerror})", fix)
    return Finding("ok", f"port {port}", "free")


def _demo() -> Finding:
    from edgekv.demo import target_path
    from edgekv.errors import ModelError
    from edgekv.model.hf_config import read_spec

    folder = target_path()
    if not (folder / "config.json").is_file():
        return Finding("fail", "demo model", "missing", "reinstall edgekv, or in its repository: make demo-model")
    try:
        spec = read_spec(folder)
    except ModelError as error:
        return Finding("fail", "demo model", str(error), "reinstall edgekv, or in its repository: make demo-model")
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Finding("ok", "demo model", f"{spec.num_parameters / 1e6:.1f} M parameters, {format_size(weights)} on disk")


def _print(findings: list[Finding]) -> None:
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    listing = table("", "", "")
    for column in listing.columns:
        column.justify, column.no_wrap = "left", False
    listing.show_header = False
    for finding in findings:
        mark = f"[{colours[finding.verdict]}]{finding.verdict}[/]"
        told = escape(finding.found) + (f"\n[bold]→ {escape(finding.fix)}[/]" if finding.fix else "")
        listing.add_row(mark, escape(finding.subject), told)
    stdout().print(listing)
    names = [name for name in ("edgekv", "trio", "hypercorn", "starlette") if _installed(name)]
    stdout().print(", ".join(f"{name} {metadata.version(name)}" for name in names), style="dim")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
