"""Models that no run can come of are refused in one line, before anything is made."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_reward
from tiny_models import save_opt
from toy_runs import contents, start
from utils.config import PROJECT, UserError, parse_config
from utils.models.loading import load_policy, load_scalar_model
from utils.models.parents import Parent
from utils.runs.ending import print_stages, refuse_broken_summaries


@pytest.mark.parametrize("layers", [3_000, 10**6, 10**9])
@pytest.mark.parametrize("files", [True, False])
def test_more_layers_than_weights(layers, files, tmp_path):
    folder = save_opt(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    if not files:
        if layers < 10**4:
            return
        (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"^model: config.json of '.*' says {layers} layers, but"):
        load_policy(Parent("model", str(folder)))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_weights_that_are_no_numbers(number, kind, tmp_path):
    folder = save_opt(tmp_path / "model", kind)
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[len(weights) // 2]
    weights[name].view(-1)[-1] = number
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    load = load_policy if kind == "policy" else load_scalar_model
    with pytest.raises(UserError, match=rf"no finite numbers \(NaN or infinite\), in .*{name[-20:]}"):
        load(Parent("model", str(folder)))


def test_nothing_is_made_for_a_model_of_nan(tmp_path):
    folder = save_opt(tmp_path / "model")
    weights = {name: torch.full_like(weight, torch.nan)
               for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    words = ["--model", str(folder), "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    default = PROJECT / "configs" / "tldr_mini" / "reward.yaml"
    with pytest.raises(UserError, match="no finite numbers"):
        train_reward.main(parse_config(train_reward.RewardStageConfig, default, words))
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------- the run of a parent


SFT = {"base_rouge_avg": 0.25, "rouge_avg": 0.75}


@pytest.fixture
def parent(tmp_path):
    """The final/ of a finished SFT run."""
    run = start(tmp_path / "sft")
    run.write_summary(SFT)
    save_opt(tmp_path / "sft" / "final")
    (tmp_path / "sft" / "final" / "stage.json").write_text('{"stage": "sft"}')
    return tmp_path / "sft"


BROKEN = ["", "{", "null", "[]", "3", "{}", '{"rouge_avg": "text", "base_rouge_avg": 1, "seconds": 1}',
          '{"rouge_avg": 1, "base_rouge_avg": 1}', "[" * 100_000, "\xff"]


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:20])
def test_a_parents_broken_summary_is_said_at_the_start_and_kills_nothing_at_the_end(text, parent, capsys):
    model = Parent("model", str(parent / "final"))
    refuse_broken_summaries(model)
    (parent / "summary.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="^model: '.*/sft/summary.json' does not have the figures"):
        refuse_broken_summaries(model)
    print_stages({"sft": parent})
    assert f"sft: is not in the table: '{parent}/summary.json' does not have" in capsys.readouterr().out


@pytest.mark.parametrize("break_it", [
    lambda run: (run / "plots").rmdir(),
    lambda run: ((run / "plots").rmdir(), (run / "plots").touch()),
    lambda run: (run / "summary.json").unlink(),
    lambda run: (run / "final" / "stage.json").unlink(),
])
def test_what_is_gone_of_a_parents_run_kills_nothing_at_the_end(break_it, parent, capsys):
    model = Parent("model", str(parent / "final"))
    found = model.run
    break_it(parent)
    refuse_broken_summaries(model)
    print_stages({found[0]: found[1]})
    assert f"sft: {parent}" in capsys.readouterr().out and "final" in contents(parent)
