"""The files that a Linux machine with such a card would show, as text: /sys/class/drm, KFD, /proc, the control group.

`render` is pure; `write_tree` makes a folder equal to what it says, each file in one step (a reader sees the old text
or the new one). Layouts and units follow the kernel's: drivers/gpu/drm/drm_file.c (print_size),
drivers/gpu/drm/amd/amdgpu/{amdgpu_vram_mgr,amdgpu_fdinfo}.c, drivers/gpu/drm/amd/amdkfd/{kfd_process,kfd_topology}.c,
fs/proc/{meminfo,array}.c.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.sim.card import CardState

_VENDOR_IDS = {"nvidia": ("0x10de", "0x2684", "nvidia"), "amd": ("0x1002", "0x744c", "amdgpu")}
_PAGE = 4096
_SPEEDS = {1: "2.5 GT/s PCIe", 2: "5.0 GT/s PCIe", 3: "8.0 GT/s PCIe", 4: "16.0 GT/s PCIe", 5: "32.0 GT/s PCIe"}


class Tree:
    """Paths relative to the card's folder: texts of files, targets of symbolic links. Folders are there for files."""

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.links: dict[str, str] = {}

    def add(self, folder: str, **files: object) -> None:
        """Several files of one line each."""
        for name, value in files.items():
            self.files[f"{folder}/{name}"] = f"{value}\n"

    def link(self, path: str, target: str) -> None:
        """A relative link, as sysfs has them; `target` is relative to the card's folder."""
        self.links[path] = os.path.relpath(target, os.path.dirname(path))


def render(state: CardState, tree_pid: int) -> Tree:
    """Everything that the trees show in this state."""
    tree = Tree()
    if state.vendor != "cpu":
        _drm(tree, state)
    if state.vendor in ("amd", "amd-apu"):
        _kfd(tree, state, tree_pid)
    _processes(tree, state, tree_pid)
    if state.vendor in ("cpu", "amd-apu"):
        _main_memory(tree, state, tree_pid)
    return tree


def write_tree(root: Path, tree: Tree, known: Tree | None = None) -> None:
    """Make `root`/sys and `root`/proc what `tree` says; what did not change is left alone.

    `known`: what is there now; None where that has to be looked up, which takes some milliseconds.
    """
    if known is None or known.files.keys() != tree.files.keys() or known.links != tree.links:
        _write_all(root, tree)
        return
    for relative, text in tree.files.items():
        if known.files[relative] != text:
            _replace(root, relative, partial(Path.write_text, data=text, encoding="utf-8"))


def _write_all(root: Path, tree: Tree) -> None:
    for top in ("sys", "proc"):
        (root / top).mkdir(exist_ok=True)
        for folder, folders, files in os.walk(root / top, topdown=False):
            for name in (*files, *folders):
                path = os.path.join(folder, name)
                relative = os.path.relpath(path, root)
                if os.path.islink(path):
                    if relative not in tree.links:
                        os.unlink(path)
                elif os.path.isdir(path):
                    if not os.listdir(path):
                        os.rmdir(path)
                elif relative not in tree.files:
                    os.unlink(path)
    for relative, target in tree.links.items():
        if not os.path.islink(root / relative) or os.readlink(root / relative) != target:
            _replace(root, relative, partial(os.symlink, target))
    for relative, text in tree.files.items():
        file = root / relative
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            _replace(root, relative, partial(Path.write_text, data=text, encoding="utf-8"))


def _replace(root: Path, relative: str, make: Callable[[Path], object]) -> None:
    # Made outside the trees: whoever lists a folder must not find half a file, nor one with an odd name.
    new = root / "new"
    if new.is_symlink() or new.exists():
        new.unlink()
    make(new)
    (root / relative).parent.mkdir(parents=True, exist_ok=True)
    os.replace(new, root / relative)


