"""Main memory for real: a program takes memory, the server gives its KV pool's back, and takes it again later.

Both hold what they hold for real, but it is only theirs that counts (see private_machine.py): other programs of the
machine come and go, and a server that makes room for them does just what it should.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.guard.clients import Crowd
from edgekv.core.capacity import headroom_bytes
from edgekv.core.pressure import PATIENCE_S
from edgekv.smi.host import read_memory
from tests.e2e.private_machine import BYTES, PROGRAMS
from tests.e2e.real_server import RealServer, real_server

MIB, GIB = 1 << 20, 1 << 30
POOL_BYTES = 2 * GIB
PROGRAM_BYTES = 230 * MIB  # interpreter, torch and weights, roughly
SLACK_BYTES = 300 * MIB  # free beyond the reserve, before the hog comes
RESERVE_BYTES = 1536 * MIB  # more than the hog takes: what it gets is there
EMERGENCY_BYTES = 800 * MIB  # what the hog takes beyond what is critical
MACHINE_BYTES = POOL_BYTES + PROGRAM_BYTES + SLACK_BYTES + RESERVE_BYTES
# Free memory is critical half of the usual headroom below the reserve.
HOG_BYTES = SLACK_BYTES + headroom_bytes(MACHINE_BYTES) // 2 + EMERGENCY_BYTES
QUESTIONS, CLIENTS = 4, 3
AT_ALL_S = 100.0  # patience on a busy machine, for what takes a second or so, or PATIENCE_S

HOG = """
import mmap, signal, sys
signal.alarm(300)  # it ends by itself, whatever becomes of the test
held = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, len(held), mmap.PAGESIZE):
    held[page] = 1
print("taken", flush=True)
sys.stdin.read()
"""


@contextmanager
def hog(num_bytes: int, programs: Path) -> Iterator[None]:
    """A program that holds so much memory, every page of it touched; `programs` is told of it."""
    command = [sys.executable, "-c", HOG, str(num_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            programs.write_text(f"{process.pid}\n", encoding="ascii")
            assert process.stdout is not None
            assert process.stdout.readline() == "taken\n"
            yield
        finally:
            process.kill()
    programs.write_text("", encoding="ascii")


@contextmanager
def chatting(server: RealServer, expected: dict[int, str]) -> Iterator[Crowd]:
    """Clients that chat all the while."""
    crowd = Crowd(server.url, QUESTIONS, expected)
    thread = threading.Thread(target=crowd.run, args=(CLIENTS,))
    thread.start()
    try:
        yield crowd
    finally:
        crowd.stop.set()
        thread.join()


def memory_of(server: RealServer) -> dict[str, Any]:
    return dict(server.get("/api/edgekv/memory").json())


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + AT_ALL_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.slow
def test_a_hog_gets_its_memory_from_the_pool_and_the_pool_gets_it_back_later(tmp_path: Path) -> None:
    if read_memory().available_bytes < POOL_BYTES + PROGRAM_BYTES + HOG_BYTES + GIB:
        pytest.skip("would leave other programs too little of the free memory")
    programs = tmp_path / "programs"
    programs.write_text("", encoding="ascii")
    settings = [
        f"kv.budget={POOL_BYTES // MIB}MiB",
        "devices.ram.match.vendor=cpu",
        f"devices.ram.desktop_reserve={RESERVE_BYTES // MIB}MiB",
    ]
    arguments = [part for setting in settings for part in ("--set", setting)]
    machine = {BYTES: str(MACHINE_BYTES), PROGRAMS: str(programs)}
    with real_server(*arguments, variables=machine, module="tests.e2e.private_machine") as server:
        undisturbed = Crowd(server.url, QUESTIONS)
        undisturbed.run(CLIENTS)
        before, resident = memory_of(server), server.rss_bytes
        assert before["pool"]["kv_bytes"] > 0.95 * POOL_BYTES
        assert before["pool"]["given_back_bytes"] == 0
        assert resident > POOL_BYTES, "the pool's memory is committed when it is added"
        pool = lambda: memory_of(server)["pool"]  # noqa: E731
        with chatting(server, undisturbed.texts) as crowd:
            with hog(HOG_BYTES, programs):
                wait_until(lambda: pool()["given_back_bytes"] > 500 * MIB, "it gives too little back")
                wait_until(lambda: memory_of(server)["state"] != "critical", "the hog still wants memory")
                time.sleep(1.0)  # what was ordered last is done
                after, fallen = memory_of(server), resident - server.rss_bytes
                given_back = after["pool"]["given_back_bytes"]
                assert given_back < HOG_BYTES, "more than was wanted"
                assert fallen == pytest.approx(given_back, rel=0.1), json.dumps(after, indent=1)
                assert after["pool"]["kv_bytes"] == before["pool"]["kv_bytes"] - given_back
                leased = before["ledger"]["leased_bytes"] - after["ledger"]["leased_bytes"]
                assert leased == given_back
            left_at = time.monotonic()
            wait_until(lambda: pool()["taken_bytes"] > before["pool"]["taken_bytes"], "it does not grow again")
            assert time.monotonic() - left_at > PATIENCE_S / 2, "it grew before it could know that the hog stays away"
            wait_until(lambda: pool()["kv_bytes"] == before["pool"]["kv_bytes"], "it stays small")
            assert server.rss_bytes == pytest.approx(resident, abs=0.1 * POOL_BYTES)
        assert (crowd.answers.lost, crowd.answers.changed, crowd.answers.faults) == (0, 0, ())
        assert crowd.answers.finished > CLIENTS
        assert pool()["given_back_bytes"] == given_back, "only the hog was made room for"
