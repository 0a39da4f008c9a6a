"""Rounds of training as processes: how they end, what is shown of them, and that no process is left behind.

The stages are stand-ins that write what real ones write; the last test runs real ones.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import feedback
import train_sft
from browser import Browser
from rated import database, next_task, rate
from served import served, wait_until, words_of, write_models
from utils.config import PROJECT, parse_config
from utils.feedback.database import Ratings
from utils.feedback.rounds import Rounds, RunningError, policy_of

STAGE = """import json, pathlib, signal, sys, time
kind, folder = sys.argv[1], pathlib.Path(sys.argv[2])
print("loading 10%\\rloading 100%")
if kind == "fails":
    sys.exit("error: --learning_rate: too high\\x1b[31m")
if kind == "waits":
    signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(0)))
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
(folder / "final").mkdir(parents=True)
rows = [{"step": step, "loss": 1 / step, "note": "text"} for step in range(1, 1001)]
(folder / "metrics.jsonl").write_text("\\n".join(map(json.dumps, rows)) + '\\n{"step": 10')
print("done")
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "stage.py"
    path.write_text(STAGE)
    return path


@pytest.fixture
def ratings(tmp_path):
    """A database with five rankings."""
    ratings = database(tmp_path / "ratings.db", [f"post {n}" for n in range(6)])
    for _ in range(5):
        task = next_task(ratings, "Ann")
        rate(ratings, "Ann", task, [[text] for text in sorted(task.answers)])
    yield ratings
    ratings.close()


def rounds_of(ratings, script, finished=lambda name, folder: None, reward="ends", ppo="ends",
              names=("sft", "reward", "ppo")):
    def stages(folder):
        kinds = {"sft": "ends", "reward": reward, "ppo": ppo}
        return {stage: [str(script), kinds[stage], str(folder / stage)] for stage in names}
    return Rounds(ratings, script.parent / "out", stages, finished, None, least=1, full=1)


def ended(rounds) -> dict:
    """The newest round, once it has ended."""
    wait_until(lambda: not rounds.is_running())
    return rounds.state()["rounds"][-1]


