"""Part a: what this project computes on the device equals separate rows of stock models.

The reference is float64: each row alone through the stock model. Beside our error stands that of stock rows
in the same arithmetic. Errors are ||x - reference|| / ||reference||.
"""

import copy
import math
from functools import partial

import torch
from transformers import AttentionInterface

from studies.gpu_checks.device import DEVICE, ON_CARD, arithmetic, milliseconds
from studies.gpu_checks.families import (
    CONFIGS,
    EOS,
    PAD,
    VOCABULARY,
    our_model,
    random_groups,
    random_tokens,
    stock_model,
)
from studies.gpu_checks.results import Outcome, Results
from utils.models.attention import CAUSAL_BLOCKS
from utils.models.generation import sample
from utils.models.lm_head import LMHead, token_logprobs_and_entropy
from utils.models.outputs import response_logprobs, response_values, scores
from utils.models.prompt_groups import branches, pack, spread

TEMPERATURE = 0.7
KS = (1, 4)
OUTPUT_LIMIT, GRADIENT_LIMIT = 1e-4, 1e-3  # of our errors in float32
# In bfloat16, with its 8 bits of mantissa, stock rows are off as well. Ours may be off by twice as much plus
# a slack, because a norm over three scores is noisy.
STOCK_FACTOR, STOCK_SLACK = 2.0, 1e-2
MEAN_RATIO_LIMIT, RATIO_LIMIT = 1e-5, 1e-4  # of |ratio - 1| of sampled tokens in float32


def run(results: Results) -> None:
    torch.set_float32_matmul_precision("highest")  # no TF32
    for family in CONFIGS:
        for precision in ("fp32", "bf16"):
            results.check(
                f"prompt groups, {family}, {precision}", 3, partial(prompt_groups, family, precision)
            )
            results.check(f"sampling, {family}, {precision}", 3, partial(sampling, family, precision))
    for precision in ("fp32", "bf16"):
        results.check(f"language-model head, {precision}", 3, partial(head, precision))
        for length in (500, 1500):
            results.check(
                f"attention, {length} tokens, {precision}", 3, partial(attention, length, precision)
            )


# ---------------------------------------------------------------------------------------------- prompt groups


def prompt_groups(family: str, precision: str, gradients: bool = True) -> Outcome:
    """Log-probs, scores, values and, with `gradients`, the gradients of all weights, for K = 1 and 4."""
    figures, wrong = {}, []
    for k in KS:
        prompts, completions = random_groups(k)
        groups = pack(prompts, completions, PAD).to(DEVICE)
        rows = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
        for scalar in (False, True):
            stock = stock_model(family, scalar)
            stock_outputs = partial(_stock_scalars if scalar else _stock_logprobs, rows=rows, groups=groups)
            our_outputs = partial(_scalars if scalar else _logprobs, groups=groups)
            with torch.set_grad_enabled(gradients):
                reference = _measured(copy.deepcopy(stock).double(), stock_outputs, "fp32")
                ours = _measured(our_model(stock), our_outputs, precision)
                theirs = _measured(stock, stock_outputs, precision)
            for name, expected in reference.items():
                error, stock_error = relative(ours[name], expected), relative(theirs[name], expected)
                what = f"{'value_' * (scalar and name == 'gradients')}{name}, K = {k}"
                figures[what] = {"ours": error, "stock": stock_error}
                limit = _limit(
                    GRADIENT_LIMIT if name == "gradients" else OUTPUT_LIMIT, stock_error, precision
                )
                if not error <= limit:
                    wrong.append(f"{what}: {error:.1e}, above {limit:.1e}")
    return Outcome(figures, "; ".join(wrong) or None)


