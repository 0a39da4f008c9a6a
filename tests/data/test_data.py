"""Data: every layout that the loaders know, cutting, grouping, and one clear line for each broken row."""

import gzip
import json
import os
from pathlib import Path

import datasets
import pytest
from datasets.exceptions import DatasetGenerationError, NonMatchingSplitsSizesError

import train_ppo
import train_reward
import train_sft
from tiny_models import mini_tokenizer
from utils.config import PROJECT, UserError
from utils.data import rows as data
from utils.data.layouts import Example, Ranking
from utils.data.report import DataReport
from utils.data.rows import load_rankings, refuse_overlap, split_off
from utils.data.sources import Source, open_source
from utils.data.tokens import completion_tokens, prompt_tokens

TLDR = "SUBREDDIT: r/tea\n\nTITLE: Which pot\n\nPOST: I have two pots.\nOne leaks.\n\nTL;DR:"
SHARED = Path(os.environ.get("TLDR_DATA_DIR", PROJECT.parent / "shared" / "data"))


def write(folder, *rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load_examples(*args, **more):
    return list(data.load_examples(*args, **more))


def rankings(path, cap=9, said=None):
    return list(load_rankings(path, "reward_training_data", cap, [].append if said is None else said.append))


def rows_of(name, field):
    """What a source gives: the rows with their places."""
    opened = open_source(Source(name), field)
    return [(f"{opened.label}:{number}", row) for number, row in opened.rows]


def tokenizer_of(name):
    if name == "opt" and not (SHARED / "opt_tokenizer").exists():
        pytest.skip(f"no OPT tokenizer at {SHARED / 'opt_tokenizer'}; set TLDR_DATA_DIR")
    if name == "opt":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(SHARED / "opt_tokenizer")
    return mini_tokenizer()


# ------------------------------------------------------------------------------------------------- layouts

POST = {"subreddit": "tea", "title": "Which pot", "post": "I have two pots.\nOne leaks."}
SINGLE = "SUBREDDIT: r/tea\nTITLE: Which pot\nPOST: I have two pots.\nOne leaks."
EXAMPLES = {
    "own": {"prompt": TLDR, "completion": "Buy one."},
    "trl-lib/tldr": {"prompt": TLDR, "completion": " Buy one."},
    "CarperAI/openai_summarize_tldr": {"prompt": f"{SINGLE}\nTL;DR: ", "label": "Buy one."},
    "openai/summarize_from_feedback": {"id": "t3_x", **POST, "summary": "Buy one."},
    "without TL;DR": {"prompt": SINGLE, "completion": "Buy one."},
}


@pytest.mark.parametrize("layout", EXAMPLES)
def test_examples_of_every_layout_read_alike(layout, tmp_path):
    assert (load_examples(write(tmp_path, EXAMPLES[layout]), "actor_training_data")
            == [Example(TLDR, " Buy one.", None)])


def test_other_prompts_stay_as_they_are_and_facts_are_kept(tmp_path):
    path = write(tmp_path, {"prompt": "Why is tea green?\n", "completion": "\nIt is.  ", "facts": {"a": "b"}})
    assert (load_examples(path, "actor_training_data") == [Example("Why is tea green?", "\nIt is.",
                                                                   {"a": "b"})])


def test_prompts_alone_are_enough_for_ppo(tmp_path):
    path = write(tmp_path, {"prompt": TLDR}, POST, EXAMPLES["own"])
    assert load_examples(path, "rlhf_training_data", need_completion=False) == [
        Example(TLDR, None, None), Example(TLDR, None, None), Example(TLDR, " Buy one.", None)
    ]


DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tea?\n\nAssistant:"
COMPARISONS = {
    "own": (TLDR, {"prompt": TLDR, "chosen": "Buy one.", "rejected": "Pots."}),
    "trl-lib/tldr-preference": (TLDR, {"prompt": TLDR, "chosen": " Buy one.", "rejected": " Pots."}),
    "CarperAI/openai_summarize_comparisons": (
        TLDR, {"prompt": SINGLE, "chosen": "TL;DR: Buy one.", "rejected": "TL;DR: Pots."}
    ),
    "Anthropic/hh-rlhf": (
        DIALOGUE.strip(), {"chosen": f"{DIALOGUE} Buy one.", "rejected": f"{DIALOGUE} Pots."}
    ),
    "ranking": (TLDR, {"prompt": TLDR, "completions": ["Buy one.", "Pots."]}),
}


def openai_row(choice, first="Pots.", second="Buy one.", **info):
    return {"info": {"id": "t3", **POST, "site": None, "article": None, **info},
            "summaries": [{"text": first, "policy": "sup4", "note": ""},
                          {"text": f" {second}", "policy": "ref", "note": "ok"}],
            "choice": choice, "worker": "w7", "batch": "batch3", "split": "train", "extra": {"confidence": 8}}


def test_the_choice_of_an_openai_row_is_the_better_summary(tmp_path):
    """Polarity by hand: choice 1 is the second, choice 0 the first; what the row says besides goes along with
    the pair.
    """
    note = {"confidence": "8", "policies": "ref and sup4", "batch": "batch3", "worker": "w7"}
    found = rankings(write(tmp_path, openai_row(1), openai_row(0)))
    assert found == [Ranking(TLDR, [" Buy one.", " Pots."], [(0, 1), (1, 0)], None, [note, note])]
    bare = {**openai_row(0), "extra": {}, "batch": None}
    assert rankings(write(tmp_path, bare))[0].notes == [{"policies": "ref and sup4", "worker": "w7"}]


def shp_row(label, ratio=2.5, history="Why is the sky blue?", a="Buy one.", b="Pots."):
    return {"post_id": "x", "domain": "askscience_train", "history": history, "human_ref_A": a,
            "human_ref_B": b, "labels": label, "score_A": 5 if label else 2, "score_B": 2 if label else 5,
            "score_ratio": ratio}


def test_the_label_of_an_shp_row_is_1_for_the_first_answer(tmp_path):
    for label, pairs in ((1, [(" Buy one.", " Pots.")]), (0, [(" Pots.", " Buy one.")])):
        [found] = rankings(write(tmp_path, shp_row(label)))
        assert found.prompt == "Why is the sky blue?" and all_pairs([found]) == pairs


def test_small_ratios_and_too_many_pairs_of_a_prompt_are_dropped_and_counted(tmp_path):
    rows = [shp_row(1, 1.9), *(shp_row(1, 2.0, a=f"a{n}", b=f"b{n}") for n in range(4)),
            shp_row(1, 9.0, history="Q")]
    path, said = write(tmp_path, *rows), []
    found = load_rankings(path, "reward_training_data", 9, said.append, min_score_ratio=2.0,
                          max_pairs_per_prompt=3)
    assert {group.prompt: len(group.pairs) for group in found} == {"Why is the sky blue?": 3, "Q": 1}
    assert said[1:] == [f"reward_training_data: dropped 2 of the 6 rows of '{path}' (33.3%): 1 a score_ratio "
                        "that is too small, 1 more pairs of one prompt than max_pairs_per_prompt"]
    assert sum(len(group.pairs) for group in rankings(path)) == 6  # by default every row counts


def messages_row(*turns):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def test_messages_are_a_dialogue_whose_last_answer_is_the_completion(tmp_path):
    turns = ("user", "Hi "), ("assistant", "Hello"), ("user", "Tea?"), ("assistant", " Buy one.\n")
    [found] = load_examples(write(tmp_path, messages_row(*turns)), "actor_training_data")
    assert found == Example("Human: Hi\n\nAssistant: Hello\n\nHuman: Tea?\n\nAssistant:", " Buy one.", None)
    [found] = load_examples(write(tmp_path, messages_row(("system", "Be kind."), ("user", "Tea?"))),
                            "rlhf_training_data", False)
    assert found == Example("System: Be kind.\n\nHuman: Tea?\n\nAssistant:", None, None)
    # the same layout as that of hh-rlhf, so that one model serves both
    assert rankings(write(tmp_path, COMPARISONS["Anthropic/hh-rlhf"][1]))[0].prompt == DIALOGUE.strip()


def test_an_article_is_a_prompt_of_its_own(tmp_path):
    [found] = rankings(write(tmp_path, openai_row(1, article="It rained.\n", site="cnn", post="", title=None,
                                                  subreddit=None)))
    assert found.prompt == "It rained.\n\nTL;DR:" and found.completions == [" Buy one.", " Pots."]


def test_notes_stay_with_their_pair_when_a_group_is_split(tmp_path):
    rows = [{"prompt": "P", "chosen": a, "rejected": b, "batch": f"{a}{b}", "confidence": n}
            for n, (a, b) in enumerate(["ab", "cd", "ac", "bd"])]
    for cap in (2, 3, 9):
        for group in rankings(write(tmp_path, *rows), cap):
            for (better, worse), note in zip(group.pairs, group.notes, strict=True):
                assert (note["batch"] == (group.completions[better] + group.completions[worse]).replace(" ",
                                                                                                        ""))


@pytest.mark.parametrize("layout", COMPARISONS)
def test_comparisons_of_every_layout_read_alike(layout, tmp_path):
    prompt, row = COMPARISONS[layout]
    assert rankings(write(tmp_path, row)) == [Ranking(prompt, [" Buy one.", " Pots."], [(0, 1)], None)]


def test_gzip_reads_like_plain_text_and_blank_lines_are_nothing(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n\n{"a": 2}'))
    found = rows_of(str(path), "actor_training_data")
    assert found == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": 2})]


def test_emoji_may_be_written_as_escapes(tmp_path):
    path = write(tmp_path, {"prompt": "P", "completion": "tea \N{TEACUP WITHOUT HANDLE}\N{GRINNING FACE}"})
    assert "\\ud83d" in Path(path).read_text()
    assert load_examples(path, "x")[0].completion == " tea \N{TEACUP WITHOUT HANDLE}\N{GRINNING FACE}"


def test_every_real_dialogue_is_a_pair_or_counted():
    path = SHARED / "hh_rlhf" / "harmless-base_test.jsonl.gz"
    if not path.exists():
        pytest.skip(f"no dialogues at {path}; set TLDR_DATA_DIR")
    said = []
    found = rankings(str(path), said=said)
    assert said == [f"reward_training_data: dropped 9 of the 2312 rows of '{path}' (0.4%): 4 an empty "
                    "answer, 5 share no prompt"]
    assert sum(len(group.pairs) for group in found) == 2312 - 9
    assert all(group.prompt.startswith("Human:") and group.prompt.endswith("\n\nAssistant:")
               for group in found)


@pytest.mark.parametrize(
    ("field", "splits", "expected"),
    [
        ("actor_training_data", ["test", "train", "valid"], "train"),
        ("actor_validation_data", ["train", "valid", "validation"], "validation"),
        ("reward_validation_data", ["train", "test", "valid1", "valid2"], "valid1"),
        ("rlhf_test_data", ["train", "valid", "test"], "test"),
        ("reward_test_data", ["train", "valid1", "valid2"], "valid2"),
        ("centring_data", ["train", "validation"], "validation"),
        ("rating_data", ["train", "validation", "test"], "test"),
        ("rating_data", ["train", "validation"], "validation"),
    ],
)
def test_hub_splits_are_chosen_by_role(field, splits, expected, monkeypatch):
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: splits)
    monkeypatch.setattr(datasets, "load_dataset",
                        lambda name, split: datasets.Dataset.from_list([{"split": split}]))
    assert rows_of("some/dataset", field) == [(f"some/dataset[{expected}]:1", {"split": expected})]


@pytest.mark.parametrize("error", [
    ConnectionError("offline"), RuntimeError("Dataset scripts are no longer supported"),
    DatasetGenerationError("An error occurred while generating the dataset"),
    NonMatchingSplitsSizesError("other sizes"),
])
def test_an_unreachable_hub_is_a_users_error(error, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(UserError, match=f"actor_training_data: 'some/dataset' .*{error}"):
        rows_of("some/dataset", "actor_training_data")


# -------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("name", ["opt-mini", "opt"])
def test_tokenising_apart_equals_tokenising_together(name):
    """Detail 2, on the posts of the mini data set and on awkward text."""
    tokenizer = tokenizer_of(name)
    texts = [(e.prompt, e.completion) for e in load_examples("data/tldr_mini/actor_validation.jsonl.gz",
                                                             "x")[:200]]
    texts += [(TLDR, " Buy one."), (TLDR, "\nBuy"), (TLDR, "  two spaces"), (TLDR, " ☕ naïve"),
              ("Why?", " 1,000.")]
    prompts, completions = map(list, zip(*texts, strict=True))
    apart = zip(prompt_tokens(tokenizer, prompts, 10_000), completion_tokens(tokenizer, completions),
                strict=True)
    together = tokenizer([p + c for p, c in texts])["input_ids"]
    for (prompt, completion), both in zip(apart, together, strict=True):
        assert prompt + completion == [*both, tokenizer.eos_token_id]
        assert tokenizer.eos_token_id not in completion[:-1]


@pytest.mark.parametrize("name", ["opt-mini", "opt"])
def test_special_tokens_that_somebody_wrote_are_text(name):
    """Detail 4: a post that holds the EOS's spelling must not end there, nor may padding be written into it.
    """
    tokenizer = tokenizer_of(name)
    text = " a </s> b <pad> c"
    [prompt], [completion] = prompt_tokens(tokenizer, [text.strip()],
                                           99), completion_tokens(tokenizer, [text])
    special = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert not special & {*prompt[1:], *completion[:-1]}
    assert tokenizer.decode(completion[:-1]) == text
    [cut] = prompt_tokens(tokenizer, [f"{text} " * 9], 20)
    assert not special & set(cut[1:]) and len(cut) == 20


class Words:
    """A tokenizer of white-space separated words with a BOS in front; a newline is a word of its own."""

    bos, chat_template = "<s>", None

    def __call__(self, text, add_special_tokens=True, **more):
        if isinstance(text, list):
            return {"input_ids": [self(one, add_special_tokens)["input_ids"] for one in text]}
        return {"input_ids": [self.bos] * add_special_tokens + text.replace("\n", " | ").split()}


def cut(post, limit):
    """The post that is left of a prompt cut to `limit` words."""
    prompt = f"SUBREDDIT: r/a\n\nTITLE: b\n\nPOST: {post}\n\nTL;DR:"
    (ids,) = prompt_tokens(Words(), [prompt], limit)
    assert len(ids) <= limit and ids[0] == Words.bos
    text = " ".join(ids[1:])
    assert text.startswith("SUBREDDIT: r/a | | TITLE: b | | POST:") and text.endswith("| | TL;DR:")
    return text.removeprefix("SUBREDDIT: r/a | | TITLE: b | | POST:").removesuffix("| | TL;DR:").strip()


@pytest.mark.parametrize(
    ("post", "room", "left"),
    [
        ("one two. three\nfour five", 6, "one two. three | four five"),  # fits: nothing is cut
        ("one two. three\nfour five", 5, "one two. three"),  # the last newline, although one word would do
        ("one two. three\nfour five", 2, "one two."),  # then the last sentence
        ("one two. three\nfour five", 1, "one"),  # then the last word
        ("a b? c d! e f.", 5, "a b? c d!"),
        ("a b? c d! e f.", 3, "a b?"),
        ("a b c d", 3, "a b c"),
        ("a\nb\nc", 3, "a | b"),
        ("a\nb\nc", 2, "a"),
        ("a b", 0, ""),
    ],
)
def test_a_long_post_is_cut_at_its_last_newline_then_sentence_then_word(post, room, left):
    frame = 13  # words around the post: BOS, headings, newlines, TL;DR:
    assert cut(post, frame + room) == left


def test_a_prompt_that_cannot_fit_is_refused_and_other_layouts_keep_their_end():
    with pytest.raises(UserError, match="max_prompt_tokens=12"):
        cut("a b", 12)
    assert prompt_tokens(Words(), ["one two three four"], 3) == [["<s>", "three", "four"]]


@pytest.mark.parametrize("name", ["opt-mini", "opt"])
def test_cut_prompts_end_in_tldr_for_real_tokenizers(name):
    tokenizer = tokenizer_of(name)
    prompts = [e.prompt for e in load_examples("data/tldr_mini/actor_validation.jsonl.gz", "x")[:50]]
    end = tokenizer("\n\nTL;DR:", add_special_tokens=False)["input_ids"]
    for ids, whole in zip(prompt_tokens(tokenizer, prompts, 70), prompt_tokens(tokenizer, prompts, 512),
                          strict=True):
        assert 20 < len(ids) <= 70 and ids[:10] == whole[:10]
        assert ids[-len(end) :] == end


# ------------------------------------------------------------------------------------- grouping and dropping


def pair(chosen, rejected, prompt="P"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def all_pairs(found):
    return sorted((g.completions[better], g.completions[worse]) for g in found for better, worse in g.pairs)


def test_pairs_of_a_prompt_become_one_group(tmp_path):
    path = write(tmp_path, pair("a", "b"), pair("x", "y", "Q"), pair("b", "c"), pair("a", " c "))
    assert rankings(path) == [
        Ranking("P", [" a", " b", " c"], [(0, 1), (1, 2), (0, 2)], None),
        Ranking("Q", [" x", " y"], [(0, 1)], None),
    ]


@pytest.mark.parametrize("cap", [2, 3, 4, 6])
def test_group_cap_keeps_each_pair_once(cap, tmp_path):
    letters = "abcdef"
    pairs = [(x, y) for i, x in enumerate(letters) for y in letters[i + 1 :]]
    expected = [(f" {x}", f" {y}") for x, y in pairs]
    as_pairs = rankings(write(tmp_path, *(pair(x, y) for x, y in pairs)), cap)
    as_ranking = rankings(
        write(tmp_path, {"prompt": "P", "completions": list(letters), "label_scores": [6, 5, 4, 3, 2, 1]}),
        cap
    )
    for found in (as_pairs, as_ranking):
        assert all_pairs(found) == expected
        for group in found:
            assert len(group.completions) == len(set(group.completions)) <= cap
            assert {index for p in group.pairs for index in p} == set(range(len(group.completions)))
    for group in as_ranking:
        assert group.label_scores == [7 - " abcdef".index(text.strip()) for text in group.completions]


def test_ranks_with_ties(tmp_path):
    path = write(tmp_path, {"prompt": "P", "completions": ["a", "b", "c", "d"], "ranks": [1, 2, 2, 0.5]})
    assert sorted(rankings(path)[0].pairs) == [(0, 1), (0, 2), (3, 0), (3, 1), (3, 2)]
    path = write(tmp_path, {"prompt": "P", "completions": ["a", "b", "c"], "label_scores": [3, 2, 1.5]})
    assert rankings(path)[0] == Ranking("P", [" a", " b", " c"], [(0, 1), (0, 2), (1, 2)], [3, 2, 1.5])


@pytest.mark.parametrize("cap", [2, 9])
def test_rankings_of_ties_alone_are_dropped_and_counted(cap, tmp_path):
    """Whether or not they are small enough for one group; PPO takes their prompts."""
    rows = [{"prompt": f"P{n}", "completions": ["a", "b", "c"], "ranks": [1, 1, rank]}
            for n, rank in enumerate((1, 2, 1))]
    path, said = write(tmp_path, *rows), []
    assert {row.prompt for row in rankings(path, cap, said)} == {"P1"}
    assert said == [f"reward_training_data: dropped 2 of the 3 rows of '{path}' (66.7%): 2 ties alone"]
    assert [row.prompt for row in load_examples(path, "x", need_completion=False)] == ["P0", "P1", "P2"]


def test_dropped_pairs_are_counted_with_their_reason(tmp_path):
    other = DIALOGUE.replace("Hi", "Ho")
    path = write(
        tmp_path, pair("a", "b"), pair("a", "\na"), pair("a", "a"), pair("a", "  "),
        pair("TL;DR:", "TL;DR: b"),
        {"chosen": f"{DIALOGUE} yes", "rejected": f"{other} no"},
    )
    said = []
    assert all_pairs(rankings(path, said=said)) == [(" a", " b")]
    assert said == [f"reward_training_data: dropped 5 of the 6 rows of '{path}' (83.3%): 2 equal answers, "
                    "2 an empty answer, 1 share no prompt"]
    rankings(write(tmp_path, pair("a", "b")), said=said)
    assert len(said) == 1, "nothing dropped, nothing said"


def test_a_file_with_no_usable_pair_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no usable comparison"):
        rankings(write(tmp_path, pair("a", "a")))


# -------------------------------------------------------------------------------------------------- splits


def test_split_off_holds_whole_prompts_out(tmp_path):
    rows = data.load_examples(write(tmp_path, *({"prompt": f"P{i % 20}", "completion": str(i)}
                                                for i in range(60))), "x")
    stay, held = split_off(rows, 0.25, seed=3)
    assert len({row.prompt for row in held}) == 5 and sorted([*stay, *held]) == sorted(rows)
    assert not {row.prompt for row in held} & {row.prompt for row in stay}
    again, other = split_off(rows, 0.25, seed=3), split_off(rows, 0.25, seed=4)
    assert list(held) == list(again[1]) != list(other[1])
    assert len(split_off(rows, 0.0, seed=3)[1]), "never nothing"


def test_overlap_is_refused_with_its_places_or_said(tmp_path):
    first = write(tmp_path, *({"prompt": f"P{i}"} for i in range(9)), name="a.jsonl")
    second = write(tmp_path, {"prompt": "Q"}, *({"prompt": f"P{i}"} for i in range(8, 2, -1)), name="b.jsonl")
    one, two = (data.load_examples(path, "x", False) for path in (first, second))
    said = []
    refuse_overlap({"train": one, "test": two[:1]}, False, said.append)
    assert not said
    clash = (f"the same prompt stands in train and in test: 'P8' ({first}:9 and {second}:2), 'P7' ({first}:8 "
             f"and {second}:3), 'P6' ({first}:7 and {second}:4) and 3 more")
    with pytest.raises(UserError) as caught:
        refuse_overlap({"train": one, "test": two}, False, said.append)
    assert str(caught.value) == clash + "; remove it from one, or accept it with allow_overlap: true"
    refuse_overlap({"train": one, "test": two}, True, said.append)
    assert said == [clash + " (allow_overlap)"]


@pytest.mark.parametrize(("load", "kind", "role"), [
    (train_sft.load_splits, train_sft.SFTStageConfig, "actor"),
    (train_reward.load_splits, train_reward.RewardStageConfig, "reward"),
    (train_ppo.load_posts, train_ppo.PPOStageConfig, "rlhf"),
], ids=["sft", "reward", "ppo"])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_stage_refuses_a_prompt_in_two_splits(load, kind, role, split, tmp_path):
    answers = {"chosen": " a", "rejected": " b"} if role == "reward" else {"completion": " a"}
    rows = [{"prompt": f"P{i}", **answers} for i in range(9)]
    shared = {"training": rows[:3], "validation": rows[3:6], "test": rows[6:]}
    shared[split] = [*shared[split], rows[1]]
    files = {f"{role}_{name}_data": write(tmp_path, *part, name=f"{name}.jsonl")
             for name, part in shared.items()}
    with pytest.raises(UserError, match=f"^the same prompt stands in {role}_training_data and in "
                                        f"{role}_{split}_data: 'P1'"):
        load(kind(**files), mini_tokenizer(), DataReport())


# ---------------------------------------------------------------------------------------------- broken rows

GOOD = json.dumps({"prompt": "P", "completion": "c"})
GOOD_PAIR = json.dumps({"prompt": "P", "chosen": "a", "rejected": "b"})


def ranking_row(**changes):
    return {"prompt": "P", "completions": ["a", "b"], **changes}


BROKEN_EXAMPLES = {
    "messages a text": {"messages": "Hi"},
    "no messages": {"messages": []},
    "a message of text": {"messages": ["Hi"]},
    "an unknown role": messages_row(("tool", "Hi"), ("assistant", "Hello")),
    "a message without content": {"messages": [{"role": "user"}, {"role": "assistant", "content": "Hello"}]},
    "no answer": messages_row(("user", "Hi")),
    "an answer to nothing": messages_row(("assistant", "Hello")),
    "not JSON": "prompt: P",
    "JSON cut off": '{"prompt": "P", "comple',
    "two objects on a line": GOOD + GOOD,
    "list": '["P", "c"]',
    "number": "7",
    "not UTF-8": b'{"prompt": "caf\xe9", "completion": "c"}',
    "half an emoji": '{"prompt": "P", "completion": "cut \\ud83d"}',
    "no known column": {"text": "P"},
    "completion missing": {"prompt": "P"},
    "summary missing": POST,
    "prompt empty": {"prompt": " ", "completion": "c"},
    "prompt null": {"prompt": None, "completion": "c"},
    "prompt a number": {"prompt": 3, "completion": "c"},
    "completion empty": {"prompt": "P", "completion": ""},
    "completion a list": {"prompt": "P", "completion": ["c"]},
    "label a number": {"prompt": "P", "label": 1},
    "title empty": {**POST, "title": "", "summary": "s"},
}
BROKEN_RANKINGS = {
    "rejected missing": {"prompt": "P", "chosen": "a"},
    "prompt missing": {"chosen": "a", "rejected": "b"},
    "labels 2": {**shp_row(1), "labels": 2},
    "labels a bool": {**shp_row(1), "labels": True},
    "an answer missing": {**shp_row(1), "human_ref_B": None},
    "no history": {**shp_row(1), "history": " "},
    "ratio a text": {**shp_row(1), "score_ratio": "2"},
    "choice of three": {"info": POST, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2},
    "choice a text": {"info": POST, "summaries": [{"text": "a"}, {"text": "b"}], "choice": "1"},
    "one summary": {"info": POST, "summaries": [{"text": "a"}], "choice": 0},
    "summaries of text": {"info": POST, "summaries": ["a", "b"], "choice": 0},
    "summary without text": {"info": POST, "summaries": [{"text": "a"}, {"note": "b"}], "choice": 0},
    "no post in info": {"info": {"title": "t", "subreddit": "s"}, "summaries": [{"text": "a"}, {"text": "b"}],
                        "choice": 0},
    "prompt is a list": {"prompt": ["P"], "chosen": "a", "rejected": "b"},
    "chosen a number": pair(1, "b"),
    "rejected null": pair("a", None),
    "completions without prompt": {"completions": ["a", "b"]},
    "completions a text": ranking_row(completions="a b"),
    "one completion": ranking_row(completions=["a"]),
    "a completion empty": ranking_row(completions=["a", ""]),
    "a completion a number": ranking_row(completions=["a", 2]),
    "a completion twice": ranking_row(completions=["a", "b", " a"]),
    "too few ranks": ranking_row(ranks=[1]),
    "ranks a number": ranking_row(ranks=1),
    "ranks texts": ranking_row(ranks=["1", 2]),
    "ranks null": ranking_row(ranks=[1, None]),
    "too few label_scores": ranking_row(label_scores=[1.0]),
}


def broken_file(folder, row, good=GOOD):
    path = folder / "rows.jsonl"
    row = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    path.write_bytes(f"{good}\n\n".encode() + row + f"\n{good}\n".encode())
    return path


def refused(call, *start):
    """The one line of a UserError that starts with one of these."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message.startswith(start) and "\n" not in message, message
    return message


@pytest.mark.parametrize("case", BROKEN_EXAMPLES)
def test_a_broken_example_is_named_by_file_and_line(case, tmp_path):
    path = broken_file(tmp_path, BROKEN_EXAMPLES[case])
    refused(lambda: load_examples(str(path), "actor_training_data"), f"{path}:3: ")


@pytest.mark.parametrize("case", BROKEN_RANKINGS)
def test_a_broken_ranking_is_named_by_file_and_line(case, tmp_path):
    path = broken_file(tmp_path, BROKEN_RANKINGS[case], GOOD_PAIR)
    refused(lambda: rankings(str(path)), f"{path}:3: ")


WHOLE = gzip.compress("".join(f'{{"prompt": "P{i * 7919}", "completion": "c"}}\n'
                              for i in range(2000)).encode())
BROKEN_FILES = {
    "no gzip": ("a.jsonl.gz", GOOD.encode()),
    "truncated gzip": ("a.jsonl.gz", WHOLE[: len(WHOLE) // 2]),
    "damaged gzip": ("a.jsonl.gz", WHOLE[:5000] + bytes(200) + WHOLE[5200:]),
    "gzip under a plain name": ("a.jsonl", WHOLE),
    "wrong suffix": ("a.txt", GOOD.encode()),
    "empty": ("a.jsonl", b""),
    "empty gzip": ("a.jsonl.gz", b""),
    "only blank lines": ("a.jsonl", b"\n \n"),
    "missing": ("a.jsonl", None),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_broken_file_is_named(case, tmp_path):
    name, content = BROKEN_FILES[case]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    message = refused(lambda: load_examples(str(path), "actor_training_data"), f"{path}:",
                      "actor_training_data: ")
    assert str(path) in message


def test_a_line_far_into_a_file_is_named_right(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"{GOOD}\n".encode() * 999 + b'{"prompt": "\xff"}\n' + f"{GOOD}\n".encode() * 9)
    refused(lambda: load_examples(str(path), "actor_training_data"), f"{path}:1000: ")
