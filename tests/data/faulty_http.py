"""A web server on 127.0.0.1 with range requests, faults on demand, and counters."""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FaultyServer(ThreadingHTTPServer):
    """Serves the files of `folder` at `url`.

    `fault(name, count)` is asked for each request (count from 1 for each file) and answers None or one of: a status,
    "drop" (after half the bytes), "short" (half the bytes, and says so), "whole" (ignores ranges), "slow" (pauses),
    "silent" (never answers), "shift" (gives the bytes one further).
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.fault: Callable[[str, int], object] = lambda name, count: None
        self.etags: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.ranges: list[tuple[str, int, int]] = []
        self.counting, self.over = threading.Lock(), threading.Event()

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        with self.server.counting:
            self.server.requests[name] += 1
            fault = self.server.fault(name, self.server.requests[name])
        path = self.server.folder / name
        if isinstance(fault, int):
            return self._answer(fault, b"<html>no</html>")
        if path.is_dir():
            links = "".join(f'<a href="{entry.name}">x</a>' for entry in sorted(path.iterdir()))
            return self._answer(200, links.encode(), {"Content-Type": "text/html"})
        if not path.is_file():
            return self._answer(404, b"<html>no</html>")
        content = path.read_bytes()
        tag = {"ETag": self.server.etags.get(name, f'"{path.stat().st_mtime_ns}"')}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not match or fault == "whole":
            return self._answer(200, content, tag)
        first, last = int(match[1]), min(int(match[2]), len(content) - 1)
        if first >= len(content):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        with self.server.counting:
            self.server.ranges.append((name, first, last))
        if fault == "shift":
            first, last = first + 1, last + 1
        data = content[first : last + 1]
        tag["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        if fault == "slow":
            time.sleep(0.5)
        if fault == "silent":
            self.server.over.wait()
            return None
        if fault == "short":
            data = data[: len(data) // 2]
        return self._answer(206, data, tag, drop=fault == "drop")

    def _answer(self, status: int, data: bytes, headers: dict[str, str] | None = None, drop: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        sent = data[: len(data) // 2] if drop else data
        with self.server.counting:
            self.server.bytes[self.path.lstrip("/")] += len(sent)
        self.wfile.write(sent)
        self.close_connection = drop


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    server = FaultyServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
