"""Configuration files, the environment and the command line: what they mean and every fault at once."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

import edgekv
from edgekv.config.load import json_schema, load_config
from edgekv.config.settings import Config, Model
from edgekv.config.units import GIB, MIB, Share
from edgekv.engine.draft_settings import DraftSettings
from edgekv.engine.settings import EngineSettings
from edgekv.errors import ConfigError
from edgekv.kernels.cpu.library import VARIABLE
from edgekv.smi.device import Place

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return tmp_path / "config.yaml"


def load(file: Path, text: str, overrides: list[str] | None = None, environ: Mapping[str, str] | None = None) -> Config:
    file.write_text(text)
    return load_config(file, overrides or [], environ or {})


def faults(
    file: Path, text: str, overrides: list[str] | None = None, environ: Mapping[str, str] | None = None
) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(file, text, overrides, environ)
    return [fault.removeprefix(f"{file.parent}/") for fault in caught.value.faults]


def test_without_a_file_everything_has_its_default() -> None:
    config = load_config(None)
    assert (config.server.host, config.server.port, config.models) == ("127.0.0.1", 8181, {})
    assert config == Config()


def test_a_whole_file_is_understood(file: Path) -> None:
    config = load(
        file,
        """
version: 1
server:
  port: 9000
  api_keys: [{name: laptop, key: "${env:KEY}", priority: batch}]
  stall: 250ms
  max_body: 2MiB
devices: {big: {match: {vendor: nvidia, name: RTX}}}
kv: {budget: 40%, block_size: 32}
models:
  small:
    path: model
    aliases: [default]
    device: big
    context: 4096
    kv: {budget: 1.5GiB, dtype: bfloat16}
""",
        environ={"KEY": "a long secret"},
    )
    model = config.models["small"]
    assert model.path == file.parent / "model"
    assert (model.aliases, model.context, model.kv.budget) == (("default",), 4096, int(1.5 * GIB))
    assert (config.server.stall_s, config.server.max_body_bytes) == (0.25, 2 * MIB)
    assert config.kv.budget == Share(0.4)
    key = config.server.api_keys[0]
    assert (key.key.get_secret_value(), key.level) == ("a long secret", 10)
    assert "a long secret" not in repr(config)


def test_an_unknown_key_is_named_with_its_place_and_a_suggestion(file: Path) -> None:
    text = "version: 1\nserver:\n  host: localhost\n  port: 1\n  max_queue: 3\n  prot: 2\n"
    assert faults(file, text) == ["config.yaml:6:3: error: server.prot: unknown key 'prot'; did you mean 'port'?"]


def test_all_faults_come_at_once_in_the_order_of_the_file(file: Path) -> None:
    found = faults(
        file,
        """server:
  port: 1_000
  stall: 30
  stall: 40s
  api_keys:
    - {name: a, key: abc}
    - {name: b, key: "${env:NOPE}"}
kv: {prefix_cache: no, block_size: 010, dtype: fp9}
models:
  m:
    path: nowhere
    aliases: [m]
    device: xx
    draft: {path: z}
