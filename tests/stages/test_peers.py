"""The same numbers as trl. What the trl at hand has not is skipped, so this file runs in two environments:

    python -m pytest tests/stages/test_peers.py                  # trl's reward loss, log-probs, entropy
    .venv-bench/bin/python -m pytest tests/stages/test_peers.py  # its last PPO too (requirements-bench.txt)

trl's GAE, token rewards and losses stand inside `PPOTrainer.train`, where no caller reaches them: they are
not compared here.
"""

import importlib.util
import os

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from families import EOS, FAMILIES, PAD, VOCAB, policy, random_groups, scalar_model
from utils.models.generation import _cut
from utils.models.outputs import hidden_states, logprobs_and_entropy, response_values, scores
from utils.models.prompt_groups import pack, response_states
from utils.ppo import masked_moments, mean_var, whiten

trl_utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
PROMPT_SIZES, COMPLETION_SIZES = [5, 2, 9], [[4, 1, 6], [2, 3], [5]]
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
needs_ppo = pytest.mark.skipif(importlib.util.find_spec("trl.experimental.ppo") is None,
                               reason="this trl has no PPO trainer: use requirements-bench.txt")


def in_rows():
    """Prompts and completions as our prompt groups, and as pairs of one prompt and one completion."""
    prompts, completions = random_groups(PROMPT_SIZES, COMPLETION_SIZES)
    single = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
    return pack(prompts, completions, PAD), single


# ---------------------------------------------------------------------------------------------------- any trl


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_entropy(family, temperature):
    model, (groups, single) = policy(family), in_rows()
    logprobs, entropy = logprobs_and_entropy(model, response_states(hidden_states(model, groups), groups),
                                             groups, temperature)
    for n, (prompt, completion) in enumerate(single):
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / temperature
        size = len(completion)
        theirs = trl_utils.selective_log_softmax(logits, torch.tensor(completion))
        torch.testing.assert_close(logprobs[n, :size], theirs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(entropy[n, :size], trl_utils.entropy_from_logits(logits), atol=1e-5,
                                   rtol=1e-5)
        assert not logprobs[n, size:].any() and not entropy[n, size:].any()


PAIRS = [(0, 1), (2, 0), (3, 4)]  # (better, worse) completions of the groups above


@pytest.fixture
def reward_trainer(tmp_path):
    """trl's own trainer around a tiny model; `loss(examples, centring)` is what it would train on."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import RewardConfig, RewardTrainer
    from trl.trainer.reward_trainer import DataCollatorForPreference

    words = {"<s>": 0, "<pad>": PAD, "</s>": EOS, **{f"w{n}": n for n in range(3, VOCAB)}}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<s>")),
                                        pad_token="<pad>",
                                        eos_token="</s>")
    args = RewardConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None)
    model = scalar_model("opt")
    trainer = RewardTrainer(model, args, processing_class=tokenizer,
                            train_dataset=Dataset.from_list([{"chosen_ids": [3, EOS],
                                                              "rejected_ids": [4, EOS]}]))

    def loss(examples, centring):
        trainer.args.center_rewards_coefficient = centring
        model.eval()
        return trainer.compute_loss(model, DataCollatorForPreference(PAD)(examples))

    return model, loss


@pytest.mark.parametrize("margin_of", [lambda n: 0.0, lambda n: 0.5, lambda n: 0.3 * n])  # of the n-th pair
@pytest.mark.parametrize("centring_coef", [0.0, 0.1])
def test_the_reward_loss(margin_of, centring_coef, reward_trainer):
    """trl: -log sigmoid(chosen - rejected - margin), plus coefficient * mean((chosen + rejected)^2), means
    over pairs. Each pair has a margin of its own.
    """
    pytest.importorskip("evaluate", reason="the reward stage needs requirements.txt")
    from train_reward import pairwise_loss

    (model, loss), (groups, single) = reward_trainer, in_rows()
    margins = [margin_of(n) for n in range(len(PAIRS))]
    examples = [{"chosen_ids": sum(single[b], []), "rejected_ids": sum(single[w], []), "margin": margin}
                for (b, w), margin in zip(PAIRS, margins, strict=True)]
    better, worse = torch.tensor(PAIRS).T
    score = scores(model, groups)
    ours = pairwise_loss(score[better], score[worse], torch.tensor(margins), centring_coef).mean()
    theirs = loss(examples, centring_coef)
    torch.testing.assert_close(ours, theirs)
    named = dict(model.named_parameters())
    for a, b in zip(torch.autograd.grad(ours, named.values(), allow_unused=True),
                    torch.autograd.grad(theirs, named.values(), allow_unused=True), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


# --------------------------------------------------------------------------------------------- trl's last PPO


@needs_ppo
def test_masked_mean_variance_and_whitening():
    """Their variance is the sample's: n / (n - 1) times ours, the population's (detail 30). The whitened
    differ so too.
    """
    from trl.experimental.ppo.ppo_trainer import masked_mean, masked_var, masked_whiten

    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(4, 7, generator=generator) + 2
    mask = torch.rand(4, 7, generator=generator) < 0.6
    mean, var = mean_var(masked_moments(x, mask))
    count = mask.sum()
    torch.testing.assert_close(mean.float(), masked_mean(x, mask))
    torch.testing.assert_close(var.float(), masked_var(x, mask, unbiased=False))
    torch.testing.assert_close((var * count / (count - 1)).float(), masked_var(x, mask))
    for shift_mean in (True, False):
        # without the shift the mean is put back after scaling, so only what is around it has the factor
        rest = 0 if shift_mean else mean
        theirs = (masked_whiten(x, mask, shift_mean) - rest) * (count / (count - 1)).sqrt() + rest
        torch.testing.assert_close(whiten(x, mask, shift_mean=shift_mean)[mask], theirs[mask].float(),
                                   check_dtype=False)


@needs_ppo
def test_the_cut_after_the_first_eos():
    from trl.experimental.ppo.ppo_trainer import truncate_response
    from trl.experimental.utils import first_true_indices

    responses = [[5, 6, EOS, 7, EOS], [EOS, EOS, 3, 4, 5], [3, 4, 5, 6, 7], [3, 4, 5, 6, EOS]]
    theirs = truncate_response(EOS, PAD, torch.tensor(responses))
    first = first_true_indices(torch.tensor(responses) == EOS)
    for row, cut, place in zip(responses, theirs.tolist(), first.tolist(), strict=True):
        ours, _, ended = _cut(row, [0.0] * 5, EOS)
        assert ours + [PAD] * (5 - len(ours)) == cut
        assert ended == (place < 5) and len(ours) == min(place + 1, 5)


@needs_ppo
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_values(family):
    """Theirs reads one row for each completion, padded on both sides."""
    from trl.experimental.utils import get_reward

    model, (groups, single) = scalar_model(family), in_rows()
    width = max(PROMPT_SIZES)
    rows = [torch.tensor([PAD] * (width - len(p)) + p + c) for p, c in single]
    logits, rewards, _ = get_reward(model, pad_sequence(rows, batch_first=True, padding_value=PAD), PAD,
                                    width)
    torch.testing.assert_close(scores(model, groups), rewards, atol=1e-4, rtol=1e-4)
    mask = groups.response_mask
    torch.testing.assert_close(response_values(model, groups)[mask], logits[:, width - 1 : -1, 0][mask],
                               atol=1e-4, rtol=1e-4)
