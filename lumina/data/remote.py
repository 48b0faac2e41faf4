"""Shards behind URLs: range requests with retries, over http(s) and every object store that fsspec knows."""

import io
import itertools
import os
import re
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from lumina.data.sources import MissingSourceError, Retry, Source

T = TypeVar("T")

RETRIED_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""HTTP statuses after which a request is sent again. Every other one of 400 and above is final, as are missing
objects and missing permissions; a connection that fails or breaks, a timeout and a wrong length are retried."""
MISSING_STATUSES = frozenset({401, 403, 404, 410})
STREAM_BLOCK = 8 << 20
STREAM_AHEAD = 2
_STORE_PACKAGES = (
    "aiohttp",
    "botocore",
    "aiobotocore",
    "s3fs",
    "gcsfs",
    "google",
    "azure",
    "adlfs",
    "requests",
    "urllib3",
)


class _RetriedError(Exception):
    """A reply that is wrong and may be right the next time."""


class RemoteSource(Source):
    """What is common to URLs. Size and identity are asked for once and travel with the source to other processes."""

    def __init__(self, url: str, retry: Retry | None = None) -> None:
        self.location = url
        self.retry = retry or Retry()
        self._known: tuple[int, str] | None = None
        self._opened: tuple[int, Any] | None = None
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return type(self), (self.location, self.retry), {"_known": self._known}

    def __str__(self) -> str:
        parts = urlsplit(self.location)
        # Signed links and user:password@ must not reach logs.
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "…" if parts.query else "", ""))

    def size(self) -> int:
        return self._facts()[0]

    def identity(self) -> str:
        size, tag = self._facts()
        return f"{size}-{tag}"

    def read(self, offset: int, size: int) -> bytes:
        if size == 0:
            return b""
        whole = self.size()
        if offset < 0 or offset + size > whole:
            raise ValueError(f"{self} has {whole} bytes; bytes {offset} to {offset + size} do not lie in it")
        return self.retrying(lambda deadline: self._checked(offset, size, deadline))

    def stream(self) -> io.BufferedReader:
        return io.BufferedReader(_RangeStream(self), 1 << 20)

    def beside(self, name: str) -> "RemoteSource":
        parts = urlsplit(self.location)
        path = f"{parts.path.rpartition('/')[0]}/{name}"
        return type(self)(urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")), self.retry)

    def close(self) -> None:
        # The file system and its connections belong to fsspec, which shares them among all sources of a process.
        self._opened = None

    @abstractmethod
    def _open(self) -> Any:
        """The file system, in this process."""

    @abstractmethod
    def _look(self, deadline: float) -> tuple[int, str]:
        """Size in bytes, and ETag, version or time of change."""

    @abstractmethod
    def _fetch(self, offset: int, size: int, deadline: float) -> bytes:
        """One request; it may give too little."""

    def _files(self) -> Any:
        with self._lock:
            if self._opened is None or self._opened[0] != os.getpid():
                self._opened = os.getpid(), self._open()
            return self._opened[1]

    def _facts(self) -> tuple[int, str]:
        if self._known is None:
            self._known = self.retrying(self._look)
        return self._known

    def _checked(self, offset: int, size: int, deadline: float) -> bytes:
        data = self._fetch(offset, size, deadline)
        if len(data) != size:
            raise _RetriedError(f"{len(data)} bytes came instead of {size}")
        return data

    def retrying(self, action: Callable[[float], T]) -> T:
        """What `action` gives; it is called with the time (of time.monotonic) at which it must give up.

        Raises:
            MissingSourceError: the server says that it is not there, or may not be read.
            ValueError: another final answer, or the last error once attempts or time have run out.
        """
        start = time.monotonic()
        deadline = start + self.retry.seconds
        for attempt in itertools.count(1):
            try:
                return action(deadline)
            except Exception as error:
                reason = self._reason(error)
                pause = self.retry.pause(attempt)
                if attempt < self.retry.attempts and time.monotonic() + pause < deadline:
                    time.sleep(pause)
                    continue
                tried = f"{attempt} attempts in {time.monotonic() - start:.1f} s" if attempt > 1 else "1 attempt"
                raise ValueError(f"{self} cannot be read ({tried}; the last: {reason})") from error
        raise AssertionError("unreachable")

    def _reason(self, error: Exception) -> str:
        """What to call an error that is retried; one that is final is raised, as a sentence where it is the user's."""
        if isinstance(error, _RetriedError):
            return str(error)
        status = next(
            (value for name in ("status", "code") if isinstance(value := getattr(error, name, None), int)), None
        )
        if status in MISSING_STATUSES or isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            if status in (404, 410) or isinstance(error, FileNotFoundError):
                raise MissingSourceError(f"{self} is missing") from error
            raise MissingSourceError(f"{self} may not be read (permission denied)") from error
        if status is not None and status >= 400 and status not in RETRIED_STATUSES:
            raise ValueError(f"{self} cannot be read (the server answers {status})") from error
        package = type(error).__module__.partition(".")[0]
        if isinstance(error, OSError | EOFError) or package in _STORE_PACKAGES:
            first_line = next(iter(str(error).splitlines()), "")
            if status is not None:
                return f"the server answers {status}"
            if isinstance(error, TimeoutError):
                return "no answer in time"
            return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
        raise error


