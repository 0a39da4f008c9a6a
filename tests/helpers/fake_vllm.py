"""What our code calls of vLLM, around a stock model and our own sampler, for where vLLM is not installed.

It begins with random weights, and knows those that it is given by the names of a checkpoint only.
"""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from unittest import mock

from transformers import AutoConfig, AutoModelForCausalLM

from families import PAD
from utils.models.generation import sample
from utils.models.loading import in_blocks, with_our_heads


@dataclass
class SamplingParams:
    """Those that are used; another one is an error."""

    n: int
    seed: int
    temperature: float
    max_tokens: int
    logprobs: int
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool


class LLM:
    """An engine. `resets` counts how often it was told to forget what it has cached."""

    def __init__(self, folder, *, load_format, dtype, **settings):
        assert load_format == "dummy" and settings["logprobs_mode"] == "processed_logprobs"
        self.settings, self.resets = settings, 0
        self.model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
        # by a configuration that names no class the real one takes it for a model that samples nothing
        assert settings["hf_overrides"]["architectures"] == [type(self.model).__name__]
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None))

    def collective_rpc(self, method, kwargs):
        assert method == "reload_weights"
        given = {name: weight.clone() for name, weight in kwargs["weights_iterator"]}
        found = self.model.load_state_dict(given, strict=False)
        tied = {name for name in found.missing_keys if name.startswith("lm_head")}
        assert not found.unexpected_keys and tied == set(found.missing_keys)
        assert not tied or self.model.config.tie_word_embeddings

    def apply_model(self, function):
        pass  # it has no packed weights

    def reset_prefix_cache(self):
        self.resets += 1

    def generate(self, prompts, settings, use_tqdm):
        assert len(prompts) <= self.settings["max_num_seqs"]
        model = with_our_heads(in_blocks(self.model)).eval()
        return [_answered(model, prompt["prompt_token_ids"], one)
                for prompt, one in zip(prompts, settings, strict=True)]


def _answered(model, prompt: list[int], settings: SamplingParams):
    [eos] = settings.stop_token_ids
    samples = sample(model, [prompt], k=settings.n, seeds=[settings.seed + i for i in range(settings.n)],
                     max_new_tokens=settings.max_tokens, temperature=settings.temperature, eos_id=eos,
                     pad_id=PAD)
    outputs = [SimpleNamespace(index=i, token_ids=tuple(tokens), logprobs=[
        {token: SimpleNamespace(logprob=value)} for token, value in zip(tokens, logprobs, strict=True)])
        for i, (tokens, logprobs) in enumerate(zip(samples.responses, samples.logprobs, strict=True))]
    return SimpleNamespace(outputs=outputs[::-1])  # in the order in which they end


def installed():
    """Inside, `import vllm` finds this one."""
    module = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    module.__spec__ = SimpleNamespace(name="vllm")  # find_spec looks for it
    return mock.patch.dict(sys.modules, vllm=module)
