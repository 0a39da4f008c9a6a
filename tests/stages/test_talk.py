"""chat.py on tiny models: a conversation, one prompt, a file of prompts, several models side by side."""

import io
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat
from chat_models import TEMPLATE, save_chat_model, write_rows
from tiny_models import mini_tokenizer, save_opt
from utils.config import PROJECT, UserError, parse_config
from utils.data.layouts import TLDR_TEMPLATE
from utils.models.outputs import scores
from utils.models.parents import Parent
from utils.models.prompt_groups import pack
from utils.models.talk import Scorer, Talker, as_post, share_layout, short_names

POST = "My balcony faces north. What grows there?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two policies and a reward model; answers end soon."""
    folder = tmp_path_factory.mktemp("chat")
    for name, seed in (("first", 0), ("second", 1)):
        save_opt(folder / name, eos_logit=4.0, seed=seed)
        (folder / name / "stage.json").write_text(json.dumps({"stage": "sft", "prompt_layout": "tldr",
                                                              "max_new_tokens": 12}))
    save_opt(folder / "reward", "reward", head_scale=20.0)
    (folder / "reward" / "stage.json").write_text('{"stage": "reward"}')
    return folder


def run(words, monkeypatch, capsys, typed=""):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    chat.main(parse_config(chat.ChatConfig, None, words.split()))
    return capsys.readouterr().out


def test_a_post_is_put_into_the_layout_that_the_model_was_trained_on(folder):
    talker = Talker(Parent("model", str(folder / "first")))
    ids = talker.prompt([{"role": "user", "content": POST}], 12)
    prompt = talker.tokenizer.decode(ids, skip_special_tokens=True)
    assert prompt == TLDR_TEMPLATE.format(subreddit="AskReddit", title=POST, post=POST)
    titled = as_post(f"North\n{POST}")
    assert titled == TLDR_TEMPLATE.format(subreddit="AskReddit", title="North", post=POST)
    assert as_post(titled) == titled  # what has the layout keeps it
    long = as_post("word " * 100)
    assert long.split("\n\n")[1] == f"TITLE: {('word ' * 100)[:60].strip()}"


def test_the_likeliest_answer_is_the_stock_models(folder, monkeypatch, capsys):
    out = run(f"--model {folder}/first --temperature 0 --prompt -", monkeypatch, capsys, POST)
    tokenizer, stock = mini_tokenizer(), AutoModelForCausalLM.from_pretrained(folder / "first")
    ids = tokenizer(as_post(POST), return_tensors="pt")
    row = stock.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1]:]
    assert out == tokenizer.decode(row, skip_special_tokens=True).strip() + "\n"


@torch.no_grad()
def test_scores_are_the_reward_models_and_an_answer_without_end_has_none(folder):
    talker = Talker(Parent("model", str(folder / "first")))
    scorer = Scorer(Parent("reward_model", str(folder / "reward")))
    prompt = talker.prompt([{"role": "user", "content": POST}], 12)
    torch.manual_seed(0)
    answers = scorer.scored(prompt, talker.answers(prompt, 16, 12, 1.0))
    ended = [answer for answer in answers if answer.tokens[-1] == talker.tokenizer.eos_token_id]
    assert 0 < len(ended) < 16
    assert all((answer.score is not None) == (answer in ended) for answer in answers)
    found = scores(scorer.model, pack([prompt], [[answer.tokens for answer in ended]], 1)).tolist()
    assert [answer.score for answer in ended] == pytest.approx(found, abs=1e-5)


def test_models_stand_side_by_side_with_their_scores(folder, monkeypatch, capsys):
    words = (f"--compare {folder}/first {folder}/second --reward_model {folder}/reward --k 2 --temperature 1 "
             f"--prompt {'Balcony'}")
    out = run(words, monkeypatch, capsys)
    assert out.count("(score ") + out.count("(did not end") == 4


