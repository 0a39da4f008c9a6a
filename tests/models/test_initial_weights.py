"""Fresh weights in which copying is sketched: properties of the attention, by token positions and nothing else."""

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from utils.config import UserError
from utils.models.initial_weights import sketch_induction_heads
from utils.models.loading import load_policy

LENGTH = 40


@pytest.fixture(scope="module")
def attentions():
    """Attention of each layer (heads, T, T) on 40 random tokens that are written twice."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(
        vocab_size=1000, hidden_size=192, word_embed_proj_dim=192, ffn_dim=384, num_hidden_layers=3, num_attention_heads=3,
        max_position_embeddings=128, dropout=0.0, attn_implementation="eager"))
    sketch_induction_heads(model)
    once = torch.randperm(900)[:LENGTH] + 50
    with torch.no_grad():
        found = model(torch.cat([once, once])[None], output_attentions=True).attentions
    return [layer[0] for layer in found]


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
    found = mass(attentions[1], LENGTH - 1, LENGTH + 5)
    nearby = torch.stack([mass(attentions[1], steps, LENGTH + 5) for steps in range(LENGTH - 6, LENGTH + 5)
                          if steps != LENGTH - 1])
    assert (found > 3 * nearby.max(0).values).all()


def test_tokens_and_positions_do_not_share_dimensions():
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(vocab_size=50, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2,
                                     num_attention_heads=2, max_position_embeddings=64))
    sketch_induction_heads(model)
    decoder = model.model.decoder
    assert (decoder.embed_tokens.weight[:, :8] == 0).all() and (decoder.embed_positions.weight[:, 8:] == 0).all()
    assert (decoder.embed_tokens.weight[1] == 0).all()  # <pad>
    assert model.lm_head.weight is decoder.embed_tokens.weight


@pytest.mark.parametrize("odd", [{"word_embed_proj_dim": 16}, {"num_attention_heads": 1}, {"num_hidden_layers": 1},
                                 {"do_layer_norm_before": False}])
def test_only_opt_of_the_usual_kind_is_arranged(odd, tmp_path):
    usual = {"vocab_size": 50, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2}
    OPTConfig(**usual).save_pretrained(tmp_path / "usual")
    load_policy(str(tmp_path / "usual"), initial_weights="induction")
    OPTConfig(**usual | odd).save_pretrained(tmp_path / "odd")
    with pytest.raises(UserError, match="^initial_weights: 'induction' is for OPT"):
        load_policy(str(tmp_path / "odd"), initial_weights="induction")
