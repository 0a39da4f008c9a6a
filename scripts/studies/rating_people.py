"""Simulated people rank answers through the rating page's HTTP interface, like anyone else."""

import http.cookiejar
import json
import re
import time
import urllib.error
import urllib.request
import uuid
from contextlib import contextmanager
from pathlib import Path

from studies.stage_processes import last_line, process
from studies.tastes import Person
from utils.config import UserError
from utils.feedback.database import Ratings

WAIT = 600  # seconds for the server to start, and for the answers to a post


class Visitor:
    """Somebody's browser at the rating page."""

    def __init__(self, address: str, name: str):
        self.address, self.headers = address, {"Content-Type": "application/json"}
        cookies = urllib.request.HTTPCookieProcessor(http.cookiejar.CookieJar())
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), cookies)
        self.headers["X-CSRF-Token"] = self.ask("/api/state")["csrf"]
        self.ask("/api/rater", {"name": name})

    def ask(self, path: str, body: dict | None = None):
        """The JSON that the page answers; asked again when it is asked too often."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, self.headers)
        while True:
            try:
                with self.opener.open(request, timeout=60) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                if error.code != 429:
                    said = error.read().decode(errors="replace")
                    raise UserError(f"{path}: {error.code}, {said}") from None
                time.sleep(1)
            except urllib.error.URLError as error:
                raise UserError(f"{self.address}: the rating page does not answer ({error.reason})") from None


def rate_posts(address: str, person: Person, count: int, facts: dict[str, dict]) -> None:
    """Rank until so many posts are rated.

    Args:
        facts: of each post, by its text without white space at the ends.
    """
    visitor, since = Visitor(address, person.taste), time.monotonic()
    answer = visitor.ask("/api/task")
    while answer["progress"]["rated"] < count:
        if (task := answer["task"]) is None:
            if not answer["waiting"] or time.monotonic() - since > WAIT:
                raise UserError(f"the rating page has no task after {answer['progress']['rated']} of {count} "
                                "ratings")
            time.sleep(0.5)
            answer = visitor.ask("/api/task")
            continue
        since = time.monotonic()
        post = task["prompt"]["messages"][-1]["content"].strip()
        order = person.ranking([shown["text"] for shown in task["answers"]], facts[post])
        answer = visitor.ask("/api/ratings", {
            "key": str(uuid.uuid4()), "task": task["id"], "kind": "ranking",
            "order": [[place] for place in order], "confidence": None, "seconds": 1.0, "better": None})


@contextmanager
def rating_page(models: list[str], posts: Path, k: int, seed: int, folder: Path):
    """The rating page as a process, with its database in a folder; yields its address."""
    words = ["--model", *models, "--prompts", str(posts), "--ratings", str(folder / "ratings.db"),
             "--port", "0", "--output_dir", str(folder / "page"), "--k", str(k), "--seed", str(seed),
             # every person sees all posts with the same answers, once
             "--repeat_share", "0.0", "--overlap_share", "1.0"]
    log = folder / "page.log"
    log.unlink(missing_ok=True)  # an earlier page's has another address
    with process("feedback.py", words, log) as (running, _):
        until = time.monotonic() + WAIT
        while not (found := re.search(r"open (http://[^/\s]+)/", log.read_text() if log.exists() else "")):
            if not running.is_alive() or time.monotonic() > until:
                raise UserError(f"feedback.py: did not start; '{log}' ends with: {last_line(log)}")
            time.sleep(0.2)
        yield found[1]


def rated(database: Path, taste: str) -> list[dict]:
    """A person's rankings, oldest first, without answers that are empty: no stage takes those."""
    ratings = Ratings(database)
    try:
        rankings = [row for row in ratings.rated() if row["rater"] == taste and row["kind"] == "ranking"]
    finally:
        ratings.close()
    for row in rankings:
        kept = [place for place, text in enumerate(row["completions"]) if text.strip()]
        row |= {name: [row[name][place] for place in kept] for name in ("completions", "ranks")}
    return rankings