def is_alive(process: int) -> bool:
    """Whether it runs: neither gone nor a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_round_runs_the_stages_on_a_copy_of_the_ratings(ratings, script):
    offered = []
    rounds = rounds_of(ratings, script, lambda *given: offered.append(given))
    assert rounds.start() == "round-1"
    task = next_task(ratings, "Bob")
    rate(ratings, "Bob", task, kind="skip")  # after the copy
    row = ended(rounds)
    folder = script.parent / "out" / "round-1"
    assert (row["name"], row["state"], row["ratings"]) == ("round-1", "finished", 5) and row["ended"]
    assert offered == [("round-1", folder / "ppo" / "final")]
    copy = Ratings(folder / "ratings.db")
    assert [row["rater"] for row in copy.rated()] == ["Ann"] * 5
    copy.close()
    current = rounds.state()["current"]
    assert current["stage"] == "ppo" and current["error"] is None
    assert [line for line in current["log"] if not line.startswith("$")] == ["loading 100%", "done"] * 3
    for curves in current["curves"].values():
        assert list(curves) == ["loss"] and 100 <= len(curves["loss"]) <= 400
        assert all(value == 1 / step for step, value in curves["loss"])


def test_a_round_of_sft_alone_offers_the_policy_of_sft(ratings, script):
    offered = []
    rounds = rounds_of(ratings, script, lambda *given: offered.append(given), names=("sft",))
    rounds.start()
    assert ended(rounds)["state"] == "finished"
    folder = script.parent / "out" / "round-1"
    assert offered == [("round-1", folder / "sft" / "final")] and policy_of(folder).is_dir()
    assert rounds.state()["current"]["stages"] == ["sft"]
    assert policy_of(folder / "none") == folder / "none" / "ppo" / "final"


def test_the_reward_model_and_ppo_join_when_there_are_enough_ratings(tmp_path):
    configs = PROJECT / "configs" / "personal"
    config = feedback.FeedbackConfig(model=["policy"], reward_model="reward", prompts="prompts.jsonl")
    few, enough = (feedback.stages_of(config, tmp_path, rated) for rated in (29, 30))
    assert list(few) == ["sft"] and list(enough) == ["sft", "reward", "ppo"]

    def made(words):
        return parse_config(train_sft.SFTStageConfig, configs / "sft.yaml", words[1:])

    alone, first = made(few["sft"]), made(enough["sft"])
    assert (alone.num_train_epochs, first.num_train_epochs) == (6, 3)
    assert alone.model == first.model == "policy"


def test_the_one_line_of_a_stage_that_failed_is_shown(ratings, script):
    rounds = rounds_of(ratings, script, reward="fails")
    rounds.start()
    assert ended(rounds)["state"] == "failed"
    assert rounds.state()["current"]["stage"] == "reward"  # the page marks the one that failed
    # nothing in it is for a terminal
    assert rounds.state()["current"]["error"] == "error: --learning_rate: too high\\x1b[31m"
    assert not (script.parent / "out" / "round-1" / "ppo").exists()
    assert rounds.start() == "round-2"
    ended(rounds)


def test_a_policy_that_cannot_be_offered_is_a_round_that_failed(ratings, script):
    def finished(name, folder):
        raise RuntimeError("no memory")

    rounds = rounds_of(ratings, script, finished)
    rounds.start()
    assert ended(rounds)["state"] == "failed" and rounds.state()["current"]["error"] == "error: no memory"


def test_a_cancelled_stage_may_save_and_the_next_one_does_not_begin(ratings, script):
    rounds = rounds_of(ratings, script, reward="waits")
    assert rounds.cancel() is False
    rounds.start()
    wait_until(lambda: "ready" in rounds.state()["current"]["log"])
    assert rounds.state()["current"]["stage"] == "reward"
    with pytest.raises(RunningError):
        rounds.start()
    assert rounds.cancel() is True
    assert ended(rounds)["state"] == "cancelled"
    assert rounds.state()["current"]["stage"] == "reward"
    assert rounds.state()["current"]["log"][-1] == "saved" and rounds.state()["current"]["error"] is None
    assert not (script.parent / "out" / "round-1" / "ppo").exists()


def test_a_round_that_a_killed_server_left_has_failed_and_its_process_is_gone(ratings, script, tmp_path):
    folders = [tmp_path / "out" / name for name in ("round-1", "round-2")]
    processes = []
    for folder, named in zip(folders, (folders[0], "another"), strict=True):
        folder.mkdir(parents=True)
        ratings.add_round(folder.name, folder)
        processes.append(subprocess.Popen([sys.executable, "-c", "input()", str(named)],
                                          start_new_session=True, stdin=subprocess.PIPE))
        (folder / "process.json").write_text(json.dumps({"process": processes[-1].pid}))
    wait_until(lambda: os.fsencode(folders[0]) in Path(f"/proc/{processes[0].pid}/cmdline").read_bytes())
    rounds = rounds_of(ratings, script)
    assert [row["state"] for row in rounds.state()["rounds"]] == ["failed", "failed"]
    assert rounds.state()["current"]["error"].startswith("error: the server ended while")
    assert processes[0].wait(10) == -signal.SIGKILL
    assert processes[1].poll() is None  # the number belongs to somebody else by now
    processes[1].kill()
    processes[1].communicate()
    assert rounds.start() == "round-3"
    ended(rounds)


def test_a_round_of_another_servers_folder_is_left_alone(ratings, script, tmp_path):
    ratings.add_round("round-1", tmp_path / "elsewhere" / "round-1")
    rounds = rounds_of(ratings, script)
    assert rounds.state()["rounds"][0]["state"] == "running"


@pytest.mark.slow
def test_a_killed_server_leaves_no_process_behind(ratings, script, tmp_path):
    code = f"""import sys, pathlib
