"""The tldr_mini data set and its gold score: hand-worked scores, and properties of the committed files."""

import gzip
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data" / "tldr_mini"
sys.path.insert(0, str(DATA))

import generate  # noqa: E402
import phrases  # noqa: E402
import posts  # noqa: E402
import pretraining  # noqa: E402
import summaries  # noqa: E402
from utils.judge.gold import gold_score, load_gold, mentioned_values, words_of  # noqa: E402

FACTS = {
    "relation": "sister", "name": "Anna", "age": "24", "action": "broke", "object": "lamp",
    "place": "kitchen",
    "when": "last Tuesday", "feeling": "furious", "question": "Should I ask for the money back?",
}  # fmt: skip
COMPLETE = (
    " My sister Anna (24) broke my lamp in the kitchen last Tuesday. I feel furious. Should I ask "
    "for the money back?"
)
SPLITS = [(role, split) for role in ("actor", "reward", "rlhf") for split in ("train", "validation", "test")]


@pytest.fixture(scope="module")
def gold() -> dict:
    return load_gold(DATA / "gold.json")


@pytest.fixture(scope="module")
def files() -> dict[str, list[dict]]:
    return {f"{role}_{split}": read_rows(DATA / f"{role}_{split}.jsonl.gz") for role, split in SPLITS}


def read_rows(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# --- The gold score, worked by hand -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        (COMPLETE, 1.0),
        (" my SISTER anna, 24: broke my lamp. Kitchen! Last Tuesday; furious - should I ask "
         "for the money back?", 1.0),
        # relation .10 + action .10 + object .14
        (" My sister broke my lamp.", 0.34),
        # the same without an end: - .25
        (" My sister broke my lamp", 0.09),
        # place right and wrong: .34 + .12 - .12
        (" My sister broke my lamp in the kitchen in the garden.", 0.34),
        # a wrong object: .10 + .10 - .14
        (" My sister broke my guitar.", 0.06),
        # two wrong objects cost as much as one
        (" My sister broke my guitar and drum.", 0.06),
        # the right question .10, another one - .10
        (" Should I ask for the money back?", 0.10),
        (" Should I just let it go?", -0.10),
        # only the whole phrase counts, for question and for when
        (" Should I ask for it?", 0.0),
        (" It was last.", 0.0),
        (" Last week.", -0.12),
        # words within words do not count
        (" The lamps, 245 kitchens.", 0.0),
        ("", -0.25),
        # "she said so" comes three times: she-said-so and said-so-she and so-she-said are each repeated,
        # 9 - 2 = 7 trigrams of which 3 differ, so 4 repeats: - .20
        (" she said so she said so she said so.", -0.20),
    ],
)
def test_gold_score_by_hand(gold, summary, expected):
    assert gold_score(summary, FACTS, gold) == pytest.approx(expected)


def test_cut_off_costs_once(gold):
    assert gold_score(COMPLETE, FACTS, gold, ended=False) == pytest.approx(0.75)
    assert gold_score(COMPLETE.rstrip("?"), FACTS, gold, ended=False) == pytest.approx(0.75)


def test_length_costs_per_word_beyond_need(gold):
    """The complete summary has 22 words. Distinct filler letters neither repeat trigrams nor name a fact."""
    assert len(words_of(COMPLETE)) == 22
    spare = gold["need_words"] - 22
    filler = [f"x{index}" for index in range(spare + 5)]
    assert gold_score(COMPLETE + " " + " ".join(filler[:spare]) + ".", FACTS, gold) == pytest.approx(1.0)
    assert gold_score(COMPLETE + " " + " ".join(filler) + ".", FACTS, gold) == pytest.approx(0.9)


def test_repetition_is_capped(gold):
    """20 words within the free length: 18 trigrams, all the same, 17 repeats, .85 capped at .5."""
    assert gold["need_words"] >= 20
    assert gold_score(" so" * 20 + ".", FACTS, gold) == pytest.approx(-0.5)


def test_weights_sum_to_one(gold):
    assert sum(spec["weight"] for spec in gold["slots"].values()) == pytest.approx(1.0)


# --- The world --------------------------------------------------------------------------------------


