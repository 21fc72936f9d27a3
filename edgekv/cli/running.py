"""The running server under `edgekv serve`: wires engine, actors and HTTP together and tells the terminal how it goes.

Runs in: the main thread (trio); owns: the progress bar.
"""

import os
import threading
import time
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import trio
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, Task, TaskID, TextColumn, TransferSpeedColumn
from rich.text import Text

from edgekv.actors.engine import EngineStatus, Phase
from edgekv.actors.latest import Latest
from edgekv.actors.root import HTTP_GRACE_S, Exit, run_server
from edgekv.actors.service import ModelCard, Service
from edgekv.cli.console import stderr, stdout
from edgekv.cli.draft_view import drafter
from edgekv.cli.logs import configure_logging
from edgekv.cli.owners import WIDEST_BAR, Owned, owner_bar, owner_table
from edgekv.config.units import format_size
from edgekv.core.pressure import PressurePolicy
from edgekv.core.spill import Headroom
from edgekv.http.server import serve_http
from edgekv.http.settings import ApiKey, HttpSettings
from edgekv.model.hf_config import read_spec
from edgekv.smi.device import Place, refreshed
from edgekv.smi.reader import Source
from edgekv.smi.sources import sources_for

if TYPE_CHECKING:
    from edgekv.config.settings import Config
    from edgekv.core.draft_plan import DraftPlan
    from edgekv.engine.assemble import Assembly
    from edgekv.engine.core import EngineCore
    from edgekv.engine.driver import Progress as Report
    from edgekv.engine.settings import EngineSettings


REFRESH_DEADLINE_S = 2.0


def run(
    config: "Config",
    name: str,
    aliases: tuple[str, ...],
    engine: "EngineSettings",
    sources: Sequence[Source] | None = None,
) -> int:
    """Serve until told to stop; returns the exit code.

    `sources`: the ways to read the memory of the device that `engine` names, best first; None for the usual ones.
    """
    configure_logging(config.logging.level, config.logging.format)
    ways = sources_for(engine.place.watched) if sources is None else tuple(sources)
    ended = trio.run(_Server(config, name, aliases, engine, ways).serve)
    if ended.reason:
        stderr().print(f"[red]error:[/] {escape(ended.reason)}", markup=True, soft_wrap=True)
    elif ended.code == 0:
        stderr().print("edgekv has stopped")
    return ended.code


def http_settings(config: "Config") -> HttpSettings:
    """The endpoint's part of the configuration."""
    server = config.server
    return HttpSettings(
        host=server.host,
        port=server.port,
        api_keys=tuple(ApiKey(key.name, key.key.get_secret_value(), key.level) for key in server.api_keys),
        allowed_hosts=server.allowed_hosts,
        allowed_origins=server.allowed_origins,
        max_body_bytes=server.max_body_bytes,
        max_connections=server.max_connections,
        body_timeout_s=server.body_timeout_s,
        keep_alive_s=server.keep_alive_s,
        stall_s=server.stall_s,
        grace_s=HTTP_GRACE_S - 0.5,  # done before the root loses its patience
    )