sys.path[:0] = [{str(PROJECT / "scripts")!r}, {str(PROJECT / "tests" / "helpers")!r},
                {str(Path(__file__).parent)!r}]
from test_rounds import rounds_of
from utils.feedback.database import Ratings
rounds = rounds_of(Ratings({str(tmp_path / "ratings.db")!r}), pathlib.Path({str(script)!r}), reward="waits")
rounds.start()
input()
"""
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    folder = tmp_path / "out" / "round-1"
    wait_until(lambda: (folder / "log.txt").exists() and "ready" in (folder / "log.txt").read_text())
    process = json.loads((folder / "process.json").read_text())["process"]
    assert is_alive(process)
    server.kill()
    server.communicate()
    wait_until(lambda: not is_alive(process))
    assert (folder / "log.txt").read_text().splitlines()[-1] == "saved"


# ------------------------------------------------------------------------------------------- through the page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"), "first", "second")


def test_the_page_starts_watches_and_cancels_a_round(folder, tmp_path, script, monkeypatch):
    words = words_of(folder, tmp_path / "out", "--least_ratings", "4", "--repeat_share", "0")
    with served(words) as (page, port):
        kinds = {"reward": "waits", "ppo": "ends"}
        page.rounds.why_not = None
        monkeypatch.setattr(page.rounds, "stages", lambda folder: {
            stage: [str(script), kind, str(folder / stage)] for stage, kind in kinds.items()})
        browser = Browser(port).rater("Ann")
        assert browser.open()["training"] == {
            "possible": False, "why": None, "rated": 0, "ranked": 0, "least": 4, "full": 30}
        assert browser.post("/api/train")[0] == 400
        for _ in range(4):
            wait_until(lambda: browser.get("/api/task")[1]["task"])
            browser.rate(browser.get("/api/task")[1]["task"])
        assert browser.open()["training"]["possible"] is True
        assert browser.post("/api/train") == (202, {"round": "round-1"})
        assert browser.post("/api/train")[0] == 409
        assert browser.open()["training"]["possible"] is False
        wait_until(lambda: "ready" in browser.get("/api/train")[1]["current"]["log"])
        assert browser.post("/api/train/cancel")[0] == 202
        wait_until(lambda: not page.rounds.is_running())
        assert browser.post("/api/train/cancel")[0] == 409
        assert browser.get("/api/train")[1]["rounds"][0]["state"] == "cancelled"
        # a round that finishes; its policy is the second model
        kinds["reward"] = "ends"
        offer = page.offer
        monkeypatch.setattr(page.rounds, "finished", lambda name, policy: offer(name, folder / "second"))
        assert browser.post("/api/train") == (202, {"round": "round-2"})
        wait_until(lambda: not page.rounds.is_running())
        new = next(model["id"] for model in browser.open()["models"] if model["name"] == "round-2")
        assert page.models.rated[0] == new
        lines = browser.chat({"models": [new], "messages": [{"role": "user", "content": "Hello"}]})
        assert lines[-1]["done"]
        page.ahead.wake()
        wait_until(lambda: page.ahead.idle)
        answered = {name for _, name, _ in page.ratings.policies()}
        assert "round-2" in answered and page.ratings.queue(page.models.rated, 4)["ready"] > 0


def test_what_ends_with_the_server_is_cancelled(folder, tmp_path, script, monkeypatch):
    with served(words_of(folder, tmp_path / "out")) as (page, port):
        monkeypatch.setattr(page.rounds, "stages", lambda folder: {"reward": [str(script), "waits", "x"]})
        page.rounds.start()
        wait_until(lambda: "ready" in page.rounds.state()["current"]["log"])
        process = json.loads((tmp_path / "out" / "round-1" / "process.json").read_text())["process"]
    assert not is_alive(process)
    again = Ratings(tmp_path / "out" / "ratings.db")
    assert [row["state"] for row in again.rounds()] == ["cancelled"]
    again.close()
