"""The real pynvml and amdsmi, each in a process of its own, read the simulated drivers as they would read a card's."""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.sim import CardState, SimulatedCard
from tests.sim import build as build_module
from tests.sim.build import built_libraries
from tests.sim.probe import Probe, Raised, probe

MIB, GIB = 1 << 20, 1 << 30

NVIDIA = CardState(
    "nvidia",
    name="NVIDIA GeForce RTX 4090",
    pci_id="0000:0a:00.0",
    total_bytes=24 * GIB,
    reserved_bytes=300 * MIB,
    own_bytes=9 * GIB,
    others=((4711, "/usr/bin/plasmashell", 700 * MIB), (4712, "/opt/game with spaces", 3 * GIB)),
    both_lists=(4712,),
    driver="570.86.15",
)
AMD = CardState(
    "amd",
    name="AMD Radeon RX 7900 XT",
    pci_id="0000:03:00.0",
    total_bytes=20 * GIB,
    own_bytes=9 * GIB,
    others=((4711, "plasmashell", 700 * MIB), (4712, "blender", 3 * GIB)),
    both_lists=(4712,),
    gtt_total_bytes=16 * GIB,
    gtt_used_bytes=300 * MIB,
    driver="6.12.9",
)


@pytest.fixture(scope="module")
def nvidia_probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SimulatedCard, Probe]]:
    card = SimulatedCard(tmp_path_factory.mktemp("nvidia") / "card", NVIDIA)
    with probe(card.environment()) as process:
        process.ask("import os, pynvml as n")
        process.ask("n.nvmlInit(); gpu = n.nvmlDeviceGetHandleByIndex(0)")
        yield card, process


@pytest.fixture(scope="module")
def amd_probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SimulatedCard, Probe]]:
    card = SimulatedCard(tmp_path_factory.mktemp("amd") / "card", AMD)
    with probe(card.environment()) as process:
        process.ask("import amdsmi as a")
        process.ask("a.amdsmi_init(); (gpu,) = a.amdsmi_get_processor_handles()")
        yield card, process


@pytest.fixture
def nvidia(nvidia_probe: tuple[SimulatedCard, Probe]) -> Iterator[tuple[SimulatedCard, Probe]]:
    yield nvidia_probe
    _restore(nvidia_probe[0], NVIDIA)


@pytest.fixture
def amd(amd_probe: tuple[SimulatedCard, Probe]) -> Iterator[tuple[SimulatedCard, Probe]]:
    yield amd_probe
    _restore(amd_probe[0], AMD)


def _restore(card: SimulatedCard, state: CardState) -> None:
    card.set(**{name: getattr(state, name) for name in state.__dataclass_fields__})


V2 = "(lambda m: [m.total, m.reserved, m.used, m.free])(n.nvmlDeviceGetMemoryInfo(gpu, version=n.nvmlMemory_v2))"
VRAM = "list(a.amdsmi_get_gpu_vram_usage(gpu).values())"


def test_nvml_tells_who_uses_how_much(nvidia: tuple[SimulatedCard, Probe]) -> None:
    card, process = nvidia
    used = 12 * GIB + 700 * MIB
    assert process.ask(V2) == [24 * GIB, 300 * MIB, used, 24 * GIB - used - 300 * MIB]
    version_1 = process.ask("(lambda m: [m.total, m.used, m.free])(n.nvmlDeviceGetMemoryInfo(gpu))")
    assert version_1 == [24 * GIB, used + 300 * MIB, 24 * GIB - used - 300 * MIB]
    compute = process.ask("[[p.pid, p.usedGpuMemory] for p in n.nvmlDeviceGetComputeRunningProcesses(gpu)]")
    assert compute == [[process.pid, 9 * GIB], [4712, 3 * GIB]]
    graphics = process.ask("[[p.pid, p.usedGpuMemory] for p in n.nvmlDeviceGetGraphicsRunningProcesses(gpu)]")
    assert graphics == [[4711, 700 * MIB], [4712, 3 * GIB]]
    assert process.ask("[n.nvmlSystemGetProcessName(pid) for pid in (os.getpid(), 4712)]") == [
        "edgekv",
        "/opt/game with spaces",
    ]
    with pytest.raises(Raised, match="NVMLError_NotFound"):
        process.ask("n.nvmlSystemGetProcessName(9)")
    card.set(listed_pid=999_999)  # as a container's host numbers it
    assert process.ask("[p.pid for p in n.nvmlDeviceGetComputeRunningProcesses(gpu)]") == [999_999, 4712]
    card.set(pids_known=False)
    assert process.ask("[p.usedGpuMemory for p in n.nvmlDeviceGetComputeRunningProcesses(gpu)]") == [None, None]
    card.set(pids_known=True, own_bytes=0, both_lists=())
    assert process.ask("n.nvmlDeviceGetComputeRunningProcesses(gpu)") == []


