"""Who may come in. Default-deny: only /health is open, whatever the path is written like."""

import pytest

from edgekv.http.gate import is_loopback
from edgekv.http.settings import ApiKey
from tests.http.fakes import ScriptedService, calling, running
from tests.http.raw import dialled

KEYS = (ApiKey("laptop", "sk-laptop", 0), ApiKey("batch", "sk-batch-ü", 10))
CLOSED = [
    ("GET", "/v1/models"), ("GET", "/v1/models/scripted"), ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("GET", "/metrics"), ("GET", "/"),
    ("GET", "/nothing"), ("POST", "/health"), ("GET", "/health/"), ("GET", "/health/../v1/models"),
    ("GET", "//health"), ("GET", "/Health"),
    ("GET", "/v1%2fmodels"), ("GET", "/v1/%6dodels"), ("GET", "/v1/models?x=/health"),
    ("GET", "/health%2f..%2fv1/models"), ("GET", "/v1/models;/health"), ("GET", "/health%2500"),
]  # fmt: skip
GOOD_HOSTS = [
    "localhost",
    "localhost:8181",
    "127.0.0.1",
    "127.8.9.10:1",
    "[::1]",
    "[::1]:8181",
    "LocalHost.",
    "a.localhost",
]
BAD_HOSTS = [
    "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:8181", "10.0.0.1", "[fe80::1]",
    "localhost@evil.example", "localhost/health", "localhost, evil.example", "", " ", "[::1", "localhost:123456",
    "\xff", "localhost:80:80", "127.1", "2130706433", "0x7f.1", "localhost#", "localhost?",
]  # fmt: skip


def bearer(key):
    return {"authorization": f"Bearer {key}".encode()}


@pytest.mark.parametrize("headers", [
    {}, bearer("wrong"), bearer(""), bearer("sk-laptopx"), bearer("sk-lapto"), {"authorization": "sk-laptop"},
    {"authorization": "Basic sk-laptop"}, {"x-api-key": "sk-laptop"}, {"authorization": b"Bearer \xff\xfe"},
    [("authorization", "Bearer wrong"), ("authorization", "Bearer sk-laptop")],
])  # fmt: skip
async def test_every_route_but_health_wants_a_key(headers):
    async with calling(api_keys=KEYS) as http:
        for method, path in CLOSED:
            answer = await http.request(method, path, headers=headers)
            assert answer.status_code == 401, (method, path)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert (await http.get("/health", headers=headers)).status_code == 200
        assert (await http.head("/health", headers=headers)).status_code == 200


async def test_paths_of_control_characters_mean_no_route():
    async with calling(api_keys=KEYS) as http:
        for path in ("/health%0a", "/v1/models%0a", "/v1/models%00/health", "/%ff", "/health%7f"):
            assert (await http.get(path, headers=bearer("sk-laptop"))).status_code == 400, path


@pytest.mark.parametrize("key", ["sk-laptop", "sk-batch-ü"])
async def test_each_key_opens(key):
    async with calling(api_keys=KEYS) as http:
        assert (await http.get("/v1/models", headers=bearer(key))).status_code == 200
        assert (await http.get("/v1%2fmodels", headers=bearer(key))).status_code in (200, 404)
        assert (await http.get("/nothing", headers=bearer(key))).status_code == 404


