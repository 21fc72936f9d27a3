"""Does a server stay as it was? Streaming clients that leave at random tokens, by the thousand; memory every hundred.

    python -m bench.soak [--requests 1000] [--clients 64] [--seed 1] [-- --model PATH …]

Starts `edgekv serve` (with what follows `--`), warms it up, runs the requests, and prints resident memory, threads and
blocks after every hundred. Exit status 1 if memory has moved by more than 5 %, a thread has stayed, or a block is still
held.
"""

import argparse
import random
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx2
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.e2e.real_server import RealServer, real_server

TOPICS = ("beans", "tomatoes", "mint", "the hedge", "rain", "frost", "a blackbird", "compost", "May", "the old gate")
ALLOWED_DRIFT = 0.05
BATCH = 100


def visit(server: RealServer, dice: random.Random) -> bool:
    """One client; whether it stayed to the end."""
    leaves_after = dice.choice([None, dice.randrange(32)])
    subject = f"{dice.choice(TOPICS)} and {dice.choice(TOPICS)}, {dice.randrange(10_000)}"
    text = f"{subject}: {'tell me more. ' * dice.randrange(40)}"
    body = {
        "messages": [{"role": "user", "content": text}],
        "stream": True,
        "max_tokens": dice.randrange(1, 48),
        "ignore_eos": True,
        "seed": dice.randrange(1000),
    }
    with httpx2.stream("POST", server.url + "/v1/chat/completions", json=body, timeout=300) as response:
        response.raise_for_status()
        for seen, line in enumerate(response.iter_lines()):
            if line == "data: [DONE]":
                return True
            if leaves_after is not None and seen > 2 * leaves_after:
                return False
    raise RuntimeError("a stream ended without [DONE]")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("serve", nargs="*", help="arguments for edgekv serve, after --")
    args = parser.parse_args()
    table = Table("requests", "stayed", "RSS MiB", "threads", "blocks held", "blocks cached")

    options = ("--set", "server.max_queue=1000", *args.serve)
    with real_server(*options) as server, ThreadPoolExecutor(args.clients) as clients:
        dice = random.Random(args.seed)

        def batch(size: int) -> int:
            seeds = [dice.randrange(1 << 30) for _ in range(size)]
            stayed = sum(clients.map(lambda seed: visit(server, random.Random(seed)), seeds))
            server.wait_until_quiet()
            return stayed

        def note(requests: int, stayed: int) -> tuple[int, int, int]:
            rss, threads, held = server.rss_bytes, server.num_threads, int(server.metric("edgekv_kv_blocks_active"))
            cached = int(server.metric("edgekv_kv_blocks_cached"))
            table.add_row(str(requests), str(stayed), f"{rss / 2**20:.1f}", str(threads), str(held), str(cached))
            return rss, threads, held

        before = note(0, batch(args.warmup))
        after = before
        for done in track(range(0, args.requests, BATCH), description="clients come and go"):
            after = note(done + BATCH, batch(min(BATCH, args.requests - done)))
    Console().print(table)
    drift = after[0] / before[0] - 1
    print(f"resident memory {drift:+.2%}, threads {after[1] - before[1]:+d}, blocks held {after[2]}")
    return 1 if abs(drift) > ALLOWED_DRIFT or after[1] > before[1] + 1 or after[2] else 0


if __name__ == "__main__":
    sys.exit(main())
