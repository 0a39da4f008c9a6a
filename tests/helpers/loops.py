"""Loops of the three stages around tiny random models, each in a run folder of its own, on the CPU.

A stage's own functions are called with these. `families.py` has the models; 31 tokens, no text.
"""

import tempfile
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, GradientState
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, get_scheduler

import train_ppo
from families import EOS, PAD, VOCAB, policy, random_groups, scalar_model
from utils.data.report import DataReport
from utils.data.rows import Tokenised
from utils.loop import Loop, Schedule
from utils.models.heads import head_scores
from utils.models.outputs import GroupModel, supervised_outputs
from utils.runs.run import Run

PROMPTS = random_groups([5, 1, 8, 3, 6, 4, 7], [[1]] * 7)[0]
_WORDS = {"<s>": 0, "<pad>": PAD, "</s>": EOS, **{f"w{n}": n for n in range(3, VOCAB)}}
TOKENIZER = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(_WORDS, "<s>")),
                                    pad_token="<pad>", eos_token="</s>")


class _Reached(Exception):
    """Ends a function of a stage where a test wants to go on by itself; holds what the function has made."""


def _reached(*made):
    raise _Reached(*made)


def save_parents(folder, family: str = "opt") -> dict[str, str]:
    """Write an SFT and a reward model of a family, float32 with dropout; returns PPO's keys for them."""
    parents = {"model": policy(family), "reward_model": scalar_model(family, seed=1)}
    for key, model in parents.items():
        model.save_pretrained(folder / key)
        TOKENIZER.save_pretrained(folder / key)
    return {key: str(folder / key) for key in parents}


def _prepared(config):
    """The configuration with a new run folder below `output_dir`, and accelerate as in a new process."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it remembers the precision of the test before
    GradientState._reset_state()
    PartialState(cpu=True)
    if not config.resume:
        config = replace(config, output_dir=tempfile.mkdtemp(dir=config.output_dir))
    rate = config.learning_rate or 3e-6  # a stage's `main` chooses one where none is given
    return replace(config, report_to=["none"], learning_rate=rate)


def bare_loop(config, module: torch.nn.Module, schedule: Schedule) -> Loop:
    """A loop around any module; the stage is that of the configuration."""
    config = _prepared(config)
    return Loop(Run(config, config.section, DataReport()), module, TOKENIZER, schedule)


def epoch_loop(config, model, rows: int, balances: bool = False) -> Loop:
    """A loop of the SFT or the reward stage around a stock model, for so many training rows.

    Args:
        balances: SFT computes the loss of the model's routers.
    """
    outputs = head_scores if config.section == "reward" else partial(supervised_outputs, balances=balances)
    return bare_loop(config, GroupModel(model, outputs), config.schedule(rows))


def posts_of(prompts, supervised: Tokenised | None = None) -> train_ppo.Posts:
    """Prompts to train on, nothing held out."""
    return train_ppo.Posts(prompts, Tokenised([], [], None), Tokenised([], [], None), supervised)


def ppo_loop(config) -> tuple[Loop, train_ppo.Models]:
    """Loop and models as `train_ppo.main` makes them."""
    with mock.patch.multiple(train_ppo, load_posts=lambda *_: posts_of(PROMPTS), evaluate=mock.DEFAULT,
                             train=_reached):
        try:
            train_ppo.main(_prepared(config))
        except _Reached as reached:
            loop, models, *_ = reached.args
    return loop, models


def rolled_out(loop: Loop, models, update: int = 1, prompts=PROMPTS):
    """(episodes, rollout) of an update, by `train_ppo.train` as far as its `optimise`; nothing is trained."""
    loop.step = update - 1
    with mock.patch.object(train_ppo, "optimise", lambda loop, models, *made: _reached(*made[:2])):
        try:
            train_ppo.train(loop, models, posts_of(prompts), None, None)
        except _Reached as reached:
            return reached.args


def gradients_of_steps(loop: Loop) -> list[dict[str, torch.Tensor]]:
    """A list that each optimizer step adds its gradients to, by the weights' names, as AdamW gets them."""
    steps, named = [], dict(loop.module.named_parameters())
    loop.optimizer.optimizer.register_step_pre_hook(lambda *_: steps.append(
        {name: weight.grad.clone() for name, weight in named.items() if weight.grad is not None}))
    return steps


def updated(config, supervised: Tokenised | None = None):
    """Figures of one PPO update, the weights after it, the gradients of its steps, and the loop."""
    loop, models = ppo_loop(config)
    steps = gradients_of_steps(loop)
    figures = train_ppo.optimise(loop, models, *rolled_out(loop, models), supervised)
    return figures, weights_of(loop), steps, loop


def weights_of(loop: Loop) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in loop.module.parameters()]


def step_by_sgd(loop: Loop, rate: float) -> None:
    """Plain SGD at a constant rate in place of AdamW, which hides how large a gradient is."""
    loop.optimizer = loop.accelerator.prepare(torch.optim.SGD(loop.module.parameters(), lr=rate))
    loop.scheduler = get_scheduler("constant", loop.optimizer)
