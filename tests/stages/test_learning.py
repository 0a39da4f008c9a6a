"""Does it learn? Each stage on a task whose best result is known.

A bandit for PPO, planted preferences for the reward model, eight rows by heart for SFT.
"""

import json
import math
import random
from dataclasses import replace
from statistics import fmean

import pytest

import train_ppo
import train_reward
import train_sft
from families import random_groups
from loops import epoch_loop, posts_of, ppo_loop, save_parents
from tiny_models import save_opt
from utils.data.report import DataReport
from utils.data.rows import NamedSet, load_data, tokenised
from utils.models.loading import load_policy
from utils.models.parents import Parent

# each is one token of the mini tokenizer when a space stands before it
WORDS = "the my work home door night friend money".split()
WANTED = 7  # the bandit's token

# -------------------------------------------------------------------------------------------------------- PPO


@pytest.fixture
def ppo(tmp_path, monkeypatch):
    """A configuration of the bandit: 128 episodes an update, 30 updates; the reward model plays no part."""
    monkeypatch.setattr("utils.rewards.model.scores", share_of_wanted)
    monkeypatch.setattr(train_ppo, "evaluate", lambda *_: None)
    return train_ppo.PPOStageConfig(
        **save_parents(tmp_path), output_dir=str(tmp_path), max_prompt_tokens=16, max_new_tokens=6,
        prompts_per_update=8, responses_per_prompt=16, total_episodes=30 * 128, per_device_batch_size=8,
        temperature=1.0, missing_eos_score=-0.5, save_steps=1000,
    )


def share_of_wanted(_, groups):
    """The share of the wanted token among a response's tokens before its EOS: 0 to 1; 0 for an EOS alone."""
    wanted = ((groups.responses == WANTED) & groups.response_mask).sum(1)
    return wanted / (groups.response_mask.sum(1) - 1).clamp(min=1)


def played(config) -> list[dict]:
    """What the real loop logged at each update; its figures are those of the policy before that update."""
    loop, models = ppo_loop(config)
    prompts = random_groups([5, 1, 8, 3, 6, 4, 7, 2], [[1]] * 8)[0]
    train_ppo.train(loop, models, posts_of(prompts), None, None)
    return loop.run.read_metrics()


OTHERS = [{"value_model": "shared"}, {"advantage": "rloo"}, {"advantage": "grpo"}, {"num_minibatches": 4}]


@pytest.mark.parametrize("options", [{}, *(pytest.param(other, marks=pytest.mark.slow) for other in OTHERS)],
                         ids=str)
def test_ppo_solves_a_bandit(options, ppo):
    """It must find one token of 31, say it all the time, and end: no EOS pays -0.5.

    The last score with seeds 0 to 4 for models and samples: 1.000, 0.978, 0.998, 1.000, 1.000; with each
    other option and seed 0: 1.000.
    """
    said = played(replace(ppo, kl_coef=0.0, learning_rate=3e-2, **options))
    score = [figures["objective/score"] for figures in said]
    assert len(score) == 30 and score[0] < 0
    assert score[-1] > 0.9
    assert said[-1]["objective/ended"] > 0.95


@pytest.mark.slow
def test_the_kl_penalty_holds_the_policy_at_the_reference(ppo):
    """In nats a summary, over the last 5 of 40 updates: 1,280 episodes.

    With seeds 0 to 4 for models and samples k1 is .21 .25 .47 .67 .44 without the penalty, and 7e-5 6e-5 4e-4
    -3e-4 4e-4 with it, where sampling alone errs by 2e-4; k3 is .21 .24 .51 .65 .41 and 2e-5 2e-5 4e-5 4e-5
    3e-5.
    """
    kl = {}
    for kl_coef in (0.0, 100.0):
        config = replace(ppo, kl_coef=kl_coef, learning_rate=7e-4, responses_per_prompt=32,
                         total_episodes=40 * 256)
        last = played(config)[-5:]
        kl[kl_coef] = [fmean(figures[name] for figures in last)
                       for name in ("objective/kl", "objective/kl_k3")]
    assert min(kl[0.0]) > 0.1
    assert max(map(abs, kl[100.0])) < 1e-3


# --------------------------------------------------------------------------------------- SFT and reward model


