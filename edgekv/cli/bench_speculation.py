"""`edgekv bench engine --speculate`: what speculation gains, on text that the model knows.

Runs in: the main thread; owns: the engine.

An engine takes turns on the same prompts, without speculation and with it, because a machine's speed may change twofold
within a minute. What is said is compared token by token.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgekv.cli.bench_prompts import Chat, demo_chats, read_chats
from edgekv.cli.models import NGRAM, OFF
from edgekv.cli.speculation_rows import operations, row
from edgekv.cli.speculation_view import PLAIN
from edgekv.demo import DEMO, draft_path
from edgekv.errors import EdgeKVError

if TYPE_CHECKING:
    from edgekv.core.sequence import SequenceSpec
    from edgekv.core.speculation import Controller
    from edgekv.engine.assemble import Assembly
    from edgekv.engine.measure_speculation import SpeculationMeter, Way
    from edgekv.engine.settings import EngineSettings
    from edgekv.engine.step_sums import Turn

TEMPERATURES = (0.0, 0.8)
# Prompts of a turn, for each sequence that decodes at once: enough that few of its steps have fewer sequences, and
# little enough that the machine is the same for all who take it.
_TURN_PROMPTS = 4
_SEEDS = 1 << 31


class OutputsDiffer(EdgeKVError):
    """Speculation changed what a model says, which it must never do."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What to measure: each of `batches` with each temperature, and each of `fixed` beside the controller.

    `repeat` rounds over all prompts count, after `warm_up` rounds that do not.
    """

    batches: tuple[int, ...]
    fixed: tuple[int, ...]
    max_tokens: int
    warm_up: int
    repeat: int
    profile: bool = False


def speculating(settings: "EngineSettings", draft: str | None) -> "EngineSettings":
    """The settings with who drafts: `draft` as for `edgekv serve`, else what the model has. Raises ModelError."""
    from edgekv.cli.serve import drafting

    if draft is not None:
        settings = replace(settings, draft=None if draft == OFF else drafting(draft, settings.draft, others=(NGRAM,)))
    if settings.draft is None:
        raise typer.BadParameter(
            "--speculate needs somebody who drafts: --draft with a model's path, 'demo' or 'ngram'"
        )
    return settings


def asked_chats(name: str, prompts: Path | None, settings: "EngineSettings") -> list[Chat]:
    """The prompts of a file, else those of the demo model's world."""
    if prompts is not None:
        return read_chats(prompts)
    if name != DEMO:
        raise typer.BadParameter(
            "only the demo model has prompts of its own: give --prompts FILE, one a line, of what this model is for. "
            "Random text would say nothing: how much is accepted depends on what is said"
        )
    return demo_chats(quoting=settings.draft is not None and settings.draft.folder is None)


def encoded(settings: "EngineSettings", chats: Sequence[Chat], max_tokens: int) -> list[tuple[int, ...]]:
    """The prompts as the model reads them. Raises TemplateError, and BadParameter for what does not fit its context."""
    from edgekv.model.hf_config import read_spec
    from edgekv.text.chat_template import load_chat_template
    from edgekv.text.tokenizer import load_tokenizer

    tokenizer, template = load_tokenizer(settings.folder), load_chat_template(settings.folder)
    prompts: list[tuple[int, ...]] = []
    for chat in chats:
        if template is not None:
            prompts.append(tuple(template.encode(tokenizer, chat)))
        else:
            text = "\n".join(str(message.get("content", "")) for message in chat)
            prompts.append(tuple(tokenizer.encode(text, add_special_tokens=True, parse_special=False)))
    most = read_spec(settings.folder).max_position_embeddings
    longest = max(map(len, prompts))
    if longest + max_tokens > most:
        raise typer.BadParameter(
            f"a prompt of {longest:,} tokens and an answer of {max_tokens:,} are more than the model's {most:,}"
        )
    return prompts


