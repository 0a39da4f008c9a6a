"""A reward model as one of the rewards of a run."""

from itertools import pairwise

import torch

from utils.config import UserError
from utils.data.chat import Chat
from utils.data.tokens import completion_tokens, prompt_tokens
from utils.distributed import max_over_ranks, on_all
from utils.models.outputs import scores
from utils.models.parents import Parent
from utils.models.prompt_groups import micro_batches, pack
from utils.rewards.answers import Answers
from utils.rewards.entries import ModelEntry


class ModelReward:
    """A frozen reward model that reads the policy's own tokens.

    Attributes:
        model: the loaded model; `load_models` puts it here.
    """

    reads_text = False

    def __init__(self, entry: ModelEntry, parent: Parent, model=None):
        self.entry, self.parent, self.model = entry, parent, model

    def measure(self, groups) -> torch.Tensor:
        """The score of each completion of a batch of prompt groups, float32 (n,)."""
        return scores(self.model, groups)


class RenderedReward(ModelReward):
    """A frozen reward model with a tokenizer or a chat template of its own, which reads the text once more.

    Args:
        max_prompt_tokens: longer prompts are cut, as everywhere.
        batch_size: prompt groups in a forward pass.
    """

    reads_text = True

    def __init__(self, entry: ModelEntry, parent: Parent, max_prompt_tokens: int, batch_size: int):
        super().__init__(entry, parent)
        self.tokenizer, self.most, self.batch_size = parent.tokenizer, max_prompt_tokens, batch_size
        self.chat = Chat(self.tokenizer) if self.tokenizer.chat_template else None

    @torch.no_grad()
    def of_answers(self, answers: Answers) -> list[float | None]:
        """The model's score of each answer. Every rank must call it, also one without answers.

        Raises:
            UserError: on every rank, when a prompt of one does not fit.
        """
        groups = on_all(lambda: [self._group(answers, first, last) for first, last in _groups(answers)])
        passes = micro_batches([len(prompt) + sum(map(len, texts)) for prompt, texts in groups],
                               self.batch_size)
        measured: list[list[float]] = [[] for _ in groups]
        # pad: every rank must run the same number of forward passes under ZeRO-3
        spare = [[]] * ((max_over_ranks(len(passes)) or 0) - len(passes))
        for part in [*passes, *spare]:
            texts = [groups[i] for i in part] or [([0], [[0]])]
            packed = pack(*zip(*texts, strict=True), self.tokenizer.pad_token_id)
            values = iter(self.measure(packed.to(self.model.device)).tolist())
            for i in part:
                measured[i] = [next(values) for _ in groups[i][1]]
        return sum(measured, [])

    def _group(self, answers: Answers, first: int, last: int) -> tuple[list[int], list[list[int]]]:
        """Token ids of a prompt and of its answers. An answer that did not end has no end here either."""
        prompt, texts = answers.prompts[first], answers.completions[first:last]
        if self.chat is not None:
            asked = answers.messages[first] or [{"role": "user", "content": prompt}]
            kept = self.chat.cut(asked, self.most)
            if kept is None:
                raise UserError(f"{self.parent.key}: the prompt of {answers.places[first]} does not "
                                f"fit into {self.most} tokens of '{self.parent.name}'; raise its "
                                "max_prompt_tokens")
            ids, completions = self.chat.prompt(kept), self.chat.completions(kept, texts)
        else:
            [ids] = prompt_tokens(self.tokenizer, [prompt], self.most)
            completions = completion_tokens(self.tokenizer, [text and f" {text}" for text in texts])
        return list(ids), [list(one) if ended else list(one[:-1]) or list(one) for one, ended in zip(
            completions, answers.ended[first:last], strict=True)]


def _groups(answers: Answers) -> list[tuple[int, int]]:
    """(first, last) of the answers that share a prompt."""
    count = len(answers.prompts)
    starts = [i for i in range(count) if not i or answers.places[i] != answers.places[i - 1]]
    return list(pairwise([*starts, count]))


