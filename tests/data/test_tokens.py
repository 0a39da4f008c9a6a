"""Tokens: what is cut where, for every kind of tokenizer, and that a completion continues its prompt (details
1 and 2).
"""

import gzip
import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import datasets.config
import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, CTRLTokenizer, PreTrainedTokenizerFast

from memory import peak_growth
from tiny_models import mini_tokenizer
from utils.config import PROJECT
from utils.data import tokens as module
from utils.data.layouts import TLDR_TEMPLATE
from utils.data.report import DataReport
from utils.data.rows import NamedSet, load_data, load_examples
from utils.data.sources import Source
from utils.data.tokens import (
    CUT,
    CUT_INSIDE,
    TOO_LONG,
    WHOLE,
    _last_that_fits,
    completion_tokens,
    cut_prompts,
    prompt_tokens,
    token_rows,
    tokenizer_key,
)
from utils.data.validation import read_set

SHARED = Path(os.environ.get("TLDR_DATA_DIR", PROJECT.parent / "shared" / "data"))
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| "
          r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def trained(kind):
    """A small tokenizer of a family, trained on posts: byte-level as GPT-2's and Llama 3's, or with ▁ as
    Llama 2's.
    """
    tokenizer = Tokenizer(BPE(unk_token="<unk>" if kind == "llama2" else None,
                              byte_fallback=kind == "llama2"))
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet = ([f"<0x{byte:02X}>" for byte in range(256)] if kind == "llama2"
                else pre_tokenizers.ByteLevel.alphabet())
    if kind == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                               decoders.Fuse(),
                                               decoders.Strip(" ", 1, 0)])
        special += alphabet
        alphabet = []
    elif kind == "llama3":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [e.prompt + e.completion for e in load_examples("data/tldr_mini/actor_validation.jsonl.gz",
                                                            "x")[:300]]
    if kind == "llama2":  # its trainer sees words apart, or merges would run through whole posts
        texts = [f"▁{word}" for text in texts for word in text.split()]
        tokenizer.normalizer, normalizer = None, tokenizer.normalizer
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=900, special_tokens=special,
                                                             initial_alphabet=alphabet,
                                                             show_progress=False))
    if kind == "llama2":
        tokenizer.normalizer = normalizer
    if kind != "gpt2":
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>")


@pytest.fixture(scope="module", params=["mini", "gpt2", "opt", "llama2", "llama3"])
def tokenizer(request):
    if request.param == "mini":
        return mini_tokenizer()
    if request.param == "opt":
        if not (SHARED / "opt_tokenizer").exists():
            pytest.skip(f"no OPT tokenizer at {SHARED / 'opt_tokenizer'}; set TLDR_DATA_DIR")
        return AutoTokenizer.from_pretrained(SHARED / "opt_tokenizer")
    return trained(request.param)


def in_front(tokenizer):
    """Special tokens that the tokenizer puts in front of a text."""
    return len(tokenizer("a")["input_ids"]) - len(tokenizer("a", add_special_tokens=False)["input_ids"])


TEXTS = [("SUBREDDIT: r/tea\n\nTITLE: t\n\nPOST: p\n\nTL;DR:", completion) for completion in (
    " Buy one.", " naïve ☕ tea", " 1,000 (one thousand) pots!", " I've got 2.", " a",
    " A sentence.\nAnd a line.",
    "  two spaces")]
TEXTS += [("Human: Hi\n\nAssistant:", " Hello, how are you?"), ("Why?", " So.")]


def test_prompt_and_completion_are_the_tokens_of_the_joined_text(tokenizer):
    """Detail 2, for every family; `</s>` or `<s>` in front stays where the tokenizer has one."""
    posts = load_examples("data/tldr_mini/actor_test.jsonl.gz", "x")[:200]
    texts = TEXTS + [(e.prompt, e.completion) for e in posts]
    prompts, completions = map(list, zip(*texts, strict=True))
    apart = zip(prompt_tokens(tokenizer, prompts, 10_000), completion_tokens(tokenizer, completions),
                strict=True)
    for (prompt, completion), text in zip(apart, texts, strict=True):
        assert prompt + completion == [*tokenizer("".join(text))["input_ids"], tokenizer.eos_token_id], text
        assert tokenizer.eos_token_id not in completion[:-1]