def measure_speculation(
    settings: "EngineSettings",
    prompts: Sequence[tuple[int, ...]],
    asked: Asked,
    seed: int | None,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Build the engine and measure every row. Raises OutputsDiffer."""
    from edgekv.cli.machine import LoadWatch, machine_line
    from edgekv.engine.assemble import assemble
    from edgekv.engine.measure_speculation import SpeculationMeter

    if settings.place.kind == "card":
        raise EdgeKVError(
            "--speculate measures on a processor only: a card's steps overlap. There, serve the model with "
            "its draft and with --draft off, and compare them with: edgekv bench serve"
        )
    watch = LoadWatch()
    progress("loading")
    core, assembly = assemble(settings, lambda done, total, stage: None)
    meter = SpeculationMeter(core, detailed=asked.profile)
    rng_seed = time.time_ns() if seed is None else seed
    bench = _Bench(settings, assembly, meter, prompts, asked, rng_seed % _SEEDS, progress)
    rows = [row for temperature in TEMPERATURES for batch in asked.batches for row in bench.rows(temperature, batch)]
    others = watch.read()
    assert settings.draft is not None
    return {
        "machine": machine_line(),
        "kernels": assembly.kernels,
        "dtype": assembly.dtype.name,
        "kv_dtype": assembly.memory.kv_dtype,
        "draft": _drafter(settings.draft.folder),
        "draft_tokens": settings.draft.tokens,
        "prompts": len(prompts),
        "prompt_tokens": round(statistics.mean(map(len, prompts)), 1),
        "max_tokens": asked.max_tokens,
        "warm_up": asked.warm_up,
        "rounds": asked.repeat,
        "seed": rng_seed,
        "others_cores": round(others.busy_cores, 2),
        "stolen_cores": round(others.stolen_cores, 2),
        "speculation": rows,
    }


@dataclass(frozen=True, slots=True)
class _Bench:
    """Lets the ways of decoding take turns."""

    settings: "EngineSettings"
    assembly: "Assembly"
    meter: "SpeculationMeter"
    prompts: Sequence[tuple[int, ...]]
    asked: Asked
    seed: int
    progress: Callable[[str], None]

    def rows(self, temperature: float, batch: int) -> Iterator[dict[str, Any]]:
        """A row for each way, with so many sequences at once."""
        from edgekv.cli.machine import LoadWatch
        from edgekv.engine.measure_speculation import ways

        asked = self.asked
        self.progress(f"temperature {temperature}, batch {batch}")
        found = list(ways(self.meter, self._controller(), asked.fixed, batch))
        for number in range(asked.warm_up):
            self._round(found, number, temperature, batch)
        watch = LoadWatch()
        rounds = [self._round(found, asked.warm_up + number, temperature, batch) for number in range(asked.repeat)]
        others = watch.read()
        plain = [[turns[PLAIN] for turns in each] for each in rounds]
        for way in found:
            own = [[turns[way.name] for turns in each] for each in rounds]
            told = {"temperature": temperature, "batch": batch, "way": way.name, **row(own, plain)}
            told["others_cores"] = round(others.busy_cores, 2)
            if asked.profile:
                told["profile"] = operations(way, [turn for turns in own for turn in turns])
            yield told

    def _controller(self) -> "Controller":
        from edgekv.engine.assemble import controller_of

        controller = controller_of(self.settings)
        assert controller is not None
        return controller

    def _round(self, found: Sequence["Way"], number: int, temperature: float, batch: int) -> list[dict[str, "Turn"]]:
        """Every prompt once in each way, a few at a time; who goes first changes."""
        specs = list(self._specs(number, temperature))
        size = _TURN_PROMPTS * batch
        parts = [specs[begin : begin + size] for begin in range(0, len(specs), size)]
        turns_of = []
        for place, part in enumerate(parts):
            first = (number + place) % len(found)
            turns = {way.name: way.answer(part) for way in (*found[first:], *found[:first])}
            for name, turn in turns.items():
                check_same(turns[PLAIN].said, turn.said, name)
            for turn in turns.values():
                turn.said.clear()
            turns_of.append(turns)
        return turns_of

    def _specs(self, number: int, temperature: float) -> "Iterator[SequenceSpec]":
        from edgekv.core.sampling import SamplingParams
        from edgekv.core.sequence import SequenceSpec

        stops = frozenset(self.assembly.generation.eos_token_ids)
        for place, prompt in enumerate(self.prompts):
            seed = (self.seed + number * len(self.prompts) + place) % _SEEDS
            sampling = SamplingParams(self.asked.max_tokens, seed, temperature, stop_token_ids=stops)
            yield SequenceSpec(place, prompt, sampling)


def _drafter(folder: Path | None) -> str:
    if folder is None:
        return NGRAM
    return DEMO if folder == draft_path() else str(folder)


def check_same(expected: Mapping[int, Sequence[int]], said: Mapping[int, Sequence[int]], way: str) -> None:
    """Raise OutputsDiffer where these are not the same tokens, by sequence."""
    for number in sorted(expected.keys() | said.keys()):
        ours, theirs = list(expected.get(number, ())), list(said.get(number, ()))
        if ours != theirs:
            place = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
            place = min(len(ours), len(theirs)) if place is None else place
            raise OutputsDiffer(
                f"speculation changed an answer: to prompt {number}, from token {place} on, "
                f"{way} says {theirs[place : place + 8]} and not {ours[place : place + 8]}"
            )
