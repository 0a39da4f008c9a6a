"""Sampling by vLLM in the process of training: each rank has an engine of its own, and gives it the policy's
present weights before each update.

This is vLLM's own `LLM` and its `reload_weights`, for which the weights never leave the process. trl's
`VLLMGeneration` is not used: its `sync_weights` fails on a CPU, where vLLM packs the weights that it has
loaded; it has one seed for all responses; it takes vLLM's number type, which is 16 bits for float32 weights;
and it merges adapters of peft's model class only.
"""

import atexit
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from peft.tuners.lora import LoraLayer

from utils.distributed import world
from utils.errors import UserError
from utils.models.generation import Samples
from utils.rollouts.continuous import refuse_foreign_heads

_BLOCK = 128  # tokens of the largest block of its cache
_engines = {}  # of this process, by policy; they live until its end


@torch.no_grad()
def sample_by_vllm(
    policy, prompts: list[list[int]], *, k: int, max_new_tokens: int, temperature: float, seed: int,
    eos_id: int, longest_prompt: int, batch_size: int,
) -> Samples:
    """K responses for each prompt, as `utils.models.generation.sample`.

    Args:
        seed: of the first response; the next one has the next number.
        longest_prompt: tokens of the longest prompt of the whole run.
        batch_size: prompts that are sampled together; the cache has room for so many.

    Returns:
        Responses, and their log-probs as vLLM computed them.

    Raises:
        UserError: when vLLM is not installed, or does not run this model.
    """
    refuse_foreign_heads(policy)
    device = policy.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else policy.dtype
    with torch.autocast(device, enabled=False):  # vLLM computes in the type that it was given
        if policy not in _engines:
            _engines[policy] = _start(policy, dtype, k, longest_prompt, max_new_tokens,
                                      min(batch_size, len(prompts)))
        engine = _engines[policy]
        engine.collective_rpc("reload_weights", kwargs={"weights_iterator": stock_weights(policy, dtype)})
        engine.apply_model(_pack_head)
        engine.reset_prefix_cache()
        from vllm import SamplingParams

        # a response of `n` has the next seed of the one before it
        settings = [SamplingParams(n=k, seed=seed + i * k, temperature=temperature, max_tokens=max_new_tokens,
                                   logprobs=0, stop_token_ids=[eos_id], ignore_eos=True, detokenize=False)
                    for i in range(len(prompts))]
        found = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings,
                                use_tqdm=False)
    answers = [answer for one in found for answer in sorted(one.outputs, key=lambda answer: answer.index)]
    logprobs = [[step[token].logprob for token, step in zip(answer.token_ids, answer.logprobs, strict=True)]
                for answer in answers]
    return Samples([list(answer.token_ids) for answer in answers], logprobs,
                   [answer.token_ids[-1] == eos_id for answer in answers])


def stock_weights(policy, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights by the names of a checkpoint, with their adapters in them."""
    adapted = {f"{name}.base_layer.weight": layer for name, layer in policy.named_modules()
               if isinstance(layer, LoraLayer)}
    for name, weight in policy.named_parameters():
        if "lora_" in name:
            continue
        if name in adapted:
            layer = adapted[name]
            weight = weight + sum(layer.get_delta_weight(adapter) for adapter in layer.lora_A)
        yield name.replace(".base_layer.", "."), weight.detach().to(dtype)


def _pack_head(model) -> None:
    """On a CPU a layer computes with packed weights, and a head that shares them with the embeddings is not
    packed anew when these are reloaded.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


@atexit.register
def _end() -> None:
    """Before vLLM does it: it destroys groups of processes, which the stage has left by then."""
    for engine in _engines.values():
        with suppress(ValueError):
            engine.llm_engine.engine_core.shutdown()


def _start(policy, dtype: torch.dtype, k: int, longest_prompt: int, max_new_tokens: int, batch_size: int):
    """An engine for this model, without its weights."""
    # in this process, so that it can be given the weights; without its lines on what it does
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM

    config = policy.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    longest = longest_prompt + max_new_tokens
    # of its cache: a prompt is stored once for its K responses; one block is vLLM's own
    tokens = batch_size * (longest_prompt + _BLOCK + k * (max_new_tokens + _BLOCK)) + _BLOCK
    with tempfile.TemporaryDirectory() as folder, _settings_kept():
        policy.config.save_pretrained(folder)
        try:
            return LLM(
                folder, load_format="dummy", skip_tokenizer_init=True, generation_config="vllm", dtype=dtype,
                hf_overrides={"architectures": [type(policy).__name__]},  # a config that was made has none
                max_model_len=longest, max_num_seqs=batch_size * k,
                # it cannot take back the random number of a prompt that is read in parts, on a CPU
                enable_chunked_prefill=False, max_num_batched_tokens=max(8192, longest),
                kv_cache_memory_bytes=2 * config.num_hidden_layers * heads * width * dtype.itemsize * tokens,
                gpu_memory_utilization=0.01,  # without effect beside the line above, but so much must be free
                logprobs_mode="processed_logprobs",  # at the temperature
                enforce_eager=policy.device.type == "cpu",  # to compile takes half a minute there
                distributed_executor_backend="external_launcher" if world().num_processes > 1 else "uni")
        except Exception as error:  # pydantic's, assertions, and whatever a model leads to
            reason = " ".join(str(error).split())
            raise UserError(f"rollout_engine: vLLM cannot run this model ({reason}); take rollout_engine "
                            "'own'") from None


@contextmanager
def _settings_kept():
    """vLLM seeds torch, and on a CPU takes one thread and makes that final."""
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    with torch.random.fork_rng():
        yield
    torch.set_num_threads = set_threads
    torch.set_num_threads(threads)
