"""ObjectStore: the objects under a URL, by fsspec. Each request has a deadline, is repeated a few times, and ends."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import secrets
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from datetime import datetime
from functools import partial
from typing import Any, NamedTuple

from buffers.disk import DamagedEpisodeError
from buffers.utils import Process, ThreadLock, how_to_install, number

__all__ = ["ObjectInfo", "ObjectStore", "ObjectStoreError", "Page", "check_local", "is_url"]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")
_NUM_ATTEMPTS = 3
# Seconds before the second attempt; twice that before the third.
_PAUSE = 0.1
_NUM_AT_ONCE = 16
# Seconds for requests that are cancelled to end.
_END = 1.0
# An upload may take this long besides the deadline.
_SLOWEST_BYTES_PER_SECOND = 2**18
_PAGE = 1000
# What another attempt would not change. A missing object is no error of the store.
_FINAL = (
    *(PermissionError, NotADirectoryError, IsADirectoryError, NotImplementedError, ValueError, TypeError),
    *(ImportError, MemoryError),
)
_FINAL_NAMES = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")
# What tells a version of an object from another one.
_STAMPS = ("ETag", "etag", "md5Hash", "content_hash", "mtime", "LastModified", "last_modified", "created")
# The name of a method of a file system, or a function of the file system.
_Method = str | Callable[[Any], Coroutine[Any, Any, Any]]


def is_url(path: str) -> bool:
    """Whether this is a URL, `s3://bucket/folder` for example, rather than a path of a directory."""
    return _URL.match(path) is not None


def check_local(path: str, advice: str) -> None:
    """ValueError, with advice, for a URL where a directory is meant."""
    if is_url(path):
        raise ValueError(f"{path} is a URL, and a local directory is needed. {advice}.")


class ObjectStoreError(OSError):
    """A store of objects does not do what was asked. Names the URL, what was asked, and what to do."""


class ObjectInfo(NamedTuple):
    """What a store says of an object."""

    size: int
    stamp: int  # Another one for another version of the object: 63 bits of its ETag, or of when it was made.


class Page(NamedTuple):
    """A part of what is under a URL."""

    objects: list[tuple[str, ObjectInfo]]
    folders: list[str]


class ObjectStore:
    """The objects under a URL. It may be used by threads, and each process has its own connections.

    Args:
        url: As fsspec takes it, `s3://bucket/folder` for example.
        storage_options: For fsspec: credentials, endpoints.
        timeout: Seconds until a request is given up, all attempts together.

    Raises:
        ValueError: A URL without a bucket or folder, through a cache of fsspec, or that fsspec does not know; from
            requests, too: an option that it does not know.
        ImportError: fsspec, or what it needs for this kind of URL, is missing.
    """

    def __init__(self, url: str, storage_options: Mapping[str, Any] | None = None, timeout: float = 10.0) -> None:
        self.url = url.rstrip("/")
        if not is_url(self.url):  # What is left, `s3:`, is a local folder for fsspec.
            raise ValueError(f"{url} names no bucket or folder. Add one, as in {url.partition('://')[0]}://name.")
        self.timeout = number("timeout", timeout, 0.01)
        protocols = self.url.partition("://")[0]
        if "cache" in protocols or "blockcache" in protocols:
            raise ValueError(
                f"{url} goes through a cache of fsspec, which returns wrong bytes when several threads read. Leave it "
                "out: there is a cache already, see `cache_bytes`."
            )
        self._options = dict(storage_options or {})
        self._lock = ThreadLock()
        self._process = -1
        self._opened: tuple[Any, str] = None, ""
        self.num_requests, self.num_bytes = 0, 0  #: What was asked for, and what it brought.
        self._connect()

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStore, (self.url, self._options, self.timeout)

    @property
    def identity(self) -> str:
        """What tells it from other stores: the URL and the endpoint."""
        client = self._options.get("client_kwargs") or {}
        return f"{self.url} {self._options.get('endpoint_url') or client.get('endpoint_url') or ''}"

    # Reading.

    def pages(self, folder: str = "") -> Iterator[Page]:
        """What is directly under the URL, or a folder of it, in pages of bounded size where the store is S3.

        FileNotFoundError if the store knows that there is no such place.
        """
        path, what = self._path(folder), "its list of objects"
        if not _is_s3(self._connect()[0]):
            yield _page(self._do(what, "ls", path, detail=True))
            return
        bucket, _, key = path.partition("/")
        prefix = f"{key.rstrip('/')}/" if key.strip("/") else ""
        asked = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/", "MaxKeys": _PAGE}
        while True:
            found = self._do(what, "call_s3", "list_objects_v2", **asked)
            contents, inner = found.get("Contents", []), found.get("CommonPrefixes", [])
            infos = [{**entry, "name": entry["Key"], "size": entry["Size"], "type": "file"} for entry in contents]
            yield _page(infos + [{"name": entry["Prefix"], "type": "directory"} for entry in inner])
            if not found.get("IsTruncated"):
                return
            asked["ContinuationToken"] = found["NextContinuationToken"]

    def info(self, name: str) -> ObjectInfo:
        """Size and stamp of an object; FileNotFoundError if there is none."""
        return _info(self._do(f"what {name} is", "info", self._path(name), name=name))

    def read(self, name: str) -> bytes:
        """All of a small object; FileNotFoundError if there is none."""
        data = self._do(f"all of {name}", "cat_file", self._path(name), name=name)
        self.num_bytes += len(data)
        return data

    def read_ranges(
        self, ranges: Sequence[tuple[str, int, int, int]]
    ) -> Iterator[tuple[int, bytes | FileNotFoundError | DamagedEpisodeError]]:
        """Bytes of objects, several at a time.

        Args:
            ranges: Name, start and end, and the size that the object had when it was found.

        Yields:
            The position in `ranges`, in the order in which answers come, and the bytes; FileNotFoundError if the
            object is gone, and DamagedEpisodeError if it has another size now.

        Raises:
            ObjectStoreError: Of the first that fails otherwise.
        """
        yield from self._each([partial(self._read_range, *asked) for asked in ranges])

    async def _read_range(self, name: str, start: int, end: int, size: int) -> bytes | Exception:
        path = self._path(name)

        async def attempt(fs: Any) -> bytes | Exception:
            try:
                data = await _started(fs, "cat_file", (path,), {"start": start, "end": end})
                if len(data) == end - start:
                    return data
                error = OSError(errno.EIO, f"{len(data)} bytes came")
            except OSError as found:
                if found.errno != errno.EINVAL:  # No such range.
                    raise
                error = found
            # Another attempt would not change the size of an object, but may bring the rest of a short answer.
            info = _info(await _started(fs, "info", (path,), {}))
            if info.size == size:
                raise error
            return DamagedEpisodeError(f"has {info.size} bytes, and had {size} when it was found")

        try:
            answer = await self._request(f"bytes {start} to {end} of {name}", attempt, name=name)
        except FileNotFoundError as error:
            return error
        self.num_bytes += len(answer) if isinstance(answer, bytes) else 0
        return answer

    # Writing.

    def write(self, name: str, data: bytes) -> None:
        """Put an object in place, which replaces the one there was."""
        self._do(f"writing {name}", "pipe_file", self._path(name), data, name=name, num_bytes=len(data))

    def upload(self, files: Sequence[tuple[str, str, int]]) -> Iterator[int]:
        """Upload files (path, name, size), several at a time; yields their positions as they are there.

        Those of files that are removed before they are read are left out. FileNotFoundError if there is no such bucket.
        """
        calls = [partial(self._upload, *file) for file in files]
        yield from (at for at, is_sent in self._each(calls) if is_sent)

    async def _upload(self, path: str, name: str, size: int) -> bool:
        where = self._path(name)
        fs = self._connect()[0]
        if not _is_async(fs) and "/" in name:
            await _start(partial(fs.makedirs, where.rpartition("/")[0], exist_ok=True))
        try:
            await self._request(f"uploading {name}", "put_file", path, where, name=name, num_bytes=size)
        except FileNotFoundError:
            if os.path.exists(path):
                raise
            return False
        return True

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects, if they are there."""
        for _ in self._each([partial(self._remove, name) for name in names]):
            pass

    async def _remove(self, name: str) -> None:
        try:
            await self._request(f"removing {name}", "rm_file", self._path(name), name=name)
        except FileNotFoundError:
            return

    def prepare(self) -> None:
        """Make the folder, on a store that has folders."""
        fs, path = self._connect()
        if not _is_async(fs):
            fs.makedirs(path, exist_ok=True)

    # Requests.

    def _path(self, name: str) -> str:
        path = self._connect()[1]
        return f"{path.rstrip('/')}/{name}" if name else path

    def _connect(self) -> tuple[Any, str]:
        """The file system of this process, and the path of the URL there: what a parent has opened is not for us."""
        if self._process != Process.number:
            with self._lock:
                # Its end would disturb the parent, whose connections it has.
                self._inherited = self._opened
                self._opened = _connected(self.url, self._options)
                self._process = Process.number
        return self._opened

    def _do(self, what: str, method: str, *arguments: Any, **options: Any) -> Any:
        """One request, and wait for it."""
        return next(self._each([partial(self._request, what, method, *arguments, **options)]))[1]

    def _each(self, calls: Iterable[Callable[[], Coroutine[Any, Any, Any]]]) -> Iterator[tuple[int, Any]]:
        """Run coroutines, several at a time, and yield position and result of each as it ends."""
        import fsspec.asyn

        loop = fsspec.asyn.get_loop()
        running: dict[Future[Any], int] = {}
        left = enumerate(calls)
        try:
            while True:
                while len(running) < _NUM_AT_ONCE and (following := next(left, None)) is not None:
                    running[asyncio.run_coroutine_threadsafe(_outcome(following[1]), loop)] = following[0]
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    at, (result, error) = running.pop(future), future.result()
                    if error is not None:
                        raise error
                    yield at, result
        finally:
            for future in running:
                future.cancel()
            wait(running, timeout=_END)

    async def _request(
        self, what: str, method: _Method, *arguments: Any, name: str = "", num_bytes: int = 0, **options: Any
    ) -> Any:
        """Ask by a method or function of the file system, again after errors that may pass, until the deadline."""
        fs, loop = self._connect()[0], asyncio.get_running_loop()
        end = loop.time() + self.timeout + num_bytes / _SLOWEST_BYTES_PER_SECOND
        for left in reversed(range(_NUM_ATTEMPTS)):
            self.num_requests += 1
            try:
                share = max(end - loop.time(), 0.001) / (left + 1)
                call = _started(fs, method, arguments, options) if isinstance(method, str) else method(fs)
                return await asyncio.wait_for(call, share)
            except FileNotFoundError as error:
                if not name or method in ("put_file", "pipe_file"):
                    found = "There is no such bucket or folder. Make it, or check the URL"
                    raise FileNotFoundError(errno.ENOENT, found, self.url) from error
                raise FileNotFoundError(errno.ENOENT, "There is no such object", f"{self.url}/{name}") from error
            except Exception as error:
                if isinstance(error, _FINAL) or type(error).__name__ in _FINAL_NAMES or not left:
                    raise self._explained(error, what, _NUM_ATTEMPTS - left) from error
            pause = _PAUSE * 2 ** (_NUM_ATTEMPTS - 1 - left) * (0.5 + secrets.randbelow(1000) / 1000)
            await asyncio.sleep(min(pause, max(end - loop.time(), 0) / 4))
        raise AssertionError

    def _explained(self, error: Exception, what: str, num_attempts: int) -> ObjectStoreError | ValueError:
        if isinstance(error, TypeError):
            return _wrong_options(self.url, self._options, error)
        if isinstance(error, (asyncio.TimeoutError, TimeoutError)):
            found, code = f"no answer within {self.timeout:g} s", errno.ETIMEDOUT
            advice = "Check that the store can be reached, or raise `timeout`"
        else:
            found, code = f"{type(error).__name__}: {str(error)[:300]}", errno.EIO
            advice = "Check the store and the `storage_options`, and try again"
            if isinstance(error, PermissionError) or type(error).__name__ in _FINAL_NAMES:
                code, advice = errno.EACCES, "Check the credentials in `storage_options`, and what they permit"
        attempts = f"{num_attempts} attempts" if num_attempts > 1 else "1 attempt"
        return ObjectStoreError(code, f"The store was asked for {what}: {found} ({attempts}). {advice}", self.url)