def _drm(tree: Tree, state: CardState) -> None:
    tree.files["sys/class/drm/version"] = "drm 1.1.0 20060810\n"
    for number in range(state.card_number):
        _card(tree, number, f"0000:00:{2 + number:02x}.0", "0x8086", "0x4680", "i915")
    if state.gone:
        return
    vendor, device, driver = _VENDOR_IDS["nvidia" if state.vendor == "nvidia" else "amd"]
    folder = _card(tree, state.card_number, state.pci_id, vendor, device, driver)
    speed = _SPEEDS[state.pcie_generation]
    tree.add(folder, current_link_speed=speed, max_link_speed=speed)
    tree.add(folder, current_link_width=state.pcie_width, max_link_width=state.pcie_width)
    if state.vendor == "nvidia":
        return
    apu = state.vendor == "amd-apu"
    total, used = (state.carveout_bytes, state.carveout_used_bytes) if apu else (state.total_bytes, state.used_bytes)
    tree.add(folder, mem_info_vram_total=total, mem_info_vram_used=used)
    tree.add(folder, mem_info_vis_vram_total=total, mem_info_vis_vram_used=used)
    tree.add(folder, mem_info_gtt_total=state.gtt_total_bytes, mem_info_gtt_used=state.gtt_used_bytes)
    tree.add(folder, mem_info_vram_vendor="unknown" if apu else "samsung", revision="0xc8")
    if not apu:
        tree.add(folder, unique_id=f"{state.gpu_id:016x}")
    if not apu and state.fdinfo != "6.x":
        tree.add(folder, board_info="type : cem")
    if apu and state.fdinfo == "7.2":
        tree.add(f"{folder}/uma", carveout=0, carveout_options="0: Minimum (512 MB)")


def _card(tree: Tree, number: int, pci_id: str, vendor: str, device: str, driver: str) -> str:
    """One display adapter: /sys/class/drm/cardN is a link into /sys/devices, and its `device` a link back up."""
    bus = int(pci_id.split(":")[1], 16)
    folder = f"sys/devices/pci0000:00/{'' if bus == 0 else '0000:00:01.0/'}{pci_id}"
    ids = f"{vendor[2:].upper()}:{device[2:].upper()}"
    tree.add(folder, vendor=vendor, device=device, boot_vga=int(number == 0))
    tree.files[f"{folder}/class"] = "0x030000\n"
    tree.files[f"{folder}/uevent"] = (
        f"DRIVER={driver}\nPCI_CLASS=30000\nPCI_ID={ids}\nPCI_SUBSYS_ID={ids}\nPCI_SLOT_NAME={pci_id}\n"
        f"MODALIAS=pci:v0000{vendor[2:].upper()}d0000{device[2:].upper()}\n"
    )
    tree.link(f"{folder}/driver", f"sys/bus/pci/drivers/{driver}")
    tree.files[f"sys/bus/pci/drivers/{driver}/bind"] = ""
    tree.link(f"sys/bus/pci/devices/{pci_id}", folder)
    for name, minor in ((f"card{number}", number), (f"renderD{128 + number}", 128 + number)):
        tree.files[f"{folder}/drm/{name}/dev"] = f"226:{minor}\n"
        tree.link(f"{folder}/drm/{name}/device", folder)
        tree.link(f"sys/class/drm/{name}", f"{folder}/drm/{name}")
    connector = f"{folder}/drm/card{number}/card{number}-DP-1"  # also matches card*
    tree.files[f"{connector}/status"] = "connected\n"
    tree.link(f"{connector}/device", f"{folder}/drm/card{number}")
    tree.link(f"sys/class/drm/card{number}-DP-1", connector)
    return folder


def _kfd(tree: Tree, state: CardState, own_pid: int) -> None:
    kfd = "sys/class/kfd/kfd"
    tree.files[f"{kfd}/topology/generation_id"] = "2\n"
    processor = {"cpu_cores_count": 16, "simd_count": 0, "vendor_id": 0, "location_id": 0, "domain": 0}
    _node(tree, f"{kfd}/topology/nodes/0", 0, processor)
    if state.gone:
        return
    domain, bus, rest = state.pci_id.split(":")
    device, function = rest.split(".")
    location = int(bus, 16) << 8 | int(device, 16) << 3 | int(function)
    card = {"cpu_cores_count": 0, "simd_count": 192, "vendor_id": 0x1002, "device_id": 0x744C, "location_id": location}
    card |= {"domain": int(domain, 16), "drm_render_minor": 128 + state.card_number, "gfx_target_version": 110000}
    _node(tree, f"{kfd}/topology/nodes/1", state.gpu_id, card)
    # KFD counts what was asked for, wherever that lies by now.
    spilled = state.spilled_own_bytes if state.vendor == "amd" else 0
    _kfd_process(tree, state, state.listed_pid or own_pid, state.own_bytes + spilled, state.evicted_ms)
    for pid, _, num_bytes in state.others:
        if pid in state.both_lists:
            _kfd_process(tree, state, pid, num_bytes or 0, 0)


