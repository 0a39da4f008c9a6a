"""The mini base model before its training: what its attention does by positions alone, and the folder."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from utils.models.loading import load_policy
from utils.models.parents import Parent

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data" / "tldr_mini"))

import base_model  # noqa: E402
from induction_heads import sketch_induction_heads  # noqa: E402

LENGTH = 40
MINI = ROOT / "assets" / "opt-mini"
SMALL = {"vocab_size": 50, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64,
         "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture(scope="module")
def attentions():
    """Attention of each layer (heads, T, T) on 40 random tokens that are written twice."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(
        vocab_size=1000, hidden_size=192, word_embed_proj_dim=192, ffn_dim=384, num_hidden_layers=3,
        num_attention_heads=3, max_position_embeddings=128, dropout=0.0, attn_implementation="eager"))
    sketch_induction_heads(model)
    once = torch.randperm(900)[:LENGTH] + 50
    with torch.no_grad():
        layers = model(torch.cat([once, once])[None], output_attentions=True).attentions
    return [layer[0] for layer in layers]


def mass(attention, steps, start):
    """Mean attention (heads,) that tokens from `start` on give to the token `steps` before them."""
    places = torch.arange(start, attention.shape[-1])
    return attention[:, places, places - steps].mean(1)


def test_first_layer_looks_one_two_and_three_tokens_back(attentions):
    for head in range(3):
        steps = torch.stack([mass(attentions[0], steps, 10)[head] for steps in range(6)])
        assert steps.argmax() == head + 1 and steps.max() > 0.5


def test_second_layer_finds_what_followed_the_token_before(attentions):
    """In the second half the token 39 steps back is the one that followed this token's first occurrence."""
    copied = mass(attentions[1], LENGTH - 1, LENGTH + 5)
    nearby = torch.stack([mass(attentions[1], steps, LENGTH + 5) for steps in range(LENGTH - 6, LENGTH + 5)
                          if steps != LENGTH - 1])
    assert (copied > 3 * nearby.max(0).values).all()


def test_tokens_and_positions_do_not_share_dimensions():
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**SMALL))
    sketch_induction_heads(model)
    decoder = model.model.decoder
    tokens, positions = decoder.embed_tokens.weight, decoder.embed_positions.weight
    assert (tokens[:, :8] == 0).all() and (positions[:, 8:] == 0).all()
    assert (tokens[1] == 0).all()  # <pad>
    assert model.lm_head.weight is decoder.embed_tokens.weight


@pytest.mark.parametrize(("odd", "reason"), [
    ({"word_embed_proj_dim": 16}, "embedding projection"),
    ({"do_layer_norm_before": False}, "LayerNorm before"),
    ({"num_attention_heads": 1}, "two heads"), ({"num_hidden_layers": 1}, "two layers"),
])
def test_only_opt_of_the_usual_kind_is_arranged(odd, reason):
    model = OPTForCausalLM(OPTConfig(**SMALL | odd))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with pytest.raises(ValueError, match=reason):
        sketch_induction_heads(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "first_weights"
    base_model.main(["--output_dir", str(folder)])
    return folder


def test_the_folder_has_the_architecture_and_the_tokenizer_of_the_committed_model(folder):
    assert json.loads((folder / "config.json").read_text()) == json.loads((MINI / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).read_bytes() == (MINI / name).read_bytes()
    assert Parent("model", str(folder)).tokenizer.convert_tokens_to_ids("<pad>") == 1


def test_the_weights_that_training_loads_are_the_sketch_and_follow_the_seed(folder):
    """Written and loaded again nothing is lost, and no weight is filled in on the way."""
    loaded = load_policy(Parent("model", str(folder))).state_dict()
    config = OPTConfig.from_pretrained(folder)
    same, other = (base_model.base_model(config, seed).state_dict() for seed in (0, 1))
    assert loaded.keys() == same.keys()
    assert all(torch.equal(loaded[name], same[name]) for name in loaded)
    # no draws: biases, norms, sinusoidal positions, and layer 0's queries and keys, which follow from these
    fixed = ("positions", "layers.0.self_attn.q_proj", "layers.0.self_attn.k_proj")
    drawn = [name for name in loaded if loaded[name].dim() == 2 and not any(part in name for part in fixed)]
    assert not any(torch.equal(loaded[name], other[name]) for name in drawn)


def test_a_folder_that_holds_a_model_is_refused(folder, capsys):
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(SystemExit):
        base_model.main(["--output_dir", str(folder), "--seed", "1"])
    assert "holds a model already" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == before
