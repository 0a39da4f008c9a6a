"""The rating page in a real browser, on the real server with tiny models: what a person does reaches the
database, by mouse, by finger, by keys alone; nothing is lost by a reload or a failing network."""

import json
import re
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from page_server import CHROMIUM, api, launch, open_page, page_server
from served import served, words_of
from tiny_models import save_opt

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM.exists(), reason="chromium is not installed")]

VIEWS = ("chat", "rate", "look", "train")
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
HEBREW = "שלום לכולם"
SCRIPT = "<script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy whose answers end soon, one that goes on and on, a reward model, posts, and tiny stages."""
    folder = tmp_path_factory.mktemp("page")
    positions = {"max_position_embeddings": 4400}
    save_opt(folder / "first", eos_logit=3.0, **positions)
    save_opt(folder / "endless", seed=1, num_hidden_layers=8, **positions)
    save_opt(folder / "reward", "reward", head_scale=20.0, **positions)
    for name in ("first", "endless"):
        (folder / name / "stage.json").write_text('{"stage": "sft", "max_new_tokens": 12}')
    (folder / "reward" / "stage.json").write_text('{"stage": "reward"}')
    posts = [{"prompt": f"Post {number}: my son broke my vase in the garden. What now?"}
             for number in range(80)]
    (folder / "posts.jsonl").write_text("\n".join(map(json.dumps, posts)))
    stage = "per_device_batch_size: 4\nmax_new_tokens: 8\neval_rows: 2\ntest_rows: 2\n"
    (folder / "reward.yaml").write_text("max_steps: 2\nlogging_steps: 1\neval_steps: 1\neval_rows: 2\n"
                                        "test_rows: 2\nper_device_batch_size: 4\n")
    (folder / "sft.yaml").write_text(f"{stage}max_steps: 2\nlogging_steps: 1\neval_steps: 1\n")
    (folder / "ppo.yaml").write_text(f"{stage}total_episodes: 8\nprompts_per_update: 2\n"
                                     "responses_per_prompt: 2\nppo_epochs: 1\neval_steps: 1\n")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    words = ("--model {0}/first --compare {0}/endless --reward_model {0}/reward "
             "--prompts {0}/posts.jsonl --sft_config {0}/sft.yaml "
             "--reward_config {0}/reward.yaml --ppo_config {0}/ppo.yaml "
             "--least_ratings 4 --ppo_ratings 4 --repeat_share 0 --overlap_share 0 --ahead 30")
    with page_server(folder, words.format(folder).split()) as address:
        yield address


@pytest.fixture(scope="module")
def browser(server):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, closing(launch(playwright)) as browser:
        yield browser


@pytest.fixture
def person(browser, server, request):
    """Opens pages of new persons, and sees in the end that no page had a problem."""
    pages = []

    def open_one(**options):
        name = f"{request.node.name[-50:]} {len(pages)}"
        pages.append(open_page(browser, server, **{"rater": name} | options))
        pages[-1].rater = name
        return pages[-1]

    yield open_one
    problems = [problem for page in pages for problem in page.problems]
    for page in pages:
        page.context.close()
    assert not problems


def shown(page) -> list[str]:
    """The texts of the answers in the order in which they stand on the page."""
    return [answer["text"] for answer in api(page, "/api/task")["task"]["answers"]]


def press(page, keys: str) -> None:
    for key in keys:
        page.keyboard.press(key)


def until(page, condition: str) -> None:
    """Waits for a condition in JavaScript. Playwright's own way needs eval, which the page forbids."""
    end = time.monotonic() + 10
    while not page.evaluate(condition):
        assert time.monotonic() < end, condition
        page.wait_for_timeout(50)


def after_saving(page, act) -> None:
    """Does what sends a rating, and waits until the page says that it is saved."""
    with page.expect_response("**/api/ratings") as answer:
        act()
    assert answer.value.status == 201
    page.locator("#toast", has_text=re.compile("Saved|Skipped")).wait_for()


