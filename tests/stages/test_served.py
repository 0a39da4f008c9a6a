"""A trained policy answers in vLLM as in transformers and in chat.py. In an environment of its own:

    python3 -m venv .venv-vllm
    .venv-vllm/bin/python -m pip install -r requirements-vllm.txt    # more in that file
    .venv/bin/python -m pytest tests/stages/test_served.py           # or VLLM_PYTHON=another/bin/python
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import chat
import train_sft
from chat_models import CONFIGS, TEMPLATE, messages_of, save_chat_model, write_rows
from utils.config import PROJECT, parse_config
from utils.data.rows import load_examples
from vllm_environment import NEEDS_VLLM, run

pytestmark = NEEDS_VLLM
SHORT = ("--logging_steps 1 --eval_steps 100 --save_steps 100 --eval_rows 4 --test_rows 4 "
         "--per_device_batch_size 8 --warmup_steps 0")
COUNT, LONGEST = 8, 24
MORE_ROWS = {"qwen2": 61}  # behind the last word
CONVERSATIONS = [messages_of(number) for number in range(50, 50 + COUNT)]


def trained(folder: Path, words: str) -> Path:
    """`final/` of the real stage."""
    words = f"{SHORT} --max_new_tokens {LONGEST} --output_dir {folder} {words}".split()
    train_sft.main(parse_config(train_sft.SFTStageConfig, PROJECT / "configs/tldr_mini/sft.yaml", words))
    return folder / "final"


def let_some_answers_end(folder: Path) -> None:
    """`<|endoftext|>` becomes a word of some of the model's answers, and generation_config.json ends them."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, size = TEMPLATE, len(tokenizer)
    prompts = [ids_of(tokenizer, ask) for ask in CONVERSATIONS]
    answers = [set(stock(model, prompt, suppress_tokens=list(range(size, model.config.vocab_size)) or None))
               - set(sum(prompts, [])) for prompt in prompts]
    counts = {word: sum(word in answer for answer in answers) for word in sorted(set().union(*answers))}
    said = min(counts, key=lambda word: abs(counts[word] - COUNT // 2))
    swapped = [said, tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    with torch.no_grad():
        for weight in {layer.weight for layer in (model.get_output_embeddings(),
                                                  model.get_input_embeddings())}:
            weight[swapped] = weight[swapped[::-1]]
    model.generation_config.eos_token_id = swapped[1:]
    model.save_pretrained(folder)


def ids_of(tokenizer, ask: str | list[dict]) -> list[int]:
    """Token ids of a post, or of a conversation in the model's own template."""
    if isinstance(ask, str):
        return tokenizer(ask)["input_ids"]
    return tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_dict=True)["input_ids"]


def stock(model, prompt: list[int], **more) -> list[int]:
    """The likeliest answer by transformers, its end included."""
    row = torch.tensor([prompt])
    found = model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=LONGEST,
                           **more)
    return found[0, len(prompt):].tolist()


@pytest.fixture(scope="module")
def finals(tmp_path_factory):
    """`final/` of the mini model on posts, and of three stock families in a chat template."""
    folder, found = tmp_path_factory.mktemp("served"), {}
    rows = [{"messages": messages_of(number, f"They are {number} good dogs.")} for number in range(40)]
    data = write_rows(folder / "rows.jsonl", rows)
    for family in CONFIGS:
        base = save_chat_model(folder / family, family, more_rows=MORE_ROWS.get(family, 0))
        let_some_answers_end(base)
        found[family] = trained(folder / f"{family}-sft", (
            f"--model {base} --chat_template {base}/template.jinja --actor_training_data {data} "
            "--max_steps 1 --learning_rate 1e-5"))
    found["opt"] = trained(folder / "opt-sft", "--max_steps 12")
    return found


@pytest.fixture(scope="module")
def asked():
    """What each model is asked: posts, or conversations."""
    posts = load_examples(str(PROJECT / "data/tldr_mini/actor_test.jsonl.gz"), "actor_test_data")[:COUNT]
    return {"opt": [post.prompt for post in posts], **dict.fromkeys(CONFIGS, CONVERSATIONS)}


@pytest.fixture(scope="module")
def served(finals, asked, tmp_path_factory):
    """vLLM's likeliest answers. It does not read `suppress_tokens`, so these ids are given as a bias."""
    folder, jobs = tmp_path_factory.mktemp("vllm"), []
    for name, final in finals.items():
        unused = json.loads((final / "generation_config.json").read_text()).get("suppress_tokens") or []
        jobs.append({"model": str(final), "prompts": asked[name], "sampling": {
            "temperature": 0, "max_tokens": LONGEST, "logit_bias": dict.fromkeys(map(str, unused), -100.0)}})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run("tests/helpers/vllm_answers.py", f"{folder}/jobs.json", f"{folder}/answers.json")
    return dict(zip(finals, json.loads((folder / "answers.json").read_text()), strict=True))


@pytest.mark.parametrize("name", ["opt", *CONFIGS])
def test_vllm_answers_as_transformers_and_chat(name, finals, asked, served, tmp_path, monkeypatch):
    final = finals[name]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    texts = [ask if isinstance(ask, str) else ask[-1]["content"] for ask in asked[name]]
    write_rows(tmp_path / "asked.jsonl", [{"prompt": text} for text in texts])
    chat.main(parse_config(chat.ChatConfig, None, (
        f"--model {final} --temperature 0 --max_new_tokens {LONGEST} --prompts {tmp_path}/asked.jsonl "
        f"--output {tmp_path}/said.jsonl").split()))
    said = [json.loads(line)["answers"][str(final)][0]["text"]
            for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    for ask, answer, text in zip(asked[name], served[name], said, strict=True):
        ids = ids_of(tokenizer, ask)
        assert answer["prompt"] == ids
        assert answer["tokens"] == stock(model, ids)
        assert answer["ended"] == (answer["tokens"][-1] in ends)
        # vLLM leaves out a character whose last bytes did not come
        assert answer["text"].strip().rstrip("\ufffd") == text.rstrip("\ufffd")
        assert max(answer["tokens"]) < len(tokenizer)
    ended = [answer["ended"] for answer in served[name]]
    assert any(ended) and not all(ended)
    assert len(ends) == (1 if name == "opt" else 2)
