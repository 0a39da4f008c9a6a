"""A reward model that reads the text by its own chat template, against a stock model on stock text."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from chat_models import CONFIGS, TEMPLATE, save_stock_tokenizer
from utils.config import UserError
from utils.models.loading import load_scalar_model
from utils.models.parents import Parent
from utils.rewards.answers import Answers
from utils.rewards.entries import ModelEntry
from utils.rewards.model import RenderedReward

LONG = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How are the old dogs? " * 6},
        {"role": "assistant", "content": "They sleep."}, {"role": "user", "content": "And the house?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rendered")
    config = CONFIGS["qwen2"](save_stock_tokenizer(folder))
    config.num_labels = 1
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.3)
    model.save_pretrained(folder)
    (folder / "template.jinja").write_text(TEMPLATE)
    return folder


def reward(folder, most: int, batch_size: int = 2):
    parent = Parent("rewards.x", str(folder), str(folder / "template.jinja"), stages=("reward",))
    made = RenderedReward(ModelEntry(model=str(folder)), parent, most, batch_size)
    made.model = load_scalar_model(parent).eval()
    return made


def answers(*of_prompts) -> Answers:
    """(prompt, messages or None, completions, ended) of each prompt."""
    rows = [(prompt, messages, text, end, f"f.jsonl:{number}")
            for number, (prompt, messages, texts, ends) in enumerate(of_prompts, start=1)
            for text, end in zip(texts, ends, strict=True)]
    prompts, messages, texts, ended, places = map(list, zip(*rows, strict=True))
    count = len(rows)
    return Answers(prompts, texts, [None] * count, [[]] * count, ended, [{}] * count, messages, places)


@torch.no_grad()
def stock_score(folder, messages, answer: str, ended: bool) -> float:
    """Of one plain row, whose text stock transformers renders."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    text = tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, tokenize=False,
                                         add_generation_prompt=True)
    ids = tokenizer(text + answer + "<|im_end|>" * ended, add_special_tokens=False)["input_ids"]
    state = model.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
    return model.score(state).item()


def test_each_answer_scores_what_the_stock_model_says_of_its_rendered_text(folder):
    """A conversation with all of its turns, and a plain prompt, which is one turn of the user. An answer that
    did not end has no end here either.
    """
    asked = answers(("unread", LONG, ["It is new.", "Old and good"], [True, False]),
                    ("What do dogs like?", None, ["Friends.", "Work"], [False, True]),
                    ("Who told you?", None, ["A friend", "The dogs."], [True, True]))
    found = reward(folder, most=200).of_answers(asked)
    expected = [stock_score(folder, messages or [{"role": "user", "content": prompt}], text, end)
                for prompt, messages, text, end in zip(asked.prompts, asked.messages, asked.completions,
                                                       asked.ended, strict=True)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert len({round(score, 2) for score in found}) == 6, "the scores differ"


def test_a_long_conversation_loses_its_first_turns_and_a_long_question_names_the_row(folder):
    short = [LONG[0], LONG[-1]]
    asked = answers(("p", LONG, ["It is new."], [True]))
    assert reward(folder, most=40).of_answers(asked) == pytest.approx(
        [stock_score(folder, short, "It is new.", True)], abs=1e-4)
    with pytest.raises(UserError, match="^rewards.x: the prompt of f.jsonl:1 does not fit into 40 tokens of "
                                        "'.*'; raise its max_prompt_tokens$"):
        reward(folder, most=40).of_answers(answers(("p", LONG[:2], ["Well."], [True])))