def test_nvml_tells_what_the_card_is(nvidia: tuple[SimulatedCard, Probe]) -> None:
    _, process = nvidia
    facts = process.ask("[n.nvmlDeviceGetName(gpu), n.nvmlSystemGetDriverVersion(), n.nvmlDeviceGetCount()]")
    assert facts == ["NVIDIA GeForce RTX 4090", "570.86.15", 1]
    pci = "(lambda p: [p.busId, p.busIdLegacy, p.domain, p.bus, p.device])(n.nvmlDeviceGetPciInfo(gpu))"
    assert process.ask(f"[x.decode() if isinstance(x, bytes) else x for x in {pci}]") == [
        "00000000:0A:00.0",
        "0000:0A:00.0",
        0,
        10,
        0,
    ]
    assert process.ask("n.nvmlDeviceGetName(n.nvmlDeviceGetHandleByPciBusId('0000:0a:00.0'))") == facts[0]
    with pytest.raises(Raised, match="NVMLError_NotFound"):
        process.ask("n.nvmlDeviceGetHandleByPciBusId('0000:0b:00.0')")
    link = "[n.nvmlDeviceGetMaxPcieLinkGeneration(gpu), n.nvmlDeviceGetCurrPcieLinkWidth(gpu)]"
    assert process.ask(link) == [4, 16]
    memory = "[n.nvmlDeviceGetMaxClockInfo(gpu, n.NVML_CLOCK_MEM), n.nvmlDeviceGetMemoryBusWidth(gpu)]"
    assert process.ask(memory) == [10501, 384]
    assert process.ask("[n.nvmlDeviceGetUUID(gpu), n.nvmlSystemGetNVMLVersion()]") == [NVIDIA.uuid, NVIDIA.library]


def test_amdsmi_tells_who_uses_how_much(amd: tuple[SimulatedCard, Probe]) -> None:
    card, process = amd
    assert process.ask(VRAM) == [20 * 1024, 12 * 1024 + 700]
    memory = "[f(gpu, a.AmdSmiMemoryType[t]) for f in (a.amdsmi_get_gpu_memory_total, a.amdsmi_get_gpu_memory_usage)"
    assert process.ask(memory + " for t in ('VRAM', 'VIS_VRAM', 'GTT')]") == [
        *(20 * GIB, 20 * GIB, 16 * GIB),
        *(12 * GIB + 700 * MIB, 12 * GIB + 700 * MIB, 300 * MIB),
    ]
    columns = "[p['pid'], p['name'], p['mem'], p['memory_usage']['vram_mem']]"
    processes = f"[{columns} for p in a.amdsmi_get_gpu_process_list(gpu)]"
    assert process.ask(processes) == [
        [process.pid, "edgekv", 9 * GIB, 9 * GIB],
        [4712, "blender", 3 * GIB, 3 * GIB],  # the one that computes
    ]
    card.set(own_bytes=0, both_lists=())
    assert process.ask(processes) == []


