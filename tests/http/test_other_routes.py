"""/tokenize, /detokenize, /v1/models and /metrics."""

from prometheus_client.parser import text_string_to_metric_families

from tests.http.fakes import ScriptedService, calling

HELLO = [{"role": "user", "content": "<s>é"}]


async def test_tokenize_text():
    async with calling() as http:
        answer = (await http.post("/tokenize", json={"prompt": "aé<s>", "return_token_strs": True})).json()
        assert answer == {
            "count": 5,
            "max_model_len": 400_000,
            "tokens": [256, 97, 0xC3, 0xA9, 256],
            "token_strs": ["<s>", "a", "\ufffd", "\ufffd", "<s>"],
        }
        answer = (
            await http.post("/tokenize", json={"prompt": "a", "add_special_tokens": False, "model": "gpt-4o"})
        ).json()
        assert answer == {"count": 1, "max_model_len": 400_000, "tokens": [97], "token_strs": None}


async def test_tokenize_chat_is_what_a_chat_completion_counts_and_content_stays_content():
    service = ScriptedService()
    async with calling(service) as http:
        answer = (await http.post("/tokenize", json={"messages": HELLO})).json()
        usage = (await http.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 1})).json()["usage"]
        bare = (await http.post("/tokenize", json={"messages": HELLO, "add_generation_prompt": False})).json()
        twice = (await http.post("/tokenize", json={"messages": HELLO, "add_special_tokens": True})).json()
    assert answer["tokens"] == [256, 258, *"<s>é".encode(), 259]
    assert answer["count"] == usage["prompt_tokens"]
    assert service.drafts[0].prompt == tuple(answer["tokens"])
    assert bare["tokens"] == answer["tokens"][:-1]
    assert twice["tokens"] == answer["tokens"]


async def test_a_long_text_is_tokenized_beside_the_loop():
    async with calling() as http:
        answer = (await http.post("/tokenize", json={"prompt": "x" * 100_000})).json()
        assert answer["count"] == 100_001


async def test_detokenize():
    async with calling() as http:
        assert (await http.post("/detokenize", json={"tokens": [256, 97, 0xC3, 0xA9]})).json() == {"prompt": "<s>aé"}
        assert (await http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}
        for tokens in ([261], [-1], ["a"], [1.0], [True], "abc", None, [[1]]):
            answer = await http.post("/detokenize", json={"tokens": tokens})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tokens")


async def test_tokenize_refuses_by_name():
    async with calling() as http:
        for fields, param in [
            ({}, "prompt"), ({"prompt": 5}, "prompt"), ({"prompt": "a", "x": 1}, "x"),
            ({"messages": HELLO, "tools": [1]}, "tools"), ({"messages": HELLO, "prompt": "a"}, "prompt"),
        ]:  # fmt: skip
            answer = await http.post("/tokenize", json=fields)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


async def test_models_lists_every_name():
    async with calling() as http:
        models = (await http.get("/v1/models")).json()
    assert models["object"] == "list"
    assert [model["id"] for model in models["data"]] == ["scripted", "gpt-4o", "org/scripted"]
    assert models["data"][1]["max_model_len"] == 400_000


async def test_metrics_carry_vllms_names():
    async with calling() as http:
        await http.post("/v1/completions", json={"prompt": "abc", "max_tokens": 10})
        await http.get("/no/such/path")
        text = (await http.get("/metrics")).text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name in [
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:prompt_tokens",
        "vllm:prefix_cache_queries", "vllm:prefix_cache_hits", "vllm:generation_tokens", "vllm:num_preemptions",
        "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds", "vllm:e2e_request_latency_seconds",
        "vllm:request_success",
    ]:  # fmt: skip
        assert name in families, name

    def value(name, **labels):
        samples = [s for family in families.values() for s in family.samples]
        return next(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    assert value("vllm:kv_cache_usage_perc", model_name="scripted") == 0.25
    assert value("vllm:generation_tokens_total") == 10
    assert value("edgekv_forward_seconds_total") == 1.25
    assert value("vllm:time_to_first_token_seconds_count") == 1
    assert value("vllm:inter_token_latency_seconds_count") == 9 - 3  # the first four tokens came at once
    assert value("vllm:request_success_total", finished_reason="length") == 1
    assert value("edgekv_http_responses_total", route="/v1/completions", status="200") == 1
    assert value("edgekv_http_responses_total", route="unknown", status="404") == 1
    assert "/no/such/path" not in text
