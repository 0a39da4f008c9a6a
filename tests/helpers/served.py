"""The rating page on tiny models: in this process, or in one of its own."""

import json
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import feedback
from tiny_models import save_opt
from utils.config import PROJECT, parse_config


def write_models(folder: Path, *names: str, **changes) -> Path:
    """Tiny policies that were trained on posts, a reward model, and 24 posts in posts.jsonl."""
    for seed, name in enumerate(names):
        save_opt(folder / name, **{"eos_logit": 4.0, "seed": seed, **changes})
        (folder / name / "stage.json").write_text(json.dumps({"stage": "sft", "prompt_layout": "tldr",
                                                              "max_new_tokens": 12}))
    save_opt(folder / "reward", "reward", head_scale=20.0)
    (folder / "reward" / "stage.json").write_text('{"stage": "reward"}')
    posts = [f"SUBREDDIT: r/pets\n\nTITLE: Cat {n}\n\nPOST: My cat {n} sleeps.\n\nTL;DR:" for n in range(24)]
    (folder / "posts.jsonl").write_text("\n".join(json.dumps({"prompt": post}) for post in posts))
    return folder


def words_of(folder: Path, output: Path, *words: str) -> list[str]:
    """The command line of a page on what `write_models` wrote; `words` may replace some of it."""
    given = {"--model": [str(folder / "first")], "--prompts": [str(folder / "posts.jsonl")], "--port": ["0"],
             "--ratings": [str(output / "ratings.db")], "--output_dir": [str(output)]}
    kept = [[name, *values] for name, values in given.items() if name not in words]
    return [*sum(kept, []), *words]


@contextmanager
def served(words: list[str]):
    """A page in this process: (the page, its port)."""
    page = feedback.Page(parse_config(feedback.FeedbackConfig, None, words))
    server = page.server()
    thread = threading.Thread(target=page.serve, args=(server,))
    thread.start()
    try:
        yield page, page.socket.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def start_process(words: list[str], log: Path) -> tuple[subprocess.Popen, int]:
    """A page in a process of its own, and its port, once it serves. What it prints goes into a file."""
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, str(PROJECT / "scripts" / "feedback.py"), *words],
                                   stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    while "open http://" not in (said := log.read_text()):
        assert process.poll() is None, said
        time.sleep(0.02)
    return process, int(said.split("open http://127.0.0.1:")[1].split("/")[0])


def wait_until(true, seconds: float = 60.0) -> None:
    """Wait for what a thread is going to do."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)
