"""From a parsed JSON body to a request: every field is honoured or refused by name. Runs in: anywhere; owns: nothing.

The models are strict (no "1" for 1) and forbid unknown fields. Fields of OpenAI's or vLLM's API that this server does
not have are listed with the values that ask for nothing: those pass, any other value is refused by name.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from edgekv.http import strict_json
from edgekv.http.errors import ApiError, invalid

Neutral = Mapping[str, Sequence[object]]


class RequestModel(BaseModel):
    """Base of every request body and of the objects inside them."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )
    neutral: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {}
        for name, member in value.items():
            if name not in cls.neutral:
                kept[name] = member
            elif not any(type(member) is type(idle) and member == idle for idle in cls.neutral[name]):
                raise PydanticCustomError("unsupported", "not supported", {"field": name})
        return kept

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Parse and validate. Raises `ApiError` 400 naming the first offending field."""
        return cls.from_object(parse_object(body))

    @classmethod
    def from_object(cls, value: dict[str, Any]) -> Self:
        """Validate a parsed JSON object. Raises `ApiError` 400 naming the first offending field."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise _first_fault(error, value) from None


def fault(field: str, message: str) -> PydanticCustomError:
    """For validators that see a whole object: what is wrong, and the field of it that the answer names."""
    return PydanticCustomError("fault", "{message}", {"field": field, "message": message})


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises `ApiError` 400."""
    try:
        value = strict_json.parse(body)
    except strict_json.StrictJsonError as error:
        raise invalid(error.param, str(error), code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid(None, "The body must be a JSON object.", code="invalid_json")
    return value


def check_token_ids(name: str, ids: Sequence[int], vocab_size: int) -> None:
    """Raises `ApiError` 400 unless every id is a token of the model."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        raise invalid(name, f"'{name}' holds a token id outside the vocabulary (0 to {vocab_size - 1}).")


def _first_fault(error: ValidationError, value: dict[str, Any]) -> ApiError:
    # A union reports a fault for each of its branches; the one that got furthest into the value is about the value.
    faults = [(_path(value, fault), fault) for fault in error.errors(include_url=False, include_input=False)]
    path, fault = max(faults, key=lambda entry: len(entry[0]))
    name = _spelled(path)
    match fault["type"]:
        case "unsupported":
            return invalid(name, f"'{name}' is not supported by this server.", code="unsupported")
        case "extra_forbidden":
            return invalid(name, f"Unrecognized request argument: '{name}'.", code="unknown_field")
        case "missing":
            return invalid(name, f"Missing required parameter: '{name}'.", code="missing_field")
        case "fault":
            return invalid(name, fault["ctx"]["message"], code="invalid_value")
        case "value_error":
            return invalid(name or None, str(fault["ctx"]["error"]), code="invalid_value")
        case _:
            reason = fault["msg"]
            return invalid(name, f"Invalid '{name}': {reason[:1].lower()}{reason[1:]}.", code="invalid_value")


def _path(value: object, fault: Any) -> list[int | str]:
    """The steps of a fault's location that lead through the value; names of union branches do not."""
    loc: Sequence[int | str] = fault["loc"]
    path: list[int | str] = []
    for number, step in enumerate(loc):
        if isinstance(value, dict) and (step in value or (fault["type"] == "missing" and number == len(loc) - 1)):
            path.append(step)
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            path.append(step)
            value = value[step]
    if fault["type"] in ("unsupported", "fault"):
        path.append(fault["ctx"]["field"])
    return path


def _spelled(path: Sequence[int | str]) -> str:
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            # A field name comes from the client; it is shown, but not at any length.
            text += f"{'.' if text else ''}{step[:64]}"
    return text