def test_amdsmi_tells_what_the_card_is(amd: tuple[SimulatedCard, Probe]) -> None:
    card, process = amd
    assert process.ask("a.amdsmi_get_gpu_asic_info(gpu)['market_name']") == "AMD Radeon RX 7900 XT"
    assert process.ask("a.amdsmi_get_gpu_driver_info(gpu)['driver_version']") == "6.12.9"
    assert process.ask("list(a.amdsmi_get_lib_version().values())[:3]") == [26, 0, 0]
    assert process.ask("a.amdsmi_get_gpu_device_bdf(gpu)") == "0000:03:00.0"
    assert process.ask("a.amdsmi_get_gpu_device_bdf(a.amdsmi_get_processor_handle_from_bdf('0000:03:00.0'))")
    assert process.ask("a.amdsmi_get_processor_type(gpu)") == {"processor_type": "AMDSMI_PROCESSOR_TYPE_AMD_GPU"}
    assert process.ask("a.amdsmi_get_gpu_vram_info(gpu)['vram_type'] == a.amdsmi_wrapper.AMDSMI_VRAM_TYPE_GDDR6")
    with pytest.raises(Raised, match="NOT_SUPPORTED"):
        process.ask("a.amdsmi_get_gpu_fan_speed(gpu, 0)")
    card.set(vendor="amd-apu", carveout_used_bytes=100 * MIB)
    assert process.ask(VRAM) == [512, 100]
    assert not process.ask("a.amdsmi_get_gpu_vram_info(gpu)['vram_type'] == a.amdsmi_wrapper.AMDSMI_VRAM_TYPE_GDDR6")


def test_the_simulated_structs_are_laid_out_as_the_installed_amdsmi_binding_has_them(
    amd: tuple[SimulatedCard, Probe],
) -> None:
    _, process = amd
    process.ask("import ctypes; w = a.amdsmi_wrapper; lib = w._libraries['libamd_smi.so']")
    process.ask("lib.sim_layout.restype = ctypes.c_char_p")
    layout = [line.split() for line in process.ask("lib.sim_layout().decode()").splitlines()]
    assert {name for name, _ in layout if "." not in name} == {
        *("vram_usage", "vram_info", "asic_info", "driver_info", "proc_info", "version")
    }
    for name, number in layout:
        struct, _, field = name.partition(".")
        wanted = f"w.struct_amdsmi_{struct}_t" + (f".{field}.offset" if field else "")
        assert process.ask(wanted if field else f"ctypes.sizeof({wanted})") == int(number), name


@pytest.mark.parametrize(
    ("vendor", "question", "index"), [("nvidia", V2, 2), ("amd", VRAM, 1)], ids=["nvidia", "amd"]
)
def test_a_change_shows_at_the_next_call(
    vendor: str, question: str, index: int, request: pytest.FixtureRequest
) -> None:
    card, process = request.getfixturevalue(vendor)
    before = process.ask(question)[index]
    SimulatedCard.open(card.folder).set(own_bytes=10 * GIB)
    card.set(others=())  # and what another writer set stays
    unit = 1 if vendor == "nvidia" else MIB
    assert process.ask(question)[index] == 10 * GIB // unit != before