def stored(folder: Path, rater: str) -> list[dict]:
    """What the database holds of a rater, oldest first; ranks: text of the answer -> rank."""
    with closing(sqlite3.connect(f"file:{folder / 'ratings.db'}?mode=ro", uri=True)) as db:
        db.row_factory = sqlite3.Row
        rows = [dict(row) for row in db.execute(
            "SELECT ratings.*, edits.text AS better FROM ratings JOIN tasks ON tasks.id = task_id "
            "JOIN raters ON raters.id = rater_id LEFT JOIN edits ON rating_id = ratings.id "
            "WHERE raters.name = ? ORDER BY ratings.id", (rater,))]
        for row in rows:
            row["ranks"] = dict(db.execute(
                "SELECT text, rank FROM ranks JOIN answers ON answers.id = answer_id WHERE rating_id = ?",
                (row["id"],)).fetchall())
    return rows


def ranks(texts: list[str], levels: list[list[int]]) -> dict[str, int]:
    """The ranks that an order means. Answers are counted from 1 as on the page; ties share the better rank.
    """
    found = {}
    for level in levels:
        rank = len(found) + 1
        found |= {texts[answer - 1]: rank for answer in level}
    return found


def card(page, number: int):
    return page.locator(".answer").nth(number - 1)


def drag(page, source, target, part: float) -> None:
    """Drags by the mouse to a part of the target's width."""
    source.scroll_into_view_if_needed()
    start, end = source.bounding_box(), target.bounding_box()
    page.mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] / 2)
    page.mouse.down()
    x, y = end["x"] + end["width"] * part, end["y"] + end["height"] / 2
    page.mouse.move(x - 20, y - 5, steps=4)
    page.mouse.move(x, y, steps=2)
    page.mouse.up()


def swipe(page, source, target) -> None:
    """Drags by a finger."""
    start, end = source.bounding_box(), target.bounding_box()
    session = page.context.new_cdp_session(page)
    points = [[box["x"] + box["width"] / 2, box["y"] + box["height"] / 2] for box in (start, end)]
    between = [(a + b) / 2 for a, b in zip(*points, strict=True)]
    for kind, point in (("touchStart", points[0]), ("touchMove", between), ("touchMove", points[1])):
        session.send("Input.dispatchTouchEvent", {
            "type": kind, "touchPoints": [{"x": point[0], "y": point[1]}]})
    session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})


# ------------------------------------------------------------------------------------------------- rankings


def test_a_ranking_by_clicks_in_order(person, folder):
    page = person()
    texts = shown(page)
    for number in (3, 1, 4, 2):
        card(page, number).click()
    assert page.locator(".chip b").all_inner_texts() == ["3", "1", "4", "2"]
    page.get_by_role("button", name="Fairly").click()
    after_saving(page, page.get_by_role("button", name="Send").click)
    [rating] = stored(folder, page.rater)
    assert rating["ranks"] == ranks(texts, [[3], [1], [4], [2]]) and rating["confidence"] == 2
    assert rating["seconds"] is not None and rating["better"] is None


def test_a_ranking_by_keys_alone_with_ties_and_corrections(person, folder):
    page = person()
    texts = shown(page)
    press(page, "32")
    page.keyboard.press("Backspace")  # 2 gets no place yet
    press(page, "1=4")
    assert page.locator(".answer .where").all_inner_texts() == ["= Place 2", "", "Best", "= Place 2"]
    page.keyboard.press("Enter")  # one is left: nothing is sent
    assert page.locator(".status").inner_text() == "1 answer has no place yet"
    press(page, "2cc")
    after_saving(page, lambda: page.keyboard.press("Enter"))
    [rating] = stored(folder, page.rater)
    assert rating["ranks"] == ranks(texts, [[3], [1, 4], [2]]) and rating["confidence"] == 2
    press(page, "?")
    page.get_by_label("Single keys are shortcuts").uncheck()
    page.get_by_role("button", name="Close").click()
    press(page, "1b")
    assert page.locator(".chip").count() == 0 and len(stored(folder, page.rater)) == 1


