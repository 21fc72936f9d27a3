"""What an engine is built from: the configuration's choices, and what is refused before anything is loaded."""

from pathlib import Path

import pytest

from edgekv.cli.running import _spin_briefly, http_settings
from edgekv.cli.serve import served_model
from edgekv.config.settings import Config
from edgekv.core.capacity import GIB, MIB
from edgekv.demo import draft_path, target_path
from edgekv.engine.settings import ContextTooLong, EngineSettings, NoRoomForKV, lease, plan_engine
from edgekv.errors import ModelError, OverBudget
from edgekv.model.hf_config import read_spec
from edgekv.smi.device import Place

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
    assert settings == EngineSettings(Path("/m"), CPU, None, "bfloat16", GIB, 1000, 32, False, 4, 64)
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
    assert list(ledger.statement()) == ["weights", "workspace", "kv.target"]
    assert ledger.budget_bytes == CPU.free_bytes - memory.headroom_bytes
    assert ledger.free_bytes == memory.free_bytes


@pytest.mark.parametrize(
    ("place", "budget", "error", "told"),
    [
        (CPU, 1024, NoRoomForKV, r"holds no block: one block of 16 tokens takes [\d,]+ bytes. Raise kv.budget"),
        (Place("cpu", "cpu", "CPU", 513 * MIB), None, NoRoomForKV, "leaves no room"),
        (CPU, 9 * GIB, OverBudget, "kv.target: 9,663,"),
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


def test_without_a_model_it_is_the_demo() -> None:
    name, _, settings = served_model(Config(), None)
    assert (name, settings.folder) == ("demo", target_path())
    assert served_model(Config(), "demo")[0] == "demo"


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
