"""Takes the pictures of the rating page that are in docs/feedback, on the demo's models (after `make demo`).

    .venv/bin/python tests/helpers/page_pictures.py

Another folder of models can be named. Three people with a noisy taste rate through HTTP first, so that the
figures have something to show.
"""

import io
import random
import sys
import tempfile
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

# isort: split
from PIL import Image  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402

from browser import Browser  # noqa: E402
from page_server import api, launch, open_page, page_server  # noqa: E402
from utils.config import PROJECT  # noqa: E402

DEMO = Path(sys.argv[1]) if len(sys.argv) > 1 else PROJECT / "outputs" / "tldr_mini"
PICTURES = PROJECT / "docs" / "feedback"
DESKTOP = {"viewport": {"width": 1200, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
POST = ("Something happened to my lamp\n\nHello everyone, I hope this is the right place. Meet Paul, 21, my "
        "son. Last Sunday he broke my lamp in the kitchen. I got it from my grandmother. Now I am very sad. "
        "Should I ask him for a new one?")


def rate_like_people(port: int, count: int = 14) -> None:
    """Short answers are liked; a rater who is unsure ties or turns two around."""
    for name, noise in (("Ada", 2), ("Bram", 6), ("林", 4)):
        draw, browser = random.Random(name), Browser(port).rater(name)
        for _ in range(count):
            while not (found := browser.get("/api/task")[1])["task"]:
                time.sleep(0.5)  # answers are sampled
            wish = [len(answer["text"]) / 10 + draw.gauss(0, noise) for answer in found["task"]["answers"]]
            order = [[place] for place in sorted(range(len(wish)), key=wish.__getitem__)]
            if draw.random() < 0.2 and len(order) > 2:
                order[-2:] = [order[-2] + order[-1]]
            kind = draw.choices(["ranking", "all_bad", "skip"], [12, 1, 1])[0]
            browser.post("/api/ratings", {
                "key": str(uuid.uuid4()), "task": found["task"]["id"], "kind": kind,
                "order": order if kind == "ranking" else None, "seconds": draw.uniform(10, 40)})


def take(page, name: str) -> None:
    """A picture of what is on the screen, with 256 colours."""
    page.wait_for_timeout(400)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(256).save(PICTURES / f"{name}.png", optimize=True)


def pictures(browser, address: str) -> None:
    for name, options in (("rate", DESKTOP), ("rate_phone", PHONE)):
        page = open_page(browser, address, "Ada" if name == "rate" else "Bram", **options)
        for key in "31=4":
            page.keyboard.press(key)
        take(page, name)
        page.context.close()
    page = open_page(browser, address, "Ada", "chat", **DESKTOP, color_scheme="dark")
    page.get_by_label("Beside it").select_option(index=2)
    page.get_by_label("Message").fill(POST)
    page.keyboard.press("Enter")
    page.locator(".reply:not(.busy)").nth(1).wait_for(timeout=60_000)
    take(page, "chat_dark")
    while not api(page, "/api/look")["reward_model"]:
        page.wait_for_timeout(1000)  # the answers get their scores
    page.locator(".tabs a[href='#look']").click()
    page.locator(".tile").first.wait_for()
    take(page, "look_dark")
    page.context.close()


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        words = ["--model", f"{DEMO}/ppo/final", f"{DEMO}/sft/final",
                 "--reward_model", f"{DEMO}/reward/final",
                 *"--prompts data/tldr_mini/rlhf_test.jsonl.gz --prompt_count 60 --ahead 60".split(),
                 *"--overlap_share 0.5 --repeat_share 0.3".split()]
        with page_server(Path(folder), words) as address, sync_playwright() as playwright:
            rate_like_people(int(address.rpartition(":")[2]))
            pictures(launch(playwright), address)


if __name__ == "__main__":
    main()