@pytest.mark.parametrize(("vendor", "question"), [("nvidia", V2), ("amd", VRAM)], ids=["nvidia", "amd"])
def test_a_hanging_driver_answers_when_its_time_has_passed_or_it_is_let_go(
    vendor: str, question: str, request: pytest.FixtureRequest
) -> None:
    card, process = request.getfixturevalue(vendor)
    answer = process.ask(question)
    start = time.monotonic()
    card.set(hang_s=0.2)
    assert process.ask(question) == answer
    assert 0.2 <= time.monotonic() - start < 5
    card.set(hang_s=1000.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(process.ask, question)
        card.set(evicted_ms=1)  # a change of something else does not let it go
        time.sleep(0.1)
        assert not waiting.done()
        card.set(hang_s=0.0)
        assert waiting.result(timeout=10) == answer


def test_a_lost_card_fails_in_each_library_s_own_way(
    nvidia: tuple[SimulatedCard, Probe], amd: tuple[SimulatedCard, Probe]
) -> None:
    card, process = nvidia
    card.set(gone=True)
    with pytest.raises(Raised, match="NVMLError_GpuIsLost"):
        process.ask(V2)
    with pytest.raises(Raised, match="NVMLError_GpuIsLost"):
        process.ask("n.nvmlDeviceGetHandleByIndex(0)")
    card, process = amd
    card.set(gone=True)
    with pytest.raises(Raised, match=r"AmdSmiLibraryException.*\n.*NOT_FOUND"):
        process.ask(VRAM)
    card.set(gone=False)
    assert process.ask(VRAM) == [20 * 1024, 12 * 1024 + 700]


def test_the_files_of_a_lost_card_vanish_and_come_back(tmp_path: Path) -> None:
    card = SimulatedCard(tmp_path / "card", AMD)
    device = card.sysfs / "class/drm/card0/device"
    files = [device / "mem_info_vram_used", device / "uevent"]
    files += [card.sysfs / f"class/kfd/kfd/{f}" for f in ("topology/nodes/1/gpu_id", f"proc/{os.getpid()}/pasid")]
    files += [card.sysfs / "bus/pci/devices/0000:03:00.0/vendor"]
    assert all(file.exists() for file in files)
    card.set(gone=True)
    assert not any(file.exists() for file in files)
    assert [entry.name for entry in (card.sysfs / "class/drm").iterdir()] == ["version"]
    assert "drm-" not in (card.proc / "self/fdinfo/7").read_text()
    card.set(gone=False)
    assert all(file.exists() for file in files)


def test_the_files_say_what_the_library_says(amd: tuple[SimulatedCard, Probe]) -> None:
    card, process = amd
    card.set(spilled_own_bytes=64 * MIB, card_number=1)
    (device,) = (d for d in card.sysfs.glob("class/drm/card?/device") if (d / "vendor").read_text() == "0x1002\n")
    assert f"PCI_SLOT_NAME={process.ask('a.amdsmi_get_gpu_device_bdf(gpu)')}\n" in (device / "uevent").read_text()
    used = process.ask("[a.amdsmi_get_gpu_memory_usage(gpu, t) for t in a.AmdSmiMemoryType]")
    files = [int((device / f"mem_info_{kind}_used").read_text()) for kind in ("vram", "vis_vram", "gtt")]
    assert files == used == [12 * GIB + 700 * MIB, 12 * GIB + 700 * MIB, 300 * MIB]


@pytest.mark.parametrize(
    ("fdinfo", "resident", "gtt"),
    [
        ("6.x", "drm-memory-vram:\t9437184 KiB", "drm-memory-gtt: \t66564 KiB"),
        ("6.14", "drm-resident-vram:\t9216 MiB", "drm-memory-gtt: \t66564 KiB"),
        ("7.2", "drm-resident-vram:\t9216 MiB", "drm-resident-gtt:\t66564 KiB"),
    ],
    ids=["6.x", "6.14", "7.2"],
)
def test_a_descriptor_tells_what_its_client_holds_wants_and_lost(
    tmp_path: Path, fdinfo: str, resident: str, gtt: str
) -> None:
    card = SimulatedCard(tmp_path / "card", AMD)
    card.set(fdinfo=fdinfo, spilled_own_bytes=64 * MIB, own_gtt_bytes=MIB + 4096)
    texts = [(card.proc / f"self/fdinfo/{fd}").read_text() for fd in (7, 9)]
    for text in texts:
        lines = text.splitlines()
        assert {resident, gtt, "drm-driver:\tamdgpu", "drm-pdev:\t0000:03:00.0", "drm-client-id:\t17"} <= set(lines)
        assert {"amd-evicted-vram:\t65536 KiB", "amd-requested-vram:\t9502720 KiB"} <= set(lines)
    assert "drm-client-id:\t31" in (card.proc / "4712/fdinfo/7").read_text()


def test_a_driver_that_does_not_start_says_so(
    nvidia: tuple[SimulatedCard, Probe], amd: tuple[SimulatedCard, Probe]
) -> None:
    card, process = nvidia
    card.set(init_fails=True)
    with pytest.raises(Raised, match="NVMLError_DriverNotLoaded"):
        process.ask("n.nvmlInit()")
    card, process = amd
    card.set(init_fails=True)
    with pytest.raises(Raised, match="DRIVER_NOT_LOADED"):
        process.ask("a.amdsmi_init()")


def test_the_other_vendor_s_library_is_missing(
    nvidia: tuple[SimulatedCard, Probe], amd: tuple[SimulatedCard, Probe]
) -> None:
    with pytest.raises(Raised, match="KeyError"):
        nvidia[1].ask("import amdsmi")
    with pytest.raises(Raised, match="NVMLError_LibraryNotFound"):
        amd[1].ask("__import__('pynvml').nvmlInit()")


def test_an_older_driver_lacks_a_function(tmp_path: Path) -> None:
    with probe(SimulatedCard(tmp_path / "nvidia", NVIDIA).environment("skew")) as process:
        process.ask("import pynvml as n")
        process.ask("n.nvmlInit(); gpu = n.nvmlDeviceGetHandleByIndex(0)")
        with pytest.raises(Raised, match="NVMLError_FunctionNotFound"):
            process.ask(V2)
        assert process.ask("n.nvmlDeviceGetMemoryInfo(gpu).total") == 24 * GIB
        with pytest.raises(Raised, match="NVMLLibraryMismatchError"):
            process.ask("n.nvmlDeviceGetComputeRunningProcesses(gpu)")
        assert process.ask("[p.pid for p in n.nvmlDeviceGetComputeRunningProcesses_v2(gpu)]") == [process.pid, 4712]
    card = SimulatedCard(tmp_path / "amd", AMD)
    with (
        probe(card.environment("skew")) as process,
        pytest.raises(Raised, match=r"AttributeError.*amdsmi_get_gpu_vram_usage"),
    ):
        process.ask("import amdsmi")


def test_a_card_that_changed_hands_has_the_files_of_the_last_change(tmp_path: Path) -> None:
    card = SimulatedCard(tmp_path / "card", AMD)
    other = SimulatedCard.open(card.folder)
    used = card.sysfs / "class/drm/card0/device/mem_info_vram_used"
    card.set(own_bytes=1 * GIB, others=())
    other.set(own_bytes=2 * GIB)
    card.set(evicted_ms=3)
    assert used.read_text() == f"{2 * GIB}\n"
    card.set(own_bytes=1 * GIB)
    assert used.read_text() == f"{GIB}\n"


def test_psutil_reads_the_simulated_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = CardState("cpu", total_bytes=32 * GIB, own_bytes=9 * GIB, own_pid=os.getpid(), page_cache_bytes=2 * GIB)
    card = SimulatedCard(tmp_path / "card", state)
    card.set(swap_total_bytes=8 * GIB, spilled_own_bytes=1 * GIB, swap_in_bytes=5 * MIB)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(card.proc))
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    assert (memory.total, memory.available, memory.free) == (32 * GIB, 23 * GIB, 21 * GIB)
    assert (swap.total, swap.used, swap.sin) == (8 * GIB, 1 * GIB, 5 * MIB)
    own = psutil.Process()
    assert (own.name(), own.memory_info().rss, own.memory_info().vms) == ("edgekv", 9 * GIB, 10 * GIB)


def test_two_who_build_at_once_get_one_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "_BUILDS", tmp_path)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: built_libraries.__wrapped__("nvidia", "good"), range(2))
    assert first == second
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    assert (first / "lib" / "libnvidia-ml.so.1").read_bytes().startswith(b"\x7fELF")


def test_without_a_compiler_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "_BUILDS", tmp_path)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    with pytest.raises(RuntimeError, match=r"no C compiler .*apt install gcc"):
        built_libraries.__wrapped__("nvidia", "good")
    assert list(tmp_path.iterdir()) == []
