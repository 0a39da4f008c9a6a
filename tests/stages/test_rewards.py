"""PPO's rewards through the real `main()`, on one tiny policy."""

import gzip
import json
import signal
import threading

import pytest

import train_ppo
from reward_service import service
from run_folders import furthest, last_trained, metrics, weights
from tiny_models import save_heads, save_opt, save_other_vocabulary
from utils.config import PROJECT, UserError, parse_config

DATA = PROJECT / "data" / "tldr_mini"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny policy, a reward model with large scores, and six prompts for each purpose."""
    folder = tmp_path_factory.mktemp("rewards")
    save_opt(folder / "base", eos_logit=3.0)
    save_opt(folder / "reward", "reward", seed=1, head_scale=30.0)
    for part in ("train", "validation", "test"):
        with gzip.open(DATA / f"rlhf_{part}.jsonl.gz", "rt") as rows:
            (folder / f"{part}.jsonl").write_text("".join(next(rows) for _ in range(6)))
    return folder


def config_of(folder, out, *words):
    sets = [f"--rlhf_{kind}_data={folder}/{part}.jsonl" for kind, part in (
        ("training", "train"), ("validation", "validation"), ("test", "test"))]
    quick = ("--total_episodes 16 --prompts_per_update 4 --responses_per_prompt 2 --eval_steps 2 "
             "--save_steps 1 --eval_rows 2 --test_rows 2 --max_new_tokens 6 --max_prompt_tokens 256 "
             "--report_to none")
    places = [f"--model={folder}/base", f"--output_dir={folder / out}"]
    return parse_config(train_ppo.PPOStageConfig, None, [*places, *sets, *quick.split(), *words])


def run(folder, out, *words):
    train_ppo.main(config_of(folder, out, *words))
    return folder / out


@pytest.fixture(scope="module")
def plain(folder):
    """The run with `reward_model`, the shortest form."""
    return run(folder, "plain", f"--reward_model={folder}/reward")


def test_a_list_of_one_model_is_the_run_of_reward_model_bit_for_bit(folder, plain):
    listed = run(folder, "listed", "--rewards", f"[{{model: {folder}/reward}}]")
    assert metrics(listed) == metrics(plain)
    assert (listed / "samples.jsonl").read_text() == (plain / "samples.jsonl").read_text()
    assert furthest(last_trained(listed), last_trained(plain)) == 0
    assert furthest(weights(listed / "final"), weights(plain / "final")) == 0
    assert furthest(weights(listed / "final"), weights(folder / "base")) > 0
    parents = json.loads((listed / "final" / "stage.json").read_text())["parents"]
    assert set(parents) == {"model", "rewards.model"}


@pytest.mark.parametrize(("words", "message"), [
    ("--model assets/opt-mini --reward_model none",
     "^reward_model: nothing scores the answers; name a reward model, or rewards$"),
    ("--reward_model x --rewards [{model: x}]", "^command line: 'reward_model' has no effect .rewards says "),
    ("--rewards 3", "^command line: 'rewards' must be a list of mappings.* found a whole number$"),
    ("--rewards []", "^command line: 'rewards' must be a list of mappings.* found an empty list$"),
    ("--rewards [a", "^command line: 'rewards' is not YAML: "),
    ("--rewards [a]", "^command line: 'rewards' entry 1 is text; a mapping is needed"),
    ("--rewards [{weight: 2}]", "^command line: 'rewards' entry 1 has none of model"),
    ("--rewards [{model: x, wieght: 2}]",
     r"^command line: 'rewards' entry 1 \('model'\) has an unknown key 'wieght'; valid keys: name, weight"),
    ("--rewards [{model: x, weight: much}]",
     r"^command line: 'rewards' entry 1 \('model'\): 'weight' must be a number, found 'much'$"),
    ("--rewards [{model: x, weight: .inf}]", "'weight' must be a finite number"),
    ("--rewards [{model: }]", "^command line: 'rewards' entry 1 .'model'.: 'model' says nothing$"),
    ("--rewards [{model: x}, {model: y}]", "has 2 entries of the name 'model'; give each a 'name'"),
    ("--rewards [{model: x, name: a b}]", "entry 1 .* has the name 'a b'; letters, digits"),
])
def test_a_mistake_in_the_list_is_one_line_with_place_and_key(words, message, tmp_path):
    given = words.replace(" --", "\n--").replace("--rewards ", "--rewards\n").replace("model ", "model\n", 2)
    with pytest.raises(UserError, match=message):
        train_ppo.main(config_of(tmp_path, "no", *given.split("\n")))


OWN = """
from pathlib import Path