def _node(tree: Tree, folder: str, gpu_id: int, properties: dict[str, int]) -> None:
    tree.add(folder, gpu_id=gpu_id)
    tree.files[f"{folder}/properties"] = "".join(f"{name} {value}\n" for name, value in properties.items())


def _kfd_process(tree: Tree, state: CardState, pid: int, vram_bytes: int, evicted_ms: int) -> None:
    folder = f"sys/class/kfd/kfd/proc/{pid}"
    tree.files[f"{folder}/pasid"] = "32771\n"
    tree.files[f"{folder}/vram_{state.gpu_id}"] = f"{vram_bytes}\n"
    tree.files[f"{folder}/sdma_{state.gpu_id}"] = "0\n"
    tree.files[f"{folder}/stats_{state.gpu_id}/evicted_ms"] = f"{evicted_ms}\n"
    tree.files[f"{folder}/stats_{state.gpu_id}/cu_occupancy"] = "0\n"


def _processes(tree: Tree, state: CardState, own_pid: int) -> None:
    tree.links["proc/self"] = str(own_pid)
    tree.files["proc/stat"] = "cpu  0 0 0 0 0 0 0 0 0 0\nbtime 1700000000\n"
    _process(tree, own_pid, state.own_name)
    for pid, name, _ in state.others:
        _process(tree, pid, name)
    if state.vendor not in ("amd", "amd-apu"):
        return
    vram, gtt, spilled = state.own_bytes, state.own_gtt_bytes, state.spilled_own_bytes
    if state.vendor == "amd-apu":
        vram, gtt, spilled = 0, state.own_bytes + gtt, 0  # there, spilling is swapping
    _client(tree, state, own_pid, 17, vram, gtt, spilled)
    for i, (pid, _, num_bytes) in enumerate(state.others):
        _client(tree, state, pid, 30 + i, num_bytes or 0, 0, 0)


def _process(tree: Tree, pid: int, name: str) -> None:
    tree.add(f"proc/{pid}", comm=os.path.basename(name)[:15])
    tree.files[f"proc/{pid}/cmdline"] = f"{name}\0"
    tree.files[f"proc/{pid}/fdinfo/0"] = "pos:\t0\nflags:\t0100002\nmnt_id:\t27\nino:\t5\n"
    tree.links[f"proc/{pid}/fd/0"] = "/dev/pts/3"


def _client(tree: Tree, state: CardState, pid: int, client: int, vram: int, gtt: int, spilled: int) -> None:
    """Two descriptors of one client of the driver: the second is a duplicate, and what it says is said already."""
    for fd in (7, 9):
        tree.links[f"proc/{pid}/fd/{fd}"] = f"/dev/dri/renderD{128 + state.card_number}"
        head = f"pos:\t0\nflags:\t02100002\nmnt_id:\t29\nino:\t{600 + fd}\n"
        body = "" if state.gone else _client_text(state, client, vram, gtt, spilled)
        tree.files[f"proc/{pid}/fdinfo/{fd}"] = head + body
    tree.links[f"proc/{pid}/fd/8"] = "/dev/kfd"
    tree.files[f"proc/{pid}/fdinfo/8"] = "pos:\t0\nflags:\t02100002\nmnt_id:\t29\nino:\t510\n"


def _client_text(state: CardState, client: int, vram: int, gtt: int, spilled: int) -> str:
    lines = [f"drm-driver:\tamdgpu\ndrm-client-id:\t{client}\ndrm-pdev:\t{state.pci_id}\npasid:\t32771\n"]
    if state.fdinfo != "6.x":
        # total: what asked for the place; resident: what lies there.
        for region, total, resident in (
            ("cpu", 0, 0),
            ("gtt", gtt, gtt + spilled),
            ("vram", vram + spilled, vram),
        ):
            sizes = {"total": total, "shared": 0, "active": 0, "resident": resident, "purgeable": 0}
            lines += [f"drm-{stat}-{region}:\t{_scaled(size)}\n" for stat, size in sizes.items()]
    if state.fdinfo != "7.2":
        lines.append(f"drm-memory-vram:\t{vram // 1024} KiB\n")
        lines.append(f"drm-memory-gtt: \t{(gtt + spilled) // 1024} KiB\n")
        lines.append("drm-memory-cpu: \t0 KiB\n")
    lines.append(f"amd-evicted-vram:\t{spilled // 1024} KiB\n")
    lines.append(f"amd-requested-vram:\t{(vram + spilled) // 1024} KiB\n")
    lines.append(f"amd-requested-gtt:\t{gtt // 1024} KiB\n")
    lines.append("drm-engine-compute:\t0 ns\n")
    return "".join(lines)


