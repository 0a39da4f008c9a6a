"""What the rating page refuses: each bad request with its status, and what it sends with every answer."""

import json
import os
from html.parser import HTMLParser

import pytest

from browser import Browser
from served import served, words_of, write_models
from utils.config import UserError, parse_config
from utils.feedback import security
from utils.feedback.security import Buckets, Sessions, installation_key, read_token, safe_html

TOKEN = "a-token-of-thirty-two-characters"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"), "first")


@pytest.fixture(scope="module")
def port(folder, tmp_path_factory):
    """A page for this machine."""
    with served(words_of(folder, tmp_path_factory.mktemp("page"))) as (_, port):
        yield port


@pytest.fixture(scope="module")
def closed_port(folder, tmp_path_factory):
    """A page with a login."""
    output = tmp_path_factory.mktemp("closed")
    (output / "token").write_text(TOKEN)
    (output / "token").chmod(0o600)
    with served(words_of(folder, output, "--token_file", str(output / "token"))) as (_, port):
        yield port


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """More requests than one browser makes come from these tests."""
    monkeypatch.setattr(Buckets, "take", lambda self, address: True)


# -------------------------------------------------------------------------------------------- what is refused

BIG = json.dumps({"name": "x" * 1_000_001}).encode()
BAD = [
    # method, path, body, headers in place of a browser's, status
    ("POST", "/api/rater", b'{"name": "Ann"}', {"x_csrf_token": None}, 403),
    ("POST", "/api/rater", b'{"name": "Ann"}', {"x_csrf_token": "guessed"}, 403),
    ("POST", "/api/rater", b'{"name": "Ann"}', {"cookie": None}, 403),
    ("POST", "/api/rater", b'{"name": "Ann"}', {"origin": "http://evil.example"}, 403),
    ("POST", "/api/rater", b'{"name": "Ann"}', {"origin": "null"}, 403),
    ("POST", "/api/rater", b'{"name": "Ann"}', {"sec_fetch_site": "cross-site"}, 403),
    ("GET", "/api/state", None, {"sec_fetch_site": "cross-site"}, 403),
    ("GET", "/api/state", None, {"sec_fetch_site": "same-site"}, 403),
    ("GET", "/api/state", None, {"host": "evil.example"}, 403),
    ("GET", "/", None, {"host": "127.0.0.1.evil.example"}, 403),
    ("GET", "/", None, {"host": "192.168.0.7:8017"}, 403),
    ("GET", "/", None, {"host": ""}, 403),
    ("GET", "/", None, {"host": "[::1"}, 403),
    ("POST", "/api/rater", BIG, {}, 413),
    ("POST", "/api/chat", b"x" * 10_000_000, {}, 413),
    ("POST", "/api/rater", b"{", {}, 400),
    ("POST", "/api/rater", b"[]", {}, 400),
    ("POST", "/api/rater", b'{"name": NaN}', {}, 400),
    ("POST", "/api/rater", b'{"name": "\\ud800"}', {}, 400),
    ("POST", "/api/rater", b'{"name": "\xff"}', {}, 400),
    ("POST", "/api/rater", b"[" * 100_000, {}, 400),
    ("POST", "/api/rater", b'{"name": "Ann", "admin": true}', {}, 400),
    ("POST", "/api/rater", b'{"name": ["Ann"]}', {}, 400),
    ("POST", "/api/rater", b'{"name": " \\n "}', {}, 400),
    ("POST", "/api/rater", b'{"name": "Ann\\u0000"}', {}, 400),
    ("POST", "/api/rater", json.dumps({"name": "x" * 61}).encode(), {}, 400),
    ("GET", "/api/task", None, {}, 409),
    ("POST", "/api/ratings", b"{}", {}, 409),
    ("POST", "/api/login", b'{"token": "any"}', {}, 401),
    ("GET", "/api/nothing", None, {}, 404),
    ("GET", "/static/../feedback.py", None, {}, 404),
    ("GET", "/static/..%2f..%2fsecurity.py", None, {}, 404),
    ("GET", "/static/%2e%2e/security.py", None, {}, 404),
    ("GET", "/static//etc/passwd", None, {}, 404),
    ("GET", "/api/export/..%2f..%2fsession.key", None, {}, 404),
    ("GET", "/api/rated?before=1%20OR%201", None, {}, 400),
    ("GET", "/api/rater", None, {}, 405),
    ("DELETE", "/api/ratings", None, {}, 405),
]


@pytest.mark.parametrize(("method", "path", "body", "headers", "status"), BAD, ids=[
    f"{case[0]} {case[1]} {str((case[2] or b'')[:20])} {case[3]}" for case in BAD])
