"""How long raters wait: twenty of them rate on the page, one rating a second each, for a minute.

    python scripts/studies/feedback_load.py --model outputs/tldr_mini/ppo/final

The page runs in a process of its own on this machine. All answers are sampled before, so that what is
measured is the server and its database, not the model.
"""

import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import PROJECT, UserError, key
from utils.launch import read_config, start
from utils.models.folders import model_key


@dataclass
class LoadConfig:
    """How many rate, and for how long."""

    model: str = model_key("outputs/tldr_mini/ppo/final", "A model, of which nothing is sampled.")
    raters: int = key(20, "Raters at once.", unit="raters", low=1, high=1000)
    seconds: int = key(60, "How long they rate, one rating a second each.", unit="seconds", low=1, high=3600)


if __name__ == "__main__":
    CONFIG = read_config(LoadConfig, None, __doc__)

import numpy as np

from utils.feedback.database import Ratings
from utils.models.talk import short_names

K = 4


def prepare(path: Path, model: str, prompts: int) -> None:
    """A database with answers to more prompts than will be rated."""
    ratings = Ratings(path)
    policy = ratings.add_policy(short_names([model])[0], model)
    ratings.add_prompts((f"What grows on balcony number {n}?" for n in range(prompts)), "load")
    for prompt, _, missing in ratings.to_sample([policy], K, prompts):
        texts = [(f"Answer {n} to it, in a sentence of some words.", True) for n in range(missing[policy])]
        ratings.add_answers(prompt, policy, texts, 1.0)
    ratings.close()


class Rater(threading.Thread):
    """Ranks one prompt a second. Attributes: `seconds`, what each rating took."""

    def __init__(self, port: int, number: int, until: float):
        super().__init__(name=f"rater {number}")
        self.until, self.seconds, self.error, self.session = until, [], None, {}
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self, method: str, path: str, body: dict | None = None) -> dict:
        content = None if body is None else json.dumps(body)
        self.connection.request(method, path, content, self.session)
        response = self.connection.getresponse()
        answer = json.loads(response.read())
        if cookie := response.getheader("Set-Cookie"):
            self.session["Cookie"] = cookie.split(";")[0]
        if response.status >= 400:
            raise UserError(f"{path}: {response.status} {answer}")
        return answer

    def run(self) -> None:
        try:
            self.session["X-CSRF-Token"] = self.ask("GET", "/api/state")["csrf"]
            self.ask("POST", "/api/rater", {"name": self.name})
            task = self.ask("GET", "/api/task")["task"]
            while time.monotonic() < self.until:
                begin = time.monotonic()
                order = [[place] for place in range(len(task["answers"]))]
                answer = self.ask("POST", "/api/ratings", {
                    "key": str(uuid.uuid4()), "task": task["id"], "kind": "ranking", "order": order,
                    "confidence": 2, "seconds": 1.0, "better": None})
                self.seconds.append(time.monotonic() - begin)
                task = answer["task"]
                time.sleep(max(0.0, begin + 1 - time.monotonic()))
        except Exception as error:  # a thread's error is shown by the main thread
            self.error = error


def main(config: LoadConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder) / "ratings.db"
        prepare(database, config.model, config.raters * (config.seconds + 10))
        page = subprocess.Popen(
            [sys.executable, str(PROJECT / "scripts" / "feedback.py"), "--model", config.model, "--ratings",
             str(database), "--output_dir", folder, "--port", "0", "--ahead", "1"],
            stdout=subprocess.PIPE, text=True)
        try:
            port = next((int(line.split(":")[2].split("/")[0]) for line in page.stdout
                         if line.startswith("open http://")), None)
            if port is None:
                raise UserError("the page did not start; its line is above")
            raters = [Rater(port, n, time.monotonic() + config.seconds) for n in range(config.raters)]
            for rater in raters:
                rater.start()
                time.sleep(1 / config.raters)  # people do not click in step
            for rater in raters:
                rater.join()
        finally:
            page.terminate()
            page.wait()
    if errors := [rater.error for rater in raters if rater.error]:
        raise errors[0]
    took = 1000 * np.array([seconds for rater in raters for seconds in rater.seconds])
    median, p95, p99 = np.quantile(took, [0.5, 0.95, 0.99])
    print(f"{len(took)} ratings of {config.raters} raters in {config.seconds} s: median {median:.0f} ms, p95 "
          f"{p95:.0f} ms, p99 {p99:.0f} ms, longest {took.max():.0f} ms")


if __name__ == "__main__":
    start(main, CONFIG)
