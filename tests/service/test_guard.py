"""Connections that wait, for heads, for requests, for answers to be read; and the names that a service answers to."""

import asyncio
import socket
import time

import pytest

from utils.errors import UserError

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")
guard = pytest.importorskip("service.guard")

HEAD = b"GET / HTTP/1.1\r\nHost: a\r\n"
LIMIT_S = 20
SIZE = 30_000_000  # of the long answer: more than the buffers of a connection hold


async def app(scope, receive, send):
    """Answers briefly, at length, or once the client has said something."""
    if scope["path"] == "/wait":
        await receive()
    body = b"x" * (SIZE if scope["path"] == "/long" else 2)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def play(monkeypatch):
    """Runs a scene with a server of short deadlines; the scene is given a function that connects to it."""
    monkeypatch.setattr(guard, "HEAD_TIMEOUT_S", 0.3)
    monkeypatch.setattr(guard, "STALLED_S", 0.3)
    monkeypatch.setattr(guard, "MAX_CONNECTIONS", 4)

    def run(scene):
        async def main():
            listener = socket.create_server(("127.0.0.1", 0))
            config = uvicorn.Config(app, http=guard.Connection, ws="none", lifespan="off", log_level="error")
            server = uvicorn.Server(config)
            serving = asyncio.ensure_future(server.serve([listener]))
            await scene(lambda: asyncio.open_connection(*listener.getsockname(), limit=2**10))
            server.should_exit = True
            await serving

        asyncio.run(asyncio.wait_for(main(), LIMIT_S))

    return run


async def answer(reader, writer, text):
    writer.write(text)
    return await reader.readuntil(b"\r\n")


async def seconds_until_closed(reader):
    begun_s = time.monotonic()
    try:
        while await reader.read(2**16):
            continue
    except ConnectionResetError:
        pass
    return time.monotonic() - begun_s


def test_head_that_does_not_come_as_a_whole_in_time_ends_the_connection(play):
    async def scene(connect):
        (silent, _), (half, half_writer), (slow, slow_writer), (good, good_writer) = [await connect() for _ in range(4)]
        half_writer.write(HEAD)
        assert await answer(good, good_writer, HEAD + b"\r\n") == b"HTTP/1.1 200 OK\r\n"
        await good.readuntil(b"\r\n\r\nxx")

        async def trickle():
            for letter in HEAD:
                slow_writer.write(bytes([letter]))
                await asyncio.sleep(0.05)

        trickling = asyncio.ensure_future(trickle())
        times = await asyncio.gather(*map(seconds_until_closed, (silent, half, slow)))
        assert max(times) < 1, "however often something comes"
        trickling.cancel()
        assert not good.at_eof(), "between requests there is more time"
        good_writer.write(HEAD)
        assert await seconds_until_closed(good) < 1

    play(scene)


def test_request_in_progress_has_no_deadline_of_this_kind(play):
    async def scene(connect):
        reader, writer = await connect()
        writer.write(b"POST /wait HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n")
        await asyncio.sleep(0.6)
        assert await answer(reader, writer, b"xy") == b"HTTP/1.1 200 OK\r\n"

    play(scene)


def test_newcomer_takes_the_place_of_the_one_that_has_waited_longest(play):
    async def scene(connect):
        busy_reader, busy_writer = await connect()
        busy_writer.write(b"POST /wait HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n")
        await asyncio.sleep(0.02)
        oldest, others = await connect(), []
        for _ in range(2):
            await asyncio.sleep(0.02)
            others.append(await connect())
        reader, writer = await connect()
        assert await answer(reader, writer, HEAD + b"\r\n") == b"HTTP/1.1 200 OK\r\n"
        assert await seconds_until_closed(oldest[0]) < 0.1
        for pair in ((busy_reader, busy_writer), others[1]):
            text = b"xy" if pair[0] is busy_reader else HEAD + b"\r\n"
            assert await answer(*pair, text) == b"HTTP/1.1 200 OK\r\n"

    play(scene)


def test_answer_that_nobody_reads_does_not_stay_and_one_that_is_read_slowly_does(play):
    async def scene(connect):
        (stalled, stalled_writer), (slow, slow_writer) = await connect(), await connect()
        for writer in (stalled_writer, slow_writer):
            writer.write(HEAD.replace(b"/ ", b"/long ") + b"Connection: close\r\n\r\n")
        await slow.readuntil(b"\r\n\r\n")
        got = 0
        while got < SIZE:
            got += len(await slow.readexactly(min(SIZE - got, 3_000_000)))
            await asyncio.sleep(0.1)
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await stalled.readuntil(b"\r\n\r\n")
            await stalled.readexactly(SIZE)

    play(scene)


def test_where_many_come_at_once_each_takes_another_s_place(play, monkeypatch):
    """All are accepted in one turn of the server's loop, before it hears of any end."""
    monkeypatch.setattr(guard, "HEAD_TIMEOUT_S", 60.0)

    async def scene(connect):
        clients = await asyncio.gather(*(connect() for _ in range(12)))
        ends = [asyncio.ensure_future(seconds_until_closed(reader)) for reader, _ in clients]
        done, pending = await asyncio.wait(ends, timeout=5)
        assert len(done) == 8 and len(pending) == 4
        for end in pending:
            end.cancel()
        for _, writer in clients:
            writer.close()

    play(scene)


@pytest.mark.parametrize(
    ("bound", "more", "trusted", "untrusted"),
    [
        ((), (), ["localhost", "127.0.0.1:5000", "[::1]:5000", "::1", "Localhost.", ""], ["evil.example", "10.0.0.7"]),
        (("10.0.0.7",), (), ["10.0.0.7:5000", "localhost"], ["10.0.0.8", "0.0.0.0", "10.0.0.7.evil.example"]),
        (("gate", "10.0.0.7"), (), ["gate:80", "10.0.0.7"], ["gate.evil.example", "evil.example"]),
        (("0.0.0.0",), (), ["10.0.0.7", "192.168.1.2:5000", "[fe80::1]:5000"], ["evil.example", "gate"]),
        (("::",), (), ["10.0.0.7", "[2001:db8::1]"], ["evil.example"]),
        (("0", "0.0.0.0"), ("Gate.Example.org", "b"), ["gate.example.org:443", "b"], ["example.org"]),
        ((), ("*",), ["evil.example", "10.0.0.7"], []),
    ],
)
def test_known_names_are_trusted_and_others_are_not(bound, more, trusted, untrusted):
    hosts = guard.TrustedHosts(bound, more)
    assert [host for host in trusted if not hosts.trusts(host)] == []
    assert [host for host in untrusted if hosts.trusts(host)] == []


@pytest.mark.parametrize("name", ["", "http://gate", "a b", "a,b", "n" * 300, "tür"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(UserError, match=r"--trusted-hosts '.*a name such as"):
        guard.TrustedHosts(more=[name])
