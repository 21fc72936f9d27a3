"""What a configuration may say, with every default. Runs in: anywhere; owns: nothing (frozen data).

Names in the file carry their unit in the value (`stall: 30s`), names in code carry it themselves (`stall_s`).
"""

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationInfo, WithJsonSchema

from edgekv.config.draft_forms import add_short_forms, written_out
from edgekv.config.units import MIB, Share, parse_duration, parse_share, parse_size, parse_size_or_share
from edgekv.demo import DEMO, draft_path, target_path


def _expand_path(value: object, info: ValidationInfo) -> object:
    if not isinstance(value, str) or not value:
        raise ValueError(f"expected the path of a file or folder, not {value!r}")
    base = (info.context or {}).get("base", Path.cwd())
    return Path(base, Path(value).expanduser())


def _model_path(value: object, info: ValidationInfo) -> object:
    return target_path() if value == DEMO else _expand_path(value, info)


def _draft_path(value: object, info: ValidationInfo) -> object:
    return draft_path() if value == DEMO else _expand_path(value, info)


def _acceptance(value: object) -> object:
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            near = f"; did you mean {parse_share(value).fraction:g}?"
        except ValueError:
            near = ""
        raise ValueError(f"expected a number from 0 to 1, not {value!r}{near}")
    if type(value) in (int, float) and value > 1:  # type: ignore[operator]
        raise ValueError(f"must be at most 1.0, not {value}: it is a share, 0.5 for one in two")
    return value


def _budget(value: object) -> object:
    return value if value == "auto" else parse_size_or_share(value)


def _ttl(value: object) -> object:
    return value if value == "never" else _timeout(value)


def _time(value: object) -> float:
    seconds = parse_duration(value)
    if seconds > 86_400:
        raise ValueError(f"expected a duration of at most 24h, not {value!r}")
    return seconds


def _timeout(value: object) -> float:
    seconds = _time(value)
    if seconds < 0.001:
        raise ValueError(f"expected a duration of at least 1ms, not {value!r}")
    return seconds


def _context(value: object) -> object:
    if value == "auto" or (type(value) is int and 1 <= value <= 1 << 24):
        return value
    raise ValueError(f"expected a number of tokens or 'auto', not {value!r}")


def _block_size(value: object) -> object:
    if type(value) is int and 8 <= value <= 256 and value & (value - 1) == 0:
        return value
    raise ValueError(f"expected a power of two between 8 and 256, not {value!r}")


def _text_schema(description: str, pattern: str, **extra: Any) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": pattern, "description": description, **extra})


_SIZE = r"^[0-9]+(\.[0-9]+)?\s*([KMGTkmgt]i?)?[Bb]$"
Bytes = Annotated[int, BeforeValidator(parse_size), _text_schema("a size such as 768MiB", _SIZE)]
Budget = Annotated[
    Literal["auto"] | int | Share,
    BeforeValidator(_budget),
    _text_schema("auto, a size such as 4GiB, or a share of the memory such as 40%", rf"^auto$|%$|{_SIZE}"),
]
_DURATION = _text_schema("a duration such as 30s", r"^[0-9]+(\.[0-9]+)?\s*(ms|[smhd])$")
SizeOrShare = Annotated[
    int | Share,
    BeforeValidator(parse_size_or_share),
    _text_schema("a size such as 20GiB, or a share of the device's memory such as 94%", rf"%$|{_SIZE}"),
]
Seconds = Annotated[float, BeforeValidator(_time), _DURATION]
Ttl = Annotated[
    Literal["never"] | float,
    BeforeValidator(_ttl),
    _text_schema("never, or a duration such as 1h", r"^never$|^[0-9]+(\.[0-9]+)?\s*(ms|[smhd])$"),
]
Timeout = Annotated[float, BeforeValidator(_timeout), _DURATION]  # 0 would cut everybody off
FilePath = Annotated[Path, BeforeValidator(_expand_path), WithJsonSchema({"type": "string"})]
ModelPath = Annotated[Path, BeforeValidator(_model_path), WithJsonSchema({"type": "string"})]
DraftPath = Annotated[Path, BeforeValidator(_draft_path), WithJsonSchema({"type": "string"})]
ContextTokens = Annotated[
    Literal["auto"] | int,
    BeforeValidator(_context),
    WithJsonSchema({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1, "maximum": 1 << 24}]}),
]
BlockSize = Annotated[
    int, BeforeValidator(_block_size), WithJsonSchema({"enum": [8, 16, 32, 64, 128, 256], "type": "integer"})
]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KVDtype = Literal["auto", "float32", "bfloat16", "float16", "fp8", "int8", "int4"]
PriorityName = Literal["interactive", "batch"]

