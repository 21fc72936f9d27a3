"""What is refused, and that the refusal names the field. Every case runs against a service that would have answered."""

import json
import re

import pytest

from edgekv.errors import NotServing, QueueFull
from edgekv.model.spec import GenerationDefaults
from tests.http.fakes import EOS, ScriptedService, calling, card

HELLO = [{"role": "user", "content": "hello"}]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def said(content):
    return [{"role": "user", "content": content}]


BAD_CHAT = [
    # (fields beside messages, the field the answer must name)
    ({"n": 0}, "n"),
    ({"n": 17}, "n"),
    ({"n": 2**62}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2**40}, "max_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.1}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"min_p": -1}, "min_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": ["x", 5]}, "stop[1]"),
    ({"stop": "x" * 257}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [261]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"261": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"logprobs": 5}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ({"priority": -1}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"a b": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
    ({"model": 5}, "model"),
    ({"no_such_field": 1}, "no_such_field"),
    # named, known, and not here
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy", "format": "wav"}}, "audio"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"prediction": {"type": "content", "content": ""}}, "prediction"),
    ({"store": True}, "store"),
    ({"store": 0}, "store"),
    ({"metadata": {"a": "b"}}, "metadata"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"structured_outputs": {"regex": "a+"}}, "structured_outputs"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"best_of": 2}, "best_of"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
]

BAD_MESSAGES = [
    ([], "messages"),
    ("hello", "messages"),
    (None, "messages"),
    ([5], "messages[0]"),
    ([{"role": "wizard", "content": "x"}], "messages[0].role"),
    ([{"content": "x"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"),
    (said(None), "messages[0].content"),
    (said(5), "messages[0].content"),
    (said([{"type": "image_url", "image_url": {"url": "http://x"}}]), "messages[0].content[0].type"),
    (said([{"type": "text", "text": "a"}, {"type": "text"}]), "messages[0].content[1].text"),
    ([*HELLO, {"role": "assistant", "tool_calls": [{"id": "1"}]}], "messages[1].tool_calls"),
    ([{"role": "user", "content": "x", "colour": 1}], "messages[0].colour"),
    ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "messages"),
]

BAD_COMPLETIONS = [
    ({}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [1.0]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [261]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [[1], [2**62]]}, "prompt"),
    ({"prompt": ["a"] * 65}, "n"),
    ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "logprobs": True}, "logprobs"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "best_of": 2}, "best_of"),
    ({"prompt": "a", "echo": True, "logprobs": 1}, "logprobs"),
    ({"prompt": "a", "messages": []}, "messages"),
    ({"prompt": "", "add_special_tokens": False}, "prompt"),
]

BAD_JSON = [
    (b"", None),
    (b"{", None),
    (b"[]", None),
    (b'"x"', None),
    (b"NaN", None),
    (b'{"messages": [{"role": "user", "content": "\xff"}]}', None),
    (b"\xef\xbb\xbf{}", None),
    (b'{"model": "a", "model": "b"}', "model"),
    (b'{"messages": [{"role": "user", "role": "user"}]}', "role"),
    (b'{"temperature": NaN}', "temperature"),
    (b'{"temperature": Infinity}', "temperature"),
    (b'{"temperature": 1e999}', "temperature"),
    (b'{"logit_bias": {"5": -1e999}}', "logit_bias.5"),
    (b'{"seed": 123456789012345678901234567890}', "seed"),
    (b'{"seed": 9223372036854775808}', "seed"),
    (b'{"seed": ' + b"9" * 5000 + b"}", None),
    (b'{"messages": [{"x": [1, -9223372036854775809]}]}', "messages[0].x[1]"),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "messages[0].content"),
    (b'{"stop": ["a", "\\udc00b"]}', "stop[1]"),
    (b'{"messages":' + b"[" * 100_000, None),
    (b'{"a":' * 100_000, None),
    (b'{"messages": [' + b"{}," * 60_000 + b"{}]}", None),
    (b"{" + b",".join(b'"k%d": 1' % i for i in range(3000)) + b"}", None),
]


