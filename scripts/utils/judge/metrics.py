"""Figures that judge a model: ROUGE, pair accuracy, win rate, calibration, and their uncertainty.

Everything runs on the gathered texts or scores, on one process. Nothing here needs a network.
"""

import math
import tempfile
import unicodedata
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import datasets
import evaluate
import numpy as np
import regex
from nltk.stem.porter import PorterStemmer
from rouge_score import rouge_scorer, tokenizers

# per prompt group: (index of the better, index of the worse) completion
Pairs = Sequence[Sequence[tuple[int, int]]]


# Scripts that put no space between words: each letter counts as a word, with the marks that it bears.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_LETTERS = r"\p{L}\p{Nd}\p{Nl}"
# The marks of Devanagari or Arabic are part of the word; so are the joiners (U+200C, U+200D) inside of it.
_WORDS = regex.compile(rf"[[{_LETTERS}]&&[{_UNSPACED}]]\p{{M}}*"
                       rf"|(?:[[{_LETTERS}]--[{_UNSPACED}]][\p{{M}}\u200c\u200d]*)+", regex.VERSION1)


_WIDE = {code + 0xFEE0: code for code in range(0x21, 0x7F)}  # ASCII in the width of Chinese characters


class AnyScript(tokenizers.Tokenizer):
    """Words of any script for ROUGE. (rouge-score's own tokenizer drops all letters but a to z.)

    Words of ASCII letters and digits are stemmed as rouge-score stems them, so that English text gives the
    same words as with its tokenizer.
    """

    def __init__(self):
        self._stemmer = PorterStemmer()

    def tokenize(self, text: str) -> list[str]:
        words = _WORDS.findall(unicodedata.normalize("NFC", text.translate(_WIDE).lower()))
        return [self._stemmer.stem(word) if word.isascii() and len(word) > 3 else word for word in words]


class SummaryRouge(evaluate.Metric):
    """ROUGE-1/2/L with stemming, mean F1 over examples, and `rouge_avg`, their mean (N+; detail 14).

    `compute(predictions=[str], references=[str])` -> {"rouge1", "rouge2", "rougeL", "rouge_avg"}, each in [0,
    1]. Our own class because `evaluate.load("rouge")` downloads code. Raises ValueError when there are no
    examples.
    """

    def __init__(self):
        # In memory no file is written, but the base class makes a folder all the same: make it where it goes
        # away.
        with tempfile.TemporaryDirectory() as folder:
            super().__init__(keep_in_memory=True, cache_dir=folder)

    def _info(self):
        return evaluate.MetricInfo(
            description="ROUGE-1, ROUGE-2, ROUGE-L with stemming and the mean of the three.",
            citation="Lin, 2004. ROUGE: A Package for Automatic Evaluation of Summaries.",
            inputs_description="predictions, references: lists of strings of one length.",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references):
        if len(predictions) == 0:
            raise ValueError("ROUGE of no examples")
        examples = rouge_of_each(predictions, references)
        return {name: float(np.mean([example[name] for example in examples])) for name in examples[0]}


def rouge_of_each(predictions: Sequence[str], references: Sequence[str]) -> list[dict[str, float]]:
    """For each prediction "rouge1", "rouge2", "rougeL", F1 with stemming, and their mean "rouge_avg"."""
    names, each = ["rouge1", "rouge2", "rougeL"], []
    scorer = rouge_scorer.RougeScorer(names, tokenizer=AnyScript())
    for prediction, reference in zip(predictions, references, strict=True):
        score = scorer.score(target=reference, prediction=prediction)
        found = {name: score[name].fmeasure for name in names}
        each.append(found | {"rouge_avg": float(np.mean(list(found.values())))})
    return each


def _wins(ours, theirs):
    """1 where ours is greater, 0.5 at a tie, 0 elsewhere; for numbers and for arrays."""
    return (ours > theirs) + 0.5 * (ours == theirs)


