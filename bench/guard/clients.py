"""The load: chats that stream at once, each compared with what the same server says undisturbed.

    python -m bench.guard.clients URL CLIENTS --questions N [--expected FILE]

Runs in: a process of its own, a thread a client, so that it takes no time from who keeps the trace's time; owns:
nothing. The clients ask until standard input ends, and finish what is under way then; with nothing expected each
question is asked once. Standard output: how far they are, now and then, and what came of it last, an object a line.
"""

import argparse
import http.client
import json
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.guard.measure import Answers

QUESTIONS = 32
STALL_S = 120.0
TELL_S = 0.5
MOST_FAULTS = 5
NOT_ADMITTED = ("kv_cache_full", "loading")  # every other refusal is a request lost

_NOTES = (
    "The beans came up on the first of May and the frost took half of them.",
    "A blackbird sits on the old gate every evening and sings until the light is gone.",
    "The compost is warm in the middle; turn it once a week and keep it moist.",
    "Mint walks under the fence if nobody stops it. Put it in a pot.",
    "The hedge was cut in August, after the young birds had left.",
    "Tomatoes want sun, water at the root, and no wet leaves.",
)


@dataclass(frozen=True, slots=True)
class Question:
    """One chat; the same `number` is always the same chat."""

    number: int

    def body(self) -> dict[str, Any]:
        """Long and short prompts, greedy and drawn from a seed."""
        number = self.number
        notes = " ".join(_NOTES[(number + i) % len(_NOTES)] for i in range(2 + 18 * (number % 8)))
        text = f"Note {number}. {notes} What should I do in the garden this week?"
        return {
            "messages": [{"role": "user", "content": text}],
            "stream": True,
            "max_tokens": 48 + 16 * (number % 6),
            "ignore_eos": True,
            "temperature": 0.0 if number % 2 else 0.9,
            "seed": number,
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back for one question: a text, or why there is none."""

    text: str
    tokens: int = 0
    longest_silence_s: float = 0.0
    fault: str | None = None
    retry_after_s: float | None = None


class Client:
    """One connection, one question at a time."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._address = (parts.hostname, parts.port or 80)
        self._connection: http.client.HTTPConnection | None = None

    def ask(self, question: Question) -> Answer:
        """The whole answer; never raises."""
        try:
            return self._ask(question)
        except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
            self.close()
            return Answer("", fault=f"question {question.number}: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Hang up."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(self, question: Question) -> Answer:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(*self._address, timeout=STALL_S)
        body = json.dumps(question.body())
        self._connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        response = self._connection.getresponse()
        if response.status == 200:
            return _read(response, question)
        error = json.loads(response.read())["error"]
        retry_after = response.getheader("retry-after")
        if error.get("code") in NOT_ADMITTED and retry_after is not None:
            return Answer("", retry_after_s=float(retry_after))
        raise ValueError(f"status {response.status}: {error['message']}")


def _read(response: http.client.HTTPResponse, question: Question) -> Answer:
    text: list[str] = []
    tokens, silence = 0, 0.0
    last: float | None = None
    for event in _events(response):
        if event == "[DONE]":
            response.read()
            return Answer("".join(text), tokens, silence)
        chunk = json.loads(event)
        if "error" in chunk:
            if not text and chunk["error"].get("code") in NOT_ADMITTED:  # waited in the queue, was never started
                response.read()
                return Answer("", retry_after_s=1.0)
            raise ValueError(f"after {tokens} tokens: {chunk['error']['message']}")
        for choice in chunk["choices"]:
            if choice["delta"].get("content"):
                now = time.monotonic()
                silence, last = max(silence, now - last if last is not None else 0.0), now
                text.append(choice["delta"]["content"])
                tokens += 1
            if choice.get("finish_reason") not in (None, "length", "stop"):
                raise ValueError(f"after {tokens} tokens: finish_reason {choice['finish_reason']}")
    raise ValueError(f"the stream ended after {tokens} tokens without [DONE]")


def _events(response: http.client.HTTPResponse) -> Iterator[str]:
    while line := response.readline():
        if line.startswith(b"data: "):
            yield line[6:].decode().rstrip("\n")


@dataclass(slots=True)
class Crowd:
    """Clients that ask in turn what they are given, until `stop` is set."""

    url: str
    questions: int
    expected: dict[int, str] | None = None
    answers: Answers = field(default_factory=Answers)
    texts: dict[int, str] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _asked: int = 0

    def run(self, clients: int) -> None:
        """Until every client has ended."""
        threads = [threading.Thread(target=self._visit, name=f"client {i}") for i in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _next(self) -> Question | None:
        with self._lock:
            if self.stop.is_set() or (self.expected is None and self._asked == self.questions):
                return None
            number, self._asked = self._asked % self.questions, self._asked + 1
            return Question(number)

    def _visit(self) -> None:
        client = Client(self.url)
        while (question := self._next()) is not None:
            answer = client.ask(question)
            while answer.retry_after_s is not None:
                self._count(refused=1)
                if self.stop.wait(answer.retry_after_s):
                    break
                answer = client.ask(question)
            else:
                self._take(question, answer)
        client.close()

    def _take(self, question: Question, answer: Answer) -> None:
        if answer.fault is not None:
            self._count(lost=1, fault=answer.fault)
            self.stop.wait(0.5)
            return
        changed = 0
        if self.expected is None:
            self.texts[question.number] = answer.text
        elif answer.text != self.expected[question.number]:
            changed = 1
        fault = f"question {question.number}: another answer than undisturbed" if changed else None
        self._count(finished=1, changed=changed, answer=answer, fault=fault)

    def _count(
        self,
        finished: int = 0,
        lost: int = 0,
        changed: int = 0,
        refused: int = 0,
        answer: Answer | None = None,
        fault: str | None = None,
    ) -> None:
        with self._lock:
            so_far = self.answers
            self.answers = replace(
                so_far,
                finished=so_far.finished + finished,
                lost=so_far.lost + lost,
                changed=so_far.changed + changed,
                refused=so_far.refused + refused,
                tokens=so_far.tokens + (answer.tokens if answer else 0),
                longest_silence_s=max(so_far.longest_silence_s, answer.longest_silence_s if answer else 0.0),
                faults=(*so_far.faults, fault) if fault and len(so_far.faults) < MOST_FAULTS else so_far.faults,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("clients", type=int)
    parser.add_argument("--questions", type=int, default=QUESTIONS)
    parser.add_argument("--expected", type=Path)
    args = parser.parse_args()
    expected = None
    if args.expected is not None:
        told = json.loads(args.expected.read_text(encoding="utf-8"))
        expected = {int(number): text for number, text in told.items()}
    crowd = Crowd(args.url, args.questions, expected)
    ended = threading.Event()

    def heed() -> None:
        sys.stdin.read()
        crowd.stop.set()

    def tell() -> None:
        while not ended.wait(TELL_S):
            print(json.dumps({"answers": asdict(crowd.answers)}), flush=True)

    threading.Thread(target=heed, daemon=True).start()
    teller = threading.Thread(target=tell)
    teller.start()
    crowd.run(args.clients)
    ended.set()
    teller.join()
    print(json.dumps({"answers": asdict(crowd.answers), "texts": crowd.texts}), flush=True)


if __name__ == "__main__":
    main()