def named_in(answer, param):
    error = answer.json()["error"]
    assert answer.status_code == 400, answer.text
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    if param is not None:
        assert any(part in error["message"] for part in re.split(r"[.\[\]0-9]+", param) if part)
    return error


async def test_every_bad_field_of_a_chat_is_named():
    async with calling() as http:
        for fields, param in BAD_CHAT:
            named_in(await http.post(CHAT, json={"messages": HELLO, **fields}), param)
        for messages, param in BAD_MESSAGES:
            named_in(await http.post(CHAT, json={"messages": messages}), param)
        assert named_in(await http.post(CHAT, json={}), "messages")["code"] == "missing_field"


async def test_every_bad_field_of_a_completion_is_named():
    async with calling() as http:
        for fields, param in BAD_COMPLETIONS:
            named_in(await http.post(COMPLETION, json=fields), param)


async def test_json_that_python_would_take_is_refused():
    async with calling() as http:
        for body, param in BAD_JSON:
            answer = await http.post(CHAT, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400, body[:60]
            assert answer.json()["error"]["param"] == param, body[:60]


async def test_values_that_ask_for_nothing_are_taken():
    idle = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"], "store": False,
        "parallel_tool_calls": None, "metadata": None, "service_tier": "auto", "best_of": 1, "audio": None,
        "user": "me", "prompt_cache_key": "k", "stop": None, "logit_bias": None, "n": None, "stream": None,
        "top_k": -1, "length_penalty": 1.0, "structured_outputs": None,
    }  # fmt: skip
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "user", "content": "x", "name": "ada"},
        {"role": "assistant", "content": None, "tool_calls": [], "refusal": None},
        {"role": "user", "content": "y"},
    ]
    service = ScriptedService()
    async with calling(service) as http:
        answer = await http.post(CHAT, json={"messages": messages, **idle})
    assert answer.status_code == 200, answer.text
    prompt = "<s><|system|>a\nb<|user|>x<|assistant|><|user|>y<|assistant|>"
    assert service.drafts[0].prompt == tuple(
        card().tokenizer.encode(prompt, add_special_tokens=False, parse_special=True)
    )


async def test_what_is_asked_reaches_the_engine():
    service = ScriptedService()
    fields = {
        "max_completion_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "seed": -3,
        "presence_penalty": 0.25, "frequency_penalty": -0.5, "repetition_penalty": 1.25, "logit_bias": {"65": -100},
        "min_tokens": 2, "stop_token_ids": [10], "ignore_eos": True, "logprobs": True, "top_logprobs": 3, "n": 2,
    }  # fmt: skip
    async with calling(service) as http:
        answer = await http.post(CHAT, json={"messages": HELLO, **fields})
    assert answer.status_code == 200, answer.text
    first, second = (draft.sampling for draft in service.drafts)
    assert (first.max_tokens, first.temperature, first.top_p, first.top_k, first.min_p) == (7, 0.5, 0.9, 40, 0.1)
    assert (first.presence_penalty, first.frequency_penalty, first.repetition_penalty) == (0.25, -0.5, 1.25)
    assert first.logit_bias == ((65, -100.0),)
    assert (first.min_tokens, first.logprobs) == (2, 3)
    assert first.stop_token_ids == {10}
    assert (first.seed, second.seed) == (2**64 - 3, 2**64 - 2)


async def test_the_models_own_defaults_apply_where_the_request_is_silent():
    own = GenerationDefaults(eos_token_ids=(EOS, 10), temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1)
    service = ScriptedService(served=card(generation=own, context_tokens=1000, pool_tokens=500))
    async with calling(service) as http:
        assert (await http.post(CHAT, json={"messages": HELLO})).status_code == 200
        assert (await http.post(CHAT, json={"messages": HELLO, "temperature": 0, "top_k": 0})).status_code == 200
    silent, told = (draft.sampling for draft in service.drafts)
    assert (silent.temperature, silent.top_p, silent.top_k, silent.repetition_penalty) == (0.7, 0.8, 20, 1.1)
    assert silent.stop_token_ids == {EOS, 10}
    assert silent.max_tokens == 500 - len(service.drafts[0].prompt)
    assert (told.temperature, told.top_k) == (0.0, None)


