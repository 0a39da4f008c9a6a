"""Upload to the hub, against a server of the hub's interface on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import constants

from utils.config import UserError
from utils.runs.hub import push, refuse_closed_hub

TOKEN = "hf_secretsecretsecret"  # noqa: S105


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload needs. Every request is kept in `server.seen`."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer({"name": "somebody", "type": "user", "id": "somebody/model", "sha": "1" * 40,
                     "siblings": []})

    do_HEAD = do_GET

    def do_PUT(self):
        self.answer({})

    def do_POST(self):
        body = self.body()
        if self.path.endswith("/repos/create"):
            self.answer({"url": f"{self.server.url}/somebody/model", "id": "somebody/model"})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for file in json.loads(body)["files"]]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            self.answer({"commitUrl": f"{self.server.url}/user/name/commit/1", "commitOid": "1" * 40,
                         "success": True})
        else:
            self.answer({})

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, value):
        body = self.body() if self.command == "PUT" else b""
        self.server.seen.append((self.command, self.path, self.headers.get("Authorization"), body))
        created = self.server.posted and "POST" not in self.server.statuses
        missing = "/api/models/" in self.path and self.command in ("GET", "HEAD") and not created
        status = 404 if missing else self.server.statuses.get(self.command, 200)
        text = json.dumps(value if status == 200 else {"error": "no"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)


class Recorded(Hub):
    def body(self):
        body = super().body()
        if self.command == "POST":
            self.server.posted.append((self.path, body))
        return body


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorded)
    server.seen, server.posted, server.statuses = [], [], {}
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def final(folder):
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "opt"}')
    (folder / "README.md").write_text("# card\n")
    return folder


def test_a_finished_model_is_uploaded_and_private(hub, tmp_path):
    refuse_closed_hub("somebody/model")
    lines = []
    push(final(tmp_path / "final"), "somebody/model", lines.append)
    assert len(lines) == 1 and "uploaded to http://127.0.0.1" in lines[0] and TOKEN not in lines[0]
    created = [json.loads(body) for path, body in hub.posted if path.endswith("/repos/create")]
    assert [one["visibility"] for one in created] == ["private"] and created[0]["name"] == "model"
    [commit] = [body.decode() for path, body in hub.posted if "/commit/" in path]
    operations = [json.loads(line) for line in commit.splitlines()]
    uploaded = {one["value"]["path"] for one in operations if one["key"] == "file"}
    assert uploaded == {"config.json", "README.md"}
    assert all(authorization == f"Bearer {TOKEN}" for _, _, authorization, _ in hub.seen)


@pytest.mark.parametrize("status", [401, 403, 500])
def test_an_upload_that_fails_loses_nothing_and_says_how_to_try_again(status, hub, tmp_path):
    hub.statuses["POST"] = status
    folder, lines = final(tmp_path / "final"), []
    push(folder, "somebody/model", lines.append)
    assert len(lines) == 1 and "was not uploaded: " in lines[0] and TOKEN not in lines[0]
    assert f"hf upload somebody/model {folder}" in lines[0] and "\n" not in lines[0]
    assert {path.name for path in folder.iterdir()} == {"config.json", "README.md"}


@pytest.mark.parametrize("name", ["model", "a/b/c", "a/b c", "", "-a/b", "https://huggingface.co/a/b"])
def test_a_name_that_is_no_repository_is_refused(name, hub):
    with pytest.raises(UserError, match="^push_to_hub: '.*' is no repository; give user/name$"):
        refuse_closed_hub(name)


def test_a_token_that_is_missing_or_refused_is_said_before_training(hub, monkeypatch, tmp_path):
    hub.statuses["GET"] = 401
    with pytest.raises(UserError, match="^push_to_hub: the hub cannot be asked: ") as caught:
        refuse_closed_hub("somebody/model")
    assert TOKEN not in str(caught.value) and "\n" not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match="^push_to_hub: no token of the hub is here"):
        refuse_closed_hub("somebody/model")


def test_a_hub_that_does_not_answer_is_said(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="^push_to_hub: the hub cannot be asked: "):
        refuse_closed_hub("somebody/model")
