"""Reading a request's body where a client is slow or leaves; what no ordinary client can be made to do."""

import asyncio

import pytest

fastapi = pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")
requests = pytest.importorskip("starlette.requests")
uploads = pytest.importorskip("service.uploads")

NEVER = object()


def upload(messages, kind="image/png", max_bytes=100, more=()):
    """A request whose messages arrive one by one; NEVER stands for silence."""
    pending = iter(messages)

    async def receive():
        message = next(pending)
        if message is NEVER:
            await asyncio.sleep(60)
        return message

    scope = {"type": "http", "method": "POST", "headers": [(b"content-type", kind.encode()), *more]}
    return uploads.Upload(requests.Request(scope, receive), max_bytes)


def piece(size, more=True):
    return {"type": "http.request", "body": bytes(size), "more_body": more}


def test_body_in_pieces_is_put_together():
    assert asyncio.run(upload([piece(40), piece(0), piece(60, False)]).read()) == bytes(100)


def test_client_that_sends_nothing_is_given_up(monkeypatch):
    monkeypatch.setattr(uploads, "BODY_TIMEOUT_S", 0.02)
    with pytest.raises(fastapi.HTTPException) as refused:
        asyncio.run(upload([piece(10), NEVER]).read())
    assert refused.value.status_code == 408


@pytest.mark.parametrize("kind", ["image/png", "multipart/form-data; boundary=x"])
def test_client_that_leaves_in_the_middle_is_noticed(kind):
    with pytest.raises(requests.ClientDisconnect):
        asyncio.run(upload([piece(0), {"type": "http.disconnect"}], kind=kind).read())


def test_reading_stops_at_the_limit_and_the_rest_is_forgotten_within_bounds(monkeypatch):
    monkeypatch.setattr(uploads, "DRAIN_TIMEOUT_S", 0.02)
    sent = iter([piece(60)] * 50)
    endless = upload(sent)

    async def scene():
        with pytest.raises(fastapi.HTTPException) as refused:
            await endless.read()
        await endless.drain()
        return refused.value.status_code

    assert asyncio.run(scene()) == 413
    assert len(list(sent)) == 50 - 2 - 7, "two pieces pass the limit of 100 bytes, seven the 400 that are drained"
    asyncio.run(upload([NEVER]).drain())  # silence ends it too


def test_client_that_asks_before_it_sends_is_not_waited_for():
    request = upload([NEVER], kind="text/plain", more=[(b"expect", b"100-continue")])
    with pytest.raises(fastapi.HTTPException):
        asyncio.run(request.read())
    asyncio.run(asyncio.wait_for(request.drain(), 0.5 * uploads.DRAIN_TIMEOUT_S))


def test_no_upload_goes_to_disk(monkeypatch):
    import tempfile

    data = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + bytes(3 * 2**20)
    message = {"type": "http.request", "body": data + b"\r\n--x--\r\n", "more_body": False}
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda *_, **__: pytest.fail("a temporary file was opened"))
    form = upload([message], kind="multipart/form-data; boundary=x", max_bytes=2**22)
    assert len(asyncio.run(form.read())) == 3 * 2**20
