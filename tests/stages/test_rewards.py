"""PPO's rewards through the real `main()`, on one tiny policy."""

import gzip
import json

import pytest

import train_ppo
from run_folders import furthest, last_trained, metrics, weights
from tiny_models import save_opt
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
    ("--reward_model none", "^reward_model: nothing scores the answers; name a reward model, or rewards$"),
    ("--reward_model x --rewards [{model: x}]", "^command line: 'reward_model' has no effect .rewards says "),
    ("--rewards 3", "^command line: 'rewards' must be a list of mappings .* found a whole number$"),
    ("--rewards []", "^command line: 'rewards' must be a list of mappings .* found an empty list$"),
    ("--rewards [a", "^command line: 'rewards' is not YAML: "),
    ("--rewards [a]", "^command line: 'rewards' entry 1 is text; a mapping is needed"),
    ("--rewards [{weight: 2}]", "^command line: 'rewards' entry 1 has none of model"),
    ("--rewards [{model: x, wieght: 2}]",
     r"^command line: 'rewards' entry 1 \('model'\) has an unknown key 'wieght'; valid keys: name, weight"),
    ("--rewards [{model: x, weight: much}]",
     r"^command line: 'rewards' entry 1 \('model'\): 'weight' must be a number, found 'much'$"),
    ("--rewards [{model: x, weight: .inf}]", "'weight' must be a finite number"),
    ("--rewards [{model: }]", "^command line: 'rewards' entry 1: 'model' says nothing$"),
    ("--rewards [{model: x}, {model: y}]", "has 2 entries of the name 'model'; give each a 'name'"),
    ("--rewards [{model: x, name: a b}]", "entry 1 has the name 'a b'; letters, digits"),
])
def test_a_mistake_in_the_list_is_one_line_with_place_and_key(words, message, tmp_path):
    given = words.replace(" --", "\n--").replace("--rewards ", "--rewards\n").replace("_model ", "_model\n")
    with pytest.raises(UserError, match=message):
        train_ppo.main(config_of(tmp_path, "no", *given.split("\n")))


def test_a_mistake_in_a_file_names_its_line(tmp_path):
    (tmp_path / "own.yaml").write_text("seed: 1\nrewards:\n- {model: x, weight: 1e9}\n")
    with pytest.raises(UserError, match=r"own.yaml:2: 'rewards' entry 1 \('model'\): 'weight' must be at "):
        config_of(tmp_path, "no", "--config", f"{tmp_path}/own.yaml")