def pair_accuracy(scores: Sequence[Sequence[float]], pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Correct counts (G,) and pair counts (G,), float, of G prompt groups; a tie counts one half (detail 20).

    `scores[g][i]` scores completion i of group g. `bootstrap_interval` takes the two arrays.
    """
    correct = [
        sum(_wins(group[better], group[worse]) for better, worse in group_pairs)
        for group, group_pairs in zip(scores, pairs, strict=True)
    ]
    return np.array(correct, dtype=float), np.array([len(group_pairs) for group_pairs in pairs], dtype=float)


def bootstrap_interval(
    numerators: Sequence[float], denominators: Sequence[float], posts: Sequence[Hashable], seed: int,
    resamples: int = 2000, level: float = 0.95
) -> tuple[float, float, float]:
    """Ratio sum(numerators) / sum(denominators) and its bootstrap interval over posts: (mean, low, high).

    Posts are drawn again, each with all its rows: what is said of one post is not independent, and rows that
    repeat each other must not narrow the interval. Posts with denominator 0 say nothing and are left out.

    Args:
        numerators, denominators, posts: (N,), one entry for each row. Rows of one post have equal `posts`.

    Raises:
        ValueError: when no post remains.
    """
    numbers = {post: number for number, post in enumerate(dict.fromkeys(posts))}
    places = [numbers[post] for post in posts]
    sums, counts = (np.bincount(places, weights=np.asarray(values, dtype=float))
                    for values in (numerators, denominators))  # (number of posts,) each
    sums, counts = sums[counts > 0], counts[counts > 0]
    if not len(sums):
        raise ValueError("nothing to average: every denominator is 0")
    drawn = np.random.default_rng(seed).integers(len(sums), size=(resamples, len(sums)))
    ratios = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)  # (resamples,)
    tail = each_tail(level, len(sums))
    low, high = np.quantile(ratios, [tail, 1 - tail])
    return float(sums.sum() / counts.sum()), float(low), float(high)


def each_tail(level: float, posts: int) -> float:
    """Share of the resamples beyond each end of an interval.

    Plain percentiles are too narrow for few posts: at 20 they cover 91 % in place of 95 %. The expanded
    percentile interval (Hesterberg, 1411.5279) widens them as Student's t does for a mean, by sqrt(n/(n - 1))
    and the quantile of t; that is expanded here around the normal one (Cornish and Fisher).
    """
    if posts == 1:
        return 0.0
    z, freedom = NormalDist().inv_cdf((1 + level) / 2), posts - 1
    t = (z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
         + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3))
    return NormalDist().cdf(-t * math.sqrt(posts / freedom))


def label_ceiling(label_scores: Sequence[Sequence[float]], pairs: Pairs) -> float:
    """Accuracy that no reward model can exceed: mean over all pairs of max(p, 1 - p).

    p = sigmoid(difference of the label scores) is the chance that a noisy (Bradley-Terry) labeller prefers
    the first; even who knows p is right with max(p, 1 - p) only. Raises ValueError when there is no pair.
    """
    gaps = [abs(g[i] - g[j]) for g, group_pairs in zip(label_scores, pairs, strict=True)
            for i, j in group_pairs]
    if not gaps:
        raise ValueError("no pairs")
    return float(np.mean(1 / (1 + np.exp(-np.array(gaps)))))  # sigmoid(|difference|) is max(p, 1 - p)


def win_rate(ours: Sequence[float], theirs: Sequence[float], posts: Sequence[Hashable],
             seed: int) -> tuple[float, float, float]:
    """How often ours beats theirs on the same prompt: (rate, low, high), ties one half (detail 37).

    All (N,), one entry for each row; the 95 % interval is over posts, see `bootstrap_interval`.
    """
    wins = _wins(np.asarray(ours), np.asarray(theirs))
    return bootstrap_interval(wins, np.ones(len(wins)), posts, seed)


def length_controlled_win_rate(
    ours: Sequence[float], theirs: Sequence[float], our_lengths: Sequence[float],
    their_lengths: Sequence[float]
) -> float:
    """How often ours would beat theirs if both were equally long, in (0, 1): much of the preference is length
    (detail 37).

    All (N,), one number per prompt; lengths in any one unit. Fits p(win) = sigmoid(a + b * log(our length /
    their length)) by logistic regression, a tie being half a win, and gives sigmoid(a). Sources: the control
    for length is ST's (the log of the ratio); the figure is that of AlpacaEval 2.0 (Dubois et al.,
    2404.04475). Where our length decides without exception a and b have no finite fit: a ridge of 1e-6 a
    prompt keeps them finite and moves other figures by less than 1e-5.

    Raises:
        ValueError: for no prompts, and for a length that is not positive, which has no logarithm.
    """
    if len(ours) == 0:
        raise ValueError("a win rate over no prompts")
    lengths = np.array([our_lengths, their_lengths], dtype=float)
    if not (lengths > 0).all():
        raise ValueError("a length is not positive; count the EOS as a token")
    logratios = np.log(lengths[0] / lengths[1])
    inputs = np.column_stack([np.ones(len(logratios)), logratios])
    intercept = _logistic_fit(inputs, _wins(np.asarray(ours), np.asarray(theirs)))[0]
    return float(1 / (1 + np.exp(-intercept)))


def _logistic_fit(inputs, outcomes, ridge=1e-6):
    """Weights (D,) of the logistic regression of outcomes (N,) in [0, 1] on inputs (N, D), by damped Newton
    steps.
    """
    weights = np.zeros(inputs.shape[1])
    for _ in range(100):
        p = 1 / (1 + np.exp(-inputs @ weights))
        gradient = inputs.T @ (p - outcomes) / len(inputs) + ridge * weights
        hessian = (inputs.T * (p * (1 - p))) @ inputs / len(inputs) + ridge * np.eye(len(weights))
        step = np.linalg.solve(hessian, gradient)
        largest = np.abs(inputs @ step).max()
        if largest < 1e-12:
            break
        # a whole step may overshoot; so damped it always descends (Bach, 0910.4627), and near the optimum it
        # is whole
        weights = weights - step * np.log1p(largest) / largest
    return weights


def reliability(
    probabilities: Sequence[float], outcomes: Sequence[float], bins: int = 10
) -> list[tuple[float, float, int]]:
    """A reliability curve: (mean probability, mean outcome, count) of each bin that is not empty, lowest
    first (detail 20).

    Both (N,), outcomes 0 or 1. Bins have equal width; an edge belongs to the bin above it, 1 to the last one.
    """
    probabilities, outcomes = np.asarray(probabilities, dtype=float), np.asarray(outcomes, dtype=float)
    places = np.minimum((probabilities * bins).astype(int), bins - 1)
    found = [(probabilities[places == place], outcomes[places == place]) for place in np.unique(places)]
    return [(float(p.mean()), float(y.mean()), len(p)) for p, y in found]


def expected_calibration_error(probabilities: Sequence[float], outcomes: Sequence[float],
                               bins: int = 10) -> float:
    """Mean over predictions of |mean probability - mean outcome| of their bin in `reliability` (detail 20).

    Both (N,), outcomes 0 or 1. Source: Guo et al., 1706.04599. For ordered pairs (better, worse) the outcome
    would always be 1: pass max(p, 1 - p) and whether p was right.
    """
    curve = reliability(probabilities, outcomes, bins)
    return sum(count * abs(p - y) for p, y, count in curve) / len(probabilities)


def best_of_n(scores: Sequence[float], values: Sequence[float], n: int) -> float:
    """Expected value of the best of n samples by score, unbiased: the mean over all subsets of size n of the
    N samples.

    Sorted by score, sample i of N is the best of C(i - 1, n - 1) of the C(N, n) subsets (Nakano et al.,
    2112.09332, appendix I). Among equal scores any is the best one as often as another.

    Args:
        scores: (N,), what the best one is chosen by.
        values: (N,), what it is worth; `scores` again for the expected score.
        n: 1 to N.

    Raises:
        ValueError: when there are fewer than n samples.
    """
    scores, values = np.asarray(scores, dtype=float), np.asarray(values, dtype=float)
    total = len(scores)
    if not 1 <= n <= total:
        raise ValueError(f"the best of {n} samples from {total}")
    weights = np.array([math.comb(i, n - 1) / math.comb(total, n) for i in range(total)])
    _, ties = np.unique(scores, return_inverse=True)  # (N,), in the order of the scores
    means = np.bincount(ties, weights=values) / np.bincount(ties)
    return float(weights @ means[np.sort(ties)])


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n to the policy it samples from, in nats: log n - (n - 1) / n (ST, appendix G).

    Exact where no two samples are equal, else an upper bound (Beirami et al., 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def rank_correlation(first, second) -> float:
    """Spearman's correlation of two columns of numbers, (N,) each: that of their ranks, equal numbers sharing
    their mean rank.

    Not a number when one column is constant.
    """
    ranks = []
    for values in (first, second):
        _, places, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True,
                                      return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[places])
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(*ranks)[0, 1])