def test_who_types_more_than_the_model_can_read_is_told(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a cat. " * 30_000))
    chat.main(parse_config(chat.ChatConfig, None, f"--model {folder}/first --prompt -".split()))
    said = capsys.readouterr()
    assert said.err.count("note: ") == 1 == said.out.count("\n")
    assert not Talker(Parent("model", str(folder / "first"))).shortens(POST, 12)


def test_a_base_model_gets_the_prompt_of_the_trained_one_beside_it(folder, tmp_path):
    save_opt(tmp_path / "base")
    talkers = [Talker(Parent("compare", str(path))) for path in (tmp_path / "base", folder / "first")]
    asked = [{"role": "user", "content": POST}]
    alone, trained = (talker.prompt(asked, 12) for talker in talkers)
    share_layout(talkers)
    assert talkers[0].prompt(asked, 12) == trained == talkers[1].prompt(asked, 12) != alone
    assert talkers[0].max_new_tokens == 12


def test_a_conversation_obeys_its_commands(folder, monkeypatch, capsys):
    typed = ('/help\nHello\n/k 2\n/temperature 0.5\nAgain\n"""\ntwo\nlines\n"""\n/new\n/nothing\n/k 0\n\n'
             '/quit\nnever\n')
    asked = []
    ask = chat.Chat.ask
    monkeypatch.setattr(chat.Chat, "ask", lambda self, text, streams=False: asked.append(
        (text, len(self.turns), self.k, self.temperature)) or ask(self, text, streams))
    out = run(f"--model {folder}/first", monkeypatch, capsys, typed)
    assert asked == [("Hello", 0, 1, None), ("Again", 2, 2, 0.5), ("two\nlines", 4, 2, 0.5)]
    assert out.count("error: no command") == 1 and out.count("error: /k: a whole number") == 1
    assert "/system TEXT" in out and max(map(len, out.splitlines()[4:12])) <= 80


def test_a_conversation_outlives_its_mistakes(folder, monkeypatch, capsys):
    typed = ("/k 2\n/temperature 0\nHello\n/k 1\n/temperature 0\n/k 2\n/temperature x\n/system Be kind\n"
             "b\udcffd\nAgain\n")
    asked = []
    monkeypatch.setattr(chat, "show", lambda names, found, scored: asked.append(len(found[0])))
    out = run(f"--model {folder}/first", monkeypatch, capsys, typed)
    assert asked == [2]  # the second one streams
    words = ["error: /temperature: at temperature 0 all", "answers to each prompt: 1", "temperature: 0\n",
             "error: /k: at temperature 0 all", "error: /temperature: a number", "error: /system: this model",
             "error: prompt: this is not text in UTF-8"]
    places = [out.index(word) for word in words]
    assert places == sorted(places) and out.rstrip().endswith(">") and len(out[places[-1]:].splitlines()) > 2


def test_the_scores_of_one_prompt_stand_beside_the_pipe(folder, monkeypatch, capsys):
    words = f"--model {folder}/first --reward_model {folder}/reward --temperature 1 --k 3 --prompt -"
    monkeypatch.setattr(sys, "stdin", io.StringIO(POST))
    chat.main(parse_config(chat.ChatConfig, None, words.split()))
    said = capsys.readouterr()
    assert said.out.count("\n") == 3 == len(re.findall(r"^\((?:score -?\d|did not end)", said.err, re.M))
    assert "score" not in said.out


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # of a UTF-8 and of a C locale
def test_bytes_that_are_no_text_are_refused(errors, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8", errors))
    with pytest.raises(UserError, match="^prompt: this is not text in UTF-8$"):
        chat.main(parse_config(chat.ChatConfig, None, f"--model {folder}/first --prompt -".split()))


def test_conversations_of_a_file_get_the_models_template(tmp_path, monkeypatch, capsys):
    model = save_chat_model(tmp_path / "model", "llama")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
             {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "My cat?"}]
    write_rows(tmp_path / "rows.jsonl", [{"prompt": turns}, {"prompt": "A dog"}])
    run(f"--model {model} --chat_template {model}/template.jinja --prompts {tmp_path}/rows.jsonl "
        f"--output {tmp_path}/answers.jsonl --temperature 0 --max_new_tokens 12", monkeypatch, capsys)
    tokenizer, stock = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    for line, asked in zip(lines, (turns, [{"role": "user", "content": "A dog"}]), strict=True):
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt",
                                            return_dict=True)["input_ids"]
        row = stock.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1]:]
        [answer] = json.loads(line)["answers"][str(model)]
        assert answer["text"] == tokenizer.decode(row, skip_special_tokens=True).strip()