@pytest.fixture
def base(tmp_path):
    """A tiny random OPT with the mini tokenizer."""
    return str(save_opt(tmp_path / "base", max_position_embeddings=64))


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_sft_learns_eight_rows_by_heart(base, tmp_path):
    """Its own rows, generated: the held-out ones only fill the keys; the last step's weights are kept.

    ROUGE mean with seeds 0 to 4 for model, rows and order: 1.000 each time.
    """
    rng = random.Random(0)
    rows = [{"prompt": f"{n} {' '.join(rng.choices(WORDS, k=8))}:",
             "completion": " ".join(rng.choices(WORDS, k=6))} for n in range(12)]
    files = {split: written(tmp_path / f"{split}.jsonl", part)
             for split, part in (("training", rows[:8]), ("validation", rows[8:10]), ("test", rows[10:]))}
    config = train_sft.SFTStageConfig(
        model=base, output_dir=str(tmp_path / "sft"), actor_training_data=files["training"],
        actor_validation_data=files["validation"], actor_test_data=files["test"], max_prompt_tokens=32,
        max_new_tokens=16, max_steps=250, eval_steps=250, per_device_batch_size=8, learning_rate=1e-2,
    )
    train_sft.main(config)
    final = Parent("model", str(tmp_path / "sft" / "final"))
    named = {"actor_training_data": NamedSet(files["training"], "examples")}
    found = load_data(config, named, final.tokenizer, DataReport())
    learnt = tokenised(found["actor_training_data"], prompts_only=True)
    loop = epoch_loop(config, load_policy(final), 8)
    loop.tokenizer = final.tokenizer
    figures, _ = train_sft.rouge_of(loop, learnt, "")
    assert json.loads((tmp_path / "sft" / "summary.json").read_text())["base_rouge_avg"] < 0.3
    assert figures["rouge_avg"] > 0.9
    assert figures["ended"] == 1


def planted_rankings(count: int, name: str, rng: random.Random) -> list[dict]:
    """Three completions of six words; a strength of 1 for each "money". Ranks: strength plus Gumbel noise.

    Of any two, that noise puts the first above the second with probability sigmoid(difference):
    Bradley-Terry.
    """
    rows = []
    for n in range(count):
        strengths = rng.sample(range(6), 3)
        texts = [["money"] * s + rng.choices(WORDS[:-1], k=6 - s) for s in strengths]
        for text in texts:
            rng.shuffle(text)
        noisy = [s - math.log(rng.expovariate(1)) for s in strengths]
        rows.append({"prompt": f"{name} {n}:", "completions": [" ".join(text) for text in texts],
                     "ranks": [1 + sum(other > x for other in noisy) for x in noisy],
                     "label_scores": strengths})
    return rows


def test_the_reward_model_reaches_the_ceiling_of_noisy_labels_and_no_more(base, tmp_path):
    """Above the ceiling would be a leak of the labels.

    Accuracy / ceiling with seeds 0 to 4 for model, data and order: 1.015, 0.986, 1.008, 1.006, 0.988; a
    standard error is .018.
    """
    rng = random.Random(0)
    sizes = {"training": 1500, "validation": 50, "test": 500}
    splits = {split: planted_rankings(count, split, rng) for split, count in sizes.items()}
    config = train_reward.RewardStageConfig(
        model=base, output_dir=str(tmp_path / "reward"), max_prompt_tokens=32, max_completion_tokens=32,
        per_device_batch_size=32, learning_rate=3e-3,
        **{f"reward_{split}_data": written(tmp_path / f"{split}.jsonl", rows)
           for split, rows in splits.items()},
    )
    train_reward.main(config)
    found = json.loads((tmp_path / "reward" / "summary.json").read_text())
    gaps = [abs(row["label_scores"][i] - row["label_scores"][j])
            for row in splits["test"] for i, j in ((0, 1), (0, 2), (1, 2))]
    ceiling = fmean(1 / (1 + math.exp(-gap)) for gap in gaps)
    # pairs of one post are not independent: posts count
    error = math.sqrt(ceiling * (1 - ceiling) / len(splits["test"]))
    assert found["label_ceiling"] == pytest.approx(ceiling, abs=1e-6)
    assert 0.95 * ceiling <= found["accuracy"] <= ceiling + 3 * error