def test_a_bad_request_is_refused_in_one_line(method, path, body, headers, status, port):
    browser = Browser(port)
    browser.open()
    found, answer = browser.ask(method, path, body, **headers)
    assert found == status
    assert list(answer) == ["error"] and answer["error"] and "\n" not in answer["error"]
    assert browser.headers["content-security-policy"].startswith("default-src 'none';")
    browser.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST:9", "[::1]:8017"])
def test_this_machines_own_names_are_served(host, port):
    browser = Browser(port, host)
    browser.open()
    assert browser.rater("Ann").get("/api/task")[0] == 200


def test_a_body_in_chunks_without_a_length_is_counted(port):
    browser = Browser(port)
    browser.open()
    parts = (b"x" * 100_000 for _ in range(11))
    assert browser.ask("POST", "/api/rater", parts)[0] == 413


def test_a_token_of_another_session_does_not_count(port):
    one, other = Browser(port), Browser(port)
    one.open(), other.open()
    assert one.cookie != other.cookie and one.csrf != other.csrf
    assert one.post("/api/rater", {"name": "Ann"}, x_csrf_token=other.csrf)[0] == 403


def test_a_changed_cookie_is_none(port):
    browser = Browser(port).rater("Ann")
    content, signature = browser.cookie.split(".")
    for cookie in (f"{content[:-2]}AA.{signature}", f"{content}.", f"{content}.{signature[:-3]}AA=",
                   "feedback=", "feedback=\xff.\xff", "feedback=W10=.W10="):
        status, state = browser.get("/api/state", cookie=cookie)
        assert status == 200 and state["rater"] is None
    assert browser.get("/api/state", cookie=f"a=b; {content}.{signature}; c=d")[1]["rater"] == "Ann"


