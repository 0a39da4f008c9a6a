"""The loss on all answers of a conversation (`loss_on: turns`): the tokens and the losses that each answer
has in a row of its own.
"""

import json
from importlib.resources import files
from types import SimpleNamespace

import pytest
import torch
from test_chat import messages_of, tokenizer_of
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import train_sft
from utils.config import PROJECT, UserError, parse_config
from utils.data.report import DataReport
from utils.data.rows import NamedSet, load_data
from utils.data.turns import NO_LOSS, turn_group
from utils.models.loading import with_our_heads
from utils.models.outputs import response_logprobs

LONG = [("system", "Be short."), ("user", "Tea?"), ("assistant", "Green. Or black."),
        ("user", "Why?\n\nTell me."), ("assistant", "It is\n\ngood"), ("user", "3rd"),
        ("assistant", "<think>\nhm\n</think>\n\nFine.")]
PLAIN = [("user", "a"), ("assistant", "b  c"), ("user", "d\n\n\ne"), ("assistant", "f"),
         ("user", "g ünïcode"), ("assistant", "end")]
# In these a conversation is one sequence. Qwen3 strips earlier thoughts. The test's tokenizer joins two line
# breaks when nothing follows them, which Llama's does not.
WHOLE = ["qwen2_5", "qwen3_instruct_2507", "phi3", "cohere", "gemma", "gemma3"]
# what trl learns besides the answer and its end
BLANK = {"\n", "\n\n", ""}


def load(tokenizer, *conversations, max_prompt_tokens=10_000, rows=None, report=None):
    """The token table of conversations, each a list of (role, content)."""
    path = load.folder / f"{len(list(load.folder.iterdir()))}.jsonl"
    rows = [{"messages": messages_of(turns)} for turns in conversations] if rows is None else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SimpleNamespace(on_bad_rows="error", max_row_bytes=10**7, max_dropped_share=1.0,
                             max_prompt_tokens=max_prompt_tokens)
    named = {"actor_training_data": NamedSet(str(path), "examples", turns=True)}
    return load_data(config, named, tokenizer, report or DataReport())["actor_training_data"]


@pytest.fixture(autouse=True)
def folder(tmp_path):
    load.folder = tmp_path / "sets"
    load.folder.mkdir()


def plain_tokenizer():
    tokenizer = tokenizer_of("qwen2_5")
    tokenizer.chat_template = None
    return tokenizer


def prefixes(turns):
    """The conversation as far as each of its answers."""
    return [turns[:n] for n, (role, _) in enumerate(turns, start=1) if role == "assistant"]


def learnt(group):
    """What each place with a loss predicts, by the tokens before it: ((tokens), label)."""
    found = []
    for completion, labels in zip(group["completions"], group["labels"], strict=True):
        assert len(completion) == len(labels)
        found += [(tuple(group["prompt"] + completion[:n]), label) for n, label in enumerate(labels)
                  if label != NO_LOSS]
    return sorted(found)


def expected(tokenizer, turns, **keys):
    """The same for the last answer of each prefix, as the stage learns it without the key."""
    found = []
    for prefix in prefixes(turns):
        [row] = load(tokenizer, prefix, **keys).dataset()
        found += [(tuple(row["prompt"] + row["completion"][:n]), label)
                  for n, label in enumerate(row["completion"])]
    return sorted(found)


@pytest.mark.parametrize("family", [*WHOLE, "llama3", "qwen3", "lfm2", None])
def test_what_is_learnt_is_the_last_answer_of_each_prefix(family):
    """Each target beside all the tokens before it: nothing more, nothing twice."""
    tokenizer = tokenizer_of(family) if family else plain_tokenizer()
    turns = LONG[1:] if family in ("cohere", "gemma") else LONG
    for conversation in (turns, PLAIN):
        [row] = load(tokenizer, conversation).dataset()
        assert learnt(row["turns"]) == expected(tokenizer, conversation)
        assert row["answers"] == 3
        sizes = list(map(len, row["turns"]["completions"]))
        assert row["length"] == len(row["turns"]["prompt"]) + sum(sizes)
        assert row["positions"] == len(row["turns"]["prompt"]) + max(sizes)
        if family in WHOLE or family is None:
            assert len(sizes) == 1 and row["length"] == len(row["prompt"] + row["completion"])


