"""A network in front of a server: it passes requests on, or cuts, slows, answers 500 or 403, and changes bytes."""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = Callable[["Handler", bytes], "bytes | None"]
"""``fault(handler, body)`` returns the body to pass on; or ``None``, when it has answered itself or cut."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_):
        pass

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError):
            super().handle_one_request()

    def _pass(self):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self.server.requests.append((self.command, self.path, length))
        fault = self.server.fault
        if fault is not None and (body := fault(self, body)) is None:
            return
        up = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=120)
        headers = {key: value for key, value in self.headers.items() if key.lower() != "content-length"}
        up.request(
            self.command, self.path, body, headers | ({"Content-Length": str(len(body))} if body or length else {})
        )
        answer = up.getresponse()
        content = answer.read()
        self.send_response(answer.status)
        given = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        for key, value in answer.getheaders():
            if key.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                self.send_header(key, value)
        if given is not None:
            self.send_header("Content-Length", given)
        self.end_headers()
        on_answer = self.server.on_answer
        self.wfile.write(content if on_answer is None else on_answer(self, content))
        up.close()

    def answer(self, status: int, code: str) -> None:
        content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(0 if self.command == "HEAD" else len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def cut(self) -> None:
        self.close_connection = True
        self.connection.close()


for _method in ("GET", "PUT", "POST", "DELETE", "HEAD"):
    setattr(Handler, f"do_{_method}", Handler._pass)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    # The server's socket is busy when 4 parts and a lease come at once.
    request_queue_size = 64

    def handle_error(self, *_):
        pass


class FaultyNetwork:
    def __init__(self, upstream: int) -> None:
        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.upstream = upstream
        self._server.fault = self._server.on_answer = None
        self._server.requests = []
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def requests(self) -> list[tuple[str, str, int]]:
        return self._server.requests

    def fails(self, fault: Fault | None) -> None:
        self._server.fault = fault

    def answers(self, change: Callable[[Handler, bytes], bytes] | None) -> None:
        self._server.on_answer = change

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def cut(handler, body):
    handler.cut()


def broken(handler, body):
    handler.answer(500, "InternalError")


def expired(handler, body):
    handler.answer(403, "ExpiredToken")


def slow(secs: float) -> Fault:
    def fault(handler, body):
        time.sleep(secs)
        return body

    return fault


def held(goes_on: threading.Event) -> Fault:
    def fault(handler, body):
        goes_on.wait(300)
        return body

    return fault


def only(method: str, part: str, fault: Fault, *, times: int | None = None) -> Fault:
    """The fault for the requests of this method whose path has ``part``; ``times`` bounds it."""
    left = [times]

    def chosen(handler, body):
        if handler.command != method or part not in handler.path or left[0] == 0:
            return body
        if left[0] is not None:
            left[0] -= 1
        return fault(handler, body)

    return chosen
