"""A web server for shards that fails and stalls on request: the real protocol over loopback, with real faults."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Faults:
    """Every `fail`-th request is answered with 503, every `cut`-th breaks off half way, every `stall`-th sends half and
    waits until the server ends, every `flip`-th has one wrong byte. 0: never. `refuse`: all are answered with 403."""

    def __init__(self, fail: int = 0, cut: int = 0, stall: int = 0, flip: int = 0, refuse: bool = False) -> None:
        self.fail, self.cut, self.stall, self.flip, self.refuse = fail, cut, stall, flip, refuse
        self.requests: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()
        self.ended = threading.Event()

    def next(self, path: str, headers: dict[str, str]) -> int:
        with self.lock:
            self.requests.append(path)
            self.headers.append(headers)
            return len(self.requests)


@contextmanager
def serve(folder: Path, faults: Faults) -> Iterator[str]:
    """Returns the URL of `folder`."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def do_GET(self) -> None:
            number = faults.next(self.path, dict(self.headers))
            path = Path(self.translate_path(self.path))
            if faults.refuse:
                self.send_error(403)
            elif faults.fail and number % faults.fail == 0:
                self.send_error(503)
            elif path.is_dir() or not path.exists():
                super().do_GET()
            else:
                self._send(bytearray(path.read_bytes()), number)

        def _send(self, data: bytearray, number: int) -> None:
            if faults.flip and number % faults.flip == 0:
                data[len(data) // 2] ^= 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            short = any(every and number % every == 0 for every in (faults.cut, faults.stall))
            self.wfile.write(data[: len(data) // 2] if short else data)
            if faults.stall and number % faults.stall == 0:
                self.wfile.flush()
                faults.ended.wait()
            self.close_connection = short

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        faults.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