def test_a_ranking_by_dragging(person, folder):
    page = person()
    texts = shown(page)
    free, slots = page.locator(".slot.free"), page.locator(".slot:not(.free)")
    for number in (1, 2):
        drag(page, card(page, number).locator(".grip"), free.first, 0.5)
    drag(page, card(page, 3).locator(".grip"), slots.first, 0.05)  # before the best
    drag(page, card(page, 4).locator(".grip"), slots.last, 0.5)  # on the last: a tie
    assert page.locator(".slot").evaluate_all(
        "slots => slots.map(slot => [...slot.querySelectorAll('b')].map(b => b.textContent).join('='))"
    ) == ["3", "1", "2=4"]
    drag(page, page.locator(".chip[data-drag='0']"), page.locator(".slot").last, 0.95)  # after the last
    after_saving(page, lambda: page.keyboard.press("Enter"))
    [rating] = stored(folder, page.rater)
    assert rating["ranks"] == ranks(texts, [[3], [2, 4], [1]])


def test_a_ranking_by_a_finger_on_a_phone(person, folder):
    page = person(**PHONE)
    texts = shown(page)
    assert page.locator(".pick .mark").all_inner_texts() == ["1", "2", "3", "4"]  # what the places call them
    assert page.locator(".pick .mark").first.is_visible()
    for number in (2, 4, 1, 3):
        grip = card(page, number).locator(".grip")
        grip.evaluate("node => node.scrollIntoView({block: 'center'})")
        page.wait_for_timeout(100)  # fingers reach what has been drawn
        swipe(page, grip, page.locator(".slot.free").first)
        page.locator(f".chip[data-drag='{number - 1}']").wait_for()
    after_saving(page, page.get_by_role("button", name="Send", exact=True).tap)
    [rating] = stored(folder, page.rater)
    assert rating["ranks"] == ranks(texts, [[2], [4], [1], [3]])


def test_places_change_by_arrow_keys(person, folder):
    page = person()
    texts = shown(page)
    press(page, "1234")
    page.locator(".chip[data-drag='3']").focus()
    page.keyboard.press("ArrowLeft")  # beside 3
    assert page.evaluate("document.activeElement.dataset.drag") == "3"
    page.keyboard.press("ArrowLeft")  # before 3
    page.locator(".chip[data-drag='0']").focus()
    page.keyboard.press("ArrowRight")  # beside 2
    page.locator("#prompt-title").focus()
    after_saving(page, lambda: page.keyboard.press("Enter"))
    [rating] = stored(folder, page.rater)
    assert rating["ranks"] == ranks(texts, [[1, 2], [4], [3]])


def test_all_bad_and_skip(person, folder):
    page = person()
    after_saving(page, lambda: page.keyboard.press("b"))
    page.wait_for_selector(".answer")
    after_saving(page, lambda: page.keyboard.press("s"))
    assert [(row["kind"], row["ranks"]) for row in stored(folder, page.rater)] == [
        ("all_bad", {}), ("skip", {})]


def test_a_better_answer_begins_as_the_best_one(person, folder):
    page = person()
    texts = shown(page)
    press(page, "2143e")
    field = page.get_by_label("A better answer")
    assert field.input_value() == texts[1].strip()
    page.keyboard.type(" And so on.")
    after_saving(page, lambda: page.keyboard.press("Control+Enter"))
    page.wait_for_selector(".answer")
    press(page, "1234e")  # opened and left as it is: no better answer
    page.keyboard.press("Escape")
    after_saving(page, lambda: page.keyboard.press("Enter"))
    first, second = stored(folder, page.rater)
    assert first["better"] == f"{texts[1].strip()} And so on." and second["better"] is None
    assert first["ranks"] == ranks(texts, [[2], [1], [4], [3]])


def test_undo_brings_back_what_was_said(person, folder):
    page = person()
    texts = shown(page)
    press(page, "4=231c")
    after_saving(page, lambda: page.keyboard.press("Enter"))
    until(page, "document.querySelectorAll('.chip').length === 0")
    page.keyboard.press("u")
    page.wait_for_selector(".chip")
    assert page.locator(".answer .where").all_inner_texts() == ["Place 4", "= Best", "Place 3", "= Best"]
    assert shown(page) == texts
    page.keyboard.press("Backspace")
    page.keyboard.press("Backspace")
    press(page, "13")
    after_saving(page, lambda: page.keyboard.press("Enter"))
    first, second = stored(folder, page.rater)
    assert first["undone"] and not second["undone"]
    assert first["ranks"] == ranks(texts, [[4, 2], [3], [1]])
    assert second["ranks"] == ranks(texts, [[4, 2], [1], [3]]) and second["confidence"] == 1