PRIORITY_LEVELS: dict[PriorityName, int] = {"interactive": 0, "batch": 10}
MAX_PROPOSED = 16
MAX_PINNED = 64
MAX_PINNED_BYTES = 1 * MIB


class Section(BaseModel):
    """Base of every part of the configuration: unknown keys are errors, values are never converted silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=False, validate_by_name=False)


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, which may be left out; None for a field that is none."""
    for part in (annotation, *get_args(annotation)) if isinstance(annotation, UnionType) else (annotation,):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


class ApiKey(Section):
    """One key that clients may present as a bearer token."""

    name: str = Field(min_length=1, max_length=64, description="what logs and metrics call its holder")
    key: SecretStr = Field(min_length=8, description="the secret; ${env:NAME} keeps it out of the file")
    priority: PriorityName = Field("interactive", description="who goes first when memory is short")

    @property
    def level(self) -> int:
        """The priority as the scheduler counts it: lower runs first."""
        return PRIORITY_LEVELS[self.priority]


class Server(Section):
    """The listening side."""

    host: str = Field("127.0.0.1", min_length=1, description="beyond loopback api_keys are required")
    port: int = Field(8181, ge=0, le=65535, description="0 takes any free port")
    api_keys: tuple[ApiKey, ...] = Field((), strict=False, description="none: every local client may come in")
    max_queue: int = Field(64, ge=0, le=100_000, description="requests waiting for memory; past it 429")
    max_connections: int = Field(512, ge=1, le=65536, description="open connections; past it new ones are closed")
    max_body_bytes: Bytes = Field(8 * MIB, alias="max_body", description="largest request body; past it 413")
    body_timeout_s: Timeout = Field(30.0, alias="body_timeout", description="how long a body may take to arrive")
    stall_s: Timeout = Field(30.0, alias="stall", description="a client that reads nothing for this long is cut off")
    keep_alive_s: Seconds = Field(75.0, alias="keep_alive", description="how long an idle connection stays open")
    grace_s: Seconds = Field(10.0, alias="grace", description="how long running requests get when the server stops")
    allowed_hosts: tuple[str, ...] = Field((), strict=False, description="accepted Host names beside loopback's")
    allowed_origins: tuple[str, ...] = Field((), strict=False, description="web origins whose pages may call")


class DeviceMatch(Section):
    """Which card is meant; every given field has to fit."""

    vendor: Literal["cpu", "nvidia", "amd"]
    name: str | None = Field(None, min_length=1, description="part of the card's name")
    index: int | None = Field(None, ge=0, le=64, description="its number among those that fit")


class Device(Section):
    """A card (or the CPU) under a name of its own."""

    match: DeviceMatch
    desktop_reserve_bytes: Bytes | None = Field(
        None, alias="desktop_reserve", description="what is left free for other programs; by default 512MiB or 6%"
    )
    vram_budget: SizeOrShare | None = Field(None, description="the most that edgekv may have of it in all")


class KVDefaults(Section):
    """The KV cache of every model, unless the model says otherwise."""

    dtype: KVDtype = Field(
        "auto", description="auto: what the model computes in; int8: on our own kernels; fp8, int4: on a card's"
    )
    block_size: BlockSize = Field(16, description="tokens in one block")
    budget: Budget = Field("auto", description="memory of the KV pool")
    prefix_cache: bool = Field(True, description="keep computed prefixes for later requests")
    on_full: Literal["queue"] = Field("queue", description="a request that fits later waits")
    spill: Literal["never"] = Field("never", description="there is no other value")


class ModelKV(Section):
    """The KV cache of one model; what is left out comes from the top-level `kv`."""

    dtype: KVDtype | None = None
    budget: Budget | None = None


class DraftKV(Section):
    """The KV cache of a draft model, which is a pool of its own."""

    dtype: KVDtype = Field("auto", description="auto: what the draft computes in")
    budget: Budget = Field("auto", description="memory of the draft's KV pool")


class ModelDraft(Section):
    """Who proposes tokens that the model then verifies several at a time; outputs stay what they are without."""

    method: Literal["model", "ngram", "off"] = Field(
        "model",
        description="model: a smaller model with the same tokenizer; ngram: what followed in the text before; "
        "off: nobody, whatever else stands here",
    )
    path: DraftPath | None = Field(
        None, description="the draft model: a folder in Hugging Face's layout, a .gguf file, or demo: the bundled one"
    )
    tokens: int = Field(
        8, ge=1, le=MAX_PROPOSED, description="the most proposed for a sequence at once; how many pay is measured"
    )
    kv: DraftKV = Field(default_factory=DraftKV)
    min_acceptance: Annotated[float, BeforeValidator(_acceptance)] = Field(
        0.0, ge=0, le=1, description="where the first token proposed is right less often, none are, whatever they save"
    )


