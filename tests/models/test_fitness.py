"""The check at load: which models are refused, by what they do, and that it leaves no trace."""

from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    FalconConfig,
)

from families import CONFIGS, FAMILIES, PAD, VOCAB, policy, random_groups, scalar_model
from many_families import TRAINED, tiny, tiny_scalar
from utils.config import UserError
from utils.models import generation
from utils.models.fitness import refuse_unfit
from utils.models.loading import with_our_heads, without_dropout
from utils.models.outputs import hidden_states
from utils.models.prompt_groups import end_states, pack

PARENT = SimpleNamespace(key="some_key", name="some/model")
TOKENIZER = SimpleNamespace(get_vocab=lambda: {"first": 0, "last": VOCAB - 1})


def check(model, tokens=20, tokenizer=TOKENIZER, **more):
    """Of a model as it is loaded; those of `families.py` have dropout."""
    refuse_unfit(without_dropout(model), PARENT, tokenizer, tokens, "what_makes_rows", **more)


def refusal(model, **more) -> str:
    with pytest.raises(UserError, match="^some_key: 'some/model' ") as caught:
        check(model, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("made", [policy, scalar_model])
@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_models_pass_and_nothing_is_left_behind(family, made):
    model = without_dropout(made(family)).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    check(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("made", [tiny, tiny_scalar])
@pytest.mark.parametrize("family", TRAINED)
def test_models_that_are_computed_rightly_pass(family, made):
    """test_many_families.py has the numbers."""
    model = made(family)
    if model is not None:
        check(model)


# the module that is named
MIXING = {
    "qwen3.5": "linear_attn (Qwen3_5GatedDeltaNet)", "qwen3-next": "linear_attn (Qwen3NextGatedDeltaNet)",
    "lfm2": "conv (Lfm2ShortConv)", "falcon-h1": "mamba (FalconH1Mixer)", "jamba": "mamba (JambaMambaMixer)",
    "bamba": "mamba (BambaMixer)", "granite-hybrid": "mamba (GraniteMoeHybridMambaLayer)",
    "recurrent-gemma": "temporal_block (RecurrentGemmaRecurrentBlock)",
    "minimax": "self_attn (MiniMaxLightningAttention)", "zamba": "mamba (ZambaMambaMixer)",
}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("made", [tiny, tiny_scalar])
@pytest.mark.parametrize("family", MIXING)
def test_layers_that_mix_along_the_row_are_refused(family, made, fresh):
    """Also with the small weights of a model that has learnt nothing."""
    model = made(family, std=None if fresh else 0.2)
    if model is None:
        pytest.skip("transformers has no classifier of this family")
    assert MIXING[family] in refusal(model)


def test_layers_that_choose_among_columns_are_refused():
    """Rows of a few tokens do not show what they do to long ones."""
    assert "layers of type indexed_attention" in refusal(tiny("deepseek-v3.2"))


class Leaks(torch.nn.Module):
    """Each token's state gets a little of what stands `distance` columns before it."""

    def __init__(self, layer, distance, share):
        super().__init__()
        self.layer, self.distance, self.share = layer, distance, share

    def forward(self, states):
        states = self.layer(states)
        return states + self.share * torch.roll(states, self.distance, 1)


@pytest.mark.parametrize("made", [policy, scalar_model])
@pytest.mark.parametrize("distance", [1, 2, 4, 8, -1])
def test_a_leak_of_a_twentieth_is_seen(made, distance):
    """From the neighbour, from the answer before, and from the padding behind."""
    model = made("llama-gqa")
    model.model.layers[1].mlp = Leaks(model.model.layers[1].mlp, distance, share=0.05)
    assert "model.layers.1.mlp (Leaks)" in refusal(model)


def test_a_leak_in_decoding_alone_is_seen(monkeypatch):
    decode = generation._Batch._decode

    def all_see_all(batch, tokens):
        monkeypatch.setattr(torch, "eye", lambda k, **more: torch.ones(k, k, **more))
        try:
            return decode(batch, tokens)
        finally:
            monkeypatch.undo()

    check(policy("opt"))
    monkeypatch.setattr(generation._Batch, "_decode", all_see_all)
    assert "sample from other probabilities" in refusal(policy("opt"))


def test_left_padding_that_is_seen_in_sampling(monkeypatch):
    start = generation._Batch.__init__

    def with_real_padding(batch, *args):
        start(batch, *args)
        batch.real = torch.ones_like(batch.real)

    monkeypatch.setattr(generation._Batch, "__init__", with_real_padding)
    assert "sample from other probabilities" in refusal(policy("llama-gqa"))


@pytest.mark.parametrize("made", [tiny, tiny_scalar])
@pytest.mark.parametrize("family", TRAINED)
@torch.no_grad()
def test_no_dropout_is_left(family, made):
    """Every table entry that has dropout or jitter has .3 of it; see `many_families.py`."""
    model = made(family)
    if model is None:
        return
    model.train()
    row = torch.randint(3, VOCAB, (1, 20))
    first, second = (model(row).logits for _ in range(2))
    assert torch.equal(first, second)
    assert not any(value for name, value in model.config.to_dict().items()
                   if isinstance(value, float) and ("drop" in name or "jitter" in name))


def test_randomness_is_not_used_up():
    """Supervised fine-tuning keeps a model's dropout, and its run begins at its seed."""
    class Drawing(torch.nn.Module):
        def forward(self, states):
            return states + 0 * torch.rand(1)

    model = policy("llama-gqa")
    model.model.norm = torch.nn.Sequential(model.model.norm, Drawing())
    state = torch.get_rng_state()
    check(model)
    assert torch.equal(torch.get_rng_state(), state)


class Noisy(torch.nn.Module):
    """Randomness that no name gives away."""

    def __init__(self, layer, width=0.01):
        super().__init__()
        self.layer, self.width = layer, width

    def forward(self, states):
        states = self.layer(states)
        return states + self.width * torch.randn_like(states) if self.training else states


@pytest.mark.parametrize("made", [policy, scalar_model])
def test_randomness_that_is_left_is_refused_by_the_modules_name(made):
    model = made("llama-gqa")
    model.model.layers[1].mlp = Noisy(model.model.layers[1].mlp)
    message = refusal(model)
    assert "random in training" in message and "model.layers.1.mlp (Noisy)" in message
    check(model, dropout=True)  # supervised fine-tuning keeps a model's dropout


@pytest.mark.parametrize(("rope", "longest"), [
    ({"rope_type": "dynamic", "factor": 2.0}, 64),
    ({"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 4.0],
      "original_max_position_embeddings": 16}, 16),
    ({"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [1.0, 1.01],
      "original_max_position_embeddings": 16}, 16),  # seen at late positions only
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
    ({"rope_type": "linear", "factor": 2.0}, 64),
    ({"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
      "original_max_position_embeddings": 16}, 64),
], ids=["dynamic", "longrope", "slight longrope", "yarn", "linear", "llama3"])
@torch.no_grad()
def test_rope_that_depends_on_the_longest_row(rope, longest):
    """Up to `longest` tokens a row's numbers are those of a shorter one; beyond it the run is refused."""
    config = CONFIGS["llama-gqa"]()
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        config.num_labels = 1
        model = with_our_heads(kind.from_config(config)).eval()
        check(model, tokens=longest)
        long, short = random_groups([longest - 4, 3], [[4, 2], [4, 4]])
        groups, alone = pack(long, short, PAD), pack(long[1:], short[1:], PAD)
        together = hidden_states(model, groups)
        with_long = end_states(together, groups)[2:]
        expected = end_states(hidden_states(model, alone), alone)
        torch.testing.assert_close(with_long, expected, rtol=1e-4, atol=1e-5)
        if longest < 64:
            assert f"what_makes_rows makes rows of {longest + 1} tokens" in refusal(model, tokens=longest + 1)
            check(model, tokens=longest)  # the frequencies are the short ones again


def test_rows_longer_than_the_model_has_positions():
    for model in (policy("opt"), policy("gpt2"), scalar_model("llama-gqa")):
        check(model, tokens=64)
        with pytest.raises(UserError, match="^what_makes_rows makes rows of 65 tokens, but the model has 64"):
            check(model, tokens=65)


@pytest.mark.parametrize("made", [policy, scalar_model])
def test_ids_without_an_embedding_are_refused(made):
    beyond = SimpleNamespace(get_vocab=lambda: {"a": 0, "<pad>": VOCAB})
    message = refusal(made("opt"), tokenizer=beyond)
    assert f"has {VOCAB} embedding rows" in message and f"ids up to {VOCAB};" in message
    assert f"resize_token_embeddings({VOCAB + 1})" in message


@pytest.mark.parametrize("made", [policy, scalar_model])
def test_weights_that_are_not_finite_are_refused(made):
    model = made("opt")
    model.base_model.decoder.layers[0].fc1.weight.data[0, 0] = float("nan")
    assert "NaN" in refusal(model)


def test_a_head_that_does_more_is_refused():
    """BERT's head has a layer of its own; a classifier of its kind is no linear layer on the last states."""
    config = BertConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=24, is_decoder=True, num_labels=1)
    for kind in (AutoModelForCausalLM, AutoModelForSequenceClassification):
        model = without_dropout(with_our_heads(kind.from_config(config)))
        assert "more to its last hidden states than one linear head" in refusal(model)
    for name in ("final_logit_softcapping", "logit_scale"):  # forgotten ones are seen, built-in ones pass
        model = tiny("gemma3" if name.startswith("final") else "cohere2")
        check(model)
        head = model.get_output_embeddings()
        head.softcap, head.scale = None, 1.0
        assert "more to its last hidden states than one linear head" in refusal(model)


def test_a_model_that_cannot_take_the_call_is_refused():
    """A class without position ids, and one that counts positions in columns (ALiBi)."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    for config in (BloomConfig(**sizes), FalconConfig(**sizes, alibi=True)):
        model = with_our_heads(AutoModelForCausalLM.from_config(config))
        assert "cannot be computed in prompt groups" in refusal(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits(dtype):
    """As ZeRO-3 loads them: ordinary models pass, a leak is seen."""
    for family in ("opt", "gpt2", "llama-gqa"):
        check(without_dropout(policy(family)).to(dtype))
    assert "linear_attn" in refusal(tiny("qwen3.5").to(dtype))


def test_what_it_costs(monkeypatch):
    """Tokens that go through the model."""
    counts = []
    for made in (policy, scalar_model):
        model, tokens = made("opt"), []
        model.get_input_embeddings().register_forward_hook(
            lambda module, args, output, seen=tokens: seen.append(args[0].numel()))
        check(model)
        counts.append(tokens)
    assert counts == [[42, 18, 8, 12, 4, 4, 4], [42, 18, 8]]


@torch.no_grad()
def test_a_score_near_0_is_no_other_head():
    """A sum of terms that cancel has the rounding of the terms: the demo's reward model was refused."""
    model = without_dropout(scalar_model("opt")).eval()
    words = [(VOCAB // 2 + i) % VOCAB for i in range(8)]  # the row that is looked at
    state = model.base_model(input_ids=torch.tensor([words])).last_hidden_state[0, -1]
    weight = model.score.weight
    for score in (1e-3, 1e-7, 0.0):
        weight -= ((weight @ state - score) / (state @ state))[:, None] * state
        check(model)
