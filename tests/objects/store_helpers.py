"""A server that speaks S3, on loopback, behind a proxy that spoils what a test asks for."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from buffers.dataset import IndividualFileDataset
from tests import tagged

#: Spoils a request (method, path): what it returns is done instead of passing the answer on; None passes it on.
Fault = Callable[[str, str], "str | None"]


class Proxy:
    """Passes requests on to a server, counts them, and spoils some.

    Attributes:
        fault: Says of a request (method, path) "500", "503", "403", "hang", "drop" (the connection), "short" (half of
            the bytes, as if these were all), "cut" (half of the bytes that were announced), "lose" (nothing is
            done, and said to be), or None.
        requests: (method, path, range) of each.
    """

    def __init__(self, port: int) -> None:
        self.fault: Fault = lambda method, path: None
        self.requests: list[tuple[str, str, str]] = []
        self.num_bytes = 0
        self.ended, self.has_answered_late = threading.Event(), False
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # An answer in two packets would wait for the first to be acknowledged.
            wbufsize = 2**16
            disable_nagle_algorithm = True

            def handle_one_request(self) -> None:
                with contextlib.suppress(ConnectionError):
                    super().handle_one_request()

            def handle_expect_100(self) -> bool:
                going_on = super().handle_expect_100()
                self.wfile.flush()
                return going_on

            def pass_on(self) -> None:
                outer.pass_on(self, port)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = pass_on

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def pass_on(self, handler: BaseHTTPRequestHandler, port: int) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        self.requests.append((handler.command, handler.path, handler.headers.get("Range") or ""))
        fault = self.fault(handler.command, handler.path)
        if fault == "hang":
            self.has_answered_late |= not self.ended.wait(60)
        if fault in ("hang", "drop"):
            handler.close_connection = True
            return
        if fault is not None and fault.isdigit():
            code = {"403": "AccessDenied", "503": "SlowDown", "507": "InsufficientStorage"}.get(fault, "InternalError")
            self.answer(handler, int(fault), f"<Error><Code>{code}</Code></Error>".encode(), [])
            return
        if fault == "lose":
            self.answer(handler, 200, b"", [("ETag", '"0"')])
            return
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request(handler.command, handler.path, body, dict(handler.headers.items()))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        left_out = {"content-length", "connection", "transfer-encoding", "server", "date"}
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in left_out]
        if handler.command == "HEAD":
            headers.append(("Content-Length", answer.getheader("Content-Length") or "0"))
        if fault == "short":
            data = data[: len(data) // 2]
        self.answer(handler, answer.status, data, headers, cut=fault == "cut")

    def answer(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        data: bytes,
        headers: list[tuple[str, str]],
        cut: bool = False,
    ) -> None:
        handler.send_response(status)
        for name, value in headers:
            handler.send_header(name, value)
        if handler.command != "HEAD":
            handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        sent = data[: len(data) // 2] if cut else data
        if handler.command != "HEAD":
            handler.wfile.write(sent)
            self.num_bytes += len(sent) if handler.command == "GET" else 0
        handler.wfile.flush()
        handler.close_connection = handler.close_connection or cut

    def close(self) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()

    def gets(self, of: str = "") -> list[tuple[str, str, str]]:
        """The requests for content of objects, not lists, whose path has this text."""
        return [r for r in self.requests if r[0] == "GET" and "list-type" not in r[1] and of in r[1]]

    def lists(self) -> int:
        return sum("list-type" in path for _, path, _ in self.requests)


class S3:
    """A bucket, the proxy in front of it, and what fsspec needs to reach it."""

    def __init__(self, proxy: Proxy, endpoint: str) -> None:
        self.proxy = proxy
        self.options = {"key": "key", "secret": "secret", "endpoint_url": proxy.url}
        self.direct = {**self.options, "endpoint_url": endpoint}

    def new_url(self) -> str:
        """A folder in which nothing is, in a bucket of its own."""
        bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        self.filesystem().mkdir(bucket)
        return f"s3://{bucket}/some/episodes"

    def filesystem(self) -> Any:
        """The same one for all tests, as making one takes long."""
        import s3fs

        return s3fs.S3FileSystem(**self.direct, use_listings_cache=False)

    def put(self, directory: Path, url: str) -> None:
        """Copy all files, without an index, as other tools do."""
        fs = self.filesystem()
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                fs.pipe_file(f"{url}/{path.relative_to(directory)}", path.read_bytes())


def failing(num: int, fault: str, method: str = "GET", of: str = "") -> Fault:
    """Spoil the first requests of a method whose path has a text."""
    left = itertools.count(num, -1)
    return lambda found, path: fault if found == method and of in path and next(left) > 0 else None


def always(fault: str, method: str = "GET", of: str = "") -> Fault:
    return lambda found, path: fault if found == method and of in path else None


def tagged_episodes(directory: Path, lengths: list[int], infos: bool = False, **options: Any) -> None:
    """Write tagged episodes, with a late field if there is an info."""
    with IndividualFileDataset(10_000, directory=directory, durability="rename", **options) as dataset:
        first = dataset.table.next_id
        for number, length in enumerate(lengths, first):
            info = {"task": f"task {number}"} if infos else None
            dataset.add_episode(tagged.episode(length, number), info=info)


def reader(url: str, cache: Path | None = None, **options: Any) -> IndividualFileDataset:
    """A dataset of a URL, with a cache of its own or none."""
    cached = {"cache_bytes": 0} if cache is None else {"cache_directory": cache}
    return IndividualFileDataset(directory=url, mode="r", **{**cached, **options})


def same_batches(one: IndividualFileDataset, other: IndividualFileDataset, num: int = 4, **options: Any) -> None:
    """Compare batches of the same seed, bit by bit."""
    options = {"batch_size": 8, "sequence_length": 3, "seed": 5, "include": ("index", "episode"), **options}
    loaders = [iter(dataset.get_loader(**options)) for dataset in (one, other)]
    for _ in range(num):
        found, expected = (tagged.flatten(next(loader)) for loader in loaders)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name].numpy(), value.numpy(), err_msg=name, strict=True)
    for loader in loaders:
        del loader


def wait_until(is_true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def moto_server() -> Iterator[int]:
    """The port of moto's server."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()