def all_texts(bank) -> list[str]:
    if isinstance(bank, str):
        return [bank]
    if isinstance(bank, dict):
        bank = bank.values()
    return [text for item in bank if not isinstance(item, int) for text in all_texts(item)]


def test_values_are_disjoint(gold):
    """No value lies within another, of its own slot or of any other."""
    for slot, spec in gold["slots"].items():
        for value in spec["values"]:
            mentioned = mentioned_values(words_of(value), gold)
            assert mentioned.pop(slot) == {value}
            assert not any(mentioned.values()), value


def test_fixed_text_contains_no_value(gold):
    value_banks = {"RELATIONS", "NAMES", "ACTIONS", "OBJECTS", "PLACES", "WHENS", "FEELINGS", "QUESTIONS"}
    banks = [bank for name, bank in vars(phrases).items() if name.isupper() and name not in value_banks]
    for template in all_texts([*banks, list(phrases.QUESTIONS.values())]):
        fixed = re.sub(r"\{\w+\}", " # xx # ", template)
        assert not any(mentioned_values(words_of(fixed), gold).values()), template


def test_banks_are_large():
    assert len(set(phrases.OPENERS)) >= 40
    for bank in (phrases.INTRODUCTIONS, phrases.EVENTS, phrases.FEELING_SENTENCES, phrases.QUESTION_LEADS):
        assert len(set(bank)) >= 16
    assert len(set(phrases.DISTRACTORS)) >= 60
    assert len(set(phrases.CLOSERS)) >= 20


def test_post_states_every_fact_and_distractors_none():
    rng = random.Random(1)
    for _ in range(200):
        post = posts.make_post(rng)
        body = words_of(post.body)
        for slot, value in post.facts.items():
            if slot != "question":
                assert contains(body, words_of(value)), (slot, value, post.body)
            assert value not in post.mentions[slot]
        for distractor in post.distractors:
            for slot, value in distractor.values.items():
                if slot != "question":
                    assert contains(words_of(distractor.text), words_of(value))


def contains(words: list[str], part: list[str]) -> bool:
    return any(words[start : start + len(part)] == part for start in range(len(words)))


def test_title_gives_away_at_most_relation_or_object(gold, files):
    for row in files["actor_validation"]:
        title = re.search(r"TITLE: (.*)\n", row["prompt"]).group(1)
        mentioned = {slot for slot, values in mentioned_values(words_of(title), gold).items() if values}
        assert mentioned in (set(), {"relation"}, {"object"})


# --- Summaries --------------------------------------------------------------------------------------


def test_complete_summaries_score_one_in_every_style(gold):
    for _, template in phrases.SUMMARY_STYLES:
        text = summaries.render(template, frozenset(posts.SLOTS), FACTS)
        assert gold_score(text, FACTS, gold) == pytest.approx(1.0), text


def test_main_style_by_hand():
    template = phrases.SUMMARY_STYLES[0][1]
    assert summaries.render(template, frozenset(posts.SLOTS), FACTS) == COMPLETE
    essential = frozenset({"relation", "action", "object"})
    assert summaries.render(template, essential, FACTS) == " My sister broke my lamp."
    assert summaries.render(template, frozenset({"name", "place"}), FACTS) == (
        " Anna did something to a thing of mine in the kitchen."
    )


def test_references_are_true(gold, files):
    for row in files["actor_train"][:500]:
        mentioned = mentioned_values(words_of(row["completion"]), gold)
        assert all(values <= {row["facts"][slot]} for slot, values in mentioned.items()), row["completion"]
        assert all(mentioned[slot] for slot in ("relation", "action", "object"))
        assert re.fullmatch(r" \S.*[.?]", row["completion"])


def test_reference_rates(files):
    """Authors leave facts out about as often as REFERENCE_CHANCES says (a little less: short ones are
    redrawn).
    """
    rows = files["actor_train"]
    for slot, chance in summaries.REFERENCE_CHANCES.items():
        rate = sum(contains(words_of(r["completion"]), words_of(r["facts"][slot])) for r in rows) / len(rows)
        assert rate == pytest.approx(chance, abs=0.05), slot


# --- Files ------------------------------------------------------------------------------------------


