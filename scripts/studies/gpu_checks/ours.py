"""Our side of each comparison: a step, as the stage scripts have it, over one batch."""

import random
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from typing import NamedTuple
from unittest import mock

import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from studies.gpu_checks.device import DEVICE, ON_CARD, arithmetic
from utils.models import flex, generation
from utils.models.compiled import compile_layers
from utils.models.generation import sample
from utils.models.loading import in_blocks, with_our_heads
from utils.models.outputs import response_logprobs, scores
from utils.models.policy_value import PolicyAndValue
from utils.models.prompt_groups import micro_batches, pack
from utils.ppo import gae, kl_estimate, policy_loss, token_rewards, value_loss, whiten

LEARNING_RATE, ADAM_EPS, CLIP_NORM = 1e-5, 1e-5, 1.0
TEMPERATURE, KL_COEF, PPO_EPOCHS = 0.7, 0.05, 4
PASS_TOKENS = 16384  # of a forward pass that is trained on, on both sides
PAD = 1


class Batch(NamedTuple):
    """What a step works on, in token ids; K completions for each prompt."""

    prompts: list[list[int]]
    completions: list[list[list[int]]]


def random_batch(
    posts: int, k: int, prompt: int, completion: tuple[int, int], vocabulary: int, seed: int = 0
) -> Batch:
    """Prompts of one length, completions of lengths between the two given."""
    draw = random.Random(seed)

    def tokens(count):
        return [draw.randrange(3, vocabulary) for _ in range(count)]

    return Batch(
        [tokens(prompt) for _ in range(posts)],
        [[tokens(draw.randint(*completion)) for _ in range(k)] for _ in range(posts)],
    )


def random_model(config, scalar: bool):
    """A stock model with random weights in float32, made on the device; the same weights each time."""
    torch.manual_seed(int(scalar))
    auto_class = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
    with DEVICE:
        return auto_class.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def weights_of(precision: str) -> torch.dtype:
    """The number type of a sampled model's weights."""
    return torch.bfloat16 if precision == "bf16 weights" else torch.float32


def our_model(config, scalar: bool):
    """`random_model` with our attention and heads."""
    return with_our_heads(in_blocks(random_model(config, scalar)))


@contextmanager
def paced(recorded: bool):
    """Inside, sampling records a decoding step and replays it, or launches each kernel. On a CPU "recorded"
    is a card's pace without a recording, so that the shrunken check goes the same way.
    """
    pace = generation.PACE_CUDA._replace(recorded=recorded)
    with mock.patch.object(generation, "PACE_CUDA", pace):
        if ON_CARD or not recorded:
            yield
        else:
            with mock.patch.object(generation, "PACE", pace._replace(recorded=False)):
                yield


class Trained:
    """A model with its optimizer."""

    def __init__(self, model, precision: str):
        self.model, self.precision, self.loss = model.train(), precision, None
        self.kernels = (
            torch.backends.cuda.cudnn_sdp_enabled()
        )  # as in_blocks left it; the peer's turns switch it on
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=ADAM_EPS, fused=True)

    def take_kernels(self) -> None:
        torch.backends.cuda.enable_cudnn_sdp(self.kernels)

    def optimizer_step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def first_loss(self) -> float | None:
        return None if self.loss is None else float(self.loss)

    def close(self) -> None:
        del self.model, self.optimizer


def passes_of(batch: Batch, tokens: int = PASS_TOKENS) -> list[list[int]]:
    """Prompt groups of each forward pass."""
    sizes = [len(p) + sum(map(len, group)) for p, group in zip(batch.prompts, batch.completions, strict=True)]
    return micro_batches(sizes, len(sizes), tokens)


def packed(batch: Batch, part: list[int]):
    return pack([batch.prompts[i] for i in part], [batch.completions[i] for i in part], PAD).to(DEVICE)


class Reward(Trained):
    """The reward stage: all pairs of each prompt's completions, the first being the best."""

    def __init__(self, config, batch: Batch, precision: str):
        super().__init__(our_model(config, scalar=True), precision)
        self.batch = batch

    def step(self) -> None:
        self.take_kernels()
        pairs = sum(len(group) * (len(group) - 1) // 2 for group in self.batch.completions)
        total = 0.0
        for part in passes_of(self.batch):
            groups, order, first = packed(self.batch, part), [], 0
            for i in part:
                count = len(self.batch.completions[i])
                order += [(first + a, first + b) for a, b in combinations(range(count), 2)]
                first += count
            with arithmetic(self.precision):
                score = scores(self.model, groups)
            better, worse = score[torch.tensor(order, device=DEVICE)].unbind(1)
            loss = -logsigmoid(better - worse).sum() / pairs
            loss.backward()
            total += loss.detach()
        self.loss = total if self.loss is None else self.loss
        self.optimizer_step()


class SFT(Trained):
    """Supervised fine-tuning with the loss on the completion.

    Args:
        compiled: the layers go through torch.compile, as with `compile_trunk`; on a CPU without a compiler.
    """

    def __init__(self, config, batch: Batch, precision: str, compiled: bool = False):
        super().__init__(our_model(config, scalar=False), precision)
        self.batch = batch
        if compiled:
            backend = "inductor" if ON_CARD else "eager"
            with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)):
                compile_layers(self.model)

    def step(self) -> None:
        self.take_kernels()
        tokens = sum(len(completion) for group in self.batch.completions for completion in group)
        total = 0.0
        for part in passes_of(self.batch):
            with arithmetic(self.precision):
                logprobs = response_logprobs(self.model, packed(self.batch, part), 1.0)
            loss = -logprobs.sum() / tokens
            loss.backward()
            total += loss.detach()
        self.loss = total if self.loss is None else self.loss
        self.optimizer_step()