def test_two_raters_at_once_rate_different_prompts(person, folder):
    pages = [person(), person()]
    texts = [shown(page) for page in pages]
    press(pages[0], "12")
    press(pages[1], "43")
    press(pages[0], "34")
    press(pages[1], "21")
    for page in pages:
        after_saving(page, lambda page=page: page.keyboard.press("Enter"))
    (first,), (second,) = (stored(folder, page.rater) for page in pages)
    assert first["task_id"] != second["task_id"]
    assert first["ranks"] == ranks(texts[0], [[1], [2], [3], [4]])
    assert second["ranks"] == ranks(texts[1], [[4], [3], [2], [1]])


# ------------------------------------------------------------------------------------------ nothing is lost


def test_a_reload_in_the_middle_keeps_the_ranking(person, folder):
    page = person()
    texts = shown(page)
    press(page, "3=1c")
    page.keyboard.press("e")
    page.keyboard.type(" More.")
    page.reload()
    page.wait_for_selector(".chip")
    assert page.locator(".chip b").all_inner_texts() == ["3", "1"]
    assert page.get_by_label("A better answer").input_value() == f"{texts[2].strip()} More."
    press(page, "42")
    after_saving(page, lambda: page.keyboard.press("Enter"))
    [rating] = stored(folder, page.rater)
    assert rating["ranks"] == ranks(texts, [[3, 1], [4], [2]])
    assert rating["confidence"] == 1 and rating["better"] == f"{texts[2].strip()} More."


@pytest.mark.parametrize("how", ["lost", "broken off"])
def test_a_rating_whose_answer_was_lost_is_sent_again_and_counts_once(person, folder, how):
    page = person()
    texts, lost = shown(page), []

    def lose(route):
        lost.append(route.request.post_data_json["key"])
        if len(lost) == 1:
            route.fetch()  # it arrives, and its answer does not
            route.abort() if how == "lost" else route.fulfill(status=201, body='{"rating": 1, "ta')
        else:
            route.fallback()

    page.route("**/api/ratings", lose)
    press(page, "2134")
    page.keyboard.press("Enter")
    page.locator(".retry", has_text="not saved yet").wait_for()
    press(page, "3")  # what is on its way does not change
    after_saving(page, page.get_by_role("button", name="Send now").click)
    [rating] = stored(folder, page.rater)
    assert rating["ranks"] == ranks(texts, [[2], [1], [3], [4]]) and lost == [rating["key"]] * 2
    assert all("Failed to load" in problem for problem in page.problems)
    page.problems.clear()


def test_a_rating_that_could_not_be_sent_is_sent_after_a_reload(person, folder):
    page = person()
    texts = shown(page)
    page.route("**/api/ratings", lambda route: route.abort())
    press(page, "4321")
    page.keyboard.press("Enter")
    page.locator(".retry", has_text="not saved yet").wait_for()
    page.reload()
    page.locator(".loading", has_text="not saved yet").wait_for()
    for view in ("Look", "Rate"):  # it goes on being sent, whichever view is shown
        page.get_by_role("link", name=view, exact=True).click()
        page.locator({"Look": ".tile, .ask", "Rate": ".loading"}[view]).first.wait_for()
    page.unroute("**/api/ratings")
    after_saving(page, lambda: None)
    [rating] = stored(folder, page.rater)
    assert rating["ranks"] == ranks(texts, [[4], [3], [2], [1]])
    assert all("Failed to load" in problem for problem in page.problems)
    page.problems.clear()


def test_a_rating_that_is_refused_says_so(person, folder):
    page = person()
    page.route("**/api/ratings", lambda route: route.fulfill(status=409, json={"error": "rated already"}))
    press(page, "1234")
    page.keyboard.press("Enter")
    page.locator("#toast", has_text="not saved: rated already").wait_for()
    page.wait_for_selector(".answer")
    assert page.evaluate("localStorage.getItem('outbox')") is None and stored(folder, page.rater) == []
    assert "status of 409" in page.problems.pop() and not page.problems


