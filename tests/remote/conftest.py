"""A real server with S3's protocol, and a network in front of it that fails when it is told to."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("mirrors")

from faults import FaultyNetwork  # noqa: E402 - found by the line above

BUCKET = "bucket"


@pytest.fixture(scope="module")
def s3_server() -> Iterator[int]:
    """The port of a server with an empty bucket."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    server._server.app = _in_turn(server._server.app)
    yield server.get_host_and_port()[1]
    server.stop()


def _in_turn(app):
    """The server checks the condition of a write first and writes then; for a real store, that is one act."""
    turn = threading.Lock()

    def called(environ, start_response):
        with turn if {"HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"} & environ.keys() else nullcontext():
            return app(environ, start_response)

    return called


@pytest.fixture
def network(s3_server, monkeypatch) -> Iterator[FaultyNetwork]:
    """The way to the server, with an empty bucket behind it."""
    base = f"http://127.0.0.1:{s3_server}"
    urllib.request.urlopen(urllib.request.Request(f"{base}/moto-api/reset", method="POST")).close()
    urllib.request.urlopen(urllib.request.Request(f"{base}/{BUCKET}", method="PUT")).close()
    way = FaultyNetwork(s3_server)
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{way.port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield way
    way.close()


@pytest.fixture(params=["s3", "directory"])
def url(request, tmp_path) -> str:
    """The address of an empty mirror, one of each kind."""
    if request.param == "directory":
        return str(tmp_path / "mirror")
    request.getfixturevalue("network")
    return f"s3://{BUCKET}/runs/x"


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: for tests that save hundreds of times."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="stepguard-", dir=memory))
    yield path
    shutil.rmtree(path)