async def test_what_can_never_fit_is_told_the_numbers_in_openais_words():
    async with calling(ScriptedService(served=card(context_tokens=100, pool_tokens=64))) as http:
        answer = await http.post(CHAT, json={"messages": said("x" * 50), "max_tokens": 30})
        error = named_in(answer, "messages")
        assert error["code"] == "context_length_exceeded"
        assert error["message"].startswith(
            "This model's maximum context length is 64 tokens. However, you requested 83 tokens "
            "(53 in the messages, 30 in the completion)."
        )
        answer = await http.post(CHAT, json={"messages": said("x" * 64)})
        assert answer.json()["error"]["code"] == "context_length_exceeded"


async def test_a_full_queue_and_a_loading_model_say_when_to_come_back():
    service = ScriptedService(refuses=QueueFull(needed_tokens=900, free_tokens=100, retry_after_s=2.2))
    async with calling(service) as http:
        answer = await http.post(CHAT, json={"messages": HELLO})
        assert (answer.status_code, answer.headers["retry-after"]) == (429, "3")
        error = answer.json()["error"]
        assert (error["code"], error["type"]) == ("kv_cache_full", "rate_limit_error")
        assert "900" in error["message"]
    service = ScriptedService(served=NotServing("model_loading", "The model is loading.", 0.0))
    async with calling(service) as http:
        for path in (CHAT, "/tokenize"):
            answer = await http.post(path, json={"messages": HELLO})
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["code"] == "model_loading"
        assert (await http.get("/v1/models")).status_code == 503
        health = await http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        assert (await http.get("/metrics")).status_code == 200


async def test_an_unknown_model_is_told_what_there_is():
    async with calling() as http:
        answer = await http.post(CHAT, json={"messages": HELLO, "model": "gpt-5"})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
        assert "'gpt-4o'" in answer.json()["error"]["message"]
        assert (await http.get("/v1/models/gpt-5")).status_code == 404
        assert (await http.get("/v1/models/org/scripted")).json()["id"] == "org/scripted"


async def test_unknown_paths_methods_and_media_types_are_json_errors():
    async with calling() as http:
        for method, path, status in [
            ("GET", "/", 404), ("GET", "/v1", 404), ("GET", "/v1/models/", 404), ("POST", "/v1/embeddings", 404),
            ("GET", CHAT, 405), ("DELETE", "/v1/models", 405), ("POST", "/health", 405), ("GET", CHAT + "/", 404),
        ]:  # fmt: skip
            answer = await http.request(method, path)
            assert (answer.status_code, method, path) == (status, method, path)
            assert answer.json()["error"]["message"]
        for headers in (
            {"content-type": "text/plain"},
            {},
            {"content-type": "application/json", "content-encoding": "gzip"},
        ):
            answer = await http.post(CHAT, content=json.dumps({"messages": HELLO}), headers=headers)
            assert answer.status_code == 415


async def test_a_body_over_the_cap_is_refused():
    async with calling(max_body_bytes=1000) as http:
        answer = await http.post(CHAT, json={"messages": said("x" * 1000)})
        assert answer.status_code == 413
        assert "1,000" in answer.json()["error"]["message"]


async def test_a_fault_in_the_server_shows_nothing_of_itself(caplog):
    service = ScriptedService(refuses=RuntimeError("/secret/path at 0x7f00"))
    async with calling(service) as http:
        with pytest.raises(RuntimeError):  # passed on to the server, which logs it
            await http.post(CHAT, json={"messages": HELLO})