logging: {level: inf, prompts: true}
""",
    )
    assert found == [
        "config.yaml:2:9: error: server.port: expected a whole number, not '1_000'",
        "config.yaml:3:10: error: server.stall: expected a duration with its unit such as '5s' or '10m', not 30",
        "config.yaml:4:3: error: server.stall: duplicate key: first given on line 3",
        "config.yaml:6:22: error: server.api_keys[0].key: must have at least 8 characters",
        "config.yaml:7:22: error: server.api_keys[1].key: the environment variable NOPE is not set",
        "config.yaml:8:20: error: kv.prefix_cache: expected true or false, not 'no'",
        "config.yaml:8:36: error: kv.block_size: expected a power of two between 8 and 256, not 10",
        "config.yaml:8:48: error: kv.dtype: expected 'auto', 'float32', 'bfloat16', 'float16', 'fp8', 'int8' or "
        "'int4', not 'fp9'; did you mean 'fp8'?",
        f"config.yaml:11:11: error: models.m.path: {file.parent}/nowhere: no such folder; "
        "a model is a folder in Hugging Face's layout or a .gguf file",
        "config.yaml:12:15: error: models.m.aliases[0]: 'm' is a model's name",
        "config.yaml:13:13: error: models.m.device: no device 'xx': name one of auto, cpu",
        f"config.yaml:14:19: error: models.m.draft.path: {file.parent}/z: no such folder; "
        "a model is a folder in Hugging Face's layout or a .gguf file",
        "config.yaml:15:18: error: logging.level: expected 'debug', 'info', 'warning' or 'error', not 'inf'; "
        "did you mean 'info'?",
        "config.yaml:15:23: error: logging.prompts: not available yet in this version",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("server: {host: 0.0.0.0}", "1:16: error: server.host: 0.0.0.0 can be reached from other machines"),
        ("server: {host: 192.168.1.5}", "1:16: error: server.host: 192.168.1.5 can be reached"),
        ("server: 5", "1:9: error: server: expected 'name: value' pairs, not 5"),
        ("server:", "1:8: error: server: expected 'name: value' pairs, not nothing"),
        ("server: {api_keys: x}", "1:20: error: server.api_keys: expected a list, not 'x'"),
        ("server: {api_keys: [{name: a}]}", "1:21: error: server.api_keys[0].key: required, but not given"),
        (
            "server: {api_keys: [{name: a, key: 12345678x}, {name: a, key: 12345678x}]}",
            "1:55: error: server.api_keys[1].name: 'a' is the name of an earlier key",
        ),
        ("server: {max_body: 8}", "1:20: error: server.max_body: expected a size with its unit"),
        ("server: {stall: 0s}", "1:17: error: server.stall: expected a duration of at least 1ms, not '0s'"),
        ("server: {body_timeout: 0ms}", "1:24: error: server.body_timeout: expected a duration of at least 1ms"),
        ("server: {stall: 60d}", "1:17: error: server.stall: expected a duration of at most 24h, not '60d'"),
        ("server: {grace: 25h}", "1:17: error: server.grace: expected a duration of at most 24h, not '25h'"),
        ("server: {port: 70000}", "1:16: error: server.port: must be at most 65535, not 70000"),
        ("models: {m: {}}", "1:10: error: models.m.path: required, but not given"),
        ("models: {m: {path: .}}", "1:20: error: models.m.path: "),
        ("models: {m: {path: model, context: -1}}", "1:36: error: models.m.context: expected a number of tokens"),
        ("models: {m: {path: model, weights: int3}}", "1:36: error: models.m.weights: expected 'auto', 'int8'"),
        ("models: {m: {path: model, dtype: int8}}", "1:34: error: models.m.dtype: expected 'auto', 'float32', "),
        ("models: {m: {path: model, draft: {}}}", "1:34: error: models.m.draft: which model drafts? Give its 'path'"),
        ("models: {m: {path: model, draft: 5}}", "1:34: error: models.m.draft: expected 'off', 'ngram' or 'name: "),
        (
            "models: {m: {path: model, draft: {path: model, token: 3}}}",
            "1:48: error: models.m.draft.token: unknown key 'token'; did you mean 'tokens'?",
        ),
        (
            "models: {m: {path: model, draft: {method: ngrams}}}",
            "1:43: error: models.m.draft.method: expected 'model', 'ngram' or 'off', not 'ngrams'; did you mean 'ngram",
        ),
        (
            "models: {m: {path: model, draft: {path: model, tokens: 17}}}",
            "1:56: error: models.m.draft.tokens: must be at most 16, not 17",
        ),
        (
            "models: {m: {path: model, draft: {path: model, tokens: 0}}}",
            "1:56: error: models.m.draft.tokens: must be at least 1, not 0",
        ),
        (
            "models: {m: {path: model, draft: {path: model, min_acceptance: 1.5}}}",
            "1:64: error: models.m.draft.min_acceptance: must be at most 1.0, not 1.5",
        ),
        (
            "models: {m: {path: model, draft: {path: model, kv: {dtype: int9}}}}",
            "1:60: error: models.m.draft.kv.dtype: expected 'auto', 'float32', 'bfloat16', ",
        ),
        (
            "models: {m: {path: model, draft: {path: 5}}}",
            "1:41: error: models.m.draft.path: expected the path of a file or folder, not 5",
        ),
        (
            "models: {m: {path: model, draft: {path: .}}}",
            "1:41: error: models.m.draft.path: ",
        ),
        ("models: {m: {path: model, load: on-demand}}", "1:33: error: models.m.load: 'on-demand' is not available yet"),
        ("models: {m: {path: model}, n: {path: model}}", "1:31: error: models.n: a second model is not available yet"),
        ("priorities: {batch: {weight: 0}}", "1:30: error: priorities.batch.weight: must be at least 1, not 0"),
        ("priorities: {batch: {max_wait: 0s}}", "1:32: error: priorities.batch.max_wait: expected a duration of at"),
        ("priorities: {urgent: {max_wait: 1s}}", "1:14: error: priorities.urgent: unknown key 'urgent'"),
        (
            "devices: {d: {match: {vendor: amd}, vram_budget: 9}}",
            "1:50: error: devices.d.vram_budget: expected a size such as '16GiB' or a share such as '90%', not 9",
        ),
        (
            "devices: {d: {match: {vendor: amd}, desktop_reserve: 9%}}",
            "1:54: error: devices.d.desktop_reserve: expected a size with its unit",
        ),
        ("devices: {d: {match: {vendor: amd}, vram_bugdet: 9%}}", "1:37: error: devices.d.vram_bugdet: unknown key"),
        ("devices: {cpu: {match: {vendor: cpu}}}", "1:16: error: devices.cpu: 'cpu' has a meaning of its own"),
        ("kv: {spill: always}", "1:13: error: kv.spill: expected 'never', not 'always'"),
        ("kv: {budget: 200%}", "1:14: error: kv.budget: expected a percentage between 0% and 100%"),
        ("version: 2", "1:10: error: version: expected 1, not 2"),
        ("kv: {budget: '${home}'}", "1:14: error: kv.budget: '${home}' is not understood"),
    ],
)
def test_each_fault_says_what_to_do(file: Path, text: str, fault: str) -> None:
    found = faults(file, text)
    assert any(line.startswith(f"config.yaml:{fault}") for line in found), found


PINNED = "kv: {{prefix_cache: {cache}}}\nmodels: {{m: {{path: model, pinned_prompts: [{prompts}]}}}}"


def test_pinned_prompts_come_from_files_or_texts(file: Path) -> None:
    (file.parent / "house.txt").write_text("Be brief, naïve one.", encoding="utf-8-sig")  # as Windows' editors do
    prompts = (
        "{name: a, file: house.txt}, {name: b, text: Hello, role: user, ttl: 1h, priority: 3}, "
        "{name: c, raw: true, text: x}"
    )
    [a, b, c] = load(file, PINNED.format(cache="true", prompts=prompts)).models["m"].pinned_prompts
    assert (a.content(), a.role, a.raw, a.ttl_s, a.priority) == ("Be brief, naïve one.", "system", False, "never", 0)
    assert (b.content(), b.role, b.ttl_s, b.priority) == ("Hello", "user", 3600.0, 3)
    assert (c.content(), c.raw) == ("x", True)


@pytest.mark.parametrize(
    ("prompts", "fault"),
    [
        ("{name: a}", "[0]: give either 'file' or 'text'"),
        ("{name: a, text: x, file: full}", "[0]: give either 'file' or 'text', not both"),
        ("{name: a, text: x}, {name: a, text: y}", "[1].name: 'a' is the name of an earlier pinned prompt"),
        ("{name: a, text: x, raw: true, role: user}", "[0].role: a raw prompt is nobody's message"),
        ("{name: a, text: ''}", "[0].text: must not be empty"),
        ("{name: a, text: x, role: assistant}", "[0].role: expected 'system' or 'user', not 'assistant'"),
        ("{name: a, text: x, ttl: 1}", "[0].ttl: expected a duration with its unit"),
        ("{name: a, text: x, tll: 1h}", "[0].tll: unknown key 'tll'; did you mean 'ttl'?"),
        ("{name: a, file: none}", "[0].file: {folder}/none: no such file"),
        ("{name: a, file: model}", "[0].file: {folder}/model: not a file"),
        ("{name: a, file: empty}", "[0].file: {folder}/empty: empty"),
        ("{name: a, file: blank}", "[0].file: {folder}/blank: empty"),
        ("{name: a, file: latin}", "[0].file: {folder}/latin: not UTF-8 text"),
        ("{name: a, file: huge}", "[0].file: {folder}/huge: larger than 1 MiB, which no context holds"),
    ],
)
def test_what_is_wrong_with_a_pinned_prompt_is_said_before_anything_loads(file: Path, prompts: str, fault: str) -> None:
    for name, content in (
        ("full", b"x"),
        ("empty", b""),
        ("blank", b"\n "),
        ("latin", b"\xff"),
        ("huge", b"x" * (MIB + 1)),
    ):
        (file.parent / name).write_bytes(content)
    [found] = faults(file, PINNED.format(cache="true", prompts=prompts))
    assert f"error: models.m.pinned_prompts{fault.format(folder=file.parent)}" in found


def test_pinned_prompts_need_the_prefix_cache(file: Path) -> None:
    [found] = faults(file, PINNED.format(cache="false", prompts="{name: a, text: x}"))
    assert found.endswith("models.m.pinned_prompts: they live in the prefix cache, and kv.prefix_cache is off")


def test_a_device_says_what_it_leaves_to_others_and_what_edgekv_may_have(file: Path) -> None:
    text = "devices: {{a: {{match: {{vendor: amd}}, desktop_reserve: 768MiB, vram_budget: {}}}}}"
    device = load(file, text.format("94%")).devices["a"]
    assert (device.desktop_reserve_bytes, device.vram_budget) == (768 * MIB, Share(0.94))
    assert load(file, text.format("20GiB")).devices["a"].vram_budget == 20 * GIB
    found = load(
        file, text.format("94%"), ["devices.a.vram_budget=4GiB"], {"EDGEKV_DEVICES__A__DESKTOP_RESERVE": "1GiB"}
    )
    assert (found.devices["a"].vram_budget, found.devices["a"].desktop_reserve_bytes) == (4 * GIB, GIB)


def test_weights_and_keys_can_be_quantised(file: Path) -> None:
    config = load(file, "kv: {dtype: int8}\nmodels: {m: {path: model, weights: int4}}")
    place = Place("cpu", "cpu", "CPU", 1 << 30)
    settings = EngineSettings.from_config(config, config.models["m"], place)
    assert (settings.weight_format, settings.kv_dtype, settings.dtype) == ("int4", "int8", None)
    config = load(file, "models: {m: {path: model, kv: {dtype: int8}}}")
    assert EngineSettings.from_config(config, config.models["m"], place).kv_dtype == "int8"
    assert config.models["m"].weights == "auto"


def drafted(file: Path, text: str, *settings: str) -> DraftSettings | None:
    config = load(file, f"models: {{m: {{path: model{text}}}}}", list(settings))
    return EngineSettings.from_config(config, config.models["m"], Place("cpu", "cpu", "CPU", GIB)).draft


def test_nobody_drafts_unless_that_is_asked_for(file: Path) -> None:
    assert drafted(file, "") is drafted(file, ", draft: null") is None
    assert drafted(file, ", draft: {path: model}", "models.m.draft=null") is None


def test_a_model_or_n_grams_draft(file: Path) -> None:
    folder = file.parent / "model"
    assert drafted(file, ", draft: {path: model}") == DraftSettings(folder, tokens=8, min_acceptance=0.0)
    assert drafted(
        file, ", draft: {path: model, tokens: 4, min_acceptance: 0.3, kv: {dtype: int8, budget: 1GiB}}"
    ) == DraftSettings(folder, tokens=4, kv_dtype="int8", kv_budget=GIB, min_acceptance=0.3)
    whole = drafted(file, ", draft: {path: model, min_acceptance: 1, kv: {budget: 5%}}")
    assert whole == DraftSettings(folder, kv_budget=0.05, min_acceptance=1.0)
    assert drafted(file, ", draft: {method: ngram, tokens: 16}") == DraftSettings(tokens=16)


def test_a_draft_is_set_from_outside_too(file: Path) -> None:
    environ = {"EDGEKV_MODELS__M__DRAFT__TOKENS": "3", "EDGEKV_MODELS__M__DRAFT__TOKEN": "3"}
    told: list[str] = []
    file.write_text("models: {m: {path: model}}")
    config = load_config(file, ["models.m.draft.method=ngram"], environ, warn=told.append)
    draft = config.models["m"].draft
    assert draft is not None
    assert (draft.method, draft.tokens) == ("ngram", 3)
    [only] = told
    assert "EDGEKV_MODELS__M__DRAFT__TOKEN matches no setting" in only


def test_what_n_grams_do_not_need_is_told_where_it_stands(file: Path) -> None:
    text = "models:\n  m:\n    path: model\n    draft:\n      method: ngram\n      path: nowhere\n      kv: {}\n"
    path, kv = faults(file, text)
    needless = "n-grams need no model and no memory for one: leave it out, or set 'method: model'"
    assert path == f"config.yaml:6:13: error: models.m.draft.path: {needless}"
    assert kv == f"config.yaml:7:11: error: models.m.draft.kv: {needless}"
    # What is wrong is not called missing, nor judged by what it might have been.
    [only] = faults(file, "models: {m: {path: model, draft: {method: grams, path: 5x, kv: {}}}}")
    assert "models.m.draft.method" in only
    [only] = faults(file, "models: {m: {path: model, draft: {path: 5}}}")
    assert "models.m.draft.path: expected" in only


def test_formats_of_cards_are_settings_like_others(file: Path) -> None:
    for dtype in ("fp8", "int4"):
        assert load(file, f"kv: {{dtype: {dtype}}}").kv.dtype == dtype
        model = load(file, f"models: {{m: {{path: model, kv: {{dtype: {dtype}}}}}}}").models["m"]
        assert model.kv.dtype == dtype


def test_each_priority_has_its_own_patience(file: Path) -> None:
    assert Config().priorities.max_wait_s == {0: 600.0, 10: 3600.0}
    assert load(file, "priorities: {interactive: {max_wait: 5s}}").priorities.max_wait_s == {0: 5.0, 10: 3600.0}


def test_each_priority_has_its_own_weight_and_the_engine_is_told(file: Path) -> None:
    config = load(file, "priorities: {batch: {weight: 3}}")
    assert config.priorities.weights == {0: 10, 10: 3}
    model = Model.model_construct(path=file.parent)
    assert EngineSettings.from_config(config, model, Place("cpu", "cpu", "CPU", GIB)).weights == {0: 10, 10: 3}
    assert EngineSettings(file.parent, Place("cpu", "cpu", "CPU", GIB)).weights == Config().priorities.weights


def test_a_secret_is_never_repeated(file: Path) -> None:
    for key in ("123456789012", "[123456789012]", "{a: 123456789012}"):
        for fault in faults(file, f"server: {{api_keys: [{{name: a, key: {key}}}]}}"):
            assert "123456789012" not in fault


def test_the_command_line_overrides_the_environment_overrides_the_file(file: Path) -> None:
    text = "server: {port: 1, max_queue: 1, max_connections: 1}"
    environ = {"EDGEKV_SERVER__PORT": "2", "EDGEKV_SERVER__MAX_QUEUE": "2"}
    server = load(file, text, ["server.port=3"], environ).server
    assert (server.port, server.max_queue, server.max_connections) == (3, 2, 1)


def test_overrides_reach_into_models_by_any_spelling_of_their_names(file: Path) -> None:
    text = "models: {Qwen2.5-Small: {path: model}}"
    by_setting = load(file, text, ['models."Qwen2.5-Small".context=99', "kv.budget=50%"])
    assert (by_setting.models["Qwen2.5-Small"].context, by_setting.kv.budget) == (99, Share(0.5))
    by_variable = load(file, text, environ={"EDGEKV_MODELS__QWEN2_5_SMALL__ALIASES": "[a, b]"})
    assert by_variable.models["Qwen2.5-Small"].aliases == ("a", "b")


def test_a_faulty_override_is_named_as_it_was_given(file: Path) -> None:
    found = faults(file, "", ["server.port=x y", "nonsense"], {"EDGEKV_SERVER__MAX_QUEUE": "x"})
    assert "--set server.port: error: server.port: expected a whole number, not 'x y'" in found
    assert "--set nonsense: error: expected path=value, as in server.port=9000" in found
    assert "EDGEKV_SERVER__MAX_QUEUE: error: server.max_queue: expected a whole number, not 'x'" in found


def test_a_variable_that_matches_nothing_is_a_warning(file: Path) -> None:
    heard: list[str] = []
    file.write_text('server: {api_keys: [{name: a, key: "${env:EDGEKV_KEY}"}]}')
    environ = {"EDGEKV_SERVER__PROT": "1", "EDGEKV_KEY": "a long secret", "HOME": "/"}
    load_config(file, [], environ, warn=heard.append)
    assert len(heard) == 1
    assert "EDGEKV_SERVER__PROT" in heard[0]
    assert "did you mean EDGEKV_SERVER__PORT?" in heard[0]


def test_variables_that_others_read_are_no_mistakes(file: Path) -> None:
    heard: list[str] = []
    load_config(None, [], {VARIABLE: "off", "EDGEKV_KEY": "a long secret"}, warn=heard.append)
    assert heard == []


def test_who_knows_more_finds_faults_in_what_is_sound(file: Path) -> None:
    def further(config: Config) -> list[tuple[tuple[str, ...], str]]:
        return [(("kv", "dtype"), f"{config.kv.dtype} is not for {name}") for name in config.models]

    text = "models:\n  m: {path: model}\nkv:\n  dtype: int8\n"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(file, further=further)
    assert caught.value.faults == [f"{file}:4:10: error: kv.dtype: int8 is not for m"]
    with pytest.raises(ConfigError, match=r"--set kv\.dtype: error: kv\.dtype: int8 is not for m"):
        load_config(file, ["kv.dtype=int8"], further=further)
    file.write_text(text + "server: {port: x}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file, further=further)
    assert len(caught.value.faults) == 1, "of what is not sound, nothing more is asked"


def test_an_unquoted_reference_is_read_as_yaml_and_a_quoted_one_is_text(file: Path) -> None:
    environ = {"PORT": "77", "NAME": "12"}
    assert load(file, "server:\n  port: ${env:PORT}\n", environ=environ).server.port == 77
    assert "server.port: expected a whole number" in faults(file, 'server: {port: "${env:PORT}"}', environ=environ)[0]
    hosts = load(file, 'server: {allowed_hosts: ["box-${env:NAME}"]}', environ=environ).server.allowed_hosts
    assert hosts == ("box-12",)


def test_what_is_no_text_or_not_there_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"a: 1\nb: \xff\n")
    for name, fault in (
        ("latin", "latin:2:1: error: not UTF-8 text"),
        ("none", "none: error: cannot be read: No such"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(tmp_path / name)
        assert fault in str(caught.value)


def test_the_configuration_in_the_repository_is_valid_and_lists_every_default(file: Path) -> None:
    shipped = REPOSITORY / "config.yaml"
    assert load_config(shipped) == Config()
    text = shipped.read_text()
    for section in (Config, *(info.annotation for info in Config.model_fields.values())):
        for name, info in getattr(section, "model_fields", {}).items():
            assert f"{info.alias or name}:" in text, f"config.yaml does not mention {name}"


def test_the_shipped_schema_is_current() -> None:
    shipped = json.loads((Path(edgekv.__file__).parent / "config" / "schema.json").read_text())
    assert shipped == json_schema(), "run: make schema"


def test_checking_takes_no_time_worth_speaking_of(file: Path) -> None:
    started = time.perf_counter()
    for _ in range(5):
        load(file, (REPOSITORY / "config.yaml").read_text())
    assert (time.perf_counter() - started) / 5 < 0.2


def test_a_model_may_be_a_gguf_file(file: Path) -> None:
    def found(path: str) -> list[str]:
        return faults(file, f"models: {{m: {{path: {path}}}}}")

    (file.parent / "a.gguf").write_bytes(b"GGUF and so on")
    (file.parent / "b.gguf").write_bytes(b"PK and so on")
    file.write_text("models: {m: {path: a.gguf}}")
    assert load_config(file).models["m"].path == file.parent / "a.gguf"
    assert found("b.gguf") == [
        f"config.yaml:1:20: error: models.m.path: {file.parent}/b.gguf: not a GGUF file; "
        "a model is a folder in Hugging Face's layout or a .gguf file"
    ]
    assert "c.gguf: cannot be read: No such file" in found("c.gguf")[0]
    assert "holds several GGUF files, name one: a.gguf, b.gguf" in found(".")[0]
    (file.parent / "b.gguf").unlink()
    file.write_text("models: {m: {path: .}}")
    assert load_config(file).models["m"].path == file.parent
    (file.parent / "a.gguf").unlink()
    assert "neither config.json nor a .gguf file in it" in found(".")[0]
