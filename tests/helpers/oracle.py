"""The oracle of many tests: the stock forward pass on plain rows, which never sees our masks."""

import torch
from torch.nn.utils.rnn import pad_sequence

from families import PAD

TEMPERATURE = 0.7


def each_row(prompts, completions):
    """(prompt, completion) of each completion of each prompt."""
    groups = zip(prompts, completions, strict=True)
    return [(prompt, completion) for prompt, group in groups for completion in group]


def stock_logprobs(model, prompt, completion):
    """Log-probs of the completion's tokens and entropies, (R,) each, from one plain row."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    logits = logits[len(prompt) - 1 : -1] / TEMPERATURE
    entropy = torch.distributions.Categorical(logits=logits).entropy().detach()
    return logits.log_softmax(-1)[torch.arange(len(completion)), completion], entropy


def stock_scores(model, rows, pad=PAD):
    """(N,) scores by the stock forward on right-padded rows; it finds the last token by `pad_token_id`."""
    padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    return model(input_ids=padded, attention_mask=mask).logits[:, 0]
