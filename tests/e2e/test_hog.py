"""Main memory for real: a program takes memory, the server gives its KV pool's back, and takes it again later."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from bench.guard.clients import Crowd
from edgekv.core.capacity import headroom_bytes
from edgekv.core.pressure import PATIENCE_S
from edgekv.smi.main_memory import read_memory
from tests.e2e.real_server import RealServer, real_server

MIB, GIB = 1 << 20, 1 << 30
POOL_BYTES = 2 * GIB
PROGRAM_BYTES = 230 * MIB  # interpreter, torch and weights, roughly
SLACK_BYTES = 300 * MIB  # free beyond the reserve, before the hog comes
EMERGENCY_BYTES = 800 * MIB  # what the hog takes beyond what is critical
QUESTIONS, CLIENTS = 4, 3

HOG = """
import mmap, signal, sys
signal.alarm(60)  # it ends by itself, whatever becomes of the test
held = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, len(held), mmap.PAGESIZE):
    held[page] = 1
print("taken", flush=True)
sys.stdin.read()
"""


@contextmanager
def hog(num_bytes: int) -> Iterator[None]:
    """A program that holds so much memory, every page of it touched."""
    command = [sys.executable, "-c", HOG, str(num_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "taken\n"
            yield
        finally:
            process.kill()


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


def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.mark.slow
def test_a_hog_gets_its_memory_from_the_pool_and_the_pool_gets_it_back_later() -> None:
    memory = read_memory()
    # Free memory is critical half of the usual headroom below the reserve; a large machine needs a large hog for that.
    hog_bytes = SLACK_BYTES + headroom_bytes(memory.total_bytes) // 2 + EMERGENCY_BYTES
    reserve = memory.available_bytes - POOL_BYTES - PROGRAM_BYTES - SLACK_BYTES
    if reserve < hog_bytes + GIB:
        pytest.skip(f"would leave other programs too little of {memory.available_bytes / GIB:.1f} GiB of free memory")
    settings = [
        f"kv.budget={POOL_BYTES // MIB}MiB",
        "devices.ram.match.vendor=cpu",
        f"devices.ram.desktop_reserve={reserve // MIB}MiB",
    ]
    with real_server(*(part for setting in settings for part in ("--set", setting))) as server:
        undisturbed = Crowd(server.url, QUESTIONS)
        undisturbed.run(CLIENTS)
        before, resident = memory_of(server), server.rss_bytes
        assert before["pool"]["kv_bytes"] > 0.95 * POOL_BYTES
        assert resident > POOL_BYTES, "the pool's memory is committed when it is added"
        with chatting(server, undisturbed.texts) as crowd:
            with hog(hog_bytes):
                time.sleep(1.0)
                after, fallen = memory_of(server), resident - server.rss_bytes
                given_back = after["pool"]["given_back_bytes"] - before["pool"]["given_back_bytes"]
                assert given_back > 500 * MIB, json.dumps(after, indent=1)
                assert fallen == pytest.approx(given_back, rel=0.1)
                leased = before["ledger"]["leased_bytes"] - after["ledger"]["leased_bytes"]
                assert leased == given_back
            left_at = time.monotonic()
            pool = lambda: memory_of(server)["pool"]  # noqa: E731
            wait_until(lambda: pool()["taken_bytes"] > before["pool"]["taken_bytes"], 30, "it does not grow again")
            assert time.monotonic() - left_at > PATIENCE_S / 2, "it grew before it could know that the hog stays away"
            # Other programs of this machine may have taken some of it meanwhile.
            most = given_back / 2
            wait_until(lambda: pool()["taken_bytes"] - before["pool"]["taken_bytes"] > most, 30, "it stays small")
            grown = pool()["kv_bytes"] - before["pool"]["kv_bytes"]
            assert server.rss_bytes - resident == pytest.approx(grown, abs=0.1 * POOL_BYTES)
        assert (crowd.answers.lost, crowd.answers.changed, crowd.answers.faults) == (0, 0, ())
        assert crowd.answers.finished > CLIENTS
