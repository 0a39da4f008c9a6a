"""Talks to the rating page as a browser does: a cookie, the CSRF token, JSON."""

import http.client
import json
import uuid


class Browser:
    """One browser.

    Args:
        port: of a server on this machine.
        host: what it writes into the header Host; None: 127.0.0.1 with the port.
    """

    def __init__(self, port: int, host: str | None = None):
        self.port, self.host, self.cookie, self.csrf = port, host or f"127.0.0.1:{port}", None, None
        self.headers = {}  # of the last answer
        self.connection = None

    def send(self, method: str, path: str, body: bytes | None = None, **headers) -> http.client.HTTPResponse:
        """One request; the answer is not read. `headers` replace those that a browser sends; None: left out.
        """
        self.connection = self.connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"host": self.host, "cookie": self.cookie}
        if body is not None:
            sent |= {"x_csrf_token": self.csrf, "origin": f"http://{self.host}"}
        sent |= headers
        sent = {name.replace("_", "-"): value for name, value in sent.items() if value is not None}
        try:
            self.connection.request(method, path, body, sent)
            response = self.connection.getresponse()
        except (OSError, http.client.HTTPException):
            self.close()
            raise
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        if "set-cookie" in self.headers:
            self.cookie = self.headers["set-cookie"].split(";")[0]
        return response

    def ask(self, method: str, path: str, body: bytes | None = None, **headers):
        """Status and content of an answer: JSON, else bytes."""
        response = self.send(method, path, body, **headers)
        content = response.read()
        if response.will_close:
            self.close()
        is_json = response.getheader("content-type") == "application/json"
        return response.status, json.loads(content) if is_json else content

    def get(self, path: str, **headers):
        return self.ask("GET", path, **headers)

    def post(self, path: str, value=None, **headers):
        return self.ask("POST", path, json.dumps(value or {}).encode(), **headers)

    def open(self) -> dict:
        """What a page does first: the state, with the CSRF token."""
        status, state = self.get("/api/state")
        assert status == 200, state
        self.csrf = state["csrf"]
        return state

    def rater(self, name: str) -> "Browser":
        """Begin to rate under a name."""
        self.open()
        assert self.post("/api/rater", {"name": name}) == (200, {"rater": name})
        return self

    def rate(self, task: dict, order: list[list[int]] | None = None, **values):
        """Rank a task; without an order in the order in which it is shown."""
        order = order or [[place] for place in range(len(task["answers"]))]
        return self.post("/api/ratings", {"key": str(uuid.uuid4()), "task": task["id"], "kind": "ranking",
                                          "order": order, "confidence": 2, "seconds": 1.5, "better": None,
                                          **values})

    def chat(self, value: dict) -> list[dict]:
        """All lines of a chat."""
        status, content = self.post("/api/chat", value)
        assert status == 200, content
        return [json.loads(line) for line in content.decode().splitlines()]

    def close(self) -> None:
        if self.connection is not None:
            self.connection.close()
        self.connection = None