def test_models_have_short_names_that_differ():
    assert short_names(["outputs/mine/ppo/final", "../outputs/mine/sft/final", "facebook/opt-125m", "x"]) == [
        "mine/ppo", "mine/sft", "facebook/opt-125m", "x"]
    alike = ["a/mine/ppo/final", "b/mine/ppo/final"]
    assert short_names([*alike, "mine/sft"]) == [*alike, "mine/sft"]


def test_a_file_of_prompts_is_answered(folder, tmp_path, monkeypatch, capsys):
    posts = [json.dumps({"prompt": f"{POST} {number}"}) for number in range(3)]
    (tmp_path / "posts.jsonl").write_text("\n".join(posts))
    words = f"--model {folder}/first --prompts {tmp_path}/posts.jsonl --output {tmp_path}/answers.jsonl --k 2"
    run(words, monkeypatch, capsys)
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [f"{POST} {i}" for i in range(3)]
    assert all(len(row["answers"][f"{folder}/first"]) == 2 for row in rows)
    with pytest.raises(UserError, match="^output: .* is there already"):
        run(words, monkeypatch, capsys)


@pytest.mark.parametrize(("words", "message"), [
    ("--model {0}/reward --prompt x", "model: .* is a reward model, which writes nothing"),
    ("--model {0}/first --reward_model {0}/second --prompt x", "reward_model: .* is no reward model"),
    ("--model {0}/first --prompt -", "prompt: is empty"),
    ("--model {0}/first --max_new_tokens 384 --prompt x", "max_new_tokens: 384 tokens leave no room"),
    ("--model {0}/first --compare {0}/second --prompt x", ".*model: stands beside compare"),
    ("--model {0}/first --prompts x", ".*output: --prompts and --output go together"),
    ("--model {0}/first --prompts none.jsonl --output {0}/a.jsonl", "prompts: 'none.jsonl'"),
    ("--model {0}/first --k 2 --temperature 0 --prompt x", ".*k: at temperature 0 all answers"),
    ("--model {0}/first --prompts none.jsonl --output {0}/no/a.jsonl", "output: .* must be a .jsonl file"),
])
def test_a_mistake_is_one_line(words, message, folder, monkeypatch, capsys):
    with pytest.raises(UserError, match=f"^{message}") as caught:
        run(words.format(folder), monkeypatch, capsys)
    assert "\n" not in str(caught.value)


def test_without_a_trained_model_the_way_to_one_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chat, "DEMO", tmp_path)
    with pytest.raises(UserError, match="^model: no trained model in .*; run 'make demo'"):
        run("--prompt x", monkeypatch, capsys)


@pytest.mark.slow
def test_a_pipe_gets_the_answer_and_nothing_else(folder):
    done = subprocess.run([sys.executable, PROJECT / "scripts" / "chat.py", "--model", folder / "first",
                           "--temperature", "0", "--prompt", "-"], input=POST, capture_output=True, text=True,
                          check=True)
    assert len(done.stdout.splitlines()) == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_post_that_is_pasted_into_a_terminal_is_one_message(folder):
    """The terminal marks what is pasted; so line breaks in it do not send it."""
    typed = b"\x1b[200~My cat sleeps.\n\nMy dog does not.\x1b[201~\r/quit\r"
    ours, theirs = pty.openpty()
    command = [sys.executable, PROJECT / "scripts" / "chat.py", "--model", folder / "first",
               "--reward_model", folder / "reward"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                          env={**os.environ, "TERM": "xterm"}) as process:
        os.close(theirs)
        seen = b""
        while not seen.rstrip().endswith(b">"):
            seen += os.read(ours, 65536)
        asked_for_marks, seen = b"\x1b[?2004h" in seen, b""
        os.write(ours, typed)
        with suppress(OSError):  # the other end is closed
            while part := os.read(ours, 65536):
                seen += part
    os.close(ours)
    assert asked_for_marks and process.returncode == 0
    assert len(re.findall(rb"\((?:score -?\d|did not end)", seen)) == 1
