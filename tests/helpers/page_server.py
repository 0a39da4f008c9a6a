"""The rating page's server as a process of its own, and chromium for it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.config import PROJECT

CHROMIUM = Path("/usr/bin/chromium")
START = 120.0  # seconds for models and libraries to load


@contextmanager
def page_server(folder: Path, words: list[str]):
    """Serves on a free port with the database and the rounds in `folder`; gives the address."""
    command = [sys.executable, str(PROJECT / "scripts" / "feedback.py"), "--port", "0", "--ratings",
               str(folder / "ratings.db"), "--output_dir", str(folder), *words]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=PROJECT, stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        yield _address(process, folder / "server.log")
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _address(process, log: Path) -> str:
    """The address in the line `open http://... in a browser`."""
    until = time.monotonic() + START
    while time.monotonic() < until and process.poll() is None:
        if found := re.search(r"^open (http\S+)/ in a browser", log.read_text(), re.MULTILINE):
            return found[1]
        time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{log.read_text()}")


def launch(playwright):
    return playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])


def open_page(browser, address: str, rater: str | None = "Ann", view: str = "rate", **options):
    """A page of a person of their own, who has said who rates.

    `page.problems` is a list: console errors and warnings, exceptions, and what was asked of any other host,
    which gets nothing.
    """
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, "locale": "en-GB"} | options)
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.problems = []

    def guard(route):
        if route.request.url.startswith(f"{address}/"):
            route.continue_()
        else:
            page.problems.append(f"asked for {route.request.url}")
            route.abort()

    context.route("**/*", guard)
    page.on("console", lambda message: message.type in ("error", "warning") and page.problems.append(
        f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: page.problems.append(f"exception: {error}"))
    page.goto(f"{address}/#{view}")
    if rater:
        if view != "rate":
            page.get_by_role("link", name="Rate", exact=True).click()
        page.get_by_label("Your name").fill(rater)
        page.keyboard.press("Enter")
        page.wait_for_selector(".answer")
        if view != "rate":
            page.locator(f".tabs a[href='#{view}']").click()
    return page


def api(page, path: str):
    """What a GET by the page gives."""
    return json.loads(page.evaluate("path => fetch(path).then(answer => answer.text())", path))