def dialogue(turns):
    return ("\n\n".join(f"Human: Question {n}, is it so?\n\nAssistant: Yes, {n} times."
                        for n in range(turns - 1)) + (
        "\n\nHuman: And the last one?\n\nAssistant:"))


def test_a_dialogue_keeps_the_last_turns_that_fit(tokenizer):
    """The oracle tries every number of last turns."""
    prompt = dialogue(8)
    turns = prompt.split("\n\nHuman: ")
    whole = ["Human: " + "\n\nHuman: ".join(turns[-count:]) for count in range(1, len(turns))] + [prompt]
    lengths = [len(tokenizer(text)["input_ids"]) for text in whole]
    seen = set()
    for limit in range(lengths[0], lengths[-1] + 2):
        [(ids, cut)] = cut_prompts(tokenizer, [prompt], limit)
        count = max(n for n, length in enumerate(lengths) if length <= limit)
        assert ids == tokenizer(whole[count])["input_ids"] and len(ids) <= limit
        assert cut == (WHOLE if count == len(whole) - 1 else CUT)
        seen.add(count)
    assert seen == set(range(len(whole)))


def test_a_last_turn_that_does_not_fit_keeps_its_end_and_is_counted(tokenizer):
    prompt = dialogue(3)
    ids = tokenizer(prompt)["input_ids"]
    special = in_front(tokenizer)
    [(found, cut)] = cut_prompts(tokenizer, [prompt], special + 5)
    assert cut == CUT_INSIDE and found == ids[:special] + ids[-5:]


def test_other_texts_with_turns_in_them_are_no_dialogues(tokenizer):
    prompt = "I wrote a play.\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nHow does it end?"
    ids, special = tokenizer(prompt)["input_ids"], in_front(tokenizer)
    [(found, cut)] = cut_prompts(tokenizer, [prompt], len(ids) - 1)
    assert cut == CUT_INSIDE and found == ids[:special] + ids[special + 1 :]


def test_a_post_is_cut_and_its_frame_is_not(tokenizer):
    post = "One line here.\n" * 20 + "The last."
    prompt = TLDR_TEMPLATE.format(subreddit="tea", title="t", post=post)
    [(ids, cut)] = cut_prompts(tokenizer, [prompt], 100)
    kept = max(n for n in range(21) if len(tokenizer(TLDR_TEMPLATE.format(
        subreddit="tea", title="t", post="\n".join(["One line here."] * n)))["input_ids"]) <= 100)
    expected = TLDR_TEMPLATE.format(subreddit="tea", title="t", post="\n".join(["One line here."] * kept))
    assert ids == tokenizer(expected)["input_ids"] and cut == CUT
    assert cut_prompts(tokenizer, [prompt], 8) == [([], TOO_LONG)]


def test_a_post_that_is_cut_inside_a_sentence_is_counted_so(tokenizer):
    """As a dialogue that is cut inside a turn; a line or a sentence that ends where the cut is, is whole."""
    for post, expected in (("A line of a few words here\n" * 30, CUT),
                           ("This is a sentence here. " * 30, CUT),
                           ("a few words more and " * 30, CUT_INSIDE)):
        [(ids, cut)] = cut_prompts(tokenizer, [TLDR_TEMPLATE.format(subreddit="tea", title="t", post=post)],
                                   90)
        assert cut == expected and 60 < len(ids) <= 90


def test_special_tokens_that_somebody_wrote_into_a_long_post_are_text(tokenizer):
    """Detail 4: also where a text is tokenised once more to be cut."""
    post = "They wrote </s> and <pad> here.\n" * 20
    [(ids, cut)] = cut_prompts(tokenizer, [TLDR_TEMPLATE.format(subreddit="tea", title="t", post=post)], 120)
    assert (cut == CUT and not {tokenizer.eos_token_id, tokenizer.pad_token_id}
            & set(ids[in_front(tokenizer):]))
    [(ids, cut)] = cut_prompts(tokenizer, [dialogue(3) + post + "\n\nHuman: </s> <pad>\n\nAssistant:"], 60)
    assert (cut == CUT and not {tokenizer.eos_token_id, tokenizer.pad_token_id}
            & set(ids[in_front(tokenizer):]))


LONG = ("He said: \"it's 1,000 pots\", naïve as ever.\nAnd then… ☕ tea, I've got 2 of them. " * 30
        + "一只猫。又一只猫，" * 40 + "x" * 500 + " end")


