"""What vLLM samples of policies, in the environment of requirements-vllm.txt: see test_vllm_rollouts.py.

    .venv-vllm/bin/python tests/helpers/vllm_rollouts.py FOLDER

FOLDER has a model for each name in families.json. It gets found.json: for each of them the tokens that were
sampled first and their probabilities by a forward pass, and how far vLLM's log-probs are from one: of the
model, of the model with other weights, and with adapters.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import environment  # noqa: F401  where the scripts are, and no network
from train_ppo import PPOStageConfig
from utils.models.loading import in_blocks, with_our_heads
from utils.models.lora import add_adapter
from utils.models.outputs import response_logprobs
from utils.models.prompt_groups import pack
from utils.rollouts.vllm_engine import sample_by_vllm

PROMPTS, EOS, PAD = [[5, 6, 7, 8, 9], [10], [11, 12, 13, 14, 15, 16, 17]], 2, 1
LONG = [[20 + number, *range(10, 309)] for number in range(40)]  # more than vLLM reads in one step
SIZES = {"max_new_tokens": 12, "eos_id": EOS, "longest_prompt": 300}


def drift(model, prompts=PROMPTS, first: int = 0) -> tuple[float, list]:
    """The largest difference of a log-prob, and the responses; the seeds are counted on from `first`."""
    found = sample_by_vllm(model, prompts, k=3, seed=first, temperature=1.5, batch_size=40, **SIZES)
    groups = pack(prompts, [found.responses[3 * i : 3 * i + 3] for i in range(len(prompts))], PAD)
    logprobs = response_logprobs(model, groups, 1.5)
    rows = zip(logprobs, groups.response_mask, found.logprobs, strict=True)
    return max((row[mask] - torch.tensor(own)).abs().max().item() for row, mask, own in rows), found.responses


@torch.no_grad()
def figures(folder: Path) -> dict:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = with_our_heads(in_blocks(model)).eval()
    long, _ = drift(model, LONG)  # first: the engine has room for as many prompts as it begins with
    apart, responses = drift(model)
    _, alone = drift(model, PROMPTS[1:2], first=3)
    adapted = add_adapter(copy.deepcopy(model), PPOStageConfig(lora_rank=2))
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.3)
    with_adapters, others = drift(adapted)
    for weight in model.parameters():
        weight.mul_(0.9).add_(torch.randn_like(weight), alpha=0.1)
    changed, new = drift(model)
    first = sample_by_vllm(copy.deepcopy(model), PROMPTS[:1], k=800, seed=0, temperature=0.7, batch_size=1,
                           **{**SIZES, "max_new_tokens": 1})
    return {"apart": apart, "long": long, "with_adapters": with_adapters, "changed": changed,
            "alone": alone == responses[3:6], "others": responses not in (others, new),
            "first": [response[0] for response in first.responses],
            "probabilities": (model(torch.tensor(PROMPTS[:1])).logits[0, -1] / 0.7).softmax(-1).tolist()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    families = json.loads((folder / "families.json").read_text())
    found = {family: figures(folder / family) for family in families}
    (folder / "found.json").write_text(json.dumps(found))
