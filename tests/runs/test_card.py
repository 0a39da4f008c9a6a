"""The model card: read by the hub's own reader, it says what the run was."""

import re

import pytest
from huggingface_hub import ModelCard

import train_ppo
import train_reward
import train_sft
from chat_models import messages_of, save_chat_model
from tiny_models import mini_tokenizer, save_opt
from utils.data.chat import Chat
from utils.models.loading import load_policy
from utils.models.parents import Parent
from utils.runs.card import model_card

SUMMARIES = {
    "sft": {"rouge1": 0.5, "rouge2": 0.25, "rougeL": 0.375, "rouge_avg": 0.4, "seconds": 1.0},
    "reward": {"accuracy": 0.75, "accuracy_low": 0.7, "accuracy_high": 0.8, "pairs": 9},
    "ppo": {"score_after": 0.5, "kl": 2.0, "seconds": 3.0},
}
CONFIGS = {"sft": train_sft.SFTStageConfig, "reward": train_reward.RewardStageConfig,
           "ppo": train_ppo.PPOStageConfig}
HUB_SETS = {"sft": {"trl-lib/tldr"}, "reward": {"CarperAI/openai_summarize_comparisons", "trl-lib/tldr"},
            "ppo": {"trl-lib/tldr"}}


@pytest.mark.parametrize("stage", CONFIGS)
def test_the_metadata_is_the_hubs(stage):
    """Hub names are metadata, files and folders of this machine are not."""
    config = CONFIGS[stage](learning_rate=1e-3)
    base = Parent("model", "facebook/opt-125m")
    text = model_card(config, stage, [base], SUMMARIES[stage], mini_tokenizer())
    card = ModelCard(text)
    assert card.data.base_model == ["facebook/opt-125m"] and card.data.library_name == "transformers"
    task = "text-classification" if stage == "reward" else "text-generation"
    assert card.data.pipeline_tag == task and "rlhf" in card.data.tags
    assert set(card.data.datasets) <= HUB_SETS[stage] and card.data.datasets
    values = {result.metric_value for result in card.data.eval_results}
    assert values <= set(SUMMARIES[stage].values()) and len(values) >= 1
    assert ModelCard(text).validate is not None and "learning_rate: 0.001" in card.text
    assert f"python scripts/train_{stage}.py" in card.text


def test_an_interval_stands_with_its_figure():
    text = model_card(train_reward.RewardStageConfig(), "reward", [Parent("model", "facebook/opt-125m")],
                      SUMMARIES["reward"], mini_tokenizer())
    assert "| accuracy on held-out pairs | 0.750 | 0.700 - 0.800 |" in text
    [result] = ModelCard(text).data.eval_results
    assert result.metric_type == "accuracy" and result.metric_name.endswith("95 %: 0.700 - 0.800")


@pytest.mark.parametrize(("card", "licence"), [
    ("---\nlicense: apache-2.0\n---\n# base\n", "apache-2.0"), ("# base\n", None), (None, None),
    ("---\nlicense: [a, b]\n---\n", None), ("---\n{[\n---\n", None), ("---\n- 1\n---\n", None),
    ("\xff", None),
])
def test_the_licence_is_the_base_models_where_its_card_says_one(card, licence, tmp_path):
    parent = Parent("model", str(save_opt(tmp_path / "base")))
    if card is not None:
        (tmp_path / "base" / "README.md").write_text(card, encoding="latin-1")
    text = model_card(train_sft.SFTStageConfig(), "sft", [parent], SUMMARIES["sft"], mini_tokenizer())
    assert ModelCard(text).data.license == licence
    assert ModelCard(text).data.base_model is None  # a folder of this machine is no name on the hub


def test_the_code_for_a_conversation_asks_with_the_tokens_of_training(tmp_path):
    """This tokenizer puts its BOS before a text, which the template has no place for."""
    base = save_chat_model(tmp_path / "base", "gpt2")
    parent, final = Parent("model", str(base), str(base / "template.jinja")), tmp_path / "final"
    load_policy(parent).save_pretrained(final)
    parent.tokenizer.save_pretrained(final)
    config = train_sft.SFTStageConfig(max_new_tokens=2)
    card = model_card(config, "sft", [parent], SUMMARIES["sft"], parent.tokenizer)
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {"folder": final, "messages": messages_of(3)}
    exec(code, names)  # noqa: S102  the card's own code
    asked = Chat(parent.tokenizer).prompt(messages_of(3))
    assert names["inputs"]["input_ids"].tolist() == [asked]
    assert parent.tokenizer("x")["input_ids"][0] == parent.tokenizer.bos_token_id not in asked
