"""The rating page over HTTP: what each address answers. `security.Guard` stands around it.

Whatever waits for the database runs in a thread of Starlette's pool. Errors are one line of JSON.
"""

import asyncio
import json
import math
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from utils.data.conversations import conversation_in, messages_of, readable, text_of_turn
from utils.errors import UserError, quoted
from utils.feedback.database import Conflict, Ratings, Refused
from utils.feedback.exports import FORMATS
from utils.feedback.rounds import Rounds, RunningError
from utils.feedback.sampling import Ahead, BusyError, Models, Precedence, chat
from utils.feedback.security import Guard, HTTPError, Sessions, safe_html
from utils.feedback.statistics import look
from utils.feedback.tasks import CHAT, Task

OPEN_PATHS = ("/api/state", "/api/login")  # before the login
_TYPES = {".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml",
          ".js": "text/javascript; charset=utf-8", ".png": "image/png", ".ico": "image/x-icon"}
_NAME, _BETTER, _MESSAGES = 60, 20_000, 200  # characters; characters; messages of a chat
_MODELS = 4  # that answer side by side
_ROWS = 20  # of the ratings that are shown at once


@dataclass
class Shares:
    """How tasks are made."""

    k: int
    repeat: float
    overlap: float


class Application:
    """Everything that the page can ask for.

    Args:
        page: the folder with the page's files; those that are in it now are served.
    """

    def __init__(self, ratings: Ratings, models: Models, ahead: Ahead, precedence: Precedence, rounds: Rounds,
                 sessions: Sessions, shares: Shares, page: Path):
        self.ratings, self.models, self.ahead, self.precedence = ratings, models, ahead, precedence
        self.rounds, self.sessions, self.shares = rounds, sessions, shares
        self.files = {path.name: path for path in sorted(page.glob("*")) if path.suffix in _TYPES}
        self._rater_id = lru_cache(10_000)(ratings.rater)
        self._looked = None  # (what the statistics are of, the statistics)

    def guarded(self, host: str, names: list[str]) -> Guard:
        """The ASGI application, with all that protects it."""
        get, post = ["GET"], ["POST"]
        routes = [
            Route("/", self.file, methods=get), Route("/static/{name}", self.file, methods=get),
            Route("/api/state", self.state, methods=get), Route("/api/login", self.login, methods=post),
            Route("/api/rater", self.rater, methods=post), Route("/api/task", self.task, methods=get),
            Route("/api/ratings", self.rate, methods=post), Route("/api/undo", self.undo, methods=post),
            Route("/api/chat", self.chat, methods=post), Route("/api/queue", self.queue, methods=post),
            Route("/api/look", self.look, methods=get), Route("/api/rated", self.rated, methods=get),
            Route("/api/train", self.training, methods=get), Route("/api/train", self.train, methods=post),
            Route("/api/train/cancel", self.cancel, methods=post),
            Route("/api/export/{layout}", self.export, methods=get),
        ]
        handlers = {HTTPError: lambda request, error: _error(error.status, error.reason),
                    HTTPException: lambda request, error: _error(error.status_code, error.detail),
                    Conflict: lambda request, error: _error(409, str(error)),
                    Refused: lambda request, error: _error(400, str(error)),
                    UserError: lambda request, error: _error(503, str(error)),
                    # a bug; uvicorn prints its traceback
                    Exception: lambda request, error: _error(500, "the server has failed; its log says how")}
        return Guard(Starlette(routes=routes, exception_handlers=handlers), self.sessions, host, names,
                     OPEN_PATHS)

    # ------------------------------------------------------------------------------- the page and who uses it

    def file(self, request: Request) -> Response:
        path = self.files.get(request.path_params.get("name", "index.html"))
        if path is None:
            raise HTTPError(404, "there is no such file")
        return Response(path.read_bytes(), media_type=_TYPES[path.suffix])

    def state(self, request: Request) -> Response:
        session = request.scope["session"]
        state = {"csrf": self.sessions.csrf(session),
                 "login": self.sessions.token is not None and not session.logged_in,
                 "rater": session.rater, "k": self.shares.k, "models": [], "reward_model": False,
                 "queue": None, "training": None, "trouble": None}
        if not state["login"]:  # before it, nothing is told of what is here
            queue = self.ratings.queue(self.models.rated, self.shares.k)
            rated, ranked = self.ratings.learnable()
            possible = not self.rounds.is_running() and self.rounds.possible(rated) is None
            state |= {"models": [{"id": number, "name": name} for number, name in self.models.names.items()],
                      "reward_model": self.models.scorer is not None, "queue": queue,
                      "training": {"possible": possible, "why": self.rounds.why_not, "rated": rated,
                                   "ranked": ranked, "least": self.rounds.least, "full": self.rounds.full},
                      "trouble": self.ahead.trouble}
        return JSONResponse(state)

    def login(self, request: Request) -> Response:
        token = _text(_body(request, "token"), "token", 1000)
        session = self.sessions.login(request.scope["session"], token)
        if session is None:
            raise HTTPError(401, "this is not the token" if self.sessions.token else "no login is needed")
        request.scope["new_session"] = session
        return Response(status_code=204)

    def rater(self, request: Request) -> Response:
        name = " ".join(_text(_body(request, "name"), "name", _NAME).split())
        if not name or any(ord(letter) < 32 or 127 <= ord(letter) < 160 for letter in name):
            raise HTTPError(400, "name must be a line of text")
        self._rater_id(name)
        request.scope["new_session"] = replace(request.scope["session"], rater=name)
        return JSONResponse({"rater": name})

    def _rater(self, request: Request) -> int:
        name = request.scope["session"].rater
        if name is None:
            raise HTTPError(409, "say first who rates")
        return self._rater_id(name)

    # ------------------------------------------------------------------------------------------------- rating

    def task(self, request: Request) -> Response:
        return JSONResponse(self._next(self._rater(request)))

    def _next(self, rater: int) -> dict:
        """The task of a rater, or why there is none."""
        task = self.ratings.task(rater, self.shares.k, self.models.rated, self.shares.repeat,
                                 self.shares.overlap)
        progress = self._progress(rater)
        self.ahead.wake()
        waiting = task is None and progress["total"] > progress["rated"] and not self.ahead.idle
        return {"task": task and _shown(task), "waiting": waiting, "progress": progress}

    def _progress(self, rater: int) -> dict:
        rated, ranked = self.ratings.learnable()
        return self.ratings.progress(rater, self.shares.overlap, self.models.rated) | {
            "to_round": max(self.rounds.least - rated, 0), "to_full": max(self.rounds.full - ranked, 0)}

    def rate(self, request: Request) -> Response:
        rater = self._rater(request)
        body = _body(request, "key", "task", "kind", "order", "confidence", "seconds", "better")
        if isinstance(body.get("better"), str) and len(body["better"]) > _BETTER:
            raise HTTPError(400, f"better has more than {_BETTER:,} characters")
        rating = self.ratings.rate(rater=rater, **{"order": None, "confidence": None, "seconds": None,
                                                   "better": None, "key": None, "task": None, "kind": None,
                                                   **body})
        return JSONResponse({"rating": rating, **self._next(rater)}, status_code=201)

    def undo(self, request: Request) -> Response:
        rater = self._rater(request)
        undone = self.ratings.undo(rater)
        if undone is None:
            raise HTTPError(409, "nothing is left to take back")
        task, said = undone
        return JSONResponse({"task": _shown(task), "said": said, "progress": self._progress(rater)})

    # --------------------------------------------------------------------------------------------------- chat

    def chat(self, request: Request) -> Response:
        body = _body(request, "models", "messages", "temperature", "max_new_tokens")
        numbers = body.get("models")
        if not isinstance(numbers, list) or not 1 <= len(numbers) <= _MODELS or any(
                type(number) is not int or number not in self.models.names for number in numbers):
            raise HTTPError(400, f"models must be 1 to {_MODELS} ids of `state`")
        messages = _messages(body)
        temperature = _number(body, "temperature", 0, 100)
        longest = _number(body, "max_new_tokens", 1, 100_000)

        def answers(stop: threading.Event, say: Callable[[dict], None]) -> None:
            chat(self.models, list(dict.fromkeys(numbers)), messages, temperature,
                 longest if longest is None else int(longest), stop, say)

        return Stream(answers, self.precedence)

    def queue(self, request: Request) -> Response:
        messages = _messages(_body(request, "messages"))
        talker = self.models.talker(self.models.rated[0])
        text = talker.text(messages)
        talker.tokens(text, self.models.longest(talker))
        new = self.ratings.add_prompts([text], CHAT) > 0
        self.ahead.wake()
        return JSONResponse({"new": new})

    # --------------------------------------------------------------------------------------- what was rated

    def look(self, request: Request) -> Response:
        rows = self.ratings.rated()
        scores = {pair: score for pair, score in list(self.ahead.scores.items()) if math.isfinite(score)}
        state = (tuple(row["id"] for row in rows), len(scores))
        if self._looked is None or self._looked[0] != state:  # the intervals take a second
            self._looked = state, look(rows, scores)
        return JSONResponse(self._looked[1])

    def rated(self, request: Request) -> Response:
        before = request.query_params.get("before")
        if before is not None and not (before.isascii() and before.isdecimal() and len(before) < 19):
            raise HTTPError(400, "before must be the id of a rating")
        rows = self.ratings.rated(before=before and int(before), most=_ROWS)
        return JSONResponse({"rows": [_rated(row, self.ahead.scores) for row in reversed(rows)]})

    def export(self, request: Request) -> Response:
        layout = request.path_params["layout"]
        if layout not in FORMATS:
            raise HTTPError(404, f"the layouts are {', '.join(FORMATS)}")
        pieces, ending, media_type = FORMATS[layout]
        name = {"content-disposition": f'attachment; filename="ratings-{layout}.{ending}"'}
        return Response("".join(pieces(self.ratings.rated())), media_type=media_type, headers=name)

    # ----------------------------------------------------------------------------------------------- training

    def training(self, request: Request) -> Response:
        return JSONResponse(self.rounds.state())

    def train(self, request: Request) -> Response:
        _body(request)
        if why := self.rounds.possible(self.ratings.learnable()[0]):
            raise HTTPError(400, why)
        try:
            return JSONResponse({"round": self.rounds.start()}, status_code=202)
        except RunningError:
            raise HTTPError(409, "a round is running") from None

    def cancel(self, request: Request) -> Response:
        _body(request)
        if not self.rounds.cancel():
            raise HTTPError(409, "no round is running")
        return JSONResponse({}, status_code=202)