class PinnedPrompt(Section):
    """The beginning of many prompts, computed when the model loads and never evicted while it lives."""

    name: str = Field(min_length=1, max_length=64, description="what the log and the ledger call it")
    file: FilePath | None = Field(None, description="a UTF-8 text file that holds it")
    text: str | None = Field(None, min_length=1, description="the text itself, instead of a file")
    role: Literal["system", "user"] = Field("system", description="whose message it is")
    raw: bool = Field(False, description="take it as it is, for /v1/completions: no chat template around it")
    ttl_s: Ttl = Field("never", alias="ttl", description="how long it stays pinned after its last use")
    priority: int = Field(0, ge=-100, le=100, description="once its ttl is over, lower is evicted first")

    def content(self) -> str:
        """The text, read from its file where it has one. Raises OSError, and ValueError for what is not UTF-8."""
        # No client sends the mark that Windows' editors begin a file with.
        return self.file.read_text(encoding="utf-8-sig") if self.file is not None else self.text or ""


class Model(Section):
    """One model and how to serve it."""

    path: ModelPath = Field(
        description="a folder in Hugging Face's layout, a .gguf file, or demo: the bundled model"
    )
    aliases: tuple[str, ...] = Field((), strict=False, description="other names clients may ask for")
    device: str = Field("auto", min_length=1, description="auto, cpu, or a name from devices")
    context: ContextTokens = Field("auto", description="longest prompt plus answer in tokens; auto: the model's own")
    dtype: Dtype = Field("auto", description="what weights that are not quantised are computed in")
    weights: Literal["auto", "int8", "int4"] = Field(
        "auto", description="auto: as the checkpoint has them; int8, int4: quantised as they are loaded, on the CPU"
    )
    kv: ModelKV = Field(default_factory=ModelKV)
    draft: Annotated[ModelDraft | None, BeforeValidator(written_out)] = Field(
        None,
        description="who proposes tokens for it to verify; none: nobody. off and ngram are short for their method",
        json_schema_extra=add_short_forms,
    )
    max_num_seqs: int = Field(16, ge=1, le=1024, description="sequences in one step")
    max_step_tokens: int = Field(512, ge=16, le=32768, description="tokens in one step; longer prompts come in chunks")
    pinned_prompts: tuple[PinnedPrompt, ...] = Field(
        (), strict=False, max_length=MAX_PINNED, description="prompt beginnings that are always in the cache"
    )
    load: Literal["startup"] = "startup"
    ttl: Literal["never"] = "never"


_MAX_WAIT = "a request that has not begun by then gets 429"
_WEIGHT = "its share of the starts while both kinds wait"


# The wait is counted until a request's first step, so not for answers that are merely slow. Peers wait without limit: a
# queue on a laptop's processor, with long prompts in it, may well take minutes and is worth waiting for. Hence as long
# as OpenAI's clients wait by default (10 minutes): whoever is refused after that would have hung up anyway.
class Interactive(Section):
    """Requests that a person waits for."""

    weight: int = Field(10, ge=1, le=1000, description=_WEIGHT)
    max_wait_s: Timeout = Field(600.0, alias="max_wait", description=_MAX_WAIT)


class Batch(Section):
    """Requests that nobody waits for."""

    weight: int = Field(1, ge=1, le=1000, description=_WEIGHT)
    max_wait_s: Timeout = Field(3600.0, alias="max_wait", description=_MAX_WAIT)


class Priorities(Section):
    """What `priority: interactive` and `priority: batch` of an API key mean."""

    interactive: Interactive = Field(default_factory=Interactive)
    batch: Batch = Field(default_factory=Batch)

    @property
    def weights(self) -> dict[int, int]:
        """Weight by level (see PRIORITY_LEVELS)."""
        weights = {"interactive": self.interactive.weight, "batch": self.batch.weight}
        return {level: weights[name] for name, level in PRIORITY_LEVELS.items()}

    @property
    def max_wait_s(self) -> dict[int, float]:
        """Seconds by level (see PRIORITY_LEVELS)."""
        waits = {"interactive": self.interactive.max_wait_s, "batch": self.batch.max_wait_s}
        return {level: waits[name] for name, level in PRIORITY_LEVELS.items()}


class Logging(Section):
    """What the server writes about itself, to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "text", "json"] = Field("auto", description="auto: text on a terminal, else json")


class Config(Section):
    """A whole configuration."""

    version: Literal[1] = 1
    server: Server = Field(default_factory=Server)
    devices: dict[str, Device] = Field(default_factory=dict)
    kv: KVDefaults = Field(default_factory=KVDefaults)
    models: dict[str, Model] = Field(default_factory=dict, description="none: the bundled demo model")
    priorities: Priorities = Field(default_factory=Priorities)
    logging: Logging = Field(default_factory=Logging)
