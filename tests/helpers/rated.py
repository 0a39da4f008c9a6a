"""Databases of ratings with known content."""

import itertools

from utils.data.conversations import stored_conversation
from utils.feedback.database import Ratings

TALK = stored_conversation([{"role": "system", "content": "Be brief."},
                            {"role": "user", "content": "Shade?"}])
_keys = itertools.count()


def database(path, prompts=("a post",), policies=("old",), k=4, seed=0) -> Ratings:
    """A database whose prompts have k answers, spread over the policies; an answer is `<policy> <number>`."""
    ratings = Ratings(path, seed=seed)
    ratings.k = k  # for `next_task`
    ratings.add_prompts(prompts, "file")
    ids = {ratings.add_policy(name, f"/models/{name}"): name for name in policies}
    for prompt, _, missing in ratings.to_sample(list(ids), k, 10**6):
        for policy, count in missing.items():
            ratings.add_answers(prompt, policy, [(f" {ids[policy]} {n}", True) for n in range(count)], 1.0)
    return ratings


def ids_of(ratings) -> list[int]:
    return [number for number, _, _ in ratings.policies()]


def next_task(ratings, rater, repeat_share=0.0, overlap_share=0.0):
    return ratings.task(ratings.rater(rater), ratings.k, ids_of(ratings), repeat_share, overlap_share)


def rate(ratings, rater, task, levels=None, kind="ranking", **more) -> int:
    """Rate a task; `levels` are lists of texts, best first."""
    order = levels and [[task.answers.index(text) for text in level] for level in levels]
    return ratings.rate(f"key {next(_keys)}", task.id, ratings.rater(rater), kind, order, **more)


def rank_all(ratings, rater, key=None, **shares) -> int:
    """Rank all that is left for a rater by `key` of the text (the smallest is best); return how many."""
    for count in itertools.count():
        task = next_task(ratings, rater, **shares)
        if task is None:
            return count
        by_key = itertools.groupby(sorted(task.answers, key=key), key=key)
        rate(ratings, rater, task, [list(level) for _, level in by_key])