class Stream(Response):
    """Lines of JSON as they come. When the client goes away, whoever makes them is told to stop.

    Args:
        answers: called in a thread of its own with the event that stops it and a function that takes lines.
    """

    def __init__(self, answers: Callable, precedence: Precedence):
        super().__init__(media_type="application/x-ndjson")
        del self.headers["content-length"]
        self.answers, self.precedence = answers, precedence

    async def __call__(self, scope, receive, send) -> None:
        loop, lines, stop = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()

        def say(line: dict | None) -> None:
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(lines.put_nowait, line)

        def work() -> None:
            try:
                self.answers(stop, say)
            finally:
                say(None)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            stop.set()
            lines.put_nowait(None)

        try:
            slot = self.precedence.chat()
            with slot:
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                threading.Thread(target=work, name="chat", daemon=True).start()
                watching = asyncio.ensure_future(watch())
                try:
                    while (line := await lines.get()) is not None:
                        text = json.dumps(line, ensure_ascii=False) + "\n"
                        await send({"type": "http.response.body", "body": text.encode("utf-8", "replace"),
                                    "more_body": True})
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                finally:
                    stop.set()
                    watching.cancel()
        except BusyError:
            raise HTTPError(429, "too many chats at once; wait until one has ended") from None


# --------------------------------------------------------------------------------------------- what comes in


