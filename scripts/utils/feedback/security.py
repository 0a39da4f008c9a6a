"""What stands between the network and the rating page: sessions, login, hosts, limits, and headers.

A session is a signed cookie, so it outlives a restart of the server and nothing is kept for it. The key of
the signature is in a file beside the rounds; the login token is part of it: another token ends all sessions.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import secrets
import socket
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from markdown_it import MarkdownIt

from utils.durable import move
from utils.errors import UserError
from utils.input_files import read_bytes, read_text

COOKIE = "feedback"
BODY_BYTES = 1_000_000
_DRAINED = 64_000_000  # bytes of a body that are read to the end, so that its sender hears why it is refused
_BODY_SECONDS = 30.0
_DAYS = 90  # that a browser keeps the cookie
_RATE, _BURST = 50.0, 300.0  # requests a second from one address, and at once
_LOGINS = 10.0  # a minute, from one address
_ADDRESSES = 10_000  # that are remembered
_LEAST_TOKEN = 16  # characters
_LONGEST_HTML = 100_000  # characters of a text that is read as markdown

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
                               "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), browsing-topics=()",
}


class HTTPError(Exception):
    """An answer other than what was asked for: a status, and one line that says why."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status, self.reason = status, reason


# ------------------------------------------------------------------------------------------------------- text

_MARKDOWN = MarkdownIt("commonmark", {"html": False, "breaks": True}).enable("table").disable("image")


def safe_html(text: str) -> str:
    """Markdown as HTML. HTML in it is shown as text; links lead to http, https and mailto only; no images."""
    if len(text) > _LONGEST_HTML:
        return f"<p>{_MARKDOWN.renderInline(text[:_LONGEST_HTML])} ...</p>"
    return _MARKDOWN.render(text)


def _is_harmless(link: str) -> bool:
    scheme = urlsplit(link.strip()).scheme.lower()
    return scheme in ("http", "https", "mailto")


def _opens_apart(self, tokens, index, options, env) -> str:
    """A link opens in a new tab, which learns nothing of the page."""
    tokens[index].attrSet("target", "_blank")
    tokens[index].attrSet("rel", "noopener noreferrer nofollow")
    return self.renderToken(tokens, index, options, env)


def _without_style(self, tokens, index, options, env) -> str:
    """A cell of a table; the policy of the page lets no style attribute act."""
    tokens[index].attrs = {}
    return self.renderToken(tokens, index, options, env)


_MARKDOWN.validateLink = _is_harmless
_MARKDOWN.add_render_rule("th_open", _without_style)
_MARKDOWN.add_render_rule("td_open", _without_style)
_MARKDOWN.add_render_rule("link_open", _opens_apart)


# --------------------------------------------------------------------------------------------------- sessions


@dataclass(frozen=True)
class Session:
    """What a signed cookie says."""

    id: str
    rater: str | None = None
    logged_in: bool = False


class Sessions:
    """Makes and reads signed cookies.

    Args:
        key: secret of this installation.
        token: of the login; None: none is needed.
    """

    def __init__(self, key: bytes, token: str | None):
        self.token = token
        self._key = hmac.digest(key, (token or "").encode(), "sha256")

    def new(self) -> Session:
        return Session(secrets.token_urlsafe(24))

    def cookie(self, session: Session) -> str:
        content = json.dumps([session.id, session.rater, session.logged_in]).encode()
        return f"{_base64(content)}.{self._sign('session', content)}"

    def read(self, cookie: str) -> Session | None:
        """The session of a cookie; None: it is not one of ours."""
        content, _, signature = cookie.partition(".")
        try:
            content = base64.urlsafe_b64decode(content.encode("ascii"))
        except ValueError:
            return None
        if not hmac.compare_digest(signature.encode(), self._sign("session", content).encode()):
            return None
        return Session(*json.loads(content))

    def csrf(self, session: Session) -> str:
        return self._sign("csrf", session.id.encode())

    def login(self, session: Session, token: str) -> Session | None:
        """The session after a login, with a new id; None: the token is wrong."""
        given, wanted = (hashlib.sha256(text.encode()).digest() for text in (token, self.token or ""))
        fits = hmac.compare_digest(given, wanted) and self.token is not None
        return replace(session, id=self.new().id, logged_in=True) if fits else None

    def _sign(self, purpose: str, content: bytes) -> str:
        return _base64(hmac.digest(self._key, purpose.encode() + b"\0" + content, "sha256"))


def _base64(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).decode()


def installation_key(path: Path) -> bytes:
    """The secret in a file, which is made at the first start and readable for its owner only."""
    if not path.exists():
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.unlink(missing_ok=True)
        temporary.touch(mode=0o600)
        temporary.write_bytes(secrets.token_bytes(32))
        move(temporary, path)
    key = read_bytes(path)
    if len(key) < 32:
        raise UserError(f"{path}: is no key of this page; remove the file, and a new one is made")
    return key


def read_token(path: Path) -> str:
    """The login token in a file.

    Raises:
        UserError: when it is short, or others on this machine can read it.
    """
    token = read_text(path).strip()
    if len(token) < _LEAST_TOKEN or not token.isascii() or not token.isprintable():
        raise UserError(f"token_file: '{path}' must hold one line of at least {_LEAST_TOKEN} letters and "
                        "digits; make one with: python3 -c 'import secrets; print(secrets.token_urlsafe())'")
    if path.stat().st_mode & 0o077:
        raise UserError(f"token_file: others on this machine can read '{path}'; run: chmod 600 '{path}'")
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what is bound to a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# ----------------------------------------------------------------------------------------------------- limits