def _scaled(num_bytes: int) -> str:
    """drm_file.c's print_size: the largest unit that loses nothing, and none at all for 0."""
    for unit in ("", " KiB"):
        if num_bytes == 0 or num_bytes % 1024:
            return f"{num_bytes}{unit}"
        num_bytes //= 1024
    return f"{num_bytes} MiB"


def _main_memory(tree: Tree, state: CardState, own_pid: int) -> None:
    total, available = state.total_bytes, state.total_bytes - state.used_bytes
    cache = min(state.page_cache_bytes, available)
    swapped = min(state.swap_total_bytes, state.spilled_own_bytes + state.others_swap_bytes)
    sizes = {"MemTotal": total, "MemFree": available - cache, "MemAvailable": available, "Buffers": 0, "Cached": cache}
    sizes |= {"SwapCached": 0, "Active": state.used_bytes, "Inactive": cache, "Active(anon)": state.used_bytes}
    sizes |= {"Inactive(anon)": 0, "Active(file)": 0, "Inactive(file)": cache, "Unevictable": 0, "Mlocked": 0}
    sizes |= {"SwapTotal": state.swap_total_bytes, "SwapFree": state.swap_total_bytes - swapped, "Shmem": 0, "Slab": 0}
    sizes |= {"SReclaimable": 0, "SUnreclaim": 0}
    tree.files["proc/meminfo"] = "".join(f"{key + ':':<16}{num // 1024:>8} kB\n" for key, num in sizes.items())
    tree.files["proc/vmstat"] = f"pswpin {state.swap_in_bytes // _PAGE}\npswpout 0\npgmajfault {state.major_faults}\n"
    _memory_of(tree, own_pid, state.own_name, state.own_bytes, state.spilled_own_bytes, state.major_faults)
    for pid, name, num_bytes in state.others:
        _memory_of(tree, pid, name, num_bytes or 0, 0, 0)
    tree.files[f"proc/{own_pid}/cgroup"] = "0::/\n"  # as within a container: the root that is seen is the own group
    group = "sys/fs/cgroup"
    limit: object = "max" if state.cgroup_limit_bytes is None else state.cgroup_limit_bytes
    group_sizes = {"max": limit, "current": state.own_bytes + cache, "swap.current": state.spilled_own_bytes}
    for name, value in group_sizes.items():
        tree.files[f"{group}/memory.{name}"] = f"{value}\n"
    tree.files[f"{group}/memory.stat"] = (
        f"anon {state.own_bytes}\nfile {cache}\ninactive_anon 0\nactive_anon {state.own_bytes}\ninactive_file {cache}\n"
        f"active_file 0\npgmajfault {state.major_faults}\n"
    )


def _memory_of(tree: Tree, pid: int, name: str, rss: int, swap: int, major_faults: int) -> None:
    folder, comm = f"proc/{pid}", os.path.basename(name)[:15]
    sizes = {"VmSize": rss + swap, "VmRSS": rss, "RssAnon": rss, "RssFile": 0, "RssShmem": 0, "VmSwap": swap}
    status = "".join(f"{key}:\t{num // 1024:>8} kB\n" for key, num in sizes.items())
    head = f"Name:\t{comm}\nState:\tS (sleeping)\nTgid:\t{pid}\nPid:\t{pid}\nPPid:\t1\n"
    tree.files[f"{folder}/status"] = head + status
    tree.files[f"{folder}/statm"] = f"{(rss + swap) // _PAGE} {rss // _PAGE} 0 1 0 {rss // _PAGE} 0\n"
    # pid (comm) state ppid pgrp session tty_nr tpgid flags minflt cminflt majflt cmajflt utime …, 52 fields in all.
    fields = ["S", "1", str(pid), str(pid), "0", "-1", "4194304", "1000", "0", str(major_faults), "0", *["0"] * 9]
    fields += [str(rss + swap), str(rss // _PAGE), *["0"] * 28]
    tree.files[f"{folder}/stat"] = f"{pid} ({comm}) {' '.join(fields)}\n"