@pytest.mark.parametrize("piece", [40, 100, 333])
def test_a_long_text_has_the_tokens_of_the_whole(piece, tokenizer, monkeypatch):
    """It is tokenised in pieces, which are cut where no token goes on."""
    text = LONG.replace("x" * 500, "").replace("一只猫。又一只猫，", "")
    monkeypatch.setattr(module, "_PIECE", piece)
    [(ids, cut)] = cut_prompts(tokenizer, [text], 10_000)
    assert list(ids) == tokenizer(text)["input_ids"] and cut == WHOLE
    [completion] = completion_tokens(tokenizer, [f" {text}"])
    assert [*tokenizer("Why:")["input_ids"], *completion] == [*tokenizer(f"Why: {text}")["input_ids"],
                                                              tokenizer.eos_token_id]


@pytest.mark.parametrize("piece", [40, 100, 333])
def test_a_long_text_without_a_break_loses_nothing(piece, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "_PIECE", piece)
    [completion] = completion_tokens(tokenizer, [f" {LONG}"])
    whole = tokenizer(f"Why: {LONG}")["input_ids"]
    assert tokenizer.decode([*tokenizer("Why:")["input_ids"], *completion[:-1]]) == tokenizer.decode(whole)


LONG_PROMPTS = {
    "post": TLDR_TEMPLATE.format(subreddit="tea", title="t", post="One line here.\n" * 900),
    "post of a line": TLDR_TEMPLATE.format(subreddit="tea", title="t", post="a few words more and " * 900),
    "post of a word": TLDR_TEMPLATE.format(subreddit="tea", title="t", post="x" * 15_000),
    "dialogue": dialogue(400), "a last turn": f"{dialogue(3)[:-12]} {'word ' * 3000}\n\nAssistant:",
    "text": "a few words more and " * 900 + "the end",
}


@pytest.mark.parametrize("case", LONG_PROMPTS)
def test_a_very_long_prompt_is_cut_as_any_other(case, tokenizer, monkeypatch):
    """Of more than 256 characters for each token it may have, not all is tokenised."""
    prompt, limit = LONG_PROMPTS[case], 40
    found = cut_prompts(tokenizer, [prompt, "short"], limit)
    monkeypatch.setattr(module, "_LONGEST_TOKEN", 10**6)
    assert found == cut_prompts(tokenizer, [prompt, "short"], limit)
    assert len(prompt) > 256 * limit and found[0][1] != WHOLE and len(found[0][0]) > 10


TEN_MB = {"prompt": {"prompt": "the quick brown fox " * 500_000, "completion": "c"},
          "completion": {"prompt": "P", "completion": "the quick brown fox " * 500_000},
          "post": {"subreddit": "tea", "title": "t", "post": "a line\n" * 1_400_000, "summary": "s"},
          "a word": {"prompt": "x" * 10**7, "completion": "c"},
          "emoji": {"prompt": "🙂" * 2_500_000, "completion": "c"},
          "another column": {"prompt": "P", "completion": "c", "x": "the quick brown fox " * 500_000},
          "bad": {"text": "the quick brown fox " * 500_000}}