@pytest.mark.parametrize("family", WHOLE)
def test_the_mask_is_that_of_trl(family):
    """Its training templates mark what the assistant writes, and the line break behind it."""
    tokenizer = tokenizer_of(family)
    for conversation in (LONG[1:], PLAIN):
        [row] = load(tokenizer, conversation).dataset()
        [completion], [labels] = row["turns"]["completions"], row["turns"]["labels"]
        ours = [0] * len(row["turns"]["prompt"]) + [int(label != NO_LOSS) for label in labels]
        template = (files("trl") / "chat_templates" / f"{family}_training.jinja").read_text(encoding="utf-8")
        theirs = tokenizer.apply_chat_template(messages_of(conversation), chat_template=template,
                                               return_dict=True, return_assistant_tokens_mask=True)
        ids, mask = theirs["input_ids"], theirs["assistant_masks"]
        assert ids[: len(ours)] == row["turns"]["prompt"] + completion
        more = [(token, tokenizer.decode([token])) for token, one, other in
                zip(ids, mask, ours + [0] * (len(ids) - len(ours)), strict=True) if one != other]
        assert all(text in BLANK or text == tokenizer.eos_token and family == "phi3" for _, text in more)
        assert sum(ours) and sum(mask) - len(more) == sum(ours)


def test_an_answer_that_is_not_to_be_learnt_is_context_alone():
    """OpenAI's weight 0."""
    tokenizer = tokenizer_of("qwen2_5")
    messages = messages_of(PLAIN)
    messages[1]["weight"] = 0
    [row] = load(tokenizer, rows=[{"messages": messages}]).dataset()
    [whole] = load(tokenizer, PLAIN).dataset()
    first = set(expected(tokenizer, PLAIN[:2]))
    assert row["answers"] == 2 and row["prompt"] == whole["prompt"]
    assert learnt(row["turns"]) == [one for one in learnt(whole["turns"]) if one not in first]
    messages[3]["weight"] = 0.5
    with pytest.raises(UserError, match=r"message 4 \(assistant\) has the weight '0.5'; 1 \(to be"):
        load(tokenizer, rows=[{"messages": messages}])


@pytest.mark.parametrize("template", [True, False])
def test_calls_of_tools_are_learnt_as_they_are_written(template):
    call = {"type": "function", "function": {"name": "kettle", "arguments": {"cups": 2}}}
    tokenizer = tokenizer_of("qwen2_5") if template else plain_tokenizer()
    messages = messages_of([("user", "Tea?"), ("assistant", ""), ("tool", "hot"), ("assistant", "Ready.")])
    messages[1]["tool_calls"] = [call]
    [row] = load(tokenizer, rows=[{"messages": messages}]).dataset()
    [labels] = row["turns"]["labels"]
    ends = [n for n, label in enumerate(labels, 1) if label == tokenizer.eos_token_id]
    first, second = (tokenizer.decode([label for label in part if label != NO_LOSS])
                     for part in (labels[: ends[0]], labels[ends[0]:]))
    assert row["answers"] == 2 and '"kettle"' in first and "cups" in first and "hot" not in first + second
    assert second.split("<|im_end|>")[0].strip() == "Ready."


@pytest.mark.parametrize("family", ["qwen2_5", None])
def test_of_a_conversation_that_is_too_long_the_turns_that_stay_are_learnt(family):
    """The first turns go; the system's stays in a template."""
    tokenizer = tokenizer_of(family) if family else plain_tokenizer()
    kept = ([LONG[0]] if family else []) + LONG[3:]
    [whole] = load(tokenizer, kept).dataset()
    size = len(whole["prompt"])
    [cut] = load(tokenizer, LONG, max_prompt_tokens=size).dataset()
    assert cut["turns"] == whole["turns"] and cut["answers"] == 2 and cut["cut"] == 1
    [last] = load(tokenizer, kept, max_prompt_tokens=size - 1).dataset()
    assert last["answers"] == 1 and last["turns"]["prompt"] == last["prompt"]
    assert last["turns"]["completions"] == [last["completion"]] == last["turns"]["labels"]
    if family is None:  # cut inside the last question
        [inside] = load(tokenizer, kept, max_prompt_tokens=8).dataset()
        assert inside["answers"] == 1 and len(inside["turns"]["prompt"]) == 8


def test_a_template_whose_beginning_depends_on_the_end_is_refused():
    tokenizer = tokenizer_of("qwen2_5")
    tokenizer.chat_template = ("{{ messages|length // 2 }}{% for m in messages %}<|im_start|>{{ m.content }}"
                               "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}")
    with pytest.raises(UserError, match="^chat_template: (the prompt is written|.* begins) otherwise"):
        load(tokenizer, PLAIN)