def _connected(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise ImportError(f"{url} needs fsspec ({error}): {how_to_install('objects')}.") from None
    own: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if re.match(r"s3a?:", url):
        # Otherwise there are ten connections, and each of our attempts would be several of botocore's.
        own["config_kwargs"] = {"max_pool_connections": 2 * _NUM_AT_ONCE, "retries": {"max_attempts": 0}}
        own["config_kwargs"].update(options.get("config_kwargs") or {})
    try:
        fs, path = url_to_fs(url, **{**options, **own})
    except ImportError as error:
        raise ImportError(f"{url}: {error}. Install the library for this kind of URL beside fsspec.") from error
    except TypeError as error:
        raise _wrong_options(url, options, error) from error
    if hasattr(fs, "retries"):
        fs.retries = 1
    return fs, str(path)


def _wrong_options(url: str, options: Mapping[str, Any], error: TypeError) -> ValueError:
    found = f"{url} cannot be reached with these `storage_options` ({', '.join(map(repr, options)) or 'none'})"
    return ValueError(f"{found}: {error}. Correct them.")


def _is_async(fs: Any) -> bool:
    return bool(getattr(fs, "async_impl", False))


def _is_s3(fs: Any) -> bool:
    return hasattr(fs, "call_s3") and not getattr(fs, "version_aware", False)


async def _outcome(call: Callable[[], Coroutine[Any, Any, Any]]) -> tuple[Any, Exception | None]:
    """Result or error: asyncio would print the error of a call that nobody waits for any more."""
    try:
        return await call(), None
    except Exception as error:
        return None, error


async def _started(fs: Any, method: str, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
    """A method of a file system: as a coroutine where it has one, otherwise in a thread."""
    if _is_async(fs):
        return await getattr(fs, f"_{method}")(*arguments, **options)
    return await _start(partial(getattr(fs, method), *arguments, **options))


async def _start(call: Callable[[], Any]) -> Any:
    """Call it in a thread that nobody waits for at the end of the program, as it may hang for ever."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    future.set_running_or_notify_cancel()
    threading.Thread(target=run, name="buffers-objects", daemon=True).start()
    return await asyncio.wrap_future(future)


def _page(infos: Iterable[Mapping[str, Any]]) -> Page:
    page = Page([], [])
    for info in infos:
        name = str(info["name"])
        last = name.rstrip("/").rpartition("/")[2]
        if info["type"] == "directory":
            page.folders.append(last)
        elif not name.endswith("/"):  # Some tools make an empty object for a folder.
            page.objects.append((last, _info(info)))
    return page


def _info(info: Mapping[str, Any]) -> ObjectInfo:
    name = next((name for name in _STAMPS if info.get(name)), "")
    found = info.get(name)
    # fsspec's memory gives times in one form in a list, and in another by itself.
    stamp = f"{name} {found.timestamp() if isinstance(found, datetime) else found}" if name else ""
    digest = hashlib.blake2b(stamp.encode(), digest_size=8).digest()
    return ObjectInfo(int(info["size"]), int.from_bytes(digest, "little") >> 1 if stamp else 0)