def test_the_page_waits_while_answers_are_sampled(person):
    page, waits = person(), []

    def wait(route):
        waits.append(route)
        if len(waits) < 2:
            route.fulfill(json={"task": None, "waiting": True,
                                "progress": {"rated": 0, "total": 9, "seconds_left": None}})
        else:
            route.fallback()

    page.route("**/api/task", wait)
    page.reload()
    page.get_by_role("heading", name="The model is writing answers").wait_for()
    page.wait_for_selector(".answer")  # by itself


# ---------------------------------------------------------------------------------------------------- chat


def test_a_chat_streams_and_ends_with_a_score(person, folder):
    page = person(view="chat")
    page.get_by_label("Message").fill("My dog ate my book. What now?")
    page.keyboard.press("Enter")
    page.locator(".reply:not(.busy) .pill").first.wait_for()
    assert page.locator(".reply").count() == 1
    assert page.locator(".reply b").first.inner_text() == f"{folder.name}/first"


def test_a_paste_that_would_stall_the_browser_is_refused_and_nothing_is_lost(person):
    page = person(view="chat")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    message = page.get_by_label("Message")
    message.fill("My dog ate my book.")
    for length, kept in ((10_000_000, 19), (290_000, 290_019), (20_000, 290_019)):
        page.evaluate("length => navigator.clipboard.writeText('long '.repeat(length / 5))", length)
        message.focus()
        page.keyboard.press("Control+End")
        page.keyboard.press("Control+V")
        assert page.evaluate("document.querySelector('#message').value.length") == kept
        assert page.locator("#toast .error", has_text=f"{length:,}").count() == (length != 290_000)
    assert message.input_value().startswith("My dog ate my book.long")


def test_a_chat_survives_a_reload_of_its_tab_alone(person):
    page = person(view="chat")
    for text in ("My dog ate my book. What now?", "And my cat?"):
        page.get_by_label("Message").fill(text)
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Send").wait_for()
    page.get_by_label("Message").fill("And")
    before = page.locator(".log").inner_text()
    assert "ate my book" in before and "my cat" in before
    page.reload()
    page.locator(".reply").nth(1).wait_for()
    assert page.locator(".log").inner_text() == before
    assert page.get_by_label("Message").input_value() == "And"
    other = page.context.new_page()
    other.goto(page.url)
    other.locator(".welcome").wait_for()
    answered = [text for text in page.locator(".reply .prose").all_inner_texts() if text.strip()]
    with page.expect_response("**/api/chat") as answer:
        page.get_by_label("Message").press("Enter")
    asked = answer.value.request.post_data_json["messages"]
    assert asked[-1]["content"] == "And" and len(asked) == 2 * len(answered) + 1
    page.get_by_role("button", name="Send").wait_for()
    page.get_by_role("button", name="New chat").click()
    page.reload()
    page.locator(".welcome").wait_for()


def test_a_conversation_goes_on_after_an_error(person):
    page = person(view="chat")
    full = {"status": 429, "json": {"error": "too many chats"}}
    page.route("**/api/chat", lambda route: route.fulfill(**full), times=1)
    for text in ("My dog ate my book.", "And my cat?"):
        page.get_by_label("Message").fill(text)
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Send").wait_for()
    assert page.locator(".reply").first.inner_text().endswith("too many chats")
    assert page.locator(".reply .problem").count() == 1 and "429" in page.problems.pop()
    page.get_by_role("button", name="Answer again").click()
    page.get_by_role("button", name="Answer again").wait_for()  # it is the last one's alone
    assert page.locator(".bubble").all_inner_texts() == ["My dog ate my book.", "And my cat?"]


def test_an_answer_stops_and_two_models_stand_side_by_side(person, folder):
    page = person(view="chat")
    page.get_by_label("Model", exact=True).select_option(label=f"{folder.name}/endless")
    page.get_by_label("Beside it").select_option(label=f"{folder.name}/first")
    page.get_by_text("Sampling").click()
    page.get_by_label("Temperature").fill("50")
    assert page.locator("[aria-invalid=true]").get_attribute("id") == "chat-temperature"
    page.get_by_label("Temperature").fill("")
    page.get_by_label("Longest answer").fill("4000")
    page.get_by_label("Message").fill("Tell me all.")
    assert page.locator(".sampling[open]").count() == 0  # it is not in the way
    page.keyboard.press("Enter")
    body = page.locator(".reply").first.locator(".prose")
    until(page, "document.querySelector('.reply.busy .prose')?.textContent.length > 40")
    before = body.inner_text()
    until(page, f"document.querySelector('.reply.busy .prose')?.textContent.length > {len(before)}")
    page.get_by_role("button", name="Stop", exact=True).click()
    page.locator(".reply .pill", has_text="stopped").first.wait_for()
    page.get_by_role("button", name="Send").wait_for()
    boxes = [page.locator(".reply").nth(place).bounding_box() for place in (0, 1)]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]


