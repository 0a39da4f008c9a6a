"""The server is killed at 50 random moments while two raters work: no confirmed rating is lost."""

import http.client
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import uuid

import pytest

from browser import Browser
from rated import database
from served import wait_until, words_of, write_models
from utils.config import PROJECT
from utils.models.talk import short_names

KILLS, PROMPTS = 50, 700


class Rater(threading.Thread):
    """Ranks one task after the other. What was not confirmed is sent again with the same key, as by the page.

    Attributes:
        confirmed: key -> (id of the rating, task, order).
    """

    def __init__(self, port: int, name: str):
        super().__init__(name=name)
        self.browser, self.confirmed, self.unexpected = Browser(port), {}, []
        self.random, self.stop = random.Random(name), threading.Event()

    def run(self) -> None:
        self.persist(lambda: self.browser.rater(self.name))
        task = None
        while not self.stop.is_set():
            task = task or self.persist(lambda: self.browser.get("/api/task"))[1]["task"]
            if task is None:  # all are rated
                return
            places = self.random.sample(range(len(task["answers"])), len(task["answers"]))
            order, key = [[place] for place in places], str(uuid.uuid4())
            status, answer = self.persist(lambda task=task, order=order, key=key: self.browser.rate(
                task, order, key=key))
            if status != 201:
                self.unexpected.append((status, answer))
                return
            self.confirmed[key] = answer["rating"], task["id"], order
            task = answer["task"]
            time.sleep(0.03)

    def persist(self, ask):
        """Ask until there is an answer, as long as the test goes on."""
        while True:
            try:
                return ask()
            except (OSError, http.client.HTTPException, ValueError):  # the server is gone
                self.browser.close()
                if self.stop.wait(0.02):
                    raise SystemExit from None


@pytest.mark.slow
def test_no_confirmed_rating_is_lost_by_kills(tmp_path):
    write_models(tmp_path, "first")
    output = tmp_path / "out"
    [policy] = short_names([str(tmp_path / "first")])
    database(output / "ratings.db", [f"post {n}" for n in range(PROMPTS)], [policy], k=3).close()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = words_of(tmp_path, output, "--prompts", "none", "--port", str(port), "--k", "3",
                     "--overlap_share", "1", "--repeat_share", "0", "--ahead", "1")
    nursery = subprocess.Popen(
        [sys.executable, PROJECT / "tests" / "helpers" / "nursery.py", tmp_path / "log", *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    raters = [Rater(port, name) for name in ("Ann", "Bob")]
    chance, alive = random.Random(0), []
    try:
        for life in range(KILLS + 1):
            nursery.stdin.write("start\n")
            nursery.stdin.flush()
            process = int(nursery.stdout.readline())
            if life == 0:
                for rater in raters:
                    rater.start()
            before = [len(rater.confirmed) for rater in raters]
            wait_until(lambda before=before: all(len(rater.confirmed) > count or not rater.is_alive()
                                                 for rater, count in zip(raters, before, strict=True)))
            alive.append(all(rater.is_alive() for rater in raters))
            if life < KILLS:
                time.sleep(chance.uniform(0, 0.15))
            else:
                for rater in raters:
                    rater.stop.set()
                    rater.join()
            os.kill(process, signal.SIGKILL)
    finally:
        for rater in raters:
            rater.stop.set()
        nursery.stdin.close()
        nursery.wait(60)
    assert [rater.unexpected for rater in raters] == [[], []] and all(alive)
    confirmed = {key: rating for rater in raters for key, rating in rater.confirmed.items()}
    assert len(confirmed) >= 2 * (KILLS + 1)
    with sqlite3.connect(output / "ratings.db") as stored:
        assert stored.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert stored.execute("PRAGMA foreign_key_check").fetchall() == []
        tasks = {key: (number, task) for number, task, key in
                 stored.execute("SELECT id, task_id, key FROM ratings WHERE undone IS NULL")}
        assert len({task for _, task in tasks.values()}) == len(tasks)  # one rating a task
        for key, (number, task, order) in confirmed.items():
            assert tasks[key] == (number, task)
            shown = json.loads(stored.execute("SELECT shown FROM tasks WHERE id = ?", (task,)).fetchone()[0])
            ranks = dict(stored.execute("SELECT answer_id, rank FROM ranks WHERE rating_id = ?", (number,)))
            assert ranks == {shown[place]: rank for rank, [place] in enumerate(order, start=1)}
        # at most the one that each was sending is stored without having been confirmed
        assert set(confirmed) <= set(tasks) and len(tasks) <= len(confirmed) + 2
    stored.close()