def is_short(completions, number):
    return [float(len(text.split()) < n) if n else None for text, n in zip(completions, number)]

def fails(completions):
    raise ValueError("no luck")

def brittle(completions, calls=[]):
    calls.append(1)
    if len(calls) > 2 and (Path(__file__).parent / "broken").exists():
        raise ValueError("no luck")
    return [len(text) / 10 for text in completions]

def mixed(tokens):
    return [sum(t) % 8 for t in tokens]

def mixed_and_longer(tokens):
    return [sum(t) % 8 + 0.25 * len(t) for t in tokens]
"""


@pytest.fixture(scope="module")
def every_kind(folder):
    """`rewards` with an entry of each kind, and the services behind it."""
    (folder / "own.py").write_text(OWN)
    for part in ("train", "validation", "test"):
        rows = [json.loads(row) for row in (folder / f"{part}.jsonl").read_text().splitlines()]
        (folder / f"{part}.jsonl").write_text("".join(
            json.dumps(row | {"number": place}) + "\n" for place, row in enumerate(rows)))
    save_other_vocabulary(folder / "reward", folder / "other")
    save_heads(save_opt(folder / "several", "reward", seed=1, head_scale=30.0))

    def lengths(asked, handler):
        if "messages" not in asked:
            return {"scores": [len(text) / 10 for text in asked["completions"]]}
        answer = asked["messages"][1]["content"].partition("<answer>\n")[2].removesuffix("\n</answer>")
        return {"choices": [{"message": {"content": f"{len(answer) / 10}"}}]}

    with service(lengths) as (address, _):
        yield [{"model": f"{folder}/reward", "scale": "std"}, {"model": f"{folder}/other", "name": "other"},
               {"model": f"{folder}/several", "name": "worst", "ensemble": "worst"},
               {"python": f"{folder}/own.py:is_short", "warmup_updates": 3},
               {"url": address, "weight": 0.5, "length_control": True, "scale": "std"},
               {"judge": address, "judge_model": "m", "rubric": "Be long.", "weight": 0.1},
               {"length_target": 4}, {"length_limit": 3}, {"length_price": 0.01}, {"repetition": 1},
               {"format": "[a-z ]+"}, {"rouge": "mean"}, {"missing_eos": -1.0, "clip": 0.5}]


def test_every_kind_is_logged_by_its_name_and_goes_on_after_a_stop(folder, every_kind, monkeypatch):
    """A model with a vocabulary of its own reads the text once more, and here says what it says of tokens."""
    words = ["--rewards", json.dumps(every_kind), "--missing_eos_score", "none"]
    whole = run(folder, "whole", *words)
    rows = [row for row in metrics(whole) if "objective/kl" in row]
    names = ["model", "other", "worst", "is_short", "url", "judge", "length_target", "length_limit",
             "length_price", "repetition", "format", "rouge", "missing_eos"]
    for row in rows:
        assert {name.split("/")[1] for name in row if name.startswith("rewards/")} == set(names)
        assert row["rewards/length_price"] == pytest.approx(-0.01 * row["objective/length"])
        assert row["rewards/missing_eos"] == pytest.approx(row["objective/ended"] - 1)
        assert row["rewards/judge"] == pytest.approx(row["rewards/url"]) and row["rewards/judge"] > 0
        assert row["rewards/length_price/r_tokens"] in (None, pytest.approx(-1))
    for row in metrics(whole):  # of nearly greedy answers, which are no random pieces of words
        if "eval/kl" in row:
            assert row["eval/rewards/other"] == pytest.approx(row["eval/rewards/model"], abs=1e-4)
            assert row["eval/rewards/worst"] < row["eval/rewards/model"] and row["eval/spread"] > 0.01
    summary = json.loads((whole / "summary.json").read_text())
    assert all(f"{name}_{when}" in summary for name in names for when in ("before", "after"))

    class Interrupted(train_ppo.Run):
        def metrics(self, step, values):
            super().metrics(step, values)
            if step == 1:
                signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(train_ppo, "Run", Interrupted)
        run(folder, "stopped", *words)
    run(folder, "stopped", *words, "--resume")
    assert metrics(folder / "stopped") == metrics(whole)
    assert furthest(last_trained(folder / "stopped"), last_trained(whole)) == 0


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo"])
def test_ppo_needs_no_reward_model(folder, every_kind, advantage):
    words = ["--total_episodes=8", "--rewards", json.dumps(every_kind[3:4]), f"--advantage={advantage}"]
    made = run(folder, f"none-{advantage}", *words)
    stage = json.loads((made / "final" / "stage.json").read_text())
    assert set(stage["parents"]) == {"model"}
    assert any(name.startswith("value_model") for name in last_trained(made)) == (advantage == "gae")


def test_a_price_of_length_in_a_controlled_reward_changes_no_update(folder, every_kind):
    """The fit takes it off: policy, scores and what is kept are those of the run without it."""
    runs = {}
    for name in ("mixed", "mixed_and_longer"):
        entry = {"python": f"{folder}/own.py:{name}", "name": "own", "length_control": True, "scale": "std"}
        runs[name] = run(folder, name, "--rewards", json.dumps([entry]), "--eval_rows=6", "--test_rows=6",
                         "--responses_per_prompt=4", "--advantage=rloo", "--max_new_tokens=12",
                         "--missing_eos_score=none", "--learning_rate=0.003")
    plain, longer = (metrics(made) for made in runs.values())
    [[first], [second]] = [[row["rewards/own/slope"] for row in rows if "rewards/own/slope" in row]
                           for rows in (plain, longer)]
    assert second == pytest.approx(first + 0.25) and first != 0
    for ours, theirs in zip(longer, plain, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if name.startswith(("policy/", "loss/", "objective/kl")) or name == "eval/kl":
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name
    before, after = ([row["eval/score"] for row in rows if "eval/score" in row] for rows in (plain, longer))
    assert [score - after[0] for score in after] == pytest.approx([s - before[0] for s in before], abs=1e-3)
    log = (runs["mixed"] / "train.log").read_text()
    assert f"length control: own pays {first:+.4f} a token, which is taken off around " in log
    summaries = [json.loads((made / "summary.json").read_text()) for made in runs.values()]
    names = {"own_before", "own_after", "own_slope", "score_slope", "score_after_length_controlled"}
    assert names <= set(summaries[0])
    assert summaries[1]["own_before"] > summaries[0]["own_before"], "as the reward gave it"


def test_a_function_that_raises_stops_the_run_with_its_row(folder, every_kind):
    with pytest.raises(UserError, match=r"^rewards.fails: '.*own.py:fails' raised ValueError: no luck, for "
                                        r"the answer '.*' to .*validation.jsonl:1$"):
        run(folder, "fails", "--rewards", f"[{{python: '{folder}/own.py:fails'}}]")


def test_services_answer_while_the_reference_is_computed(folder, every_kind, monkeypatch):
    """In an update. The reference waits for the request to arrive, and the service for the reference."""
    sampled, arrived, computed, met = (threading.Event() for _ in range(4))
    sample, logprobs = train_ppo.sample_episodes, train_ppo.response_logprobs

    def reply(request, handler):
        if sampled.is_set():
            arrived.set()
            assert computed.wait(20)
        return {"scores": [len(text) / 100 for text in request["completions"]]}

    def with_reference(*given, **more):
        if arrived.wait(20):
            met.set()
        computed.set()
        return logprobs(*given, **more)

    monkeypatch.setattr(train_ppo, "sample_episodes", lambda *given: sampled.set() or sample(*given))
    monkeypatch.setattr(train_ppo, "response_logprobs", with_reference)
    with service(reply) as (address, _):
        made = run(folder, "meanwhile", "--rewards", f"[{{url: '{address}'}}]", "--advantage=rloo",
                   "--total_episodes=8")
    assert met.is_set() and any("rewards/url" in row for row in metrics(made))


def test_a_mended_function_goes_on_where_it_has_failed(folder, every_kind):
    """It fails in the second update: the first one's checkpoint is intact."""
    words = ["--rewards", f"[{{python: '{folder}/own.py:brittle'}}]", "--advantage=rloo"]
    whole = run(folder, "mended-whole", *words)
    (folder / "broken").touch()
    with pytest.raises(UserError, match="raised ValueError: no luck"):
        run(folder, "mended", *words)
    (folder / "broken").unlink()
    run(folder, "mended", *words, "--resume")
    assert metrics(folder / "mended") == metrics(whole)
    assert furthest(last_trained(folder / "mended"), last_trained(whole)) == 0


def test_a_mistake_in_a_file_names_its_line(tmp_path):
    (tmp_path / "own.yaml").write_text("seed: 1\nrewards:\n- {model: x, weight: 1e9}\n")
    with pytest.raises(UserError, match=r"own.yaml:2: 'rewards' entry 1 \('model'\): 'weight' must be at "):
        config_of(tmp_path, "no", "--config", f"{tmp_path}/own.yaml")