def test_a_prompt_of_the_chat_is_rated_and_markup_and_hebrew_are_text(person, folder):
    page = person(view="chat")
    page.get_by_label("Message").fill(f"{SCRIPT}\n\n{HEBREW}")
    page.keyboard.press("Enter")
    page.locator(".reply:not(.busy)").wait_for()
    assert page.locator(".bubble").inner_text() == f"{SCRIPT}\n\n{HEBREW}"
    page.get_by_role("button", name="Rate this prompt").click()
    page.locator("#toast", has_text="in the queue").wait_for()
    prompt = page.locator(".prompt-text", has_text=HEBREW)
    page.get_by_role("link", name="Rate", exact=True).click()
    assert page.locator("#toast .message").count() == 0  # it was about the other view
    page.wait_for_selector(".answer")
    for _ in range(3):  # the task that was open comes first, then the prompt once it has its answers
        if prompt.count():
            break
        until(page, "fetch('/api/state').then(r => r.json()).then(s => s.queue.ready > 0)")
        page.wait_for_timeout(300)
        after_saving(page, lambda: page.keyboard.press("s"))
        page.wait_for_selector(".answer")
    assert SCRIPT in page.locator(".prompt-text").inner_text()
    assert page.evaluate("window.broken") is None
    assert page.locator(".prompt-text script, .prompt-text img").count() == 0
    # right to left: the first letter of the Hebrew line stands right of its last one
    first, last = page.evaluate("""text => {
        const pane = document.querySelector('.prompt-text');
        const walker = document.createTreeWalker(pane, NodeFilter.SHOW_TEXT);
        while (!walker.nextNode().textContent.includes(text)) {}
        const node = walker.currentNode, start = node.textContent.indexOf(text);
        return [start, start + text.length - 1].map(at => {
            const range = document.createRange();
            range.setStart(node, at);
            range.setEnd(node, at + 1);
            return range.getBoundingClientRect().left;
        });
    }""", HEBREW)
    assert first > last
    pane = page.locator(".prompt-text").bounding_box()
    assert first > pane["x"] + pane["width"] / 2


# --------------------------------------------------------------------------------- look, languages, access


def test_the_figures_are_those_of_the_database(person, folder):
    page = person()
    press(page, "1234")
    after_saving(page, lambda: page.keyboard.press("Enter"))
    page.get_by_role("link", name="Look").click()
    page.wait_for_selector(".tile")
    with closing(sqlite3.connect(f"file:{folder / 'ratings.db'}?mode=ro", uri=True)) as db:
        counts = dict(db.execute("SELECT kind, count(*) FROM ratings WHERE undone IS NULL GROUP BY kind"))
    tiles = dict(page.locator(".tile").evaluate_all(
        "tiles => tiles.map(tile => ['dt', 'b'].map(part => tile.querySelector(part).textContent))"))
    assert tiles["Rankings"] == str(counts["ranking"])
    page.get_by_text("do not compare two models").wait_for()
    assert page.locator(".rated > li").first.inner_text().count(page.rater) == 1
    assert page.get_by_role("row", name=page.rater).count() == 1


def test_the_language_changes_in_all_views_and_stays(person):
    page = person()
    page.get_by_role("button", name="中文").click()
    for view, name in zip(VIEWS, ("对话", "评分", "查看", "训练"), strict=True):
        page.locator(f".tabs a[href='#{view}']").click()
        page.locator("main h1").first.wait_for()
        assert page.locator(".tabs a[aria-current]").inner_text() == name
        words = page.evaluate(r"document.querySelector('main').innerText.match(/\{\w+\}|undefined|NaN/g)")
        assert words is None
    page.reload()
    page.locator("main h1").first.wait_for()
    assert page.evaluate("document.documentElement.lang") == "zh-CN"


