"""Throws malformed requests at a server and looks whether it lives: `python -m tests.http.fuzz --seconds 300`.

Without `--port` it starts a server of its own, with a scripted model, in another process; with `--port` it attacks the
one that listens there on 127.0.0.1 (`--key` if it wants one).
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass, field

import trio

from tests.http.fakes import ScriptedService, running
from tests.http.malformed import MALFORMED, mutations

ALIVE_S = 5.0


@dataclass
class Tally:
    sent: int = 0
    deaths: list[bytes] = field(default_factory=list)
    hangs: list[bytes] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.sent:,} requests: {len(self.deaths)} deaths, {len(self.hangs)} hangs"


async def throw(port: int, data: bytes, wait_s: float) -> None:
    """Send it in two pieces, listen for a moment, and leave."""
    with trio.move_on_after(wait_s + 2):
        try:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
        except OSError:
            return
        async with stream:
            try:
                await stream.send_all(data[: len(data) // 2])
                await stream.send_all(data[len(data) // 2 :])
                with trio.move_on_after(wait_s):
                    while await stream.receive_some(65536):
                        pass
            except trio.BrokenResourceError:
                pass


async def looks_alive(port: int) -> bool:
    with trio.move_on_after(ALIVE_S):
        try:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
        except OSError:
            return False
        async with stream:
            try:
                await stream.send_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                return (await stream.receive_some(65536)).startswith(b"HTTP/1.1 200 ")
            except trio.BrokenResourceError:
                return False
    return False


async def corpus(port: int, tally: Tally) -> None:
    """Every hand-written request, and a look after each."""
    for data in MALFORMED.values():
        await throw(port, data, 0.05)
        tally.sent += 1
        if not await looks_alive(port):
            tally.hangs.append(data)


async def mutants(port: int, seconds: float, seed: int, tally: Tally) -> None:
    """Random mutations, eight connections at a time, and a look after each handful."""
    until = trio.current_time() + seconds
    source = mutations(seed)
    while trio.current_time() < until:
        handful = [next(source) for _ in range(8)]
        async with trio.open_nursery() as nursery:
            for data in handful:
                nursery.start_soon(throw, port, data, 0.02)
        tally.sent += len(handful)
        if not await looks_alive(port):
            tally.hangs.append(b" | ".join(data[:100] for data in handful))


async def _serve_until_killed() -> None:
    async with running(ScriptedService(), body_timeout_s=2.0, header_timeout_s=2.0) as server:
        print(server.port, flush=True)
        await trio.sleep_forever()


async def _attack(port: int | None, seconds: float, seed: int) -> Tally:
    tally = Tally()
    child = None
    if port is None:
        command = [sys.executable, "-m", "tests.http.fuzz", "--serve"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
        assert child.stdout is not None
        port = int(await trio.to_thread.run_sync(child.stdout.readline))
    try:
        await corpus(port, tally)
        print(f"corpus: {tally}", flush=True)
        await mutants(port, seconds, seed, tally)
    finally:
        if child is not None:
            if child.poll() is not None:
                tally.deaths.append(b"the server ended by itself")
            child.kill()
            child.wait()
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--port", type=int)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.serve:
        trio.run(_serve_until_killed)
        return 0
    tally = trio.run(_attack, chosen.port, chosen.seconds, chosen.seed)
    print(f"seed {chosen.seed}: {tally}")
    for data in [*tally.deaths, *tally.hangs][:20]:
        print("   ", data[:200])
    return 1 if tally.deaths or tally.hangs else 0


if __name__ == "__main__":
    sys.exit(main())