def _measured(model, outputs, precision) -> dict[str, torch.Tensor]:
    """What `outputs(model)` gives by name. Where gradients are on, also those of a weighted sum of it."""
    with arithmetic(precision):
        found = outputs(model)
        if not torch.is_grad_enabled():
            return found
        generator = torch.Generator().manual_seed(0)
        total = sum(
            (value * torch.randn(value.shape, generator=generator).to(value)).sum()
            for value in found.values()
        )
    total.backward()
    gradients = torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])
    return {**{name: value.detach() for name, value in found.items()}, "gradients": gradients}


def _logprobs(policy, groups):
    return {"log-probs": _above_uniform(response_logprobs(policy, groups, TEMPERATURE), groups)}


def _above_uniform(logprobs, groups):
    """Log-probs (N, R) minus the uniform distribution's, which hide a relative error. Padding stays 0."""
    return logprobs + math.log(VOCABULARY) * groups.response_mask


def _scalars(model, groups):
    return {"scores": scores(model, groups), "values": response_values(model, groups)}


def _stock_logprobs(policy, rows, groups):
    found = []
    for prompt, completion in rows:
        logits = policy(torch.tensor([prompt + completion], device=DEVICE)).logits[0, len(prompt) - 1 : -1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        tokens = torch.tensor(completion, device=DEVICE)
        found.append((logits / TEMPERATURE).log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
    return {"log-probs": _above_uniform(spread(torch.cat(found), groups), groups)}


def _stock_scalars(model, rows, groups):
    last, before = [], []
    for prompt, completion in rows:
        row = torch.tensor([prompt + completion], device=DEVICE)
        last.append(model(row).logits[0, 0])
        states = model.base_model(row).last_hidden_state[0, len(prompt) - 1 : -1]
        before.append(model.score(states)[:, 0])
    values = torch.cat(before)
    values = values if values.dtype == torch.float64 else values.float()
    return {"scores": torch.stack(last).to(values), "values": spread(values, groups)}


def _limit(slack: float, stock_error: float, precision: str) -> float:
    """Of our error, beside that of stock rows in the same arithmetic."""
    return STOCK_FACTOR * stock_error + (STOCK_SLACK if precision == "bf16" else slack)


def relative(x: torch.Tensor, reference: torch.Tensor) -> float:
    """||x - reference|| / ||reference||."""
    reference = reference.double()
    return float((x.double() - reference).norm() / reference.norm())


# --------------------------------------------------------------------------------------------------- sampling


def sampling(family: str, precision: str) -> Outcome:
    """The log-probs of sampling against those of a forward pass over the same tokens: the first ratio."""
    policy = our_model(stock_model(family, scalar=False))
    prompts, _ = random_groups(4)
    with torch.no_grad(), arithmetic(precision):
        samples = sample(
            policy,
            prompts,
            k=4,
            max_new_tokens=32,
            temperature=TEMPERATURE,
            seeds=list(range(4 * len(prompts))),
            eos_id=EOS,
            pad_id=PAD,
        )
        groups = pack(prompts, [samples.responses[4 * i : 4 * i + 4] for i in range(len(prompts))], PAD).to(
            DEVICE
        )
        found = response_logprobs(policy, groups, TEMPERATURE)[groups.response_mask]
    sampled = torch.tensor([value for row in samples.logprobs for value in row], device=DEVICE)
    off = (found - sampled).exp().sub(1).abs()
    mean, largest = float(off.mean()), float(off.max())
    wrong = None
    if precision == "fp32" and not (mean <= MEAN_RATIO_LIMIT and largest <= RATIO_LIMIT):
        wrong = (
            f"|ratio - 1|: mean {mean:.1e} of at most {MEAN_RATIO_LIMIT:.0e}, "
            f"largest {largest:.1e} of at most {RATIO_LIMIT:.0e}"
        )
    if not torch.isfinite(off).all():
        wrong = "a log-probability is not finite"
    return Outcome({"mean |ratio - 1|": mean, "largest |ratio - 1|": largest, "tokens": len(off)}, wrong)


# ----------------------------------------------------------------------------------------- head and attention


def head(precision: str) -> Outcome:
    """Our head at OPT's vocabulary against log-softmax in float64: log-probs, entropy, and gradients."""
    tokens, width, words = (256, 768, 50272) if ON_CARD else (40, 64, 1009)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, width, generator=generator)
    linear = torch.nn.Linear(width, words)
    with torch.no_grad():
        linear.weight.normal_(std=width**-0.5, generator=generator)
    chosen = torch.tensor(random_tokens(tokens, generator, words))
    weights = torch.randn(tokens, generator=generator)

    def measured(layer, dtype, ours):
        inputs = states.to(DEVICE, dtype, copy=True).requires_grad_()
        layer = layer.to(DEVICE, dtype)
        with arithmetic(precision if dtype == torch.float32 else "fp32"):
            if ours:
                layer.__class__ = LMHead
                found, entropy = token_logprobs_and_entropy(layer, inputs, chosen.to(DEVICE), TEMPERATURE)
            else:
                logits = layer(inputs)
                table = (
                    (logits if dtype == torch.float64 else logits.float()).div(TEMPERATURE).log_softmax(-1)
                )
                found, entropy = (
                    table.gather(-1, chosen.to(DEVICE)[:, None])[:, 0],
                    -(table.exp() * table).sum(-1),
                )
        (found * weights.to(found)).sum().backward()
        return {
            "log-probs": found.detach(),
            "entropy": entropy.detach(),
            "states' gradient": inputs.grad,
            "weight's gradient": layer.weight.grad,
            "bias's gradient": layer.bias.grad,
        }

    reference = measured(copy.deepcopy(linear), torch.float64, ours=False)
    ours = measured(copy.deepcopy(linear), torch.float32, ours=True)
    stock = measured(copy.deepcopy(linear), torch.float32, ours=False)
    return compared(reference, ours, stock, precision)


def attention(length: int, precision: str) -> Outcome:
    """Attention in blocks against one call of SDPA, under prompt groups' mask: outputs, gradients, time."""
    prompt = length * 3 // 5
    sizes = [length // 10] * 4
    groups = pack([[5] * prompt, [5] * (prompt // 2)], [[[6] * size for size in sizes]] * 2, PAD).to(DEVICE)
    mask = branches(groups).dense
    shape = (len(mask), 12, mask.shape[-1], 64) if ON_CARD else (len(mask), 2, mask.shape[-1], 8)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=generator).to(DEVICE) for _ in range(4)
    ]  # query, key, value, gradient

    def attend(name, dtype):
        query, key, value, gradient = (
            x.to(dtype, copy=True).requires_grad_(i < 3) for i, x in enumerate(inputs)
        )
        found = AttentionInterface()[name](torch.nn.Module(), query, key, value, mask, dropout=0.0)[0]
        found.backward(gradient.transpose(1, 2))
        return {
            "outputs": found.detach(),
            "queries' gradient": query.grad,
            "keys' gradient": key.grad,
            "values' gradient": value.grad,
        }

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    reference = attend("sdpa", torch.float64)
    outcome = compared(reference, attend(CAUSAL_BLOCKS, dtype), attend("sdpa", dtype), precision)
    for name in ("sdpa", CAUSAL_BLOCKS):
        outcome.figures[f"{name}: ms"] = milliseconds(partial(attend, name, dtype))
    return outcome


def compared(reference, ours, stock, precision) -> Outcome:
    """The error of each of our tensors, and of stock ones, against those in float64, all by name."""
    figures, wrong = {}, []
    for name, expected in reference.items():
        error, stock_error = relative(ours[name], expected), relative(stock[name], expected)
        figures[name] = {"ours": error, "stock": stock_error}
        limit = _limit(GRADIENT_LIMIT if "gradient" in name else OUTPUT_LIMIT, stock_error, precision)
        if not error <= limit:
            wrong.append(f"{name}: {error:.1e}, above {limit:.1e}")
    return Outcome(figures, "; ".join(wrong) or None)
