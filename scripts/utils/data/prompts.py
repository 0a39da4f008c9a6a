"""The prompts that PPO trains on and is judged on, and the examples of `ptx_coef`."""

from typing import NamedTuple

from utils.data.report import DataReport
from utils.data.rows import NamedSet, Rows, Tokenised, load_data, split_rows, tokenised
from utils.errors import UserError


class Posts(NamedTuple):
    """What the stage reads, as tokens."""

    prompts: list[list[int]]
    validation: Tokenised
    test: Tokenised
    supervised: Tokenised | None  # the examples of `ptx_coef`
    examples: Rows | None = None  # the texts of the prompts

    def rows(self, places: list[int]) -> Rows | None:
        """Some rows of the training data."""
        return self.examples and self.examples.select(places)


def load_posts(config, tokenizer, report: DataReport) -> Posts:
    """Training, validation and test prompts, none in two of them; and the examples of `ptx_coef`."""
    named = {
        "rlhf_training_data": NamedSet(config.rlhf_training_data, "prompts"),
        "rlhf_validation_data": NamedSet(config.rlhf_validation_data, "prompts"),
        "rlhf_test_data": NamedSet(config.rlhf_test_data, "prompts"),
    }
    if config.ptx_coef:
        named["actor_training_data"] = NamedSet(config.actor_training_data, "examples",
                                                config.max_completion_tokens)
    loaded = load_data(config, named, tokenizer, report)
    names = ("rlhf_training_data", "rlhf_validation_data", "rlhf_test_data")
    training, validation, test = split_rows(config, loaded, *names, report)
    report.tokens("rlhf_training_data", training.dataset())
    supervised = loaded.get("actor_training_data")
    if supervised is not None:
        supervised = supervised_examples(config, supervised, [validation, test], report)
    training, validation, test = (tokenised(rows, prompts_only=True) for rows in (training, validation, test))
    return Posts(training.prompts, validation, test, supervised, training.examples)


def supervised_examples(config, examples: Rows, held_out: list[Rows], report) -> Tokenised:
    """The examples of `ptx_coef` without the posts that the policy is judged on."""
    judged = {mark for rows in held_out for mark in rows.prompts()}
    kept = examples.select([mark not in judged for mark in examples.prompts()])
    if len(kept) < len(examples):
        report.log(f"actor_training_data: left out {len(examples) - len(kept)} of {len(examples)} "
                   "examples, whose prompts are held out for validation or test")
    if not len(kept):
        raise UserError(f"actor_training_data: every prompt in '{config.actor_training_data}' is held out "
                        "for validation or test; name the data that train_sft.py learnt from")
    return tokenised(kept.weighed(config.seed))
