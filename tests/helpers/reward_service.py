"""A reward service on this machine, which behaves as a test wants it to."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def service(reply):
    """The address of a service that answers a request with `reply(asked, handler)`: the JSON that it sends as
    status 200; None: the function has sent something itself.

    Yields:
        Its address, and a list of (headers, asked) that grows.
    """
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((dict(self.headers), asked))
            made = reply(asked, self)
            if made is not None:
                send(self, 200, json.dumps(made).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score", requests
    finally:
        server.shutdown()
        server.server_close()


def send(handler, status: int, content: bytes, **headers) -> None:
    """A whole answer."""
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(content))} | headers).items():
        handler.send_header(name, value)
    handler.end_headers()
    try:
        handler.wfile.write(content)
    except OSError:  # the client had enough
        pass


def drip(handler) -> None:
    """A byte now and then, for ever: each comes before a socket's own timeout."""
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(200):
            handler.wfile.write(b" ")
            time.sleep(0.05)
    except OSError:
        pass
