"""What final/ says beside its weights, and that it can be saved before the first step."""

import json
from types import SimpleNamespace

import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

import train_ppo
import train_sft
from tiny_models import mini_tokenizer, save_opt
from utils.errors import UserError
from utils.models.loading import load_policy
from utils.models.parents import Parent
from utils.runs.ending import print_stages
from utils.runs.final import rehearse_saving

# as Llama 2, Llama 3, Qwen and Gemma have them, and worse
PARENTS = {
    "llama 2": {"temperature": 0.9, "top_p": 0.6, "do_sample": False},
    "llama 3": {"temperature": 0.6, "top_p": 0.9, "do_sample": True, "eos_token_id": [2, 7]},
    "qwen": {"repetition_penalty": 1.05, "top_k": 20, "top_p": 0.8, "do_sample": True},
    "beams": {"num_beams": 1, "early_stopping": True, "length_penalty": 2.0},
    "contrastive": {"penalty_alpha": 0.6, "do_sample": False, "typical_p": 0.5},
    "lengths": {"max_length": 20, "min_length": 5, "forced_bos_token_id": 2},
}


@pytest.mark.parametrize("name", PARENTS)
@pytest.mark.parametrize(("kind", "said"), [
    (train_sft.SFTStageConfig, {"do_sample": None, "temperature": None, "top_k": None, "top_p": None}),
    (train_ppo.PPOStageConfig, {"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 1.0}),
])
def test_a_parents_generation_config_does_not_stop_the_end_and_is_not_handed_on(name, kind, said, tmp_path):
    parent = save_opt(tmp_path / "parent")
    (parent / "generation_config.json").write_text(json.dumps(PARENTS[name]))
    model = load_policy(Parent("model", str(parent)))
    rehearse_saving(model, mini_tokenizer(), kind(model=str(parent)))
    model.save_pretrained(tmp_path / "final")
    saved = json.loads((tmp_path / "final" / "generation_config.json").read_text())
    found = GenerationConfig.from_pretrained(tmp_path / "final")
    assert {key: saved.get(key) for key in said} == said
    assert (found.pad_token_id, found.max_new_tokens) == (1, 53)
    assert found.eos_token_id == ([2, 7] if name == "llama 3" else 2)  # what ended answers still does
    assert not {"repetition_penalty", "penalty_alpha", "forced_bos_token_id", "min_length"} & saved.keys()
    AutoModelForCausalLM.from_pretrained(tmp_path / "final")


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_what_cannot_be_saved_is_said_before_the_first_step(part, tmp_path):
    model, tokenizer = load_policy(Parent("model", str(save_opt(tmp_path / "parent")))), mini_tokenizer()

    def refuse(folder):
        raise ValueError("nothing\nof this can be written")

    if part == "config":
        model.config.save_pretrained = refuse
    else:
        tokenizer = SimpleNamespace(bos_token_id=2, eos_token_id=2, pad_token_id=1, save_pretrained=refuse)
    with pytest.raises(UserError) as caught:
        rehearse_saving(model, tokenizer, train_sft.SFTStageConfig(model="mine"))
    assert str(caught.value).startswith("model: ") and str(caught.value).endswith(
        "of 'mine' can be read, but not be saved again: nothing of this can be written")


SUMMARY = {"base_rouge_avg": 0.1, "rouge_avg": 0.5, "seconds": 3.0}


@pytest.mark.parametrize("broken", [None, "", "{", "[]", "{}", '{"seconds": 3}', '{"rouge_avg": "x"}',
                                    json.dumps(SUMMARY | {"seconds": "x"}),
                                    json.dumps(SUMMARY | {"rouge_avg": []})])
def test_an_earlier_stages_damaged_summary_does_not_stop_the_end(broken, tmp_path, capsys):
    """The run was trained; what it started from has changed since."""
    for stage in ("sft", "ppo"):
        (tmp_path / stage).mkdir()
    if broken is not None:
        (tmp_path / "sft" / "summary.json").write_text(broken)
    (tmp_path / "ppo" / "plots").mkdir()
    (tmp_path / "ppo" / "summary.json").write_text(json.dumps(
        {"score_before": 0.0, "score_after": 1.0, "score_slope": 0.25, "score_after_length_controlled": 0.5,
         "mine_slope": 0.125, "kl": 2.0, "seconds": 4.0}))
    print_stages({stage: tmp_path / stage for stage in ("sft", "ppo")})
    said = capsys.readouterr().out
    assert "sft: is not in the table" in said
    assert "reward model's score" in said and "ROUGE mean" not in said and "seconds: ppo 4" in said
    rows = [[cell.strip() for cell in line.split("│")[2:-1]] for line in said.splitlines() if "│" in line]
    for row in (["at equal length", "0.000", "0.500", ""], ["paid for a token: score", "", "0.250", ""],
                ["paid for a token: mine", "", "0.125", ""]):
        assert row in rows