def test_sizes_and_schemas(files):
    sizes = {"actor": (4000, 300, 400), "reward": (5000, 300, 600), "rlhf": (4000, 300, 400)}
    reward_keys = ["id", "prompt", "completions", "label_scores", "gold", "kinds", "facts"]
    for role, counts in sizes.items():
        for split, count in zip(("train", "validation", "test"), counts, strict=True):
            rows = files[f"{role}_{split}"]
            assert len(rows) == count
            keys = reward_keys if role == "reward" else ["id", "prompt", "completion", "facts"]
            assert all(list(row) == keys for row in rows)
            layout = r"SUBREDDIT: r/\w+\n\nTITLE: .+\n\nPOST: (.|\n)+\n\nTL;DR:"
            assert all(re.fullmatch(layout, row["prompt"]) for row in rows)


def test_ids_and_bodies_are_unique_across_all_files(files):
    rows = [row for file in files.values() for row in file]
    assert len({row["id"] for row in rows}) == len(rows)
    bodies = {row["prompt"].split("\n\nPOST: ")[1] for row in rows}
    assert len(bodies) == len(rows)


def test_reward_rows(gold, files):
    for row in files["reward_test"]:
        assert len(set(row["completions"])) == 4
        assert row["kinds"].count("reference") == 1
        scores = [gold_score(text, row["facts"], gold) for text in row["completions"]]
        assert row["gold"] == pytest.approx(scores, abs=1e-4)
        assert row["label_scores"] == pytest.approx([score / gold["temperature"] for score in scores],
                                                    abs=1e-4)


def test_labels_follow_bradley_terry(files):
    """Best-first order agrees with the better score as often as sigmoid(difference) says, in every band."""
    bands = {0.5: [], 1.5: [], 3.0: []}
    ceiling, longer, pairs = 0.0, 0.0, 0
    for row in files["reward_train"]:
        for first, second in itertools.combinations(range(4), 2):
            difference = row["label_scores"][first] - row["label_scores"][second]
            likely = 1 / (1 + math.exp(-abs(difference)))
            lengths = len(row["completions"][first]), len(row["completions"][second])
            ceiling += likely
            longer += (lengths[0] > lengths[1]) + 0.5 * (lengths[0] == lengths[1])
            pairs += 1
            band = next((upper for upper in bands if 0 < abs(difference) <= upper), None)
            if band:
                bands[band].append((difference > 0, likely))
    for outcomes in bands.values():
        right, likely = (sum(column) / len(outcomes) for column in zip(*outcomes, strict=True))
        assert right == pytest.approx(likely, abs=5 * math.sqrt(0.25 / len(outcomes)))
    assert 0.82 <= ceiling / pairs <= 0.84
    assert longer / pairs <= 0.62


def test_same_seed_same_bytes_whatever_the_hash_seed(tmp_path, monkeypatch):
    """The committed files are what the generator writes; Python's hash seed plays no part."""
    script = f"""
import sys
sys.path.insert(0, {str(DATA)!r})
import generate
from pathlib import Path
out = Path({str(tmp_path)!r})
generate.write_gold(out / "gold.json")
gold = generate.load_gold(out / "gold.json")
for name in ("actor_validation", "reward_validation"):
    rows = generate.make_rows(generate.file_rng(0, name), name, 300, gold)
    generate.write_rows(out / (name + ".jsonl.gz"), rows)
"""
    for hash_seed in ("1", "2"):
        subprocess.run([sys.executable, "-c", script], check=True,
                       env={**os.environ, "PYTHONHASHSEED": hash_seed})
        for name in ("gold.json", "actor_validation.jsonl.gz", "reward_validation.jsonl.gz"):
            assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), name


def test_posts_may_have_unequal_numbers_of_answers(gold, tmp_path, monkeypatch):
    """As `--answers 2 9` asks for; all of a post are different, and ranked by its noisy labeller."""
    monkeypatch.setattr(generate, "SIZES", {"reward": {"train": 60}, "actor": {"test": 1}})
    generate.main(["--output_dir", str(tmp_path), "--answers", "2", "9"])
    rows = read_rows(tmp_path / "reward_train.jsonl.gz")
    assert {len(row["completions"]) for row in rows} == set(range(2, 10)) and len(rows) == 60
    for row in rows:
        assert len(set(row["completions"])) == len(row["completions"]) == len(row["label_scores"])
        assert row["gold"] == pytest.approx([gold_score(text, row["facts"], gold) for text in
                                             row["completions"]], abs=1e-4)


