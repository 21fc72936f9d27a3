"""The errors a person meets: each carries its data and says what happened, the numbers, and what to do."""

import math


class EdgeKVError(Exception):
    """Base of every error that is meant to be read by a person; `str()` of it is the whole message."""


class ConfigError(EdgeKVError):
    """One or more faults in a configuration, each `file:line:column: error: path: message`."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


class ModelError(EdgeKVError):
    """A model cannot be used: names the file and, where there is one, the tensor or field."""


class OverBudget(EdgeKVError):
    """A lease was asked for that the budget does not hold; `told` says so in other words than the ledger's."""

    def __init__(
        self, name: str, asked_bytes: int, free_bytes: int, budget_bytes: int, told: str | None = None
    ) -> None:
        numbers = f"{asked_bytes:,} bytes asked, {free_bytes:,} free of a budget of {budget_bytes:,}"
        super().__init__(told or f"{name}: {numbers}")
        self.name, self.asked_bytes, self.free_bytes, self.budget_bytes = name, asked_bytes, free_bytes, budget_bytes


class ContextLengthExceeded(EdgeKVError):
    """The request can never fit the context or the pool; `limit_tokens` is the largest that can."""

    def __init__(self, limit_tokens: int, prompt_tokens: int, completion_tokens: int, remedy: str = "") -> None:
        super().__init__(
            f"This model's maximum context length is {limit_tokens} tokens. However, you requested "
            f"{prompt_tokens + completion_tokens} tokens ({prompt_tokens} in the messages, "
            f"{completion_tokens} in the completion).{' ' + remedy if remedy else ''}"
        )
        self.limit_tokens, self.prompt_tokens, self.completion_tokens = limit_tokens, prompt_tokens, completion_tokens


class QueueFull(EdgeKVError):
    """The request fits, but not now (HTTP 429); `reason` begins the sentence that says why not."""

    def __init__(
        self, needed_tokens: int, free_tokens: int, retry_after_s: float, reason: str = "The queue is full"
    ) -> None:
        super().__init__(
            f"{reason}: this request needs {needed_tokens:,} tokens of KV cache and {free_tokens:,} are free. "
            f"Try again in {math.ceil(retry_after_s)} s."
        )
        self.needed_tokens, self.free_tokens, self.retry_after_s = needed_tokens, free_tokens, retry_after_s


class NotServing(EdgeKVError):
    """The engine cannot take work now (HTTP 503): `code` is model_loading, device_lost, draining or overloaded."""

    def __init__(self, code: str, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.code, self.retry_after_s = code, retry_after_s