class Buckets:
    """How often each address may do something (token buckets).

    Args:
        rate: a second. burst: at once, after a pause.
    """

    def __init__(self, rate: float, burst: float):
        self.rate, self.burst = rate, burst
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address -> (left, time)

    def take(self, address: str) -> bool:
        """Whether it may do it now."""
        now = time.monotonic()
        left, then = self._left.pop(address, (self.burst, now))
        left = min(self.burst, left + (now - then) * self.rate)
        self._left[address] = (left - 1 if left >= 1 else left, now)
        if len(self._left) > _ADDRESSES:
            self._left.popitem(last=False)
        return left >= 1


# ------------------------------------------------------------------------------------------------------ guard


class Guard:
    """An ASGI application around another one: refuses what must not reach it, and adds the headers.

    The inner application finds `session` and `body` (bytes) in its scope, and may put a new session into
    `scope["new_session"]`.

    Args:
        host: what the server is bound to.
        names: further names under which browsers reach it.
        open_paths: paths that need no login.
    """

    def __init__(self, application, sessions: Sessions, host: str, names: list[str],
                 open_paths: tuple[str, ...] = ()):
        self.application, self.sessions = application, sessions
        self.host, self.open_paths = host, open_paths
        self.names = {"localhost", *(name.lower() for name in names), host.lower()}
        if not is_loopback(host):
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self.requests, self.logins = Buckets(_RATE, _BURST), Buckets(_LOGINS / 60, _LOGINS)

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self.application(scope, receive, send)
        if scope["type"] != "http":  # no WebSocket is served
            return None
        headers = {name.decode("latin-1").lower(): value.decode("latin-1")
                   for name, value in scope["headers"]}
        session = self._session(headers)
        scope["session"] = session or self.sessions.new()
        scope["new_session"] = None if session else scope["session"]
        started = False

        async def guarded(message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *self._added(scope)]
            await send(message)

        try:
            self._check(scope, headers)
            scope["body"] = await _body(headers, receive) if scope["method"] == "POST" else b""
            self._check_login(scope)
            await self.application(scope, receive, guarded)
        except HTTPError as error:
            if not started:
                await _refuse(error, guarded)
        return None

    def _session(self, headers: dict) -> Session | None:
        for part in headers.get("cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name == COOKIE:
                return self.sessions.read(value)
        return None

    def _check(self, scope, headers: dict) -> None:
        """Raise HTTPError for a request that is not for us, or too many of them."""
        if not self._serves(headers.get("host", "")):
            raise HTTPError(403, "this server is not known under that name; the key names takes others")
        if not self.requests.take(_address(scope)):
            raise HTTPError(429, "too many requests; wait a second")
        if not scope["path"].startswith("/api/"):
            return
        # also for GET: another page must not read, nor make this one take a task
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
            raise HTTPError(403, "this request comes from another page")
        if "origin" in headers and urlsplit(headers["origin"]).netloc.lower() != headers["host"].lower():
            raise HTTPError(403, "this request comes from another page")
        if scope["method"] == "POST":
            wanted, given = self.sessions.csrf(scope["session"]), headers.get("x-csrf-token", "")
            if not hmac.compare_digest(given.encode("latin-1", "replace"), wanted.encode()):
                raise HTTPError(403, "the header X-CSRF-Token is missing or old; reload the page")
            if scope["path"] == "/api/login" and not self.logins.take(_address(scope)):
                raise HTTPError(429, "too many attempts to log in; wait a minute")

    def _check_login(self, scope) -> None:
        path = scope["path"]
        needs = path.startswith("/api/") and path not in self.open_paths
        if self.sessions.token is not None and needs and not scope["session"].logged_in:
            raise HTTPError(401, "log in first")

    def _serves(self, host: str) -> bool:
        """Whether a Host is ours. A page elsewhere can let its own name point here, but no address."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name in self.names
        return address.is_loopback or not is_loopback(self.host)

    def _added(self, scope) -> list[tuple[bytes, bytes]]:
        added = {**HEADERS, "cache-control": "no-store" if scope["path"].startswith("/api/") else "no-cache"}
        if scope["new_session"] is not None:
            secure = "; Secure" if scope["scheme"] == "https" else ""
            added["set-cookie"] = (f"{COOKIE}={self.sessions.cookie(scope['new_session'])}; Path=/; "
                                   f"HttpOnly; SameSite=Strict; Max-Age={_DAYS * 86_400}{secure}")
        return [(name.encode(), value.encode("latin-1")) for name, value in added.items()]


def _address(scope) -> str:
    return scope["client"][0] if scope.get("client") else ""


async def _body(headers: dict, receive) -> bytes:
    """The body of a request. One that is too large is read and dropped, for else nobody reads the answer."""
    parts, size = [], 0
    try:
        if int(headers.get("content-length", "0")) > _DRAINED:
            raise _too_large()
        async with asyncio.timeout(_BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise HTTPError(400, "the request ended early")
                size += len(message.get("body", b""))
                if size > _DRAINED:
                    raise _too_large()
                if size <= BODY_BYTES:
                    parts.append(message.get("body", b""))
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise HTTPError(400, f"the request took more than {_BODY_SECONDS:.0f} s") from None
    if size > BODY_BYTES:
        raise _too_large()
    return b"".join(parts)


def _too_large() -> HTTPError:
    return HTTPError(413, f"too much text: {BODY_BYTES // 1_000_000} MB is the most")


async def _refuse(error: HTTPError, send) -> None:
    body = json.dumps({"error": error.reason}, ensure_ascii=False).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if error.status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