def _error(status: int, reason: str) -> Response:
    return JSONResponse({"error": reason}, status_code=status)


def _no_constant(name: str):
    raise ValueError(name)


def _body(request: Request, *names: str) -> dict:
    """The JSON object of a request, which has no other names than these."""
    try:
        body = json.loads(request.scope["body"] or b"{}", parse_constant=_no_constant)
        json.dumps(body, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError):
        raise HTTPError(400, "the body is not JSON in UTF-8") from None
    if not isinstance(body, dict):
        raise HTTPError(400, "the body must be a JSON object")
    if other := [name for name in body if name not in names]:
        raise HTTPError(400, f"unknown: {quoted(other[0])}")
    return body


def _text(body: dict, name: str, most: int) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value.strip():
        raise HTTPError(400, f"{name} must be text")
    if len(value) > most:
        raise HTTPError(400, f"{name} has more than {most:,} characters")
    return value


def _number(body: dict, name: str, low: float, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    fits = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not fits or not math.isfinite(value):
        raise HTTPError(400, f"{name} must be a number from {low} to {high:,}, or null")
    return value


def _messages(body: dict) -> list[dict]:
    """A conversation up to its last user turn: an optional system message, then user and assistant in turns.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not 1 <= len(messages) <= _MESSAGES:
        raise HTTPError(400, f"messages must be a list of 1 to {_MESSAGES} messages")
    found = []
    for message in messages:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise HTTPError(400, "a message must have role and content")
        content = _text(message, "content", 10**6)
        if any(letter < " " and letter not in "\t\n\v\f\r" for letter in content):
            raise HTTPError(400, "a message has control characters in it")
        found.append({"role": message["role"], "content": content})
    roles = [message["role"] for message in found]
    while roles and roles[-1] == "assistant":
        roles.pop()
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or any(role != ("user", "assistant")[place % 2] for place, role in enumerate(turns)):
        raise HTTPError(400, "messages must be those of user and assistant in turns, the user's first")
    return found[: len(roles)]


# -------------------------------------------------------------------------------------------- what goes out


def _shown(task: Task) -> dict:
    """A task as the rater sees it: nothing of who answered."""
    return {"id": task.id, "prompt": {"messages": shown_messages(task.prompt)},
            "answers": [{"text": text, "html": safe_html(text)} for text in task.answers]}


def _rated(row: dict, scores: dict[tuple[str, str], float]) -> dict:
    """A rating as the page lists it, with the reward model's scores of (prompt, answer) that are known."""
    ranks = row["ranks"] or [None] * len(row["completions"])
    answers = []
    for text, rank, policy in zip(row["completions"], ranks, row["policies"], strict=True):
        score = scores.get((row["prompt"], text), math.nan)
        answers.append({"text": text, "rank": rank, "policy": policy,
                        "score": score if math.isfinite(score) else None})
    return {**{name: row[name] for name in ("id", "rater", "time", "kind", "better")},
            "prompt": readable(row["prompt"]), "answers": answers}


def shown_messages(prompt: str) -> list[dict]:
    """A stored prompt as messages with their HTML."""
    messages = messages_of(prompt) or conversation_in(prompt) or [{"role": "user", "content": prompt}]
    texts = [(message["role"], text_of_turn(message)) for message in messages]
    return [{"role": role, "content": text, "html": safe_html(text)} for role, text in texts]
