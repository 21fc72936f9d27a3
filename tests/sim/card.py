"""A card (or a machine's main memory) that exists only as one JSON file, and everything that reads like its driver.

`SimulatedCard` writes the file and, beside it, the parts of /sys, /proc and the control groups that a reader of memory
looks at. The simulated driver libraries (`csrc/`) read the same file at every call, so a change shows at once, in other
processes too.

    card = SimulatedCard(tmp_path / "card", CardState("nvidia", total_bytes=24 * GiB, own_bytes=9 * GiB))
    card.set(others=((4711, "/usr/bin/game", 8 * GiB),))        # the game starts
    subprocess.run([...], env={**os.environ, **card.environment()})   # its pynvml and amdsmi load the simulated ones
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tests.sim.build import LibraryBuild, built_libraries
from tests.sim.trees import Tree, render, write_tree

MIB = 1 << 20
GIB = 1 << 30

Vendor = Literal["nvidia", "amd", "amd-apu", "cpu"]


@dataclass(frozen=True)
class CardState:
    """Everything that is true of the card at one moment.

    `own` is the process under test, `others` are (pid, name, bytes) of everybody else; bytes None: the driver does not
    say. For "cpu" all of these speak of main memory, and `total_bytes` is MemTotal. For "amd-apu" they do too (an APU's
    program memory is main memory, reached through GTT); its small carve-out is `carveout_bytes`.

    own_pid: None is whichever process asks the C libraries, and in the trees the process that made the card.
    listed_pid: the number by which NVML, amdsmi and KFD know own, where it is in a container that gives it another.
    own_bytes: of own, in device memory now (spilled bytes are not among them).
    own_gtt_bytes: of own, in GTT because it asked for GTT (amd).
    spilled_own_bytes: amd: wanted in VRAM and lying in GTT. amd-apu, cpu: own swapped-out bytes.
    gtt_used_bytes: exactly what the driver shows for everybody; it should contain the spilled ones.
    unlisted_bytes: used, but by nobody whom the driver lists (another container, another user).
    both_lists: pids among `others` that compute as well as draw: NVML lists them twice, and KFD knows them.
    pids_known: False is Windows' driver model: NVML lists processes without their bytes.
    evicted_ms, major_faults, swap_in_bytes: counters since the process (the machine) started.
    hang_s: every call into the C libraries blocks for so long from the moment of `set`, or until `set` says otherwise.
    gone: the card fell off the bus.
    driver, library: the versions of the kernel's part and of the C library (major.minor.release).
    fdinfo: which Linux's files amdgpu shows. Keys: "6.x" drm-memory-*, "6.14" those and drm-total-*, drm-resident-*,
    "7.2" only the latter. `board_info` (a card's) is there from "6.14" on, `uma` (an APU's) from "7.2" on.
    card_number: N of /sys/class/drm/cardN; those before it are another maker's display adapters.
    cgroup_limit_bytes: memory.max of the control group; page_cache_bytes: droppable cache, counted in MemAvailable and
    in the group's memory.current.
    """

    vendor: Vendor
    name: str = "Simulated card"
    pci_id: str = "0000:03:00.0"
    total_bytes: int = 16 * GIB
    own_pid: int | None = None
    listed_pid: int | None = None
    own_name: str = "edgekv"
    own_bytes: int = 0
    others: tuple[tuple[int, str, int | None], ...] = ()
    both_lists: tuple[int, ...] = ()
    unlisted_bytes: int = 0
    reserved_bytes: int = 0
    pids_known: bool = True
    gtt_total_bytes: int = 0
    gtt_used_bytes: int = 0
    own_gtt_bytes: int = 0
    carveout_bytes: int = 512 * MIB
    carveout_used_bytes: int = 64 * MIB
    spilled_own_bytes: int = 0
    evicted_ms: int = 0
    major_faults: int = 0
    swap_total_bytes: int = 0
    others_swap_bytes: int = 0
    swap_in_bytes: int = 0
    page_cache_bytes: int = 0
    cgroup_limit_bytes: int | None = None
    driver: str = "570.86.15"
    library: str = "26.0.0"
    uuid: str = "GPU-5ba1e0c2-0000-4000-8000-00000000edb0"
    memory_clock_mhz: int = 10501
    memory_bus_bits: int = 384
    compute_capability: int = 89
    gpu_id: int = 51108
    card_number: int = 0
    pcie_generation: int = 4
    pcie_width: int = 16
    pcie_sent_kb_s: int = 0
    pcie_received_kb_s: int = 0
    fdinfo: Literal["6.x", "6.14", "7.2"] = "6.x"
    hang_s: float = 0.0
    gone: bool = False
    init_fails: bool = False

    @property
    def used_bytes(self) -> int:
        """What the driver shows as used, by everybody and for itself: never more than there is."""
        others = sum(num_bytes or 0 for _, _, num_bytes in self.others)
        return min(self.total_bytes, self.own_bytes + others + self.unlisted_bytes + self.reserved_bytes)


class SimulatedCard:
    """One card in a folder. Any number of processes may read it, and more than one may change it (`open`)."""

    def __init__(self, folder: Path, state: CardState) -> None:
        """Make the card; the folder must not be there yet."""
        self._place(folder)
        folder.mkdir(parents=True)
        with self._locked():
            self._write(state, hang_until=time.monotonic() + state.hang_s, tree_pid=state.own_pid or os.getpid())

    @classmethod
    def open(cls, folder: Path) -> "SimulatedCard":
        """The card that another process made."""
        card = object.__new__(cls)
        card._place(folder)
        return card

    @property
    def state(self) -> CardState:
        """What the file says now."""
        return self._read()[0]

    def set(self, **changes: Any) -> None:
        """Change some fields, leave the rest as whoever last set them.

        The card file changes at once; each file of the trees changes at once too, but one after the other, as the
        kernel's do.
        """
        with self._locked():
            state, hang_until, tree_pid = self._read()
            if "hang_s" in changes:
                hang_until = time.monotonic() + changes["hang_s"]
            state = replace(state, **changes)
            self._write(state, hang_until, state.own_pid or tree_pid)

    def environment(self, build: LibraryBuild = "good") -> dict[str, str]:
        """What a process needs in its environment so that its pynvml and amdsmi load the simulated libraries.

        The library of the vendor whose card this is not is missing, as on a real machine. `build`: "skew" lacks a
        function that the Python binding wants, "none" is a machine without the driver. A real driver of this machine
        is never reached. To be laid over os.environ (LD_LIBRARY_PATH keeps what it had at its end).
        """
        vendor = self.state.vendor
        nvidia = built_libraries("nvidia", build if vendor == "nvidia" else "none")
        amd = built_libraries("amd", build if vendor in ("amd", "amd-apu") else "none")
        before = os.environ.get("LD_LIBRARY_PATH")
        paths = [str(nvidia / "lib"), str(amd / "lib"), *([before] if before else [])]
        return {
            "EDGEKV_SIM_CARD": str(self.file),
            "LD_LIBRARY_PATH": os.pathsep.join(paths),
            "ROCM_PATH": str(amd),
            "ROCM_HOME": str(amd),
        }

    def _place(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "card.json"
        self.sysfs = folder / "sys"  # stands for /sys
        self.proc = folder / "proc"  # for /proc
        self._text: str | None = None
        self._tree: Tree | None = None
        self.cgroup = folder / "sys" / "fs" / "cgroup"  # for the control group's folder

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, state: CardState, hang_until: float, tree_pid: int) -> None:
        # What this object wrote last is what is there, unless another one has written since.
        known = self._tree if self._text is not None and self._text == self._text_there() else None
        # The card first: a library call that follows `set` must see the change, and so must a reader of the trees that
        # asks the library whether the card is gone.
        text, tree = _to_json(state, hang_until, tree_pid), render(state, tree_pid)
        self._text = None
        new = self.folder / "card.json.new"
        new.write_text(text, encoding="utf-8")
        os.replace(new, self.file)
        write_tree(self.folder, tree, known)
        self._text, self._tree = text, tree

    def _text_there(self) -> str:
        return self.file.read_text(encoding="utf-8")

    def _read(self) -> tuple[CardState, float, int]:
        values = json.loads(self._text_there())
        count = values.pop("others")
        others = tuple(tuple(values.pop(f"other.{i}.{key}") for key in ("pid", "name", "bytes")) for i in range(count))
        hang_until, tree_pid = values.pop("hang_until"), values.pop("tree_pid")
        del values["used_bytes"]
        values["both_lists"] = tuple(values["both_lists"])
        return CardState(others=others, **values), hang_until, tree_pid


def _to_json(state: CardState, hang_until: float, tree_pid: int) -> str:
    """One `"key":value` a line, nothing nested but flat lists of numbers, no escapes: the C side looks for the key."""
    values: dict[str, object] = {**asdict(state), "used_bytes": state.used_bytes}
    values |= {"others": len(state.others), "hang_until": hang_until, "tree_pid": tree_pid}
    for i, (pid, name, num_bytes) in enumerate(state.others):
        values |= {f"other.{i}.pid": pid, f"other.{i}.name": name, f"other.{i}.bytes": num_bytes}
    for value in values.values():
        if isinstance(value, str) and (not value.isprintable() or set(value) & {'"', "\\"}):
            raise ValueError(f"the C side reads no escapes: {value!r}")
    return json.dumps(values, indent=0, separators=(",", ":"), ensure_ascii=False)
