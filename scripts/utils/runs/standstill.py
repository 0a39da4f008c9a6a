"""Whether a run has learnt: its loss, or PPO's score, in the first third of the run against the last."""

from statistics import fmean, variance

# stage -> metric, its name for people, and the direction in which training moves it
_WATCHED = {"sft": ("sft/loss", "the loss", -1), "reward": ("reward/loss", "the loss", -1),
            "ppo": ("objective/score", "the reward model's score", 1)}
_LEAST = 6  # values, two in each third
_SHARE = 0.03  # of a loss, that is no more than hardly moved


def standstill(rows: list[dict], stage: str, learning_rate: float) -> str | None:
    """A warning when a run has hardly moved what it trains; None when it has, or is too short to tell.

    Args:
        rows: of metrics.jsonl.
    """
    metric, name, direction = _WATCHED[stage]
    values = [row[metric] for row in rows if isinstance(row.get(metric), int | float)]
    if len(values) < _LEAST:
        return None
    first, last = values[:len(values) // 3], values[-(len(values) // 3):]
    moved = direction * (fmean(last) - fmean(first))
    # thirds differ by chance as well: two standard errors of the difference of their means
    noise = 2 * (variance(first) / len(first) + variance(last) / len(last)) ** 0.5
    if moved > max(noise, _SHARE * abs(fmean(first)) if stage != "ppo" else 0.0):
        return None
    worse = moved < -noise
    remedy = f"lower than {learning_rate:g}" if worse else f"higher than {learning_rate:g}, or more steps"
    return (f"note: {name} has hardly improved: {fmean(first):.3f} in the first third of the run, "
            f"{fmean(last):.3f} in the last; try a learning_rate {remedy}")
