"""The rating page through a real server on tiny models: tasks, ratings, chat, sampling ahead, mistakes at the
start.
"""

import json
import os
import re
import signal
import socket
import sqlite3
import threading
import time
import uuid

import pytest
import torch

import feedback
from browser import Browser
from rated import database
from served import served, start_process, wait_until, words_of, write_models
from utils.config import UserError, parse_config
from utils.data.conversations import messages_of
from utils.feedback.sampling import CHATS, BusyError, Precedence
from utils.models.talk import Talker

TOKEN = "a-token-of-thirty-two-characters"
POST = "My balcony faces north. What grows there?"


def said(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"), "first", "second")


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that never ends an answer by itself."""
    return write_models(tmp_path_factory.mktemp("endless"), "first", eos_logit=-50.0)


@pytest.fixture(scope="module")
def page(folder, tmp_path_factory):
    """Two policies whose answers are rated, with scores; everybody gets every prompt; nothing is repeated."""
    words = words_of(folder, tmp_path_factory.mktemp("page"), "--model", str(folder / "first"),
                     str(folder / "second"), "--reward_model", str(folder / "reward"), "--repeat_share", "0",
                     "--ahead", "3")
    with served(words) as (page, port):
        page.port = port
        yield page


def task_of(browser: Browser) -> dict:
    """The task of a rater, once there is one."""
    wait_until(lambda: browser.get("/api/task")[1]["task"])
    return browser.get("/api/task")[1]["task"]


def names_in(value) -> set:
    """All names of all objects in a value of JSON."""
    if isinstance(value, dict):
        return set(value) | set().union(*map(names_in, value.values()))
    return set().union(*map(names_in, value)) if isinstance(value, list) else set()


# ----------------------------------------------------------------------------------------------------- rating


def test_a_task_is_blind_and_its_rating_is_in_the_database(page):
    browser = Browser(page.port).rater("Ann")
    task = task_of(browser)
    assert names_in(task) == {"id", "prompt", "messages", "role", "content", "html", "answers", "text"}
    assert len({answer["text"] for answer in task["answers"]}) == 4
    status, answer = browser.rate(task, [[2], [0, 1], [3]], better="A cat sleeps.")
    assert status == 201 and answer["progress"]["rated"] == 1 and task_of(browser)["id"] != task["id"]
    [row] = [row for row in page.ratings.rated() if row["id"] == answer["rating"]]
    assert row["rater"] == "Ann" and row["prompt"] == task["prompt"]["messages"][0]["content"]
    assert row["completions"] == [answer["text"] for answer in task["answers"]]
    assert row["ranks"] == [2, 2, 1, 4] and row["better"] == "A cat sleeps."
    assert sorted(set(row["policies"])) == sorted(page.models.names.values()) and len(row["policies"]) == 4


def test_what_a_round_still_needs_is_told_and_a_skip_does_not_count(page, monkeypatch):
    monkeypatch.setattr(page.rounds, "least", 1000)
    monkeypatch.setattr(page.rounds, "full", 2000)
    browser = Browser(page.port).rater("Una")

    def needs(progress):
        return progress["to_round"], progress["to_full"]

    few, more = needs(browser.get("/api/task")[1]["progress"])
    assert few <= 1000 < more
    skip = {"key": str(uuid.uuid4()), "task": task_of(browser)["id"], "kind": "skip", "order": None}
    assert needs(browser.post("/api/ratings", skip)[1]["progress"]) == (few, more)
    tied = browser.rate(task_of(browser), [[0, 1, 2, 3]], better="A cat.")[1]["progress"]
    assert needs(tied) == (few - 1, more)  # the cat can be learnt from, but there is no pair
    ranked = browser.rate(task_of(browser), [[0], [1, 2, 3]])[1]["progress"]
    assert needs(ranked) == (few - 2, more - 1)
    monkeypatch.setattr(page.rounds, "least", 1)
    monkeypatch.setattr(page.rounds, "full", 1)
    assert needs(browser.get("/api/task")[1]["progress"]) == (0, 0)


def test_a_reload_shows_the_same_task(page):
    browser = Browser(page.port).rater("Bob")
    assert task_of(browser) == task_of(browser)
    again = Browser(page.port).rater("Bob")  # another window
    assert task_of(again)["id"] == task_of(browser)["id"]


def test_a_rating_that_is_sent_again_is_stored_once(page):
    browser = Browser(page.port).rater("Cid")
    task, key = task_of(browser), str(uuid.uuid4())
    first, second = (browser.rate(task, key=key) for _ in range(2))
    assert first[0] == second[0] == 201 and first[1]["rating"] == second[1]["rating"]
    assert browser.rate(task)[0] == 409  # another rating of the same task
    assert browser.get("/api/task")[1]["progress"]["rated"] == 1


def test_undo_gives_back_what_was_said(page):
    browser = Browser(page.port).rater("Dan")
    assert browser.post("/api/undo")[0] == 409
    task = task_of(browser)
    browser.rate(task, [[3], [1], [0, 2]], confidence=3, better="text")
    status, answer = browser.post("/api/undo")
    assert status == 200 and answer["task"] == task and answer["progress"]["rated"] == 0
    assert answer["said"] == {"kind": "ranking", "order": [[3], [1], [0, 2]], "confidence": 3,
                              "better": "text"}


@pytest.mark.parametrize("values", [
    {"order": [[0], [1], [2]]}, {"order": [[0, 0], [1], [2], [3]]}, {"order": [[0], [1], [2], [4]]},
    {"order": [0, 1, 2, 3]}, {"order": "0123"}, {"order": [["0"], ["1"], ["2"], ["3"]]},
    {"order": [[True], [False], [2], [3]]}, {"kind": "best"}, {"kind": "skip"}, {"confidence": 4},
    {"confidence": True}, {"seconds": -1}, {"seconds": 1e999}, {"task": 10**30}, {"task": "1"}, {"key": ""},
    {"key": "x" * 1000}, {"better": 5}, {"better": "x" * 20_001}, {"rater": "Ann"},
])
def test_a_rating_that_makes_no_sense_is_refused(values, page):
    browser = Browser(page.port).rater("Eve")
    task = task_of(browser)
    body = json.dumps({"key": str(uuid.uuid4()), "task": task["id"], "kind": "ranking",
                       "order": [[0], [1], [2], [3]], **values}).replace("Infinity", "1e999")
    status, answer = browser.ask("POST", "/api/ratings", body.encode())
    assert status == 400 and "\n" not in answer["error"]
    assert browser.get("/api/task")[1]["progress"]["rated"] == 0


def test_nobody_rates_what_is_somebody_elses(page):
    ann, eve = Browser(page.port).rater("Ann"), Browser(page.port).rater("Eve")
    assert eve.rate(task_of(ann))[0] == 400


def test_a_full_disk_is_said_and_the_same_rating_can_be_sent_again(page, monkeypatch):
    browser = Browser(page.port).rater("Fay")
    task, key = task_of(browser), str(uuid.uuid4())
    with monkeypatch.context() as broken:
        broken.setattr(page.ratings, "rate", lambda **values: (_ for _ in ()).throw(UserError("disk: full")))
        assert browser.rate(task, key=key) == (503, {"error": "disk: full"})
    assert browser.rate(task, key=key)[0] == 201


def test_what_was_rated_is_shown(page):
    browser = Browser(page.port).rater("Gus")
    for _ in range(3):
        browser.rate(task_of(browser))
    status, answer = browser.get("/api/look")
    assert status == 200 and {"name": "Gus", "rated": 3} in [
        {name: row[name] for name in ("name", "rated")} for row in answer["raters"]]
    rows = browser.get("/api/rated")[1]["rows"]
    assert [row["id"] for row in rows] == sorted((row["id"] for row in rows), reverse=True)
    assert [row["rater"] for row in rows[:3]] == ["Gus"] * 3
    assert browser.get(f"/api/rated?before={rows[0]['id']}")[1]["rows"][0]["id"] == rows[1]["id"]
    # the reward model scores in the background
    wait_until(lambda: (browser.get("/api/look")[1]["reward_model"] or {"pairs": 0})["pairs"] >= 18)


@pytest.mark.parametrize("layout", ["jsonl", "edits", "argilla", "label_studio"])
def test_a_download_is_the_file_that_export_writes(layout, page, tmp_path, capsys):
    browser = Browser(page.port).rater("Ivy")
    browser.rate(task_of(browser), better="A better one. 😀")
    status, content = browser.get(f"/api/export/{layout}")
    text = content.decode() if isinstance(content, bytes) else json.dumps(content, ensure_ascii=False)
    assert status == 200 and ("better one. 😀" in text) == (layout != "jsonl")
    ending = "jsonl" if layout in ("jsonl", "edits") else "json"
    assert browser.headers["content-disposition"] == f'attachment; filename="ratings-{layout}.{ending}"'
    words = ["--export", str(tmp_path / "file"), "--export_layout", layout, "--ratings",
             str(page.ratings.path)]
    config = parse_config(feedback.FeedbackConfig, None, words)
    feedback.main(config)
    written = (tmp_path / "file").read_text(encoding="utf-8")
    assert (json.loads(written) if ending == "json" else written.encode()) == content
    with pytest.raises(UserError, match="^export: .* must be a new file"):
        feedback.main(config)


def test_an_export_of_nothing_makes_no_database(tmp_path):
    words = ["--export", str(tmp_path / "file"), "--ratings", str(tmp_path / "none.db")]
    with pytest.raises(UserError, match="^ratings: '.*none.db' does not exist"):
        feedback.main(parse_config(feedback.FeedbackConfig, None, words))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="'port' has no effect .export writes the ratings and ends"):
        parse_config(feedback.FeedbackConfig, None, [*words, "--port", "9"])


# ------------------------------------------------------------------------------------------------------- chat


def test_models_answer_side_by_side_in_pieces(page):
    browser = Browser(page.port)
    state = browser.open()
    assert state["reward_model"] is True and [model["name"] for model in state["models"]] != []
    numbers = [model["id"] for model in state["models"]]
    lines = browser.chat({"models": numbers, "messages": said(POST), "temperature": 0, "max_new_tokens": 8})
    for number in numbers:
        *pieces, last = [line for line in lines if line["model"] == number]
        assert last.get("done"), last
        assert "".join(piece["text"] for piece in pieces).strip() == last["text"]
        talker = page.models.talker(number)
        [answer] = talker.answers(talker.prompt(said(POST), 8), 1, 8, 0.0)
        assert last["text"] == answer.text
        assert (last["score"] is not None) == last["ended"]


def test_chats_at_the_same_time_do_not_disturb_each_other(page):
    texts = [f"{POST} {number}" for number in range(CHATS)]
    number, lines = page.models.rated[0], {}

    def ask(text):
        browser = Browser(page.port)
        browser.open()
        lines[text] = browser.chat({"models": [number], "messages": said(text), "temperature": 0})

    threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    talker = page.models.talker(number)
    for text in texts:
        [answer] = talker.answers(talker.prompt(said(text), 12), 1, 12, 0.0)
        assert lines[text][-1].get("text") == answer.text, lines[text]


def test_a_bug_is_a_line_for_the_page(page, monkeypatch, caplog):
    def fails():
        raise ZeroDivisionError

    monkeypatch.setattr(page.rounds, "state", fails)
    browser = Browser(page.port)
    status, answer = browser.get("/api/train")
    assert (status, answer) == (500, {"error": "the server has failed; its log says how"})
    assert "content-security-policy" in browser.headers


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "שלום מה שלומך", "مرحبا 😀👩‍👩‍👧",
                                  "word " * 150_000, "word" * 100_000, "\u200b",
                                  "SUBREDDIT: r/x\n\nTITLE: y\n\nPOST: z"])
def test_any_text_gets_an_answer_or_a_line(text, page):
    browser = Browser(page.port)
    [model, *_] = browser.open()["models"]
    *_, last = browser.chat({"models": [model["id"]], "messages": said(text), "max_new_tokens": 4})
    assert last.get("done") or "\n" not in last["error"]


def test_no_room_for_a_prompt_is_said_in_the_chat(page):
    browser = Browser(page.port)
    [model, *_] = browser.open()["models"]
    [line] = browser.chat({"models": [model["id"]], "messages": said(POST), "max_new_tokens": 100_000})
    assert line["model"] == model["id"] and line["error"].startswith("max_new_tokens: 100000 tokens leave no")


@pytest.mark.parametrize("body", [
    {}, {"models": [], "messages": said("x")}, {"models": [99], "messages": said("x")},
    {"models": [True], "messages": said("x")}, {"models": [1] * 5, "messages": said("x")},
    {"models": [1], "messages": []}, {"models": [1], "messages": said(" ")},
    {"models": [1], "messages": said("a\x1eb")}, {"models": [1], "messages": [{"role": "user"}]},
    {"models": [1], "messages": said("a") + said("b")}, {"models": [1], "messages": said("x") * 201},
    {"models": [1], "messages": [{"role": "tools", "content": "x"}]},
    {"models": [1], "messages": [{"role": ["user"], "content": "x"}]},
    {"models": [1], "messages": [{"role": "assistant", "content": "x"}]},
    {"models": [1], "messages": said("x"), "temperature": -1},
    {"models": [1], "messages": said("x"), "temperature": "1"},
    {"models": [1], "messages": said("x"), "max_new_tokens": 0},
])
def test_a_chat_that_makes_no_sense_is_refused(body, page):
    browser = Browser(page.port)
    browser.open()
    status, answer = browser.post("/api/chat", body)
    assert status == 400 and "\n" not in answer["error"]


def test_who_leaves_stops_the_model_and_a_chat_goes_before_sampling(endless, tmp_path, monkeypatch):
    """Each token takes 10 ms here: an answer of 300 would take 3 s."""
    steps, kinds = [], []  # of the model; rows of each step
    with served(words_of(endless, tmp_path, "--max_new_tokens", "300", "--ahead", "10000")) as (page, port):
        model = page.models.talker(1).model

        def slow(module, arguments, given):
            steps.append(time.monotonic())
            kinds.append(len(given["input_ids"]))
            time.sleep(0.01)

        model.register_forward_pre_hook(slow, with_kwargs=True)
        wait_until(lambda: kinds[-3:] == [4] * 3)  # it samples ahead, four answers at once
        browser = Browser(port)
        browser.open()
        response = browser.send("POST", "/api/chat", json.dumps(
            {"models": [1], "messages": said(POST), "temperature": 1}).encode())
        assert json.loads(response.readline())["model"] == 1  # the first words come while it goes on
        chat = kinds.index(1)
        wait_until(lambda: kinds[-10:] == [1] * 10)
        # at most two more tokens were sampled ahead after the chat's first
        assert kinds[chat:].count(4) <= 2
        response.close()
        browser.close()
        left = len(kinds)
        wait_until(lambda: kinds[-1] == 4)  # sampling goes on, so the chat has ended
        assert kinds[left:].count(1) < 150 and kinds.count(1) < 290
        assert page.ratings.queue([1], 4)["ready"] == 0  # what was given up is not stored


def test_chats_at_once_are_counted():
    precedence = Precedence()
    slots = [precedence.chat() for _ in range(CHATS)]
    for slot in slots:
        slot.__enter__()
    with pytest.raises(BusyError), precedence.chat():
        pass
    assert not precedence.wait(0.01)
    for slot in slots:
        slot.__exit__(None, None, None)
    assert precedence.wait(0.01) and not precedence.is_taken()


def test_a_question_of_the_chat_is_rated_next(page):
    browser = Browser(page.port).rater("Hal")
    text = "Why <b>does</b> my 😀 cat sleep, مرحبا?"
    messages = [*said("Hello"), {"role": "assistant", "content": "Hi"}, *said(text),
                {"role": "assistant", "content": "no question"}]
    assert browser.post("/api/queue", {"messages": messages}) == (200, {"new": True})
    assert browser.post("/api/queue", {"messages": messages}) == (200, {"new": False})
    wait_until(lambda: page.ahead.idle)
    [message] = task_of(browser)["prompt"]["messages"]
    assert f"POST: {text}" in message["content"] and "&lt;b&gt;does&lt;/b&gt;" in message["html"]


# ----------------------------------------------------------------------------------------------------- models


def test_a_folder_is_loaded_once(folder, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(Talker, "__init__", lambda self, parent, init=Talker.__init__: (
        loaded.append(parent.name), init(self, parent))[1])
    os.symlink(folder / "first", tmp_path / "same")
    words = words_of(folder, tmp_path / "out", "--compare", str(folder / "first"), str(folder / "second"))
    with served(words) as (page, port):
        assert len(loaded) == 2 and len(Browser(port).open()["models"]) == 2
        page.offer("round-1", folder / "second")
        assert len(loaded) == 2
        names = {model["id"]: model["name"] for model in Browser(port).open()["models"]}
        assert names[page.models.rated[0]] == "round-1" and len(page.models.rated) == 2
        for number in (2, 3):  # of the rounds the last two stay
            page.offer(f"round-{number}", folder / "second")
        assert [name for name in page.models.names.values() if name.startswith("round")] == ["round-2",
                                                                                            "round-3"]
        assert [page.models.names[number] for number in page.models.rated] == ["round-3", "round-2"]


def test_a_prompt_that_cannot_fit_is_left_out_and_the_others_are_sampled(folder, tmp_path, capsys):
    long = f"SUBREDDIT: r/{'pets ' * 2000}\n\nTITLE: Cat\n\nPOST: My cat.\n\nTL;DR:"  # no post to cut
    (tmp_path / "posts.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in (
        long, "word " * 50_000, "A short one.")))
    words = words_of(folder, tmp_path / "out", "--prompts", str(tmp_path / "posts.jsonl"))
    with served(words) as (page, port):
        wait_until(lambda: page.ahead.idle)
        assert page.ratings.queue(page.models.rated, 4)["ready"] == 2
        assert Browser(port).open()["trouble"] is None
    assert len(re.findall(r"prompt \d is left out: .*cannot fit", capsys.readouterr().err)) == 1


def test_a_failure_of_sampling_is_shown_and_ends_with_its_cause(folder, tmp_path, monkeypatch, capsys):
    answers = Talker.answers
    broken = threading.Event()
    broken.set()

    def fails(self, *given, **more):
        if broken.is_set():
            raise RuntimeError("out of memory")
        return answers(self, *given, **more)

    monkeypatch.setattr(Talker, "answers", fails)
    with served(words_of(folder, tmp_path)) as (page, port):
        browser = Browser(port)
        wait_until(lambda: "out of memory" in (browser.open()["trouble"] or ""))
        assert browser.get("/")[0] in (200, 404)
        broken.clear()
        page.ahead.wake()
        wait_until(lambda: page.ahead.idle)
        assert browser.open()["trouble"] is None
    assert capsys.readouterr().err.count("out of memory") == 1


# -------------------------------------------------------------------------------------------------- the start


def other_database(path):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()


def damaged_database(path):
    database(path, [f"a post {n}" for n in range(50)]).close()
    content = bytearray(path.read_bytes())
    content[4096:12288] = b"\xff" * 8192
    path.write_bytes(content)


@pytest.mark.parametrize(("words", "make", "message"), [
    ("--model {0}/nothing", None, "model: no model folder at"),
    ("--model {0}/reward", None, "model: '.*' is a reward model"),
    ("--model {0}/first --reward_model {0}/second", None, "reward_model: '.*' is no reward model"),
    ("--model {0}/first --prompts none", None, "prompts: none are given, and '.*' has none; name a file"),
    ("--model {0}/first --prompts {0}/empty.jsonl", None, "prompts: "),
    ("--model {0}/first --ratings {1}/a.db", other_database, "{1}/a.db: is a database of another program"),
    ("--model {0}/first --ratings {1}/a.db", damaged_database, "{1}/a.db: is damaged"),
    ("--model {0}/first --ratings {1}/a.db", lambda path: path.write_text("text"),
     "{1}/a.db: is no SQLite database"),
    ("--model {0}/first --ratings {0}", None, ".*"),
    ("--model {0}/first --host 127.0.0.300 --token_file {1}/token", None, "host: '127.0.0.300' is no addr"),
])
def test_a_mistake_at_the_start_is_one_line(words, make, message, folder, tmp_path):
    (folder / "empty.jsonl").write_text("")
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    if make:
        make(tmp_path / "a.db")
    words = words_of(folder, tmp_path / "out", *words.format(folder, tmp_path).split())
    with pytest.raises(UserError, match=f"^{message.format(folder, re.escape(str(tmp_path)))}") as caught:
        feedback.Page(parse_config(feedback.FeedbackConfig, None, words))
    assert "\n" not in str(caught.value)


def test_a_port_in_use_is_said_before_anything_is_loaded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(feedback, "load_models", None)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        words = words_of(folder, tmp_path, "--port", str(port))
        with pytest.raises(UserError, match=f"^port: {port} on 127.0.0.1 cannot be served .*Address already"):
            feedback.Page(parse_config(feedback.FeedbackConfig, None, words))


def test_without_the_demo_the_way_to_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(feedback, "DEMO", tmp_path)
    with pytest.raises(UserError, match="^model: no trained model in .*; run 'make demo'"):
        feedback.Page(parse_config(feedback.FeedbackConfig, None, []))


def test_the_demo_is_the_default(tmp_path, monkeypatch, folder):
    monkeypatch.setattr(feedback, "DEMO", tmp_path)
    for stage, model in (("sft", "first"), ("reward", "reward"), ("ppo", "second")):
        (tmp_path / stage).mkdir()
        os.symlink(folder / model, tmp_path / stage / "final")
    config = parse_config(feedback.FeedbackConfig, None, [])
    feedback.fill_in_demo(config)
    assert (config.model, config.compare) == ([f"{tmp_path}/ppo/final"], [f"{tmp_path}/sft/final"])
    assert config.reward_model == f"{tmp_path}/reward/final"
    assert config.prompts.endswith("data/tldr_mini/rlhf_train.jsonl.gz")


@pytest.mark.slow
def test_conversations_of_a_file_keep_their_turns(tmp_path):
    """So they get the template of a model that has one, as in training."""
    turns = [*said("Hi"), {"role": "assistant", "content": "Hello"}, *said("My cat?")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": turns}))
    config = parse_config(feedback.FeedbackConfig, None, ["--prompts", str(tmp_path / "rows.jsonl")])
    ratings = database(tmp_path / "r.db", prompts=())
    feedback.add_prompts(config, ratings)
    [(_, text, _)] = ratings.to_sample([1], 4, 9)
    assert messages_of(text) == turns


def test_a_signal_ends_the_process_and_a_restart_knows_the_session(folder, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    port, browser = 0, None
    for number, status, rated in ((signal.SIGTERM, 143, 1), (signal.SIGINT, 130, 2)):
        words = words_of(folder, tmp_path / "out", "--token_file", str(tmp_path / "token"), "--port",
                         str(port))
        process, port = start_process(words, tmp_path / "log")
        if browser is None:
            browser = Browser(port)
            browser.open()
            assert browser.post("/api/login", {"token": TOKEN})[0] == 204
            browser.rater("Ann")
        assert browser.rate(task_of(browser))[1]["progress"]["rated"] == rated
        browser.close()
        command = open(f"/proc/{process.pid}/cmdline").read()
        process.send_signal(number)
        assert process.wait(60) == status
        said = (tmp_path / "log").read_text()
        assert said.endswith("\nstopped\n") and "Traceback" not in said
        assert TOKEN not in said and TOKEN not in command


def test_the_stop_is_asked_after_each_token(endless):
    """Of the stock sampling loop, not of our streams."""
    from utils.models.parents import Parent

    talker, asked = Talker(Parent("model", str(endless / "first"))), []
    torch.manual_seed(0)
    answers = talker.answers(talker.prompt(said(POST), 50), 3, 50, 1.0,
                             stop=lambda: asked.append(1) or len(asked) == 5)
    assert len(asked) == 5 and [len(answer.tokens) for answer in answers] == [5, 5, 5]