class HttpSource(RemoteSource):
    """A file on a web server that answers range requests."""

    def _open(self) -> Any:
        # A link with escapes is taken as it is: escaping it anew would break its signature.
        return _file_system("http", encoded="%" in self.location)

    def _look(self, deadline: float) -> tuple[int, str]:
        # Not HEAD: links signed for GET refuse it, and it does not show that ranges work.
        status, headers, _ = self._get(0, 1, deadline)
        total = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", headers.get("Content-Range", ""))
        if status == 200:  # an empty file, or one of a byte, which came whole
            return int(headers["Content-Length"]), _tag(headers)
        if total is None:
            raise ValueError(f"{self} is given without its size (no whole Content-Range in the answer)")
        return int(total[1]), _tag(headers)

    def _fetch(self, offset: int, size: int, deadline: float) -> bytes:
        whole, tag = self._facts()
        status, headers, data = self._get(offset, size, deadline)
        if tag != _tag(headers) or (status == 206 and not headers.get("Content-Range", "").endswith(f"/{whole}")):
            raise ValueError(f"{self} changed while it was in use; start again when it is complete")
        if status == 206 and not headers["Content-Range"].startswith(f"bytes {offset}-"):
            raise _RetriedError(f"the answer is {headers['Content-Range']}, asked was byte {offset} on")
        return data

    def _get(self, offset: int, size: int, deadline: float) -> tuple[int, Any, bytes]:
        import aiohttp
        from fsspec.asyn import sync

        left = deadline - time.monotonic()
        if left <= 0:
            raise _RetriedError("no time is left")
        files = self._files()
        url = files.encode_url(self.location)
        request = dict(files.kwargs)
        request["headers"] = dict(request.get("headers", {})) | {
            "Range": f"bytes={offset}-{offset + size - 1}",
            "Accept-Encoding": "identity",
        }
        silence = self.retry.silence
        request["timeout"] = aiohttp.ClientTimeout(total=left, sock_connect=silence, sock_read=silence)

        async def get() -> tuple[int, Any, bytes]:
            session = await files.set_session()
            async with session.get(url, **request) as response:
                headers, length = response.headers, response.content_length
                if response.status == 416 and headers.get("Content-Range") == "bytes */0":
                    return 206, headers, b""
                response.raise_for_status()
                whole_asked = offset == 0 and length == size
                if response.status != 206 and not whole_asked and length != 0:
                    response.close()  # lest the whole file come
                    raise ValueError(
                        f"{self} is on a server that ignores range requests (status {response.status}); "
                        "copy the shards to one that answers them, or to a disk"
                    )
                if length is not None and length > size:
                    response.close()
                    raise _RetriedError(f"{length} bytes came instead of {size}")
                return response.status, headers, await response.read()

        return sync(files.loop, get)


class ObjectSource(RemoteSource):
    """An object of s3, gs, azure or whatever else fsspec has a file system for."""

    def _open(self) -> Any:
        return _file_system(self.location.partition("://")[0].lower())

    def _look(self, deadline: float) -> tuple[int, str]:
        info = self._files().info(self.location)
        if info.get("type") == "directory" or info.get("size") is None:
            raise MissingSourceError(f"{self} is no file")
        keys = (
            "ETag",
            "etag",
            "md5Hash",
            "generation",
            "VersionId",
            "LastModified",
            "last_modified",
            "mtime",
            "created",
        )
        return int(info["size"]), str(next((info[key] for key in keys if info.get(key)), ""))

    def _fetch(self, offset: int, size: int, deadline: float) -> bytes:
        return self._files().cat_file(self.location, start=offset, end=offset + size)


def file_system(url: str) -> Any:
    """fsspec's file system for a URL, to list folders with; `ValueError` naming the package that it needs."""
    return _file_system("http" if url.lower().startswith(("http:", "https:")) else url.partition("://")[0].lower())


def _file_system(protocol: str, **options: Any) -> Any:
    import fsspec

    try:
        return fsspec.filesystem(protocol, **options)
    except ImportError as error:
        extra = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}.get(protocol)
        wanted = f"pip install 'lumina-t2x[{extra}]'" if extra else str(error)
        raise ValueError(f"shards of {protocol}:// need a package that is not installed: {wanted}") from error
    except ValueError as error:
        raise ValueError(
            f"there is no file system for {protocol}:// (http, https, s3, gs and others have one)"
        ) from error


def _tag(headers: Any) -> str:
    return headers.get("ETag") or headers.get("Last-Modified") or ""


class _RangeStream(io.RawIOBase):
    """A source from start to end, some blocks read ahead."""

    def __init__(self, source: RemoteSource) -> None:
        self._source, self._size = source, source.size()
        self._asked = 0
        self._pool = ThreadPoolExecutor(STREAM_AHEAD, thread_name_prefix="read-ahead")
        self._coming: deque[Future[bytes]] = deque()
        self._block, self._at = b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:
        if self._at == len(self._block):
            while self._asked < self._size and len(self._coming) <= STREAM_AHEAD:
                count = min(STREAM_BLOCK, self._size - self._asked)
                self._coming.append(self._pool.submit(self._source.read, self._asked, count))
                self._asked += count
            if not self._coming:
                return 0
            self._block, self._at = self._coming.popleft().result(), 0
        count = min(len(buffer), len(self._block) - self._at)
        buffer[:count] = self._block[self._at : self._at + count]
        self._at += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._coming.clear()
        super().close()
