"""Judging summaries: each measure against an independent way to get it, and no pass of a model that nobody asked for."""

import json
from types import SimpleNamespace

import pytest
import torch

import train_ppo
from families import EOS, PAD, policy, random_groups, scalar_model
from utils.config import UserError
from utils.data.report import DataReport
from utils.data.rows import Tokenised, load_data, tokenised
from utils.judge import evaluation
from utils.judge.judging import Judge, load_rules, refuse_missing_facts
from utils.models.loading import load_tokenizer

PROMPTS = random_groups([5, 1, 8, 3, 6], [[1]] * 5)[0]
POSTS = Tokenised([SimpleNamespace(prompt="p", completion=" w3 w4.", facts=None) for _ in PROMPTS], PROMPTS, None)
CONFIG = SimpleNamespace(max_new_tokens=6, eval_batch_size=2, temperature=0.7, eval_temperature=0.01, seed=0,
                         missing_eos_score=-1.0)


class Tokenizer:
    """Tokens as words."""

    eos_token_id, pad_token_id = EOS, PAD

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(f"w{token}" for token in row if token > EOS) for row in rows]


def judge(gold_rules=None):
    return Judge(policy("opt", 1), scalar_model("opt"), Tokenizer(), gold_rules, CONFIG)


def stock_logprob(model, prompt, response):
    logits = model(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return (logits / CONFIG.temperature).log_softmax(-1)[torch.arange(len(response)), response].sum().item()


@torch.no_grad()
def test_kl_is_the_difference_of_two_stock_forward_passes():
    ours, trained = judge(), policy("opt", 2)
    found = ours.summaries(trained, POSTS, CONFIG.temperature, "")
    expected = [stock_logprob(trained, p, r) - stock_logprob(ours.ref_policy, p, r)
                for p, r in zip(PROMPTS, found.tokens, strict=True)]
    assert ours.kls(POSTS, found, "") == pytest.approx(expected, abs=1e-3)
    assert max(map(abs, expected)) > 0.1


@torch.no_grad()
def test_each_policys_summaries_are_scored_and_one_without_eos_gets_the_fixed_score():
    ours = judge()
    found = [ours.summaries(policy("opt", seed), POSTS, 2.0, "") for seed in (2, 3)]
    assert found[0].tokens != found[1].tokens
    for summaries, scores in zip(found, ours.scores(POSTS, found, ""), strict=True):
        for prompt, response, ended, score in zip(PROMPTS, summaries.tokens, summaries.ended, scores, strict=True):
            stock = ours.reward_model(input_ids=torch.tensor([prompt + response])).logits.item()
            assert score == pytest.approx(stock if ended else -1.0, abs=1e-4)
    assert any(not ended for summaries in found for ended in summaries.ended)


def test_an_evaluation_samples_twice_and_asks_each_judge_once(monkeypatch):
    """Greedy and sampled summaries; the scores of both in one pass, the KL of the sampled ones."""
    ours, trained, asked = judge(), policy("opt", 2), []
    for model, name in ((trained, "policy"), (ours.ref_policy, "reference"), (ours.reward_model, "reward")):
        model.base_model.register_forward_hook(lambda *_, name=name: asked.append(name))
    drawn, sample = [], evaluation.sample
    monkeypatch.setattr(evaluation, "sample", lambda *a, **k: (drawn.append(k["temperature"]), sample(*a, **k))[1])
    figures, offered = {}, []
    run = SimpleNamespace(metrics=lambda step, values: figures.update(values), say=lambda line: None)
    keeper = SimpleNamespace(offer=lambda *values: offered.append(values))
    train_ppo.evaluate(trained, ours, POSTS, CONFIG, run, keeper, 3)
    assert drawn == [0.01, 0.7]
    assert asked.count("reference") == asked.count("reward") == 3, "five rows in batches of two"
    assert list(figures) == ["eval/tokens", "eval/ended", "eval/score", "eval/score_sampled", "eval/kl", "eval/rouge_avg"]
    assert offered == [(3, figures["eval/score"], figures["eval/kl"])]


def test_an_evaluations_kl_and_score_are_of_the_right_summaries():
    """The KL of sampled summaries (greedy ones are no sample of the policy), the score of greedy ones."""
    class Recorded:
        def summaries(self, policy, posts, temperature, title):
            return SimpleNamespace(tokens=[[0]], ended=[True], texts=[""], kl=10 * temperature, score=temperature)

        def kls(self, posts, found, title):
            return [found.kl]

        def scores(self, posts, found, title):
            return [[summaries.score] for summaries in found]

        def gold(self, posts, found):
            return [found.score]

        def rouge(self, posts, found):
            return found.score

    figures, offered = {}, []
    run = SimpleNamespace(metrics=lambda step, values: figures.update(values), say=lambda line: None)
    train_ppo.evaluate(None, Recorded(), None, CONFIG, run, SimpleNamespace(offer=lambda *values: offered.append(values)), 3)
    assert {name: figures[f"eval/{name}"] for name in ("kl", "score", "score_sampled", "gold", "gold_sampled", "rouge_avg")} == {
        "kl": 7.0, "score": 0.01, "score_sampled": 0.7, "gold": 0.01, "gold_sampled": 0.7, "rouge_avg": 0.01}
    assert offered == [(3, 0.01, 7.0)]


def test_examples_whose_completion_is_too_long_are_dropped_and_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": "p q", "completion": text}) + "\n" for text in (" a a a", " a a", " a a a a")))
    tokenizer = load_tokenizer("assets/opt-mini")
    config = SimpleNamespace(data=str(path), max_prompt_tokens=9, on_bad_rows="error")
    rows = load_data(config, {"data": "examples"}, tokenizer, DataReport())["data"]
    said, word = [], tokenizer(" a", add_special_tokens=False)["input_ids"]
    found = tokenised(rows, 3 * len(word) + 1, said.append)
    assert list(found.completions) == [3 * word + [EOS], 2 * word + [EOS]] and len(found.prompts) == 2
    assert [example.completion for example in found.examples] == [" a a a", " a a"]
    assert said == [f"dropped 1 of 3 examples with more than {3 * len(word) + 1} completion tokens"]
    with pytest.raises(UserError, match="^max_completion_tokens: no completion has 2 tokens"):
        tokenised(rows, 2, said.append)


RULES = {"slots": {"who": {"weight": 1.0, "values": ["my sister"]}}, "need_words": 5,
         "penalties": {"extra_word": 0.1, "repeated_trigram": 0.1, "repeated_trigram_cap": 0.2, "no_proper_end": 0.2}}


def test_rules_of_the_gold_score_are_read(tmp_path):
    (tmp_path / "gold.json").write_text(json.dumps(RULES))
    assert load_rules(str(tmp_path / "gold.json"))["need_words"] == 5


@pytest.mark.parametrize("text", ["", "{", "{}", "null", "[]", '{"slots": {"who": {}}}', '{"slots": {}}',
                                  json.dumps({**RULES, "penalties": {}}), json.dumps({**RULES, "need_words": "five"})])
def test_rules_that_are_none_are_refused_before_they_are_needed(text, tmp_path):
    (tmp_path / "gold.json").write_text(text)
    with pytest.raises(UserError, match="^gold_rules: .* holds no rules of a gold score"):
        load_rules(str(tmp_path / "gold.json"))
    with pytest.raises(UserError, match="^gold_rules: .* does not exist"):
        load_rules(str(tmp_path / "none.json"))


@pytest.mark.parametrize("facts", [None, "my sister", {}, {"when": "today"}, {"who": 3}, ["who"]])
def test_a_row_without_the_facts_is_refused(facts):
    whole = SimpleNamespace(prompt="p", facts={"who": "my sister", "when": "today"})
    refuse_missing_facts(RULES, [whole])
    with pytest.raises(UserError, match="^gold_rules: .* no column 'facts' with a text for 'who'"):
        refuse_missing_facts(RULES, [whole, SimpleNamespace(prompt="p", facts=facts)])
