"""Short forms of `draft`: `off` and `ngram` instead of `{method: off}` and `{method: ngram}`.

Runs in: anywhere; owns: nothing.
"""

import difflib
from typing import Any

SHORT_FORMS = ("off", "ngram")
WITHOUT_DRAFT = "go without one (--draft off, or in a configuration draft: off)"


def written_out(value: object) -> object:
    """What a short form is short for; a section, or nothing, as it is. Raises ValueError that says what to write."""
    if value is None or isinstance(value, dict):
        return value
    if value in SHORT_FORMS:
        return {"method": value}
    expected = "'off', 'ngram' or 'name: value' pairs such as {path: FOLDER}"
    if value is False or value == "false":
        hint = "; did you mean 'off'?"
    elif isinstance(value, str) and (near := difflib.get_close_matches(value, SHORT_FORMS, n=1)):
        hint = f"; did you mean {near[0]!r}?"
    elif isinstance(value, str) and value:
        hint = f"; for a draft model write {{path: {value}}}"
    else:
        hint = ""
    shown = str(value).lower() if isinstance(value, bool) else "a list" if isinstance(value, list) else repr(value)
    raise ValueError(f"expected {expected}, not {shown}{hint}")


def add_short_forms(schema: dict[str, Any]) -> None:
    """Let the JSON schema of the field know them."""
    schema["anyOf"].insert(1, {"enum": list(SHORT_FORMS)})
