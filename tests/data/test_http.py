"""Web servers whose headers, bodies, parts or pages never end, while a shard is indexed or fetched."""

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.data.server import Faults, serve
from vaescale.data import DataError, places
from vaescale.data.places import Shard, fetch, names_in

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
Send = Callable[[bytes], None]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the limits from a minute to a second."""
    for name, value in (("STALL", 0.5), ("FIRST_PAUSE", 0.001), ("TRIES", 1), ("LISTING", 1.0)):
        monkeypatch.setattr(places, name, value)
    for name in ("MOST_UNANNOUNCED", "MOST_LISTED"):
        monkeypatch.setattr(places, name, 1 << 20)


@contextmanager
def answering(answer: Callable[[Send, str], None]) -> Iterator[tuple[str, list[bytes]]]:
    """(the URL of a server that answers every connection so, the requests it has had). HEAD gets no answer's body."""
    listener, ended, requests = socket.create_server(("127.0.0.1", 0)), threading.Event(), []
    threads: list[threading.Thread] = []

    def serve_one(connection: socket.socket) -> None:
        connection.settimeout(60)

        def send(data: bytes) -> None:
            if ended.is_set():
                raise OSError
            connection.sendall(data)

        with connection, suppress(OSError):
            requests.append(connection.recv(1 << 16))
            if requests[-1].startswith(b"HEAD"):
                send(b"HTTP/1.1 405 No\r\nConnection: close\r\n\r\n")
            else:
                answer(send, requests[-1].split()[1].decode())
                if not ended.is_set():
                    connection.shutdown(socket.SHUT_WR)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=serve_one, args=(connection,)))
            threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
    finally:
        ended.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join()
        for thread in threads:
            thread.join()


def forever(first: bytes, more: bytes, pause: float = 0.0) -> Callable[[Send, str], None]:
    def answer(send: Send, path: str) -> None:
        send(first)
        while True:
            send(more)
            time.sleep(pause)

    return answer


def once(data: bytes) -> Callable[[Send, str], None]:
    return lambda send, path: send(data)


BLOCK = b"x" * 65536
PART = b"10000\r\n" + BLOCK + b"\r\n"
SLOW = 0.05  # seconds; as often as that, so that no limit on a single read is met
ENDLESS = {
    "headers": forever(OK, b"X: " + b"y" * 1000 + b"\r\n"),
    "headers, slowly": forever(OK, b"X: y\r\n", SLOW),
    "one header, slowly": forever(OK + b"X: ", b"y", SLOW),
    "continue": forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n", SLOW),
    "body": forever(OK + b"\r\n", BLOCK),
    "body, slowly": forever(OK + b"\r\n", b"x", SLOW),
    "parts": forever(CHUNKED, PART),
    "parts, slowly": forever(CHUNKED, b"1\r\nx\r\n", SLOW),
    "length of a part": forever(CHUNKED, b"0", SLOW),
    "extension of a part": forever(CHUNKED + b"1;", b"e", SLOW),
    "trailers": forever(CHUNKED + b"1\r\nx\r\n0\r\n", b"X: y\r\n", SLOW),
    "announced, slowly": forever(OK + b"Content-Length: 100000\r\n\r\n", b"x", SLOW),
    "silence": forever(OK + b"Content-Length: 100000\r\n\r\n", b"", SLOW),
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("kind", ENDLESS)
def test_a_fetch_ends(tmp_path: Path, kind: str, known: bool) -> None:
    target, begun = tmp_path / "x", time.monotonic()
    with answering(ENDLESS[kind]) as (url, _), pytest.raises(DataError, match=r"a\.tar could not be fetched: \w+"):
        fetch(f"{url}/a.tar", target, Shard("a.tar", 1, 1000, "0" * 16) if known else None)
    assert time.monotonic() - begun < 30  # a second or two
    assert not target.exists() or target.stat().st_size <= (1 << 20) + (5 << 20)  # and what one read brings


@pytest.mark.parametrize("kind", [kind for kind in ENDLESS if "announced" not in kind])
def test_a_listing_ends(kind: str) -> None:
    begun = time.monotonic()
    with (
        answering(ENDLESS[kind]) as (url, _),
        pytest.raises(DataError, match=r"cannot be listed \(.+\): list the shar"),
    ):
        names_in(url, "*.tar")
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("length", [b"999999999999999999", b"-5", b"x", b"0x10", b"1, 2"])
def test_odd_lengths(tmp_path: Path, length: bytes) -> None:
    """An announced petabyte is refused before any of it arrives."""
    answer = once(OK + b"Content-Length: " + length + b"\r\n\r\n" + BLOCK)
    with answering(answer) as (url, requests), pytest.raises(DataError, match="could not be fetched"):
        fetch(f"{url}/a.tar", tmp_path / "x")
    assert len(requests) == 1


@pytest.mark.parametrize("asked", ["fetch", "list"])
def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path, asked: str) -> None:
    """Requests ask for uncompressed bytes; a server that compresses them is named, and asked only once."""
    bomb = gzip.compress(bytes(50 << 20))
    answer = once(OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb) + bomb)
    ask = (lambda url: fetch(f"{url}/a.tar", tmp_path / "x")) if asked == "fetch" else (lambda url: names_in(url, "*"))
    with (
        answering(answer) as (url, requests),
        pytest.raises(DataError, match=r"sends it compressed \(Content-Encoding: gzip\)"),
    ):
        ask(url)
    assert b"Accept-Encoding: identity" in requests[0]
    assert len(requests) == 1
    assert not (tmp_path / "x").exists()


def to(place: str) -> Callable[[Send, str], None]:
    return once(b"HTTP/1.1 302 Found\r\nLocation: " + place.encode() + b"\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://host/a", "data:,x", "http://[", "/again"])
def test_redirects_that_are_refused(tmp_path: Path, place: str) -> None:
    with answering(to(place)) as (url, requests), pytest.raises(DataError, match=r"could not be fetched: \w*Redirect"):
        fetch(f"{url}/a.tar", tmp_path / "x")
    assert len(requests) <= 11
    assert not (tmp_path / "x").exists()


def test_credentials_stay_with_their_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    (tmp_path / "netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.tar").write_bytes(b"data")
    faults = Faults()
    with serve(tmp_path / "other", faults) as other:
        elsewhere = other.replace("127.0.0.1", "localhost")
        with answering(to(f"{elsewhere}/a.tar")) as (url, requests):
            fetch(f"{url}/a.tar", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"data"
    assert b"Authorization" in requests[0]
    assert not any("Authorization" in headers for headers in faults.headers)
