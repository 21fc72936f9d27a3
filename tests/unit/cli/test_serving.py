"""What an engine is built from: the configuration's choices, and what is refused before anything is loaded."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from typer.testing import CliRunner

from edgekv.actors.root import Exit
from edgekv.cli import running
from edgekv.cli.app import app
from edgekv.cli.running import _drafter, _measured_again, _Server, _shares, _spin_briefly, http_settings
from edgekv.cli.serve import drafting, served_model
from edgekv.config.settings import Config
from edgekv.config.units import GIB, MIB
from edgekv.core.reading import Reading
from edgekv.core.spill import Headroom
from edgekv.demo import draft_path, target_path
from edgekv.engine.draft_settings import DraftSettings
from edgekv.engine.no_room import KVBudgetTooLarge, NoRoomForKV
from edgekv.engine.settings import ContextTooLong, EngineSettings, lease, plan_engine
from edgekv.errors import ModelError
from edgekv.model.hf_config import read_spec
from edgekv.smi.device import Place
from edgekv.smi.reader import Source

CPU = Place("cpu", "cpu", "CPU", 8 * GIB)


def configured(**sections: object) -> Config:
    return Config.model_validate(sections, context={"base": Path("/")})


def test_the_models_own_settings_go_over_the_general_ones() -> None:
    config = configured(
        kv={"dtype": "bfloat16", "budget": "25%", "block_size": 32, "prefix_cache": False},
        models={
            "m": {"path": "/m", "context": 1000, "kv": {"budget": "1GiB"}, "max_num_seqs": 4, "max_step_tokens": 64}
        },
    )
    settings = EngineSettings.from_config(config, config.models["m"], CPU)
    assert settings == EngineSettings(
        folder=Path("/m"), place=CPU, kv_dtype="bfloat16", kv_budget=GIB, context_tokens=1000, block_size=32,
        prefix_cache=False, max_sequences=4, max_step_tokens=64,
    )  # fmt: skip
    shared = configured(kv={"budget": "25%"}, models={"m": {"path": "/m", "dtype": "float32"}})
    settings = EngineSettings.from_config(shared, shared.models["m"], CPU)
    assert (settings.dtype, settings.kv_dtype, settings.kv_budget, settings.context_tokens) == (
        "float32",
        None,
        0.25,
        None,
    )


def test_a_context_beyond_the_models_own_is_refused() -> None:
    spec = read_spec(draft_path())
    plan_engine(EngineSettings(draft_path(), CPU, context_tokens=spec.max_position_embeddings), spec)
    with pytest.raises(ContextTooLong, match=r"A context of 4,097 tokens is more than the model's 4,096"):
        plan_engine(EngineSettings(draft_path(), CPU, context_tokens=4097), spec)


def test_every_part_of_the_plan_is_leased() -> None:
    _, memory = plan_engine(EngineSettings(draft_path(), CPU), read_spec(draft_path()))
    ledger = lease(memory)
    assert list(ledger.statement()) == ["runtime", "weights", "workspace", "kv.target"]
    assert ledger.budget_bytes == CPU.free_bytes - memory.headroom_bytes
    assert ledger.free_bytes == memory.free_bytes


@pytest.mark.parametrize(
    ("place", "budget", "error", "told"),
    [
        (CPU, 1024, NoRoomForKV, r"holds no block: one block of 16 tokens takes 16.00 KiB. Raise kv.budget"),
        (Place("cpu", "cpu", "CPU", 513 * MIB), None, NoRoomForKV, "leaves no room"),
        (CPU, 9 * GIB, KVBudgetTooLarge, "kv.budget: a KV pool of 9.00 GiB does not fit"),
    ],
)
def test_what_does_not_fit_is_refused(place: Place, budget: int | None, error: type[Exception], told: str) -> None:
    _, memory = plan_engine(EngineSettings(draft_path(), place, kv_budget=budget), read_spec(draft_path()))
    with pytest.raises(error, match=told):
        lease(memory)


def test_the_model_that_is_served(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    config = configured(models={"m": {"path": str(draft_path()), "aliases": ["a"], "device": "cpu"}})
    name, aliases, settings = served_model(config, None)
    assert (name, aliases, settings.folder, settings.place.kind) == ("m", ("a",), draft_path(), "cpu")
    name, aliases, settings = served_model(config, str(tmp_path / "mine"))
    assert (name, aliases, settings.folder) == ("mine", (), tmp_path / "mine")
    with pytest.raises(ModelError, match="no such folder"):
        served_model(config, str(tmp_path / "absent"))


def test_without_a_model_it_is_the_demo_with_its_draft() -> None:
    name, _, settings = served_model(Config(), None)
    assert (name, settings.folder) == ("demo", target_path())
    assert settings.draft == DraftSettings(draft_path())
    assert served_model(Config(), "demo")[::2] == ("demo", settings)
    assert served_model(Config(), str(target_path()))[2].draft is None
    config = configured(models={"m": {"path": str(target_path())}})
    assert served_model(config, None)[2].draft is None


def test_the_command_line_says_who_drafts() -> None:
    mine = DraftSettings(Path("/d"), tokens=3, kv_dtype="int8", kv_budget=GIB, min_acceptance=0.5)
    assert drafting("off", mine) is drafting("off", None) is None
    assert drafting("ngram", mine) == DraftSettings(None, tokens=3, min_acceptance=0.5)
    assert drafting("demo", mine) == replace(mine, folder=draft_path())
    assert drafting(str(target_path()), None) == DraftSettings(target_path())


def test_serve_builds_what_its_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[EngineSettings] = []

    def run(config: Config, name: str, aliases: tuple[str, ...], engine: EngineSettings) -> int:
        built.append(engine)
        return 0

    monkeypatch.setattr(running, "run", run)
    for options, folder in (
        ([], draft_path()), (["demo"], draft_path()), (["--draft", str(target_path())], target_path()),
    ):  # fmt: skip
        assert CliRunner().invoke(app, ["serve", *options]).exit_code == 0
        assert built.pop().draft == DraftSettings(folder)
    assert CliRunner().invoke(app, ["serve", "--draft", "off"]).exit_code == 0
    assert built.pop().draft is None
    assert CliRunner().invoke(app, ["serve", str(draft_path()), "--draft", "ngram"]).exit_code == 0
    assert built.pop().draft == DraftSettings(None)
    refused = CliRunner().invoke(app, ["serve", "--draft", "/nowhere"])
    assert (refused.exit_code, isinstance(refused.exception, ModelError), built) == (1, True, [])
    assert str(refused.exception).startswith("--draft /nowhere: no such folder; ")


def test_the_device_says_what_is_left_to_others() -> None:
    config = configured(
        devices={"memory": {"match": {"vendor": "cpu"}, "desktop_reserve": "1GiB", "vram_budget": "50%"}},
        models={"m": {"path": str(draft_path()), "device": "memory"}},
    )
    place = served_model(config, None)[2].place
    assert (place.reserve_bytes, place.most_bytes) == (GIB, place.total_bytes // 2)
    assert served_model(config, None, CPU)[2].place is CPU


class Told:
    """A source whose readings say that a given amount is free."""

    def __init__(self, free_bytes: int, hangs: threading.Event | None = None) -> None:
        self._free_bytes, self._hangs = free_bytes, hangs

    def read(self, at: float) -> Reading:
        if self._hangs is not None:
            self._hangs.wait(30)
        return Reading(16 * GIB, 16 * GIB - self._free_bytes, 0, "told", at)

    def close(self) -> None:
        pass

    @property
    def source(self) -> Source:
        return Source("told", lambda: self)


def server(*told: Told) -> _Server:
    engine = EngineSettings(draft_path(), CPU, kv_budget=MIB)
    return _Server(Config(), "draft", ("alias",), engine, tuple(each.source for each in told))


def test_an_engine_that_starts_again_is_planned_with_what_is_free_then() -> None:
    serves = server(Told(5 * GIB))
    _, first = serves._make_core(lambda done, total, stage: None)
    assert serves._assembly is not None
    assert serves._assembly.memory.total_bytes == 8 * GIB  # as it was planned before it was told to serve
    _, again = serves._make_core(lambda done, total, stage: None)
    memory = serves._assembly.memory
    assert (memory.total_bytes, memory.others_bytes) == (16 * GIB, 11 * GIB)
    assert (first.name, first.aliases, first.pool_tokens) == ("draft", ("alias",), again.pool_tokens)


async def test_the_server_is_told_of_the_guard_and_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {}

    async def run_server(**arguments: Any) -> Exit:
        await trio.lowlevel.checkpoint()
        told.update(arguments)
        return Exit(0)

    monkeypatch.setattr(running, "run_server", run_server)
    place = replace(CPU, title="a card", total_bytes=16 * GIB, reserve_bytes=GIB, most_bytes=3 * GIB)
    config = configured(priorities={"interactive": {"max_wait": "5s"}}, server={"max_queue": 7})
    sources = (Told(GIB).source,)
    await _Server(config, "m", (), EngineSettings(draft_path(), place), sources).serve()
    assert (told["sources"], told["device"], told["max_queue"]) == (sources, "a card", 7)
    assert told["max_wait_s"] == {0: 5.0, 10: 3600.0}
    policy = told["policy"]
    assert policy.headroom == Headroom.of(16 * GIB, GIB)
    # The most that may be leased holds, whatever is free.
    decision = policy.observe(Reading(16 * GIB, 0, 0, "told", 0.0), None, busy=False, now=0.0)
    assert decision.budget_bytes == 3 * GIB


def test_a_driver_that_hangs_does_not_hold_up_the_next_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "REFRESH_DEADLINE_S", 0.05)
    released = threading.Event()
    try:
        assert _measured_again(CPU, [Told(GIB, released).source]) == CPU
    finally:
        released.set()


def test_the_summary_says_where_every_byte_of_the_device_is() -> None:
    serves = server()
    serves._make_core(lambda done, total, stage: None)
    assert serves._assembly is not None
    shares = _shares(serves._assembly)
    assert [share.name for share in shares] == [
        "runtime", "weights", "workspace", "kv.target", "unused", "headroom", "others",
    ]  # fmt: skip
    assert sum(share.num_bytes for share in shares) == 8 * GIB


def test_the_summary_says_who_drafts() -> None:
    asked = EngineSettings(target_path(), CPU, draft=DraftSettings(draft_path(), tokens=1, kv_budget=MIB))
    told = _drafter(asked, plan_engine(asked, read_spec(target_path()))[1].draft)
    assert told == (
        "draft: LlamaForCausalLM, 0.6 M parameters, in float32; proposes up to 1 token for a sequence at once; "
        "its pool holds 1,024 tokens"
    )
    ngrams = replace(asked, draft=DraftSettings())
    told = _drafter(ngrams, plan_engine(ngrams, read_spec(target_path()))[1].draft)
    assert told == "n-grams propose up to 8 tokens for a sequence at once, as they followed earlier in its text"


def test_the_endpoint_gets_what_was_configured() -> None:
    config = configured(
        server={
            "host": "0.0.0.0", "port": 1, "max_body": "1MiB", "stall": "3s", "body_timeout": "4s", "keep_alive": "5s",
            "max_connections": 6, "allowed_hosts": ["box"], "allowed_origins": ["https://box"],
            "api_keys": [{"name": "n", "key": "a long secret", "priority": "batch"}],
        }
    )  # fmt: skip
    made = http_settings(config)
    assert (made.host, made.port, made.max_body_bytes, made.max_connections) == ("0.0.0.0", 1, MIB, 6)
    assert (made.stall_s, made.body_timeout_s, made.keep_alive_s) == (3, 4, 5)
    assert (made.allowed_hosts, made.allowed_origins) == (("box",), ("https://box",))
    [key] = made.api_keys
    assert (key.name, key.key, key.priority) == ("n", "a long secret", 10)


def test_waiting_threads_sleep_soon_unless_the_user_decided() -> None:
    for given, spins in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)):
        environ = dict(given)
        _spin_briefly(environ)
        assert environ.get("GOMP_SPINCOUNT") == spins
