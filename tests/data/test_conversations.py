"""Conversations in the formats that people have: how each is read, with a chat template and without, and what
is refused.
"""

import json

import pytest
from test_chat import tokenizer_of

from utils.config import UserError
from utils.data.conversations import conversation_in, messages_of, readable, stored_conversation
from utils.data.report import DataReport
from utils.data.rows import NamedSet, load_data, load_examples, load_rankings
from utils.data.sources import parse_sources

USER, ANSWER = {"role": "user", "content": "Tea?"}, {"role": "assistant", "content": "Yes."}
OTHER = {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be short."}
HUMAN, GPT, GPT2 = ({"from": role, "value": text} for role, text in
                    (("human", "Tea?"), ("gpt", "Yes."), ("gpt", "No.")))
CALL = {"type": "function", "function": {"name": "kettle", "arguments": {"cups": 2}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
PLAIN = "Human: Tea?\n\nAssistant:"


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


EXAMPLES = {
    "messages": ({"messages": [USER, ANSWER]}, PLAIN),
    "messages with a system turn": ({"messages": [SYSTEM, USER, ANSWER]}, f"System: Be short.\n\n{PLAIN}"),
    "ShareGPT": ({"conversations": [HUMAN, GPT]}, PLAIN),
    "ShareGPT with system": ({"conversations": [HUMAN, GPT], "system": "Be short."},
                             f"System: Be short.\n\n{PLAIN}"),
    "Alpaca": ({"instruction": "Tea?", "input": "", "output": "Yes."}, PLAIN),
    "Alpaca with input": ({"instruction": "Tea?", "input": "Green.", "output": "Yes."},
                          "Human: Tea?\nGreen.\n\nAssistant:"),
    "Alpaca with system and history": (
        {"instruction": "Tea?", "input": "", "output": "Yes.", "system": "Be short.",
         "history": [["Hi", "Hello"]]},
        f"System: Be short.\n\nHuman: Hi\n\nAssistant: Hello\n\n{PLAIN}"),
    "trl, prompt and completion": ({"prompt": [USER], "completion": [ANSWER]}, PLAIN),
    "prompt in the layout of hh-rlhf": ({"prompt": PLAIN, "completion": "Yes."}, PLAIN),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_is_read_as_its_author_means_it(name, tmp_path):
    row, prompt = EXAMPLES[name]
    [found] = load_examples(write(tmp_path, row), "actor_training_data")
    assert (found.prompt, found.completion) == (prompt, " Yes.")
    [asked] = load_examples(write(tmp_path, row), "rlhf_training_data", need_completion=False)
    assert asked.prompt == prompt


PAIRS = {
    "trl, explicit prompt": {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
    "trl, implicit prompt": {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
    "ultrafeedback_binarized": {"prompt": "Tea?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER],
                                "messages": [USER, ANSWER], "score_chosen": 8.0, "score_rejected": 3.0},
    "ShareGPT": {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT2},
    "UltraFeedback": {"instruction": "Tea?", "source": "x", "completions": [
        {"response": "No.", "overall_score": 3.5, "model": "a"}, {"response": "Yes.", "overall_score": 8}]},
    "responses and scores": {"prompt": "Tea?", "responses": ["No.", "Yes."], "scores": [1, 2]},
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_comparison_is_read_as_its_author_means_it(name, tmp_path):
    [found] = load_rankings(write(tmp_path, PAIRS[name]), "reward_training_data", 9, print)
    [(better, worse)] = found.pairs
    assert (found.prompt, found.completions[better], found.completions[worse]) == (PLAIN, " Yes.", " No.")
    [asked] = load_examples(write(tmp_path, PAIRS[name]), "rlhf_training_data", need_completion=False)
    assert asked.prompt == PLAIN


def test_ratings_of_k_answers_are_a_ranking_with_ties(tmp_path):
    answers = [{"response": text, "overall_score": score} for text, score in
               (("a", 3), ("b", 5), ("c", 3), ("d", 4.5))]
    [found] = load_rankings(write(tmp_path, {"instruction": "Q", "completions": answers}),
                            "reward_training_data", 9, print)
    better = {(found.completions[i].strip(), found.completions[j].strip()) for i, j in found.pairs}
    assert better == {("b", "d"), ("b", "a"), ("b", "c"), ("d", "a"), ("d", "c")}


def test_rated_answers_in_rows_of_their_own_are_compared_within_their_prompt(tmp_path):
    rated = (("Q", "a", 3), ("Q", "b", 4), ("Q", "c", 3), ("R", "d", 1), ("R", "e", 0), ("S", "f", 4))
    rows = [{"prompt": prompt, "response": text, "helpfulness": score, "verbosity": 1}
            for prompt, text, score in rated]
    lines = []
    found = load_rankings(write(tmp_path, *rows), "reward_training_data", 9, lines.append)
    pairs = {(row.completions[i].strip(), row.completions[j].strip()) for row in found for i, j in row.pairs}
    assert pairs == {("b", "a"), ("b", "c"), ("d", "e")}
    assert any("no other answer to the same prompt" in line for line in lines)


def test_rows_in_sharegpt_and_openai_spelling_are_the_same_conversation(tmp_path):
    call = {"from": "function_call", "value": json.dumps(CALL["function"])}
    ours = [USER, CALLED, {"role": "tool", "content": "hot"}, ANSWER]
    theirs = [HUMAN, call, {"from": "observation", "value": "hot"}, GPT]
    tools = [{"name": "kettle"}]
    rows = {"messages": ours, "tools": tools}, {"conversations": theirs, "tools": json.dumps(tools)}
    found = load_examples(write(tmp_path, *rows), "actor_training_data")
    assert found[0].prompt == found[1].prompt
    assert '"kettle"' in found[0].prompt and "Tool: hot" in found[0].prompt


# ---------------------------------------------------------------------------------------- through a template


def tokens(rows, kind, tokenizer, folder, field="actor_training_data"):
    from types import SimpleNamespace

    config = SimpleNamespace(on_bad_rows="error", max_prompt_tokens=400, max_row_bytes=10**6,
                             max_dropped_share=1.0)
    limits = {"max_completions": 9, "min_score_ratio": 1.0, "max_pairs_per_prompt": None}
    loaded = load_data(config, {field: NamedSet(write(folder, *rows), kind)}, tokenizer, DataReport(), limits)
    return loaded[field].dataset()


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_conversation_goes_through_the_template(name, tmp_path):
    tokenizer = tokenizer_of("qwen2_5")
    row, prompt = EXAMPLES[name]
    [found] = tokens([row], "examples", tokenizer, tmp_path)
    messages = conversation_in(prompt)
    assert tokenizer.decode(found["prompt"]) == tokenizer.apply_chat_template(messages, tokenize=False,
                                                                              add_generation_prompt=True)
    assert tokenizer.decode(found["completion"]) == "Yes.<|im_end|>"


def test_answers_of_a_ranking_end_with_the_turn_and_plain_prompts_stay_plain(tmp_path):
    tokenizer = tokenizer_of("gemma")
    tokenizer.eos_token = "<end_of_turn>"  # as a parent's tokenizer has it
    [found] = tokens([PAIRS["UltraFeedback"]], "rankings", tokenizer, tmp_path, "reward_training_data")
    answers = {tokenizer.decode(ids) for ids in found["completions"]}
    assert answers == {"Yes.<end_of_turn>", "No.<end_of_turn>"}
    assert tokenizer.decode(found["prompt"]).endswith("<start_of_turn>model\n")
    [plain] = tokens([{"prompt": "Tea?", "completion": "Yes."}], "examples", tokenizer, tmp_path)
    assert tokenizer.decode(plain["prompt"] + plain["completion"]) == "Tea? Yes.<end_of_turn>"


def test_a_template_without_tools_gets_them_as_text(tmp_path):
    tokenizer = tokenizer_of("gemma")
    tokenizer.chat_template = ("{% for m in messages %}<start_of_turn>{{ m.role }} {{ m.content }}"
                               "<end_of_turn>{% endfor %}{% if add_generation_prompt %}"
                               "<start_of_turn>assistant {% endif %}")
    row = {"messages": [USER, CALLED, {"role": "tool", "content": "hot"}, ANSWER],
           "tools": [{"name": "kettle"}]}
    [found] = tokens([row], "examples", tokenizer, tmp_path)
    text = tokenizer.decode(found["prompt"])
    assert text.startswith('<start_of_turn>system [{"name": "kettle"}]<end_of_turn>')
    assert json.dumps(CALL["function"]) in text and "<start_of_turn>tool hot<end_of_turn>" in text


# ------------------------------------------------------------------------------------ columns and wanted rows


def source(folder, rows, **more):
    return parse_sources({"name": write(folder, *rows), **more})


def test_columns_that_are_called_otherwise_are_mapped(tmp_path):
    rows = [{"question": "Q", "answer": "A", "id": 1}]
    columns = {"prompt": "question", "completion": "answer"}
    [found] = load_examples(source(tmp_path, rows, columns=columns), "actor_training_data")
    assert (found.prompt, found.completion) == ("Q", " A")
    swapped = [{"chosen": "worse", "rejected": "better", "prompt": "Q"}]
    [pair] = load_rankings(source(tmp_path, swapped, columns={"chosen": "rejected", "rejected": "chosen"}),
                           "reward_training_data", 9, print)
    [(better, _)] = pair.pairs
    assert pair.completions[better] == " better"


def test_wanted_answers_are_examples_when_they_are_asked_for(tmp_path):
    rows = [{"messages": [USER, {"role": "assistant", "content": text}], "label": label}
            for text, label in (("a", True), ("b", False), ("c", "true"))]
    found = load_examples(source(tmp_path, rows, only_wanted=True), "actor_training_data")
    assert [row.completion for row in found] == [" a", " c"]
    with pytest.raises(UserError, match="says whether it is wanted"):
        load_examples(source(tmp_path, rows), "actor_training_data")


@pytest.mark.parametrize(("value", "message"), [
    ({"columns": {}}, "no mapping of names"), ({"columns": "prompt"}, "no mapping of names"),
    ({"columns": {"prompt": 1}}, "no mapping of names"), ({"only_wanted": "yes"}, "true or false is needed"),
])
def test_a_broken_mapping_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        parse_sources({"name": "a.jsonl", **value})


@pytest.mark.parametrize(("row", "more", "message"), [
    ({"q": "Q", "completion": "A"}, {"columns": {"prompt": "question"}}, "column 'question' is missing"),
    ({"q": "Q", "prompt": "P", "completion": "A"}, {"columns": {"prompt": "q"}}, "has a column 'prompt'"),
    ({"prompt": "Q", "completion": "A"}, {"only_wanted": True}, "column 'label' is 'None'"),
    ({"prompt": "Q", "completion": "A", "label": 0.5}, {"only_wanted": True}, "column 'label' is '0.5'"),
])
def test_a_row_that_does_not_fit_the_mapping_is_named(row, more, message, tmp_path):
    with pytest.raises(UserError, match=f"rows.jsonl:1: {message}"):
        load_examples(source(tmp_path, [row], **more), "actor_training_data")


# --------------------------------------------------------------------------------------- broken conversations


def turns(*roles):
    return [{"role": role, "content": f"{role} says"} for role in roles]


BROKEN = {
    "no question": (turns("assistant"), "must hold a question"),
    "an answer first": (turns("assistant", "user", "assistant"), r"message 1 \(assistant\) answers before"),
    "an answer after the system": (turns("system", "assistant", "user", "assistant"),
                                   r"message 2 \(assistant\) answers before"),
    "two questions": (turns("user", "user", "assistant"), r"message 2 \(user\) follows another one"),
    "two answers": (turns("user", "assistant", "assistant"), "must hold a question"),
    "two answers earlier": (turns("user", "assistant", "assistant", "user", "assistant"),
                            r"message 3 \(assistant\) follows another one"),
    "a late system turn": (turns("user", "system", "assistant"),
                           r"message 2 \(system\) stands behind"),
    "two system turns": (turns("system", "system", "user", "assistant"),
                         r"message 2 \(system\) stands behind"),
    "no answer": (turns("user"), "must hold a question"),
    "the system alone": (turns("system"), "must hold a question"),
    "ends with a tool": ([USER, CALLED, {"role": "tool", "content": "hot"}], "must hold a question"),
    "a tool without a call": ([USER, {"role": "tool", "content": "hot"}, ANSWER],
                              r"message 2 \(tool\) is the result of a tool that nobody has called"),
    "a tool first": ([{"role": "tool", "content": "hot"}, USER, ANSWER], r"message 1 \(tool\) is the result"),
    "a tool after an answer": ([USER, ANSWER, {"role": "tool", "content": "hot"}, ANSWER],
                               r"message 3 \(tool\) is the result"),
    "a call without a result": ([USER, CALLED, USER, ANSWER], r"message 3 \(user\) follows the call"),
    "an answer that is a call": ([USER, CALLED], r"message 2 \(assistant\) calls a tool"),
    "a call of the user": ([{**USER, "tool_calls": [CALL]}, ANSWER], r"message 1 \(user\) has 'tool_calls'"),
    "a call without a name": ([USER, {**CALLED, "tool_calls": [{"function": {}}]}, USER, ANSWER],
                              "without the name of a function"),
    "calls that are text": ([USER, {**CALLED, "tool_calls": "kettle"}, USER, ANSWER], "without the name"),
    "a call that is no JSON": ([HUMAN, {"from": "function_call", "value": "kettle("}, GPT],
                               "must be the JSON of a call"),
    "an empty question": ([{**USER, "content": " "}, ANSWER], r"message 1 \(user\) is empty"),
    "an empty answer": ([USER, {**ANSWER, "content": ""}], r"message 2 \(assistant\) is empty"),
    "an empty turn": ([USER, {**ANSWER, "content": "\n"}, USER, ANSWER], r"message 2 \(assistant\) is empty"),
    "no content": ([{"role": "user"}, ANSWER], r"message 1 \(user\) is empty"),
    "a number as content": ([{**USER, "content": 5}, ANSWER], "a content that is not text"),
    "a picture": ([{**USER, "content": [{"type": "image_url"}]}, ANSWER], "type 'image_url'"),
    "an unknown role": ([{**USER, "role": "narrator"}, ANSWER], "message 1 has the role 'narrator'"),
    "no role": ([{"content": "Tea?"}, ANSWER], "message 1 has the role 'None'"),
    "a role in capitals": ([{**USER, "role": "User"}, ANSWER], "message 1 has the role 'User'"),
    "a role that is a list": ([{**USER, "role": ["user"]}, ANSWER], "message 1 has the role"),
    "text in place of messages": ("Tea?", "must be a list of {role, content} objects"),
    "nothing": ([], "must be a list of {role, content} objects"),
    "a message that is text": (["Tea?", "Yes."], "message 1 is not an object"),
    "a message that is null": ([None, ANSWER], "message 1 is not an object"),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_broken_conversation_is_one_line(name, column, tmp_path):
    messages, message = BROKEN[name]
    with pytest.raises(UserError, match=f"rows.jsonl:1: column '{column}'.*{message}") as caught:
        load_examples(write(tmp_path, {column: messages}), "actor_training_data")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": [USER], "chosen": [ANSWER, USER], "rejected": [OTHER]}, "column 'chosen' holds 2"),
    ({"prompt": [USER], "chosen": [USER], "rejected": [OTHER]}, "column 'chosen': message 1 is no"),
    ({"prompt": "Coffee?", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "column 'prompt' is no"),
    ({"conversations": [HUMAN], "chosen": "", "rejected": "No."}, "column 'chosen': message 1 is no"),
    ({"instruction": "Q", "completions": [{"response": "a"}, {"response": "b"}]}, "column 'scores'"),
    ({"instruction": "Q", "completions": ["a", "b"]}, "column 'completions' must be a list of objects"),
    ({"prompt": "Q", "responses": ["a", "b"], "scores": [1]}, "column 'scores' must hold one number"),
    ({"prompt": "Q", "response": "a", "helpfulness": "good"}, "column 'helpfulness' is a str"),
])
def test_a_broken_comparison_of_conversations_is_one_line(row, message, tmp_path):
    with pytest.raises(UserError, match=f"rows.jsonl:1: {message}") as caught:
        load_rankings(write(tmp_path, row), "reward_training_data", 9, print)
    assert "\n" not in str(caught.value)


# ----------------------------------------------------------------------------------------------- stored texts


@pytest.mark.parametrize("text", [
    PLAIN, "System: s\n\nHuman: a\n\nb\n\nAssistant: c\n\nHuman: d\n\nAssistant:",
])
def test_a_dialogue_reads_the_same_before_and_after(text):
    assert readable(stored_conversation(conversation_in(text))) == text
    assert messages_of(text) is None and readable(text) == text


@pytest.mark.parametrize("text", ["Human: a", "Assistant:", "\n\nAssistant:", "a\n\nAssistant:",
                                  "Human:a\n\nAssistant:", "Human: a\n\nAssistant: b\n\nAssistant:",
                                  "System: a\n\nAssistant:"])
def test_other_texts_are_no_dialogues(text):
    assert conversation_in(text) is None
