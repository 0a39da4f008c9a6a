"""Families that change their logits behind the head (soft cap, scale): stock forward passes, generation."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteMoeConfig,
)

from families import EOS, PAD, VOCAB, draw, random_groups
from oracle import each_row
from utils.models.loading import load_policy
from utils.models.outputs import response_logprobs
from utils.models.parents import Parent
from utils.models.prompt_groups import pack

_SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "head_dim": 4, "intermediate_size": 24, "max_position_embeddings": 64,
          "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": EOS}
# a cap of 2 is far below the logits of these weights
CONFIGS = {
    "gemma2": lambda: Gemma2Config(**_SIZES, final_logit_softcapping=2.0, attn_logit_softcapping=1.5,
                                   sliding_window=64),
    "gemma3": lambda: Gemma3TextConfig(**_SIZES, final_logit_softcapping=2.0, sliding_window=64),
    "cohere": lambda: CohereConfig(**_SIZES, logit_scale=0.25),
    "cohere2": lambda: Cohere2Config(**_SIZES, logit_scale=0.25, sliding_window=64),
    "granite": lambda: GraniteConfig(**_SIZES, logits_scaling=8.0),
    "granite-moe": lambda: GraniteMoeConfig(**_SIZES, logits_scaling=8.0, num_local_experts=4,
                                            num_experts_per_tok=2),
}


@pytest.fixture(params=CONFIGS)
def model(request, tmp_path):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[request.param]())
    for weight in made.parameters():
        torch.nn.init.normal_(weight.data, std=0.3)
    made.save_pretrained(tmp_path)
    model = load_policy(Parent("model", str(tmp_path))).eval()
    model.stock = [AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()]
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_gradients_are_the_stock_models(model, temperature):
    prompts, completions = random_groups([4, 1, 7], [[3, 1, 5], [2], [4, 4]])
    rows = each_row(prompts, completions)

    def gradients(model, logprobs):
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters()}

    groups = pack(prompts, completions, PAD)
    ours = response_logprobs(model, groups, temperature)[groups.response_mask]
    stock = torch.cat([stock_row(model.stock[0], *row, temperature) for row in rows])
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
    ours, stock = gradients(model, ours), gradients(model.stock[0], stock)
    for name, gradient in stock.items():
        limit = 1e-4 * max(gradient.abs().max().item(), 1e-2)
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=limit,
                                   msg=lambda m, n=name: f"{n}: {m}")


def stock_row(model, prompt, completion, temperature):
    logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


@torch.no_grad()
def test_sampling_says_the_logprobs_of_the_update_and_is_greedy_when_cold(model):
    prompts, _ = random_groups([4, 1, 7], [[2], [2], [2]])
    samples = draw(model, prompts, k=2, temperature=0.7)
    groups = pack(prompts, [samples.responses[2 * i : 2 * i + 2] for i in range(3)], PAD)
    found = response_logprobs(model, groups, 0.7)[groups.response_mask]
    torch.testing.assert_close(found, torch.tensor(sum(samples.logprobs, [])), rtol=1e-4, atol=1e-4)
    cold = draw(model, prompts, k=1, temperature=1e-6).responses
    for prompt, response in zip(prompts, cold, strict=True):
        stock = model.stock[0].generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)
        assert response == stock[0, len(prompt):].tolist()