def test_turns_by_hand():
    """An answer that loses its thought (7) once the conversation goes on has a part of its own. The end token
    (2) of the plain layout is learnt where the text goes on with another one.
    """
    turns = [([3, 4], [7, 5, 2]), ([3, 4, 5, 9, 6], [8, 2])]
    assert turn_group(turns) == ([3, 4], [[5, 9, 6, 8, 2], [7, 5, 2]],
                                 [[NO_LOSS, NO_LOSS, NO_LOSS, 8, 2], [7, 5, 2]])
    assert turn_group([([3], [5, 2]), ([3, 5, 9, 6], [8, 2])]) == (
        [3], [[5, 9, 6, 8, 2]], [[5, 2, NO_LOSS, 8, 2]])
    with pytest.raises(UserError, match="begins otherwise once it goes on"):
        turn_group([([3], [5, 2]), ([4], [8, 2])])


# --------------------------------------------------------------------------------------------------- the loss


def model_of(tokenizer, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, intermediate_size=24,
                         num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    return with_our_heads(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()


def stock_loss(model, tokenizer, conversations):
    """Sum of -log p and the number of tokens: plain rows of the stock model, one for each prefix."""
    total, count = 0.0, 0
    for turns in conversations:
        for prefix in prefixes(turns):
            [row] = load(tokenizer, prefix).dataset()
            ids = torch.tensor([row["prompt"] + row["completion"]])
            labels = ids.clone()
            labels[0, : len(row["prompt"])] = -100
            total = total + model(input_ids=ids, labels=labels).loss * len(row["completion"])
            count += len(row["completion"])
    return total, count


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", None])
def test_losses_and_gradients_are_those_of_the_prefixes_in_rows_of_their_own(family):
    """Two conversations in a batch, of different lengths; the row is computed once."""
    tokenizer = tokenizer_of(family) if family else plain_tokenizer()
    tokenizer.pad_token = "<eos>"
    config = train_sft.SFTStageConfig(loss_on="turns")
    loop = SimpleNamespace(config=config, device="cpu", tokenizer=tokenizer)
    groups = train_sft.collate(list(load(tokenizer, LONG, PLAIN).dataset()), loop)
    ours, stock = model_of(tokenizer), model_of(tokenizer)
    logprobs = response_logprobs(ours, groups, temperature=1.0)
    loss, count = stock_loss(stock, tokenizer, [LONG, PLAIN])
    assert int(groups.response_mask.sum()) == count
    assert -logprobs.sum().item() == pytest.approx(loss.item(), rel=1e-5)
    (-logprobs.sum()).backward()
    loss.backward()
    for one, other in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- the script


def test_answers_and_tokens_are_counted():
    tokenizer, report = tokenizer_of("qwen3"), DataReport()
    rows = load(tokenizer, LONG, PLAIN[:2], report=report)
    report.turns("actor_training_data", rows)
    table = rows.dataset()
    labels = [label for row in table for part in row["turns"]["labels"] for label in part]
    figures = report.figures["actor_training_data"]["turns"]
    tokens = sum(table["length"])
    count = len(labels) - labels.count(NO_LOSS)
    assert figures == {"answers": 4, "tokens": tokens, "tokens_learnt": count, "in_parts": 1}
    assert report.notes[-1].startswith(f"actor_training_data: loss on 4 answers of 2 rows, {count} of their "
                                       f"{tokens} tokens; 1 conversations")
    with pytest.raises(UserError, match="^loss_on: 'turns' has no effect, since no row of actor_training"):
        report.turns("actor_training_data", rows.select([1]))


TEMPLATE = ("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}")


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_the_script_takes_one_mean_over_all_answers(template, tmp_path):
    """Its first step, on both conversations in two passes; the oracle reads a row for each answer."""
    rows = {"training": [LONG, PLAIN], "validation": [LONG[1:5]], "test": [PLAIN[2:]]}
    words = []
    for name, conversations in rows.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"messages": messages_of(turns)}) + "\n"
                                for turns in conversations))
        words += [f"--actor_{name}_data", str(path)]
    if template:
        (tmp_path / "chat.jinja").write_text(template)
        words += ["--chat_template", str(tmp_path / "chat.jinja")]
    words += ("--model assets/opt-mini --loss_on turns --max_steps 1 --per_device_batch_size 1 "
              "--logging_steps 1 --gradient_accumulation_steps 2 --max_new_tokens 2 --report_to none "
              "--output_dir").split()
    train_sft.main(parse_config(train_sft.SFTStageConfig, None, [*words, str(tmp_path / "run")]))
    [logged] = [row["sft/loss"] for row in map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())
                if "sft/loss" in row]
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "assets" / "opt-mini")
    tokenizer.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(PROJECT / "assets" / "opt-mini")
    loss, count = stock_loss(model, tokenizer, rows["training"])
    assert logged == pytest.approx(loss.item() / count, rel=1e-5)
    figures = json.loads((tmp_path / "run" / "data.json").read_text())["actor_training_data"]
    assert (figures["turns"]["answers"], figures["turns"]["tokens_learnt"]) == (6, count)