class PPO(Trained):
    """One PPO update: sampling, scores, reference log-probs, values, and PPO_EPOCHS passes.

    Args:
        shared: a prompt is computed once for its K responses; False: once for each.
    """

    def __init__(self, config, batch: Batch, precision: str, length: int, shared: bool = True):
        reward_model, reference = (
            our_model(config, scalar=True).eval(),
            our_model(config, scalar=False).eval(),
        )
        self.reward_model, self.reference = (
            reward_model.requires_grad_(False),
            reference.requires_grad_(False),
        )
        trained = PolicyAndValue(our_model(config, scalar=False), our_model(config, scalar=True))
        super().__init__(trained, precision)
        k = len(batch.completions[0])
        self.k, self.length, self.eos = (
            (k if shared else 1),
            length,
            config.vocab_size,
        )  # an EOS that no model emits
        self.prompts = batch.prompts if shared else [prompt for prompt in batch.prompts for _ in range(k)]

    def close(self) -> None:
        super().close()
        del self.reward_model, self.reference

    def step(self) -> None:
        self.take_kernels()
        number = len(self.prompts) * self.k
        with torch.no_grad(), arithmetic(self.precision):
            samples = sample(
                self.model.policy,
                self.prompts,
                k=self.k,
                max_new_tokens=self.length,
                temperature=TEMPERATURE,
                seeds=list(range(number)),
                eos_id=self.eos,
                pad_id=PAD,
                batch_size=len(self.prompts),
            )
            responses = [samples.responses[i : i + self.k] for i in range(0, number, self.k)]
            batch, passes = Batch(self.prompts, responses), []
            for part in passes_of(batch):
                groups = packed(batch, part)
                episodes = [i * self.k + j for i in part for j in range(self.k)]
                logprobs = torch.tensor([samples.logprobs[episode] for episode in episodes], device=DEVICE)
                ref_logprobs = response_logprobs(self.reference, groups, TEMPERATURE)
                values = self.model.values(groups)
                kl = kl_estimate(logprobs, ref_logprobs)
                rewards = token_rewards(scores(self.reward_model, groups), kl, groups.response_mask, KL_COEF)
                advantages, returns = gae(rewards, values, groups.response_mask, 1.0, 0.95)
                passes.append((groups, logprobs, values, whiten(advantages, groups.response_mask), returns))
        for _ in range(PPO_EPOCHS):
            for groups, logprobs, values, advantages, returns in passes:
                with arithmetic(self.precision):
                    new_logprobs, _, new_values = self.model(groups, TEMPERATURE)
                losses, _ = policy_loss(new_logprobs, logprobs, advantages, 0.2)
                value_losses, _ = value_loss(new_values, values, returns, 0.2)
                ((losses + 0.1 * value_losses).sum() / (number * self.length)).backward()
            self.optimizer_step()


class Sampling:
    """K responses of a fixed length for each prompt.

    Args:
        precision: "bf16 weights" needs no autocast; "bf16" casts float32 weights.
        recorded: whether a card records a decoding step and replays it.
    """

    def __init__(self, config, batch: Batch, precision: str, length: int, recorded: bool = True):
        self.policy = our_model(config, scalar=False).to(weights_of(precision)).eval()
        self.prompts, self.k, self.length = batch.prompts, len(batch.completions[0]), length
        self.precision, self.recorded, self.eos = precision, recorded, config.vocab_size
        self.kernels = torch.backends.cuda.cudnn_sdp_enabled()

    def step(self) -> None:
        torch.backends.cuda.enable_cudnn_sdp(self.kernels)
        with torch.no_grad(), arithmetic(self.precision), paced(self.recorded):
            sample(
                self.policy,
                self.prompts,
                k=self.k,
                max_new_tokens=self.length,
                temperature=TEMPERATURE,
                seeds=list(range(len(self.prompts) * self.k)),
                eos_id=self.eos,
                pad_id=PAD,
                batch_size=len(self.prompts),
            )

    def first_loss(self) -> None:
        return None

    def close(self) -> None:
        del self.policy


class LongPrompt(Trained):
    """The update of a policy on one long prompt with many answers, whose log-probs and advantages are given.

    Args:
        shared: all answers in the prompt's row; False: each in a row of its own.
        fewest: tokens of a row from which on FlexAttention is used; None: as everywhere.
    """

    def __init__(self, config, batch: Batch, precision: str, shared: bool = True, fewest: int | None = None):
        super().__init__(our_model(config, scalar=False), precision)
        self.fewest = flex.FEWEST if fewest is None else fewest
        if not shared:
            batch = Batch(
                [p for p, group in zip(batch.prompts, batch.completions, strict=True) for _ in group],
                [[completion] for group in batch.completions for completion in group],
            )
        self.batch = batch

    def step(self) -> None:
        self.take_kernels()
        tokens = sum(len(completion) for group in self.batch.completions for completion in group)
        for part in passes_of(self.batch, 2 * PASS_TOKENS):
            groups = packed(self.batch, part)
            advantages = torch.ones(groups.response_mask.shape, device=DEVICE)
            with arithmetic(self.precision), mock.patch.object(flex, "FEWEST", self.fewest):
                new_logprobs = response_logprobs(self.model, groups, TEMPERATURE)
            losses, _ = policy_loss(new_logprobs, new_logprobs.detach(), advantages, 0.2)
            (torch.where(groups.response_mask, losses, 0.0).sum() / tokens).backward()
        self.optimizer_step()