@pytest.mark.parametrize("keys", [(), KEYS])
async def test_odd_hosts_open_nothing_not_even_health(keys):
    async with running(api_keys=keys) as server:
        for host in BAD_HOSTS:
            for path in ("/health", "/v1/models", "/nothing"):
                async with dialled(server.port) as raw:
                    key = b"Authorization: Bearer sk-laptop\r\n"
                    await raw.send(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n".encode("latin-1") + key + b"\r\n")
                    assert (await raw.answer()).status in (400, 403), (host, path)


async def test_names_of_this_machine_open():
    async with calling() as http:
        for host in GOOD_HOSTS:
            assert (await http.get("/v1/models", headers={"host": host})).status_code == 200, host


async def test_configured_hosts_open_and_an_address_does_when_bound_to_any():
    async with calling(allowed_hosts=("box.lan",)) as http:
        assert (await http.get("/health", headers={"host": "box.lan:8181"})).status_code == 200
        assert (await http.get("/health", headers={"host": "other.lan"})).status_code == 403
        assert (await http.get("/health", headers={"host": "192.168.1.5"})).status_code == 403
    async with calling(host="0.0.0.0") as http:
        assert (await http.get("/health", headers={"host": "192.168.1.5:8181"})).status_code == 200
        assert (await http.get("/health", headers={"host": "rebound.example"})).status_code == 403
    async with calling(allowed_hosts=("*",)) as http:
        assert (await http.get("/health", headers={"host": "anything.example"})).status_code == 200


async def test_origins():
    async with calling(allowed_origins=("https://notes.example",)) as http:
        for origin, status in [
            ("https://notes.example", 200), ("http://localhost:8181", 200), ("https://NOTES.example", 200),
            ("http://notes.example", 403), ("https://notes.example.evil", 403), ("null", 403),
            ("http://localhost:9", 403), ("http://localhost:8181@evil", 403), ("", 403), ("file://", 403),
        ]:  # fmt: skip
            answer = await http.get("/health", headers={"origin": origin})
            assert answer.status_code == status, origin
            assert ("access-control-allow-origin" in answer.headers) == (status == 200)
        preflight = await http.options("/v1/chat/completions", headers={"origin": "https://notes.example"})
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-headers"] == "authorization, *"
        assert preflight.headers["access-control-expose-headers"] == "retry-after"
        assert (await http.options("/v1/chat/completions")).status_code == 405


async def test_a_refused_page_of_an_allowed_origin_can_read_why():
    async with calling(allowed_origins=("https://notes.example",), api_keys=KEYS) as http:
        answer = await http.get("/v1/models", headers={"origin": "https://notes.example"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (401, "https://notes.example")


async def test_without_keys_only_this_machine_may_come():
    for client, status in [("127.0.0.1", 200), ("::1", 200), ("::ffff:127.0.0.1", 200), ("192.168.1.9", 401)]:
        async with calling(host="0.0.0.0", client=(client, 5)) as http:
            assert (await http.get("/v1/models")).status_code == status, client
            assert (await http.get("/health")).status_code == 200


async def test_a_key_brings_its_priority_and_its_own_cache():
    service = ScriptedService()
    ask = {"prompt": "a", "max_tokens": 1}
    async with calling(service, api_keys=KEYS) as http:
        for key, extra in [
            ("sk-laptop", {}), ("sk-laptop", {}), ("sk-batch-ü", {}), ("sk-laptop", {"cache_salt": "x"}),
            ("sk-batch-ü", {"cache_salt": "x"}), ("sk-laptop", {"priority": 5}),
        ]:  # fmt: skip
            answer = await http.post("/v1/completions", json={**ask, **extra}, headers=bearer(key))
            assert answer.status_code == 200, answer.text
        answer = await http.post("/v1/completions", json={**ask, "priority": 9}, headers=bearer("sk-batch-ü"))
        assert answer.status_code == 400
    assert [draft.priority for draft in service.drafts] == [0, 0, 10, 0, 10, 5]
    salts = [draft.salt for draft in service.drafts]
    assert salts[0] == salts[1] == salts[5]
    assert len(set(salts)) == 4
    assert b"" not in salts


async def test_without_keys_caches_are_shared_unless_salted():
    service = ScriptedService()
    async with calling(service) as http:
        for extra in ({}, {"cache_salt": "x"}, {"cache_salt": "y"}):
            await http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **extra})
    assert [draft.salt == b"" for draft in service.drafts] == [True, False, False]
    assert len({draft.salt for draft in service.drafts}) == 3


def test_loopback_is_an_address_not_a_spelling():
    assert all(map(is_loopback, ["localhost", "127.0.0.1", "127.255.0.1", "::1", "[::1]", "::ffff:127.0.0.1"]))
    assert not any(map(is_loopback, ["", "0.0.0.0", "::", "10.0.0.1", "localhost.evil", "127.0.0.1.evil", "example"]))