@pytest.mark.parametrize("size", [(1200, 800), (390, 844)])
def test_no_view_has_a_barrier_in_light_and_dark_or_scrolls_sideways(person, size):
    import axe_playwright_python

    page = person(viewport={"width": size[0], "height": size[1]})
    page.evaluate((Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text())
    press(page, "1234")
    after_saving(page, lambda: page.keyboard.press("Enter"))  # so that there are figures
    until(page, "document.querySelectorAll('.answer').length && !document.querySelector('.chip')")
    press(page, "31=4")

    def check(what):
        for scheme, only in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
            page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
            result = page.evaluate("only => axe.run(only)", only)
            assert result["passes"]
            assert [(what, scheme, found["id"], node["html"][:200]) for found in result["violations"]
                    for node in found["nodes"]] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0], what

    check("rate")
    page.keyboard.press("e")
    check("editor")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    check("keys")
    page.keyboard.press("Escape")
    for view, part in (("chat", ".composer"), ("look", ".tile"), ("train", ".rounds h2")):
        page.locator(f".tabs a[href='#{view}']").click()
        page.locator(part).first.wait_for()
        check(view)
    page.locator("#who").click()
    check("who")


def test_the_theme_switch_wins_over_the_system_and_stays(person):
    page = person(color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.locator("#theme").click()  # light
    page.locator("#theme").click()  # dark
    dark = page.evaluate(ground)
    page.reload()
    assert light != dark == page.evaluate(ground)


# ------------------------------------------------------------------------------------------------ training


def test_who_is_reached_by_others_asks_for_the_token_once(folder, browser, tmp_path):
    token = tmp_path / "token"
    token.write_text("twenty letters and more")
    token.chmod(0o600)
    words = words_of(folder, tmp_path, "--host", "0.0.0.0", "--token_file", str(token))
    with served(words) as (_, port):
        page = open_page(browser, f"http://127.0.0.1:{port}", rater=None)
        field = page.get_by_label("Token")
        field.fill("not the token, I fear")
        page.keyboard.press("Enter")
        page.get_by_text("this is not the token").wait_for()
        field.fill(token.read_text())
        page.keyboard.press("Enter")
        page.get_by_label("Your name").fill("Ann")
        page.keyboard.press("Enter")
        page.wait_for_selector(".answer")
        page.reload()
        page.wait_for_selector(".answer")
        assert page.evaluate("document.cookie") == ""  # no script reads the session
        assert "status of 401" in page.problems.pop(0) and not page.problems
        page.context.close()


def test_what_was_rated_is_trained_on_and_the_new_model_answers(person, folder):
    page = person()
    for _ in range(6):
        press(page, "1234")
        after_saving(page, lambda: page.keyboard.press("Enter"))
        until(page, "document.querySelectorAll('.answer').length && !document.querySelector('.chip')")
    page.get_by_role("link", name="Train", exact=True).click()
    start = page.get_by_role("button", name="Train on")
    start.click()
    page.locator(".logtext", has_text="train_sft.py").wait_for()
    page.get_by_role("button", name="Cancel the training").click()
    page.locator(".rounds .cancelled").wait_for(timeout=60_000)
    assert page.locator(".steps .failed").inner_text().endswith("Best answers")
    start.click()
    page.get_by_role("button", name="Cancel the training").wait_for()
    page.locator(".logtext", has_text="train_sft.py").wait_for()
    talk = page.get_by_role("link", name="Talk to round-2")
    talk.or_(page.locator(".rounds .failed")).first.wait_for(timeout=300_000)
    log = page.locator(".logtext").inner_text()
    assert page.locator(".rounds .pill").first.inner_text() == "finished", log
    page.get_by_role("heading", name="eval/accuracy").wait_for()
    page.get_by_role("heading", name="objective/score").wait_for()
    assert page.locator(".now .next a").all_inner_texts() == ["Talk to round-2", "Rate its answers"]
    talk.click()
    assert page.locator("#chat-model option:checked").inner_text() == "round-2"
    page.get_by_label("Message").fill("My cat sleeps on my book.")
    page.keyboard.press("Enter")
    page.locator(".reply:not(.busy)", has_text="round-2").wait_for()
    assert page.locator(".reply .problem").all_inner_texts() == []
