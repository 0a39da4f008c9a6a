"""Each kind of reward against a definition by hand, and what it does when its function or service fails."""

import math
import re
import time

import numpy as np
import pytest
import torch

from reward_service import drip, send, service
from utils.config import PROJECT, UserError
from utils.rewards import service as services
from utils.rewards.answers import Answers
from utils.rewards.entries import KINDS, _entry_of, parse_rewards
from utils.rewards.python import PythonReward
from utils.rewards.rewards import Rewards, reward_figures
from utils.rewards.rules import RuleReward
from utils.rewards.service import MOST_BYTES, JudgeReward, UrlReward
from utils.yaml_files import parse_yaml

TEXTS = ["a b c", "a b a b a b", "", "x"]
ANSWERS = Answers(
    prompts=["p", "p", "q", "q"], completions=TEXTS, references=["a b d", "a b d", None, None],
    tokens=[[5, 6, 7, 2], [5, 6, 5, 6, 5, 6], [2], [8, 2]], ended=[True, False, True, True],
    columns=[{"key": 1}, {"key": 1}, {"key": 2}, {"key": 2}], messages=[None] * 4,
    places=["f.jsonl:1", "f.jsonl:1", "f.jsonl:2", "f.jsonl:2"],
)


def entry(**keys):
    return _entry_of(keys, "entry 1")


# ------------------------------------------------------------------------------------------------------ rules


@pytest.mark.parametrize(("keys", "expected"), [
    ({"length_target": 4}, [0, -0.5, -0.75, -0.5]),
    ({"length_limit": 3}, [-1 / 3, -1, 0, 0]),
    ({"length_price": 0.1}, [-0.4, -0.6, -0.1, -0.2]),
    ({"repetition": 2}, [0, -3 / 5, 0, 0]),  # ab ba ab ba ab: three of five stood before
    ({"format": "[abc ]+"}, [1, 1, 0, 0]),
    ({"format": "a"}, [0, 0, 0, 0]),
    ({"missing_eos": -2.0}, [0, -2, 0, 0]),
    # 2 of 3 words are shared: precision = recall = 2/3; 2 of 6 and 2 of 3: 2 x 1/3 x 2/3 / (1/3 + 2/3)
    ({"rouge": "rouge1"}, [2 / 3, 4 / 9, None, None]),
], ids=str)
def test_a_rule_by_hand(keys, expected):
    assert RuleReward(entry(**keys), "rewards.x").of_answers(ANSWERS) == pytest.approx(expected)


def test_a_pattern_that_takes_for_ever_stops_the_run_with_the_row():
    slow = RuleReward(entry(format="(a|a)*b|(a+)+b"), "rewards.format")
    answers = ANSWERS._replace(completions=["a" * 40 + "c"] * 4)
    with pytest.raises(UserError, match=r"^rewards.format: '.*' takes more than 1 s .* f.jsonl:1; write it"):
        slow.of_answers(answers)


# -------------------------------------------------------------------------------------------------- functions

FUNCTIONS = '''
import time
CALLS = []

def plain(completions): CALLS.append(len(completions)); return [len(text) for text in completions]
def everything(prompts, completions, references, tokens, ended, key, messages, absent=None, **others):
    assert absent is None and not others
    return [k + len(t) + e for k, t, e in zip(key, tokens, ended)]
def all_columns(**columns): return [sorted(columns) == ["completions", "ended", "key", "messages", "prompts",
                                                        "references", "tokens"]] * 4
def some(completions): return [None, True, 2, 0.5]
def tensor(completions):
    import torch
    return torch.arange(4)
def raises(completions): return [1 / len(text) for text in completions]
def raises_together(completions): return [1 / (len(completions) < 2)]
def leaves(completions): raise SystemExit(3)
def nan(completions): return [0, 1, float("nan"), 0]
def text(completions): return ["1"] * 4
def few(completions): return [1.0]
def nothing(completions): pass
def slow(completions): time.sleep(30)
def wants(completions, answer): return [0] * 4
NUMBER = 3
'''


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("functions") / "own.py"
    path.write_text(FUNCTIONS)
    return path


def function(file, name, **keys):
    return PythonReward(entry(python=f"{file}:{name}", **keys), f"rewards.{name}")


@pytest.mark.parametrize(("name", "expected"), [
    ("plain", [5, 11, 0, 1]), ("everything", [6, 7, 4, 5]), ("all_columns", [1, 1, 1, 1]),
    ("some", [None, 1, 2, 0.5]), ("tensor", [0, 1, 2, 3])])
def test_a_function_gets_what_it_names_and_returns_numbers_or_none(file, name, expected):
    made = function(file, name).of_answers(ANSWERS)
    assert made == expected and all(one is None or type(one) is float for one in made)


