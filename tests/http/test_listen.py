"""Where the server listens, and what a person is told when it cannot."""

import socket

import pytest

from edgekv.http.listen import CannotListen, open_listeners
from edgekv.http.settings import HttpSettings
from tests.http.fakes import running
from tests.http.raw import dialled


async def test_a_taken_port_is_named_with_a_way_out():
    async with running() as server:
        with pytest.raises(CannotListen, match=rf"127\.0\.0\.1 port {server.port}: another program .*server\.port"):
            await open_listeners(HttpSettings(port=server.port))


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
async def test_a_host_that_is_not_ours_is_named(host):
    with pytest.raises(CannotListen, match=host.replace(".", r"\.")):
        await open_listeners(HttpSettings(host=host, port=0))


async def test_the_sockets_have_the_options_that_the_rest_relies_on():
    for listener in await open_listeners(HttpSettings(host="localhost", port=0, stall_s=1.5)):
        async with listener:
            sock = listener.socket
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 1500


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 in this Python")
async def test_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    async with running(host="::1") as server:
        assert server.url.startswith("http://[::1]:")
        async with dialled(server.port, host="::1") as raw:
            await raw.send(b"GET /v1/models HTTP/1.1\r\nHost: [::1]:%d\r\n\r\n" % server.port)
            assert (await raw.answer()).status == 200
