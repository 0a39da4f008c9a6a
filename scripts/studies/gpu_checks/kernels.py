"""Part a: what only a card takes (FlexAttention, causal kernels without a mask, a recorded decoding step),
and each engine of sampling against the softmax.

On a CPU FlexAttention runs uncompiled and without a backward pass, and nothing is recorded.
"""

import math
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import partial
from unittest import mock

import torch
from transformers import AttentionInterface

from studies.gpu_checks.device import DEVICE, ON_CARD, arithmetic, milliseconds, now
from studies.gpu_checks.equalities import compared, prompt_groups
from studies.gpu_checks.families import EOS, PAD, VOCABULARY, our_model, random_groups, stock_model
from studies.gpu_checks.ours import paced
from studies.gpu_checks.results import Outcome, Results
from utils.models import attention as models_attention
from utils.models import flex
from utils.models.attention import CAUSAL_BLOCKS
from utils.models.flex import GroupMask
from utils.models.generation import sample
from utils.models.prompt_groups import branches, pack
from utils.rollouts.continuous import sample_continuously

LENGTHS = (1500, 4000) if ON_CARD else (300,)  # tokens of a row
HEADS, KEY_HEADS, WIDTH = (12, 4, 64) if ON_CARD else (4, 2, 8)
TEMPERATURE, COLD = 0.7, 0.1  # the colder one makes some words frequent enough to be counted
DECODED = 40 if ON_CARD else 12  # tokens of each branch
# of the log-probs of the same tokens, sampled twice: kernels may add in another order
LOGPROB_LIMITS = {"fp32": 1e-3, "bf16": 0.1}
SAMPLES = 2000 if ON_CARD else 600
Z_LIMIT = 5.0  # Pearson's statistic, in its own standard deviations above its mean


def run(results: Results) -> None:
    torch.set_float32_matmul_precision("highest")  # no TF32
    for precision in ("bf16", "fp32"):
        for kind in ("FlexAttention", "causal kernel"):
            for length in LENGTHS:
                name = f"{kind}, {length} tokens, {precision}"
                results.check(name, 3, partial(attention, kind, length, precision))
    for precision in ("fp32", "bf16"):
        for family in ("OPT", "Llama, grouped queries"):
            name = f"recorded decoding, {family}, {precision}"
            results.check(name, 3, partial(decoding, family, precision))
    for family, precision in (("OPT", "bf16"), ("Llama, grouped queries", "fp32")):  # kernels of their own
        name = f"prompt groups by FlexAttention, {family}, {precision}"
        results.check(name, 10, partial(groups_by_flex, family, precision))
    for engine in ("own", "transformers"):  # last: another's engine may hang
        results.check(f"sampling by '{engine}' follows the softmax", 5, partial(distribution, engine))


# -------------------------------------------------------------------------------------------------- attention


@contextmanager
def flex_everywhere():
    """Inside, rows of any length take FlexAttention; yields a list of why it was not used, if it was not."""
    said, attend = [], flex.attend

    def watched(*args):
        found = attend(*args)
        if found is None and not said:  # it was tried before, and its fault said then
            said.append("FlexAttention is not used")
        return found

    with (mock.patch.object(flex, "FEWEST", 1), mock.patch.object(flex, "say_once", said.append),
          mock.patch.object(models_attention, "attend", watched)):
        if ON_CARD:
            yield said
            return
        eager = partial(torch.compile, backend="eager")
        with mock.patch.object(flex, "DEVICE", "cpu"), mock.patch.object(torch, "compile", eager):
            yield said