def _spin_briefly(environ: MutableMapping[str, str]) -> None:
    """Let torch's threads sleep soon when they wait for each other, unless the user has decided that.

    By default libgomp's threads spin for milliseconds. When another program has one of the cores, each of a small
    model's hundreds of parallel loops then waits out a time slice: answers were seen to take 20 to 40 times as long.
    Read by libgomp when it is loaded, hence before torch is.
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", "1000")


class _Server:
    """One run of the server: what it was told to serve, and what the engine said it built."""

    def __init__(
        self,
        config: "Config",
        name: str,
        aliases: tuple[str, ...],
        engine: "EngineSettings",
        sources: tuple[Source, ...],
    ) -> None:
        self._config, self._name, self._aliases, self._engine = config, name, aliases, engine
        self._sources = sources
        self._assembly: Assembly | None = None
        self._urls: tuple[str, ...] = ()
        self._started_at = time.monotonic()

    async def serve(self) -> Exit:
        place = self._engine.place
        total_bytes = max(place.total_bytes, place.free_bytes)
        return await run_server(
            make_core=self._make_core,
            serve_http=self._serve_http,
            max_queue=self._config.server.max_queue,
            max_wait_s=self._config.priorities.max_wait_s,
            grace_s=self._config.server.grace_s,
            watch=self._watch,
            sources=self._sources,
            policy=PressurePolicy(Headroom.of(total_bytes, place.reserve_bytes), place.most_bytes),
            device=place.title,
        )

    def _make_core(self, progress: "Report") -> "tuple[EngineCore, ModelCard]":
        """Runs on the engine's thread; torch is first imported here, while HTTP already answers."""
        progress(0, 0, "starting torch")
        _spin_briefly(os.environ)
        from edgekv.engine.assemble import assemble

        engine = self._engine
        if self._assembly is not None:  # the engine starts again: others may have taken or left memory meanwhile
            engine = replace(engine, place=_measured_again(engine.place, self._sources))
        core, assembly = assemble(engine, progress, self._sources)
        self._assembly = assembly
        return core, ModelCard(
            name=self._name,
            aliases=self._aliases,
            created=int(time.time()),
            context_tokens=assembly.memory.context_tokens,
            model_context_tokens=assembly.spec.max_position_embeddings,
            pool_tokens=assembly.pool_tokens,
            block_size=assembly.memory.kv.block_size,
            tokenizer=assembly.tokenizer,
            chat_template=assembly.chat_template,
            generation=assembly.generation,
        )

    async def _serve_http(self, service: Service, *, listening: trio.Event, shutdown: trio.Event) -> None:
        settings = http_settings(self._config)
        async with trio.open_nursery() as nursery:
            self._urls = await nursery.start(partial(serve_http, service, settings, stop=shutdown))
            listening.set()

    async def _watch(self, statuses: Latest[EngineStatus]) -> None:
        """Follow the engine: a progress bar while it loads, a summary once it serves, a line for anything else."""
        told = False
        with _LoadBar() as bar:
            async for status in statuses.watch():
                if status.phase is Phase.LOADING and status.progress is not None:
                    bar.show(status.progress.done_bytes, status.progress.total_bytes, status.progress.stage)
                elif status.phase is Phase.SERVING and self._assembly is not None:
                    bar.close()
                    if not told:
                        self._tell(self._assembly)
                    told = True

    def _tell(self, assembly: "Assembly") -> None:
        console, memory, url = stdout(), assembly.memory, self._urls[0]
        place = assembly.place
        title = f"{self._name}: {assembly.spec.architecture}, {assembly.spec.num_parameters / 1e6:,.1f} M parameters"
        how = f"{memory.dtype} on {place.title} ({assembly.dtype.reason}), {assembly.kernels}"
        console.print(f"[bold]{escape(title)}[/], {escape(how)}", soft_wrap=True)
        if place.note:
            console.print(f"[yellow]{escape(place.note)}[/]", soft_wrap=True)
        shares = _shares(assembly)
        console.print(owner_bar(shares, min(console.width, WIDEST_BAR)))
        console.print(owner_table(shares, memory.total_bytes))
        for line in memory.kv.capacity_lines(memory.context_tokens):
            console.print(line)
        if self._engine.draft is not None:
            console.print(_drafter(self._engine, memory.draft), markup=False, soft_wrap=True)
        if memory.ceiling_blocks > memory.kv.num_blocks:
            most = memory.ceiling_blocks * memory.kv.block_size
            console.print(f"It may grow to {most:,} tokens when other programs leave the card.")
        if assembly.pool_tokens < memory.context_tokens:
            console.print(
                f"[yellow]one request can have {assembly.pool_tokens:,} tokens, not the model's "
                f"{memory.context_tokens:,}: the KV pool is smaller. Set kv.budget to change that.[/]",
                soft_wrap=True,
            )
        key = " -H 'Authorization: Bearer …'" if self._config.server.api_keys else ""
        body = f'{{"model": "{self._name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
        console.print(
            f"try: curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'",
            soft_wrap=True,
            markup=False,
        )
        elapsed = time.monotonic() - self._started_at
        console.print(f"[green]edgekv is ready:[/] {url}/v1  ({elapsed:.1f} s)", soft_wrap=True)
        with suppress(OSError):
            console.file.flush()


def _drafter(engine: "EngineSettings", planned: "DraftPlan | None") -> str:
    """Who proposes tokens, and how many the draft model's pool holds."""
    draft = engine.draft
    assert draft is not None
    spec = None if draft.folder is None else read_spec(draft.folder)
    told = drafter(draft, spec, "" if planned is None else planned.dtype)
    return told if planned is None else f"{told}; its pool holds {planned.kv.pool_tokens:,} tokens"


def _shares(assembly: "Assembly") -> list[Owned]:
    """Where every byte of the device is: leases first, what is left to others last."""
    memory = assembly.memory
    how = {
        "runtime": assembly.runtime_reason,
        "weights.draft": "the model that drafts",
        "workspace.draft": "scratch of its steps",
        "kv.draft": "given up first when memory is short",
    }
    shares = [Owned(name, num_bytes, how.get(name, "")) for name, num_bytes in assembly.leases.items()]
    shares.append(Owned("unused", max(0, memory.budget_bytes - sum(assembly.leases.values()))))
    if memory.withheld_bytes:
        shares.append(Owned("withheld", memory.withheld_bytes, "beyond vram_budget"))
    shares.append(Owned("headroom", memory.headroom_bytes, "left to others"))
    return [*shares, Owned("others", memory.others_bytes, "other programs when it was loaded")]


def _measured_again(place: Place, sources: Sequence[Source]) -> Place:
    """The place with what is free now; as it was where the driver does not answer in time."""
    found: list[Place] = []
    asking = threading.Thread(target=lambda: found.append(refreshed(place, sources)), name="edgekv-place", daemon=True)
    asking.start()
    asking.join(REFRESH_DEADLINE_S)
    return found[0] if found else place


class _Bytes(DownloadColumn):
    """How many bytes of how many; nothing for a stage that has none."""

    def __init__(self) -> None:
        super().__init__(binary_units=True)

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text()


class _Rate(TransferSpeedColumn):
    """Bytes per second; nothing for a stage that has none."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text()


class _LoadBar:
    """A progress bar on a terminal; a line for each stage elsewhere."""

    def __init__(self) -> None:
        self._console = stderr()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""

    def __enter__(self) -> "_LoadBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def show(self, done_bytes: int, total_bytes: int, stage: str) -> None:
        """Show the stage, how far it is, and how fast."""
        if not self._console.is_terminal:
            if stage != self._stage:
                size = f" ({format_size(total_bytes)})" if total_bytes else ""
                self._console.print(f"loading: {stage}{size}", markup=False, soft_wrap=True)
            self._stage = stage
            return
        if self._progress is None:
            columns = (TextColumn("{task.description:>15}", markup=False), BarColumn(), _Bytes(), _Rate())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._progress.start()
        if stage != self._stage or self._task is None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(stage, total=total_bytes or None)
            self._stage = stage
        self._progress.update(self._task, completed=done_bytes, total=total_bytes or None)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = None
