from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fsspec")


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    from tests.objects.store_helpers import moto_server

    with moto_server() as port:
        yield port


@pytest.fixture
def s3(s3_port: int) -> Iterator[object]:
    from tests.objects.store_helpers import S3, Proxy

    proxy = Proxy(s3_port)
    try:
        yield S3(proxy, f"http://127.0.0.1:{s3_port}")
    finally:
        proxy.close()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test uses the cache of the user, or credentials of the machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