@pytest.mark.parametrize(("name", "message"), [
    ("raises", r"raised ZeroDivisionError: division by zero, for the answer '' to f.jsonl:2$"),
    ("raises_together", r"raised ZeroDivisionError: .* for 4 answers together, the first to f.jsonl:1$"),
    ("leaves", r"raised RuntimeError: it called sys.exit\(3\), for the answer 'a b c' to f.jsonl:1$"),
    ("nan", r"returned nan for an answer to f.jsonl:2; a finite number or None is needed$"),
    ("text", r"returned '1' for an answer to f.jsonl:1; a finite number or None is needed$"),
    ("few", r"returned 1 scores for 4 answers$"),
    ("nothing", r"returned None; a list of 4 numbers is needed$"),
    ("wants", r"asks for 'answer', which the rows do not have as a column; they have key$"),
    ("missing", r"^rewards.missing: '.*own.py' has no function 'missing'$"),
    ("NUMBER", r"has no function 'NUMBER'$"),
])
def test_a_function_that_fails_stops_the_run_with_one_line(file, name, message):
    with pytest.raises(UserError, match=message) as stopped:
        function(file, name).of_answers(ANSWERS)
    assert "\n" not in str(stopped.value)


def test_a_function_that_takes_too_long_is_not_waited_for(file):
    began = time.monotonic()
    with pytest.raises(UserError, match="did not return within its time_limit of 0.2 s, for 4 answers"):
        function(file, "slow", time_limit=0.2).of_answers(ANSWERS)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(("text", "message"), [
    ("def f(:", "cannot be run: SyntaxError"),
    ("import no_such_module", "cannot be run: ModuleNotFoundError"),
    ("raise SystemExit(2)", "cannot be run: SystemExit")])
def test_a_file_that_cannot_be_run_is_one_line(text, message, tmp_path):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(UserError, match=f"^rewards.f: '.*bad.py:f' {message}"):
        function(tmp_path / "bad.py", "f")


# --------------------------------------------------------------------------------------------------- services


def url_reward(address, **keys):
    return UrlReward(entry(url=address, timeout=0.5, retries=0, **keys), "rewards.url")


def test_a_service_gets_the_documented_json_and_its_scores_keep_their_order():
    def lengths(asked, handler):
        time.sleep(0.05 * (asked["completions"][0] == TEXTS[0]))  # the first request ends last
        return {"scores": [len(text) or None for text in asked["completions"]]}

    with service(lengths) as (address, requests):
        scores = url_reward(address, batch_size=2, api_key_env=None).of_answers(ANSWERS)
    assert scores == [5, 11, None, 1] and len(requests) == 2
    [asked] = [asked for _, asked in requests if asked["completions"][0] == TEXTS[0]]
    assert asked == {"prompts": ["p", "p"], "completions": TEXTS[:2], "references": ["a b d", "a b d"],
                     "columns": [{"key": 1}, {"key": 1}]}


def status(code, **headers):
    return lambda asked, handler: send(handler, code, b"no", **headers)


def sleeps(asked, handler):
    time.sleep(1.5)