def test_another_seed_gives_other_posts():
    first = posts.make_post(generate.file_rng(0, "actor_train"))
    assert first.body != posts.make_post(generate.file_rng(1, "actor_train")).body
    assert first.body != posts.make_post(generate.file_rng(0, "rlhf_train")).body


# --- Pretraining corpus -----------------------------------------------------------------------------


def test_documents_show_no_layout():
    rng = random.Random(3)
    for _ in range(100):
        row = pretraining.document(rng)
        text = row["prompt"] + row["completion"]
        assert row["completion"].startswith("\n")
        assert not re.search(r"SUBREDDIT|TITLE|POST|TL;DR", text)


def test_verdicts_are_correct(gold):
    """Judge each retelling by the gold score's own eyes, without the makers' book-keeping."""
    rng = random.Random(4)
    verdicts = {"No": 0, "Yes": 0}
    voice = pretraining.first_person()
    for _ in range(500):
        story = posts.make_story(rng)
        told, verdict = pretraining.retelling(rng, story, voice).split("\n")
        mentioned = mentioned_values(words_of(told), gold)
        mentioned["question"] = {
            question
            for question, bank in phrases.QUESTIONS.items()
            if contains(words_of(told), words_of(bank["whether"]))
        }
        wrong = {slot for slot, values in mentioned.items() if values - {story.facts[slot]}}
        missing = {slot for slot, values in mentioned.items() if not values}
        word = re.match(r"\w+", verdict).group()
        verdicts[word] += 1
        assert (word == "No") == bool(wrong), (told, verdict)
        if verdict in phrases.YES_ALL:
            assert not missing, (told, verdict)
        if verdict.startswith("Yes, but"):
            assert missing, (told, verdict)
    assert min(verdicts.values()) > 150


def test_lists_are_read_out_again_in_another_order():
    """Every list of the prompt stands once in the completion, whole, and nothing else does."""
    orders = set()
    for row in pretraining.list_rows(random.Random(5), 20):
        told, again = (re.findall(r"[^.,;]+[.,;]", row[column]) for column in ("prompt", "completion"))
        assert row["completion"].startswith("\n") and len(told) >= 3
        assert sorted(line.strip() for line in told) == sorted(line.strip() for line in again)
        orders.add(told[0].strip() == again[0].strip())
    assert False in orders


def test_a_sixth_of_the_corpus_is_lists():
    rows = list(pretraining.corpus(random.Random(6), 60))
    same = [sorted(words_of(row["prompt"])) == sorted(words_of(row["completion"])) for row in rows]
    assert len(rows) == 60 and sum(same) == 10


# --- Tokenizer --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "assets" / "opt-mini")


def test_tokenizer_has_opts_special_tokens(tokenizer):
    assert len(tokenizer) <= 3072
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>"]) == [0, 1, 2, 3]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("</s>", "</s>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<pad>", "<unk>")
    plain = tokenizer(" Anna", add_special_tokens=False).input_ids
    assert tokenizer(" Anna").input_ids == [2, *plain]
    assert len(plain) == 1


def test_tokenizer_is_lossless_on_any_text(tokenizer):
    for text in ("naïve ☃ 日本語 🙂", " a  b\n\n c .\t's ,x", "\x00\x7f", COMPLETE):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_prompt_and_completion_tokenise_apart(tokenizer, files):
    for row in files["actor_validation"]:
        prompt, completion, both = (
            tokenizer(text, add_special_tokens=False).input_ids
            for text in (row["prompt"], row["completion"], row["prompt"] + row["completion"])
        )
        assert prompt + completion == both
        assert 80 <= len(prompt) <= 200
        assert 15 <= len(completion) <= 32


def test_completions_fit_the_length_limit(tokenizer, files):
    lengths = [
        len(tokenizer(text, add_special_tokens=False).input_ids)
        for row in files["reward_test"]
        for text in row["completions"]
    ]
    assert min(lengths) >= 8
    assert max(lengths) <= 48