def test_what_protects_goes_with_every_answer(port):
    browser = Browser(port)
    for path in ("/api/state", "/api/nothing"):
        browser.get(path)
        policy = dict(part.strip().split(" ", 1) for part in
                      browser.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'" and "unsafe" not in str(policy)
        assert {value for name, value in policy.items() if name.endswith("-src")} == {"'self'", "'none'"}
        assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
        assert browser.headers["x-content-type-options"] == "nosniff"
        assert browser.headers["referrer-policy"] == "no-referrer"
        assert browser.headers["cache-control"] == "no-store"
        assert "server" not in browser.headers and "access-control-allow-origin" not in browser.headers


def test_the_cookie_is_for_this_page_only(port):
    browser = Browser(port)
    browser.get("/api/state")
    flags = {flag.strip() for flag in browser.headers["set-cookie"].split(";")[1:]}
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= flags and "Secure" not in flags
    other = Browser(port)
    other.get("/api/state", x_forwarded_proto="https")  # a proxy on this machine says so
    assert "Secure" in {flag.strip() for flag in other.headers["set-cookie"].split(";")}


# -------------------------------------------------------------------------------------------------- the login


def test_nothing_is_told_before_the_login(closed_port):
    browser = Browser(closed_port)
    state = browser.open()
    assert state["login"] is True
    assert (state["models"], state["queue"], state["training"]) == ([], None, None)
    for path in ("/api/task", "/api/look", "/api/rated", "/api/train", "/api/export/jsonl"):
        assert browser.get(path)[0] == 401, path
    for path in ("/api/rater", "/api/ratings", "/api/undo", "/api/chat", "/api/queue", "/api/train",
                 "/api/train/cancel"):
        assert browser.post(path)[0] == 401, path


def test_the_token_logs_in_and_the_session_is_a_new_one(closed_port):
    browser = Browser(closed_port)
    browser.open()
    before = browser.cookie, browser.csrf
    for wrong in (TOKEN[:-1], f"{TOKEN}x", "é" * 20, " "):
        assert browser.post("/api/login", {"token": wrong})[0] in (400, 401)
    assert (browser.cookie, browser.csrf) == before
    assert browser.post("/api/login", {"token": TOKEN}) == (204, b"")
    assert browser.open()["login"] is False
    assert browser.cookie != before[0] and browser.csrf != before[1]
    assert browser.rater("Ann").get("/api/task")[0] == 200


def test_another_token_ends_all_sessions():
    old, new = Sessions(b"k" * 32, TOKEN), Sessions(b"k" * 32, f"{TOKEN}2")
    session = old.login(old.new(), TOKEN)
    assert session.logged_in and old.read(old.cookie(session)) == session
    assert new.read(old.cookie(session)) is None


def test_without_a_token_nobody_can_log_in():
    sessions = Sessions(b"k" * 32, None)
    assert sessions.login(sessions.new(), "") is None


def test_attempts_to_log_in_are_few(monkeypatch):
    now = [0.0]
    monkeypatch.undo()  # of `patient`
    monkeypatch.setattr(security.time, "monotonic", lambda: now[0])
    buckets = Buckets(rate=0.5, burst=3)
    assert [buckets.take("a") for _ in range(5)] == [True, True, True, False, False]
    assert buckets.take("b")  # another address has its own
    now[0] += 2.0
    assert [buckets.take("a") for _ in range(2)] == [True, False]
    now[0] += 1e6
    assert [buckets.take("a") for _ in range(4)] == [True, True, True, False]


def test_many_requests_from_one_address_are_refused(port, monkeypatch):
    left = iter([True] * 2)
    monkeypatch.setattr(Buckets, "take", lambda self, address: next(left, False))
    browser = Browser(port)
    browser.open()
    assert browser.get("/api/state")[0] == 200
    assert browser.get("/api/state")[0] == 429 and browser.headers["retry-after"] == "1"


@pytest.mark.parametrize(("words", "message"), [
    ("--host 0.0.0.0", "host: others reach '0.0.0.0', so a token is needed"),
    ("--host ::", "host: others reach '::', so a token is needed"),
    ("--host example.org", "host: others reach 'example.org', so a token is needed"),
])
def test_others_are_not_served_without_a_token(words, message):
    import feedback

    with pytest.raises(UserError, match=f"(?s)^command line: {message}"):
        parse_config(feedback.FeedbackConfig, None, words.split())


@pytest.mark.parametrize(("content", "mode", "message"), [
    ("short", 0o600, "at least 16 letters and digits"), ("é" * 20, 0o600, "at least 16"),
    (f"{TOKEN}\n{TOKEN}", 0o600, "one line"), (TOKEN, 0o644, "others on this machine can read"),
])
def test_a_weak_token_is_refused(content, mode, message, tmp_path):
    path = tmp_path / "token"
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(UserError, match=f"^token_file: .*{message}") as caught:
        read_token(path)
    assert content not in str(caught.value)


def test_the_installations_key_is_made_once_and_is_nobody_elses(tmp_path):
    key = installation_key(tmp_path / "session.key")
    assert len(key) == 32 and installation_key(tmp_path / "session.key") == key
    assert os.stat(tmp_path / "session.key").st_mode & 0o777 == 0o600
    (tmp_path / "session.key").write_bytes(b"")
    with pytest.raises(UserError, match="is no key of this page"):
        installation_key(tmp_path / "session.key")


# -------------------------------------------------------------------------------------------- text as HTML


class Tags(HTMLParser):
    """The tags and attributes that a browser would see."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.attributes, self.text = set(), [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


HARMLESS = {"p", "br", "em", "strong", "code", "pre", "ul", "ol", "li", "blockquote", "h1", "h2", "h3", "h4",
            "h5", "h6", "hr", "a", "table", "thead", "tbody", "tr", "th", "td"}
NASTY = ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[x](javascript:alert(1))",
         "[x](JaVaScRiPt:alert(1))", "[x](&#106;avascript:alert(1))", "[x](java\tscript:alert(1))",
         "![x](http://evil.example/pixel.png)", "[x](data:text/html,<script>)", "[x]: vbscript:x\n\n[x]",
         "<javascript:alert(1)>", "[x](//evil.example)", "[x](/api/export/jsonl)",
         '[x](http://a "\\" onclick=1")',
         "<a href='http://x' onclick=1>", "```<script>\nalert(1)\n```", "<!-- --><svg/onload=alert(1)>",
         "# <b>x</b>", "|a|\n|:-:|\n|<script>|", "a\u202eb\u0000c", "[" * 5000, "> " * 3000, "*a " * 5000]


@pytest.mark.parametrize("text", NASTY)
def test_text_becomes_harmless_html(text):
    seen = Tags(safe_html(text))
    assert seen.tags <= HARMLESS
    for name, value in seen.attributes:
        assert name in ("href", "rel", "target", "title", "class", "start")
        assert name != "href" or value.startswith(("http:", "https:", "mailto:"))


def test_markup_is_shown_and_html_stays_text():
    seen = Tags(safe_html("**bold** <script>x</script> [a](https://example.org) مرحبا 😀"))
    assert {"strong", "a"} <= seen.tags and "<script>x</script>" in seen.text and "مرحبا 😀" in seen.text
    assert ("rel", "noopener noreferrer nofollow") in seen.attributes


def test_a_very_long_text_is_cut_for_the_page():
    html = safe_html("word " * 100_000)
    assert 90_000 < len(html) < 120_000