WRONG = {
    "status 503 Service Unavailable: 'no'": status(503),
    "status 302 Found": status(302, Location="http://127.0.0.1:9/elsewhere"),
    "no answer within 0.5 s": sleeps,
    "no answer within 0.5 s ": lambda asked, handler: drip(handler),
    "more than 4194304 bytes": lambda asked, handler: send(handler, 200, b" " * (MOST_BYTES + 10)),
    "its answer is no JSON: 'no'": status(200),
    "its answer is no JSON: '.....": lambda asked, handler: send(handler, 200, b"[" * 100_000),
    "has no list 'scores'": lambda asked, handler: [1, 2, 3, 4],
    "it gave 1 scores for 4 answers": lambda asked, handler: {"scores": [1]},
    "it gave the score nan": lambda asked, handler: {"scores": [1, 2, math.nan, 4]},
    "it gave the score '1'": lambda asked, handler: {"scores": ["1", 2, 3, 4]},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_service_that_is_slow_wrong_or_hostile_stops_the_run_or_gives_the_fixed_score(message):
    with service(WRONG[message]) as (address, requests):
        began = time.monotonic()
        with pytest.raises(UserError, match=message.strip()) as stopped:
            url_reward(address).of_answers(ANSWERS)
        assert time.monotonic() - began < 20 and len(requests) == 1
        assert url_reward(address, on_failure=-3).of_answers(ANSWERS) == [-3.0] * 4
    said = str(stopped.value)
    assert said.startswith("rewards.url: 'http://127.0.0.1:") and "f.jsonl:1" in said and "\n" not in said


def test_a_service_that_is_away_is_asked_again_after_growing_pauses(monkeypatch):
    with service(lambda *_: {}) as (address, _):
        pass  # nobody listens there any more
    pauses = []
    monkeypatch.setattr(services.time, "sleep", pauses.append)
    with pytest.raises(UserError, match="Connection refused .tried 4 times"):
        UrlReward(entry(url=address), "rewards.url").of_answers(ANSWERS)
    assert pauses == [1, 2, 4]


def test_a_service_that_comes_back_is_taken(monkeypatch):
    monkeypatch.setattr(services.time, "sleep", lambda seconds: None)
    tries = []

    def second_time(asked, handler):
        tries.append(1)
        return {"scores": [7.0] * 4} if len(tries) > 1 else send(handler, 500, b"")

    with service(second_time) as (address, _):
        assert UrlReward(entry(url=address), "rewards.url").of_answers(ANSWERS) == [7.0] * 4


SECRET = "sk-very-secret"


def judge(address, **keys):
    return JudgeReward(entry(judge=address, judge_model="m", rubric="Be short.", timeout=5, retries=0,
                             lowest=1, highest=5, api_key_env="TEST_KEY", **keys), "rewards.judge")


def test_a_judge_is_asked_with_the_rubric_and_marks_each_answer(monkeypatch):
    monkeypatch.setenv("TEST_KEY", SECRET)

    def marks(asked, handler):
        assert handler.path == "/score/chat/completions"
        text = asked["messages"][1]["content"]
        return {"choices": [{"message": {"content": " 4.5\n" if "a b c" in text else "2"}}]}

    with service(marks) as (address, requests):
        assert judge(address).of_answers(ANSWERS) == [4.5, 2, 2, 2]
    headers, asked = requests[0]
    assert headers["Authorization"] == f"Bearer {SECRET}" and asked["model"] == "m"
    assert "Be short." in asked["messages"][0]["content"] and "from 1 to 5" in asked["messages"][0]["content"]


@pytest.mark.parametrize("said", ["9", "good", "", "nan", "4 of 5", "I give 4"])
def test_a_judge_that_gives_no_mark_of_the_scale_has_failed(said, monkeypatch):
    monkeypatch.setenv("TEST_KEY", SECRET)
    with service(lambda *_: {"choices": [{"message": {"content": said}}]}) as (address, _):
        with pytest.raises(UserError, match="the judge said .* a number from 1 to 5 is needed") as stopped:
            judge(address).of_answers(ANSWERS)
    assert SECRET not in str(stopped.value)


def test_a_key_that_is_not_there_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(UserError, match="^rewards.judge: the environment has no TEST_KEY"):
        judge("http://localhost:1/v1")


# -------------------------------------------------------------------------------------------------- their sum


class Fixed:
    """A reward of which only the entry matters."""

    reads_text = True

    def __init__(self, **keys):
        self.entry = entry(format="x", **keys)


def test_the_sum_scales_clips_weighs_and_leaves_out_what_is_not_scored():
    rewards = Rewards([Fixed(name="a", weight=2, scale=4, clip=1), Fixed(name="b", weight=-1),
                       Fixed(name="c", scale="std", warmup_updates=10)])
    rewards.scales = {"c": 0.5}
    columns = torch.tensor([[8.0, 3.0, 1.0], [2.0, math.nan, 1.0], [-100.0, 0.5, math.nan]])
    for update, share in ((1, 0.1), (5, 0.5), (10, 1.0), (11, 1.0)):
        warmups = [min(1.0, update / max(one.entry.warmup_updates, 1)) for one in rewards.rewards]
        expected = [2 - 3 + 2 * share, 1 + 2 * share, -2 - 0.5]
        assert rewards._summed(columns, torch.ones(3), warmups).tolist() == pytest.approx(expected)


def test_figures_against_numpy():
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(50, 2, generator=generator)
    columns[:7, 1] = math.nan
    lengths = torch.randint(1, 9, (50,), generator=generator)
    made = reward_figures(columns, lengths, ["a", "b"])
    a, b, n = columns[:, 0].numpy(), columns[:, 1].numpy(), lengths.numpy()
    expected = {"rewards/a": a.mean(), "rewards/a/std": a.std(), "rewards/a/unscored": 0,
                "rewards/a/r_b": np.corrcoef(a[7:], b[7:])[0, 1],
                "rewards/a/r_tokens": np.corrcoef(a, n)[0, 1],
                "rewards/b": b[7:].mean(), "rewards/b/std": b[7:].std(), "rewards/b/unscored": 7 / 50,
                "rewards/b/r_tokens": np.corrcoef(b[7:], n[7:])[0, 1]}
    assert made == pytest.approx(expected, abs=1e-5)
    same = reward_figures(torch.ones(4, 1), torch.arange(4), ["a"])
    assert same["rewards/a/std"] == 0 and math.isnan(same["rewards/a/r_tokens"])


def test_the_examples_of_the_documents_are_lawful():
    text = (PROJECT / "docs" / "rewards.md").read_text()
    blocks = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == text.count("```yaml") > 2
    for block in map(parse_yaml, blocks):
        assert parse_rewards(block["rewards"]) == block["rewards"]


def test_every_kind_has_its_key_and_a_row_in_the_documents():
    text = (PROJECT / "docs" / "rewards.md").read_text()
    for kind, made in KINDS.items():
        names = {name for name in made.__dataclass_fields__}
        assert kind in names and all(f"`{name}`" in text for name in names), kind