def attention(kind: str, length: int, precision: str) -> Outcome:
    """One implementation against SDPA with the whole mask in float64, beside SDPA in the same arithmetic."""
    plain = kind == "causal kernel"
    sizes = [length * 3 // 5, length * 3 // 10]
    completions = [[[6] * (length // 10)] * (1 if plain else 4)] * 2
    if plain:
        completions = [[[6] * (length - size)] for size in (sizes[0], length // 3)]
    groups = pack([[5] * size for size in sizes], completions, PAD).to(DEVICE)
    mask = GroupMask(branches(groups), groups.position_ids)
    if mask.causal != plain:
        return Outcome({}, f"the rows are {'not ' * plain}of one sequence each")
    rows, width = groups.input_ids.shape
    real = (groups.owners >= 0)[:, :, None, None]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(rows, heads, width, WIDTH, generator=generator).to(DEVICE)
              for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    weights = torch.randn(rows, width, HEADS, WIDTH, generator=generator).to(DEVICE) * real
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // KEY_HEADS
    backward = ON_CARD or plain

    def attend(name, seen, dtype):
        own = [x.to(dtype, copy=True).requires_grad_(backward) for x in inputs]
        output = AttentionInterface()[name](module, *own, seen, dropout=0.0, scaling=WIDTH**-0.5)[0] * real
        found = {"outputs": output.detach()}
        if backward:
            names = ("queries' gradient", "keys' gradient", "values' gradient")
            found |= zip(names, torch.autograd.grad(output, own, weights.to(dtype)), strict=True)
        return found

    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    with torch.set_grad_enabled(backward), flex_everywhere() as said:
        reference = attend("sdpa", mask.dense, torch.float64)
        began = now()
        ours = attend(CAUSAL_BLOCKS, mask, dtype)
        first = now() - began
        outcome = compared(reference, ours, attend("sdpa", mask.dense, dtype), precision)
        outcome.figures["first call: s"] = first  # with the compiler's time
        outcome.figures["ours: ms"] = milliseconds(partial(attend, CAUSAL_BLOCKS, mask, dtype))
        outcome.figures["sdpa with a mask: ms"] = milliseconds(partial(attend, "sdpa", mask.dense, dtype))
    return _with(outcome, said)


def groups_by_flex(family: str, precision: str) -> Outcome:
    """Whole models by FlexAttention against separate rows, as part a does it for short rows."""
    with flex_everywhere() as said:
        outcome = prompt_groups(family, precision, gradients=ON_CARD)
    return _with(outcome, said)


def _with(outcome: Outcome, said: list[str]) -> Outcome:
    """An outcome that is wrong besides for what was said."""
    return outcome._replace(wrong="; ".join(filter(None, [*said, outcome.wrong])) or None)


# ------------------------------------------------------------------------------------------ decoding, engines


def decoding(family: str, precision: str) -> Outcome:
    """A recorded step against ordinary ones with the same seeds: the same tokens with the same log-probs."""
    policy = our_model(stock_model(family, scalar=False))
    prompts, _ = random_groups(4)
    found = {}
    with torch.no_grad(), arithmetic(precision), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for recorded in (False, True):
            with paced(recorded):
                found[recorded] = sample(
                    policy, prompts, k=4, max_new_tokens=DECODED, temperature=TEMPERATURE,
                    seeds=list(range(4 * len(prompts))), eos_id=EOS, pad_id=PAD)
    same, off = 0, 0.0
    for tokens, others, logprobs, theirs in zip(
            found[False].responses, found[True].responses, found[False].logprobs, found[True].logprobs,
            strict=True):
        common = next((i for i, pair in enumerate(zip(tokens, others, strict=False)) if pair[0] != pair[1]),
                      min(len(tokens), len(others)))
        same += tokens == others
        off = max([off, *(abs(a - b) for a, b in zip(logprobs[:common], theirs[:common], strict=True))])
    wrong = [str(one.message) for one in caught if "recorded" in str(one.message)]
    limit, count = LOGPROB_LIMITS[precision], len(found[True].responses)
    if not off <= limit:
        wrong.append(f"log-probs of the same tokens are {off:.1e} apart, above {limit:.0e}")
    if precision == "fp32" and same < 0.9 * count:
        wrong.append(f"only {same} of {count} responses are the same")
    return Outcome({"largest difference of a log-prob": off, "same responses": same, "of": count},
                   "; ".join(wrong) or None)


def distribution(engine: str) -> Outcome:
    """First and second tokens of many responses against their exact probabilities: Pearson's statistic.

    Its mean is the number of words less one, and its variance twice that.
    """
    stock = stock_model("OPT", scalar=False)
    policy, prompt, none = our_model(stock), random_groups(1)[0][-1], -1  # an EOS that is no token
    settings = {"k": SAMPLES, "max_new_tokens": 2, "temperature": COLD, "eos_id": none, "pad_id": PAD}
    if engine == "own":
        found = sample(policy, [prompt], seeds=list(range(SAMPLES)), **settings)
    else:
        found = sample_continuously(policy, [prompt], seed=0, **settings)
    [first] = next_token(stock, [prompt])
    after = next_token(stock, [[*prompt, word] for word in range(VOCABULARY)])  # a row for each first token
    exact = torch.stack([first, first @ after])
    z = {f"{place} tokens: z": pearson([tokens[number] for tokens in found.responses], exact[number])
         for number, place in enumerate(("first", "second"))}
    drift = max(abs(a - math.log(first[x])) + abs(b - math.log(after[x, y]))
                for (a, b), (x, y) in zip(found.logprobs, found.responses, strict=True))
    wrong = [f"{name} is {value:.1f}" for name, value in z.items() if not value <= Z_LIMIT]
    if not drift <= LOGPROB_LIMITS["fp32"]:
        wrong.append(f"the engine's log-probs are {drift:.1e} off")
    return Outcome({**z, "largest difference of a log-prob": drift, "responses": len(found.responses)},
                   "; ".join(wrong) or None)


@torch.no_grad()
def next_token(model, rows: list[list[int]]) -> torch.Tensor:
    """Probabilities of the token after each row, float64 (rows, V) on the CPU."""
    logits = model(torch.tensor(rows, device=DEVICE)).logits[:, -1]
    return (logits.double() / COLD).softmax(-1).cpu()


def pearson(tokens: list[int], probabilities: torch.Tensor) -> float:
    """Pearson's statistic less its mean, in its standard deviations. Words that are expected at most five
    times count as one.
    """
    counts, expected = Counter(tokens), probabilities * len(tokens)
    observed = torch.tensor([counts[word] for word in range(len(expected))]).to(expected)
    often = expected > 5
    observed, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (observed, expected))
    if expected[-1] <= 5:
        observed, expected = observed[:-1], expected[:-1]
    freedom = len(expected) - 1
    return float(((observed - expected).square() / expected).sum() - freedom) / math.sqrt(2 * freedom)