@pytest.mark.slow
@pytest.mark.parametrize("case", TEN_MB)
def test_a_row_of_ten_megabytes_takes_a_small_multiple_of_it(case, own_cache, tmp_path):
    """Tokenised at once it took 2.6 GiB."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [
        TEN_MB[case], *({"prompt": f"P{n}", "completion": "c"} for n in range(9))]))
    config = SimpleNamespace(on_bad_rows="skip", max_row_bytes=10**8, max_prompt_tokens=512,
                             max_dropped_share=1.0)
    growth = peak_growth(lambda: load_data(config, {"actor_training_data": NamedSet(str(path), "examples")},
                                           mini_tokenizer(), DataReport()))
    assert growth < 300  # MiB


def test_the_last_that_fits_is_found_from_any_guess():
    looked = []
    for size in range(9):
        ends = [3 * n for n in range(size)]
        for limit in range(-1, 3 * size + 1):
            for guess in (-99, *range(-1, 3 * size + 1), 1e9):
                found = _last_that_fits(ends, lambda end, limit=limit: looked.append(end) or end <= limit,
                                        guess)
                assert found == max((end for end in ends if end <= limit), default=None)
    looked.clear()
    assert (_last_that_fits(list(range(1000)), lambda end: looked.append(end) or end <= 500, 500) == 500
            and len(looked) == 2)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_table_holds_what_the_functions_say(tokenizer, own_cache, tmp_path):
    """In batches and from the disk, as for each text alone."""
    with gzip.open("data/tldr_mini/actor_train.jsonl.gz") as file:
        # a batch has 1,000 rows
        (tmp_path / "rows.jsonl").write_bytes(b"".join(itertools.islice(file, 1100)))
    stored = read_set(Source(str(tmp_path / "rows.jsonl")), "actor_training_data", "examples")
    table = token_rows(stored, tokenizer, 120)
    for index in (0, 7, 999, 1000, 1001, 1099):
        row, example = table[index], stored.row(index)
        [(ids, cut)] = cut_prompts(tokenizer, [example.prompt], 120)
        assert (row["prompt"], row["cut"]) == (ids, cut)
        assert [row["completion"]] == completion_tokens(tokenizer, [example.completion])
        assert (row["length"] == len(row["prompt"]) + len(row["completion"]) and row["longest"]
                == len(row["completion"]))
    assert (token_rows(stored, tokenizer, 119).cache_files != table.cache_files
            == token_rows(stored, tokenizer, 120).cache_files)


def test_tokenizers_that_differ_do_not_share_tokens(own_cache):
    mini, other = mini_tokenizer(), trained("gpt2")
    stored = read_set(Source("data/tldr_mini/actor_validation.jsonl.gz"), "actor_validation_data", "examples")
    for tokenizer in (mini, other):
        assert token_rows(stored, tokenizer, 512)[0]["prompt"] == tokenizer(stored.row(0).prompt)["input_ids"]
    assert tokenizer_key(mini) == tokenizer_key(mini_tokenizer()) != tokenizer_key(other)
    before = tokenizer_key(other)
    other.add_tokens(["teapot"])
    assert tokenizer_key(other) != before
    other.eos_token = "<s>"
    assert len({before, tokenizer_key(other), tokenizer_key(trained("gpt2"))}) == 2


def slow(folder, merges):
    """A tokenizer in Python: its vocabulary is the same whatever its merges are."""
    folder.mkdir()
    vocab = ["<unk>", "</s>", "a", "b", "c", "a@@", "b@@", "ab", "bc", "ab@@", "P"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    CTRLTokenizer(folder / "vocab.json", folder / "merges.txt", eos_token="</s>").save_pretrained(folder)
    return CTRLTokenizer.from_pretrained(folder)


def test_slow_tokenizers_that_differ_in_their_merges_do_not_share_tokens(own_cache, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "abc", "completion": "c"}))
    stored = read_set(Source(str(tmp_path / "rows.jsonl")), "actor_training_data", "examples")
    one, other, again = (slow(tmp_path / name, merges) for name, merges in (
        ("one", "a b\n"), ("other", "b c</w>\n"), ("again", "a b\n")))
    assert one.get_vocab() == other.get_vocab() and getattr(one, "backend_tokenizer", None) is None
    for tokenizer, tokens in ((one, ["ab@@", "c"]), (other, ["a@@", "bc"])):
        assert tokenizer.convert_ids_to_tokens(token_rows(stored, tokenizer, 32)[0]["prompt"]) == tokens
    assert tokenizer_key(one) == tokenizer_key(again) != tokenizer_key(other)


def test_cut_prompts_are_counted(own_cache, tmp_path):
    path = tmp_path / "a.jsonl"
    rows = ["Why?", dialogue(6), "word " * 99, TLDR_TEMPLATE.format(subreddit="a", title="b",
                                                                    post="c d e.\n" * 30)]
    path.write_text("".join(f'{{"prompt": {text!r}}}\n'.replace("'", '"') for text in rows))
    config = SimpleNamespace(on_bad_rows="error", max_row_bytes=10**6, max_dropped_share=1.0,
                             max_prompt_tokens=60)
    report = DataReport()
    found = load_data(config, {"data": NamedSet(str(path), "prompts")}, mini_tokenizer(), report)["data"]
    report.tokens("data", found.dataset())
    figures = report.figures["data"]
    assert (figures["rows"], figures["prompts_cut"], figures["prompts_cut_inside"]) == (4, 3, 1)
    assert figures["prompt_tokens"]["max"] <= 60 and "completion_tokens" not in figures
