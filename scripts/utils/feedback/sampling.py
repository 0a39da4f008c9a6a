"""Who answers on the rating page: the models, a thread that samples ahead of the raters, and chats.

A chat goes first. What is being sampled ahead is given up as soon as one begins, and is sampled again later.
"""

import math
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from utils.errors import UserError, one_line
from utils.feedback.database import Ratings
from utils.feedback.security import safe_html
from utils.models.parents import Parent
from utils.models.talk import Answer, Pieces, Scorer, Talker

CHATS = 4  # at once
_PAUSE = 1.0  # seconds until an idle thread looks again
_TROUBLE = 10.0  # seconds until it tries again what failed
_ROUND = "round-"  # how the policies of training rounds begin


class BusyError(Exception):
    """As many chats are running as are allowed."""


class Precedence:
    """Counts the chats that run. Whoever samples ahead asks here whether to go on."""

    def __init__(self):
        self._chats, self._changed = 0, threading.Condition()

    @contextmanager
    def chat(self) -> Iterator[None]:
        """A chat; BusyError when there are too many."""
        with self._changed:
            if self._chats >= CHATS:
                raise BusyError
            self._chats += 1
        try:
            yield
        finally:
            with self._changed:
                self._chats -= 1
                self._changed.notify_all()

    def is_taken(self) -> bool:
        return self._chats > 0

    def wait(self, seconds: float) -> bool:
        """Wait until no chat is running; False: one still is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._chats, seconds)


class Models:
    """The models of the page by the id of their policy. A folder is loaded once.

    Args:
        max_new_tokens: of an answer; None: what each model was trained with.
    """

    def __init__(self, ratings: Ratings, scorer: Scorer | None, max_new_tokens: int | None = None):
        self.ratings, self.scorer, self.max_new_tokens = ratings, scorer, max_new_tokens
        self.names: dict[int, str] = {}
        self.rated: list[int] = []  # whose answers are rated
        self._talkers: dict[int, Talker] = {}
        self._lock = threading.Lock()

    def add(self, name: str, path: str, key: str = "model") -> int:
        """Load a model; what is loaded already is used again.

        Raises:
            UserError: when it cannot be loaded, or the reward model has another tokenizer.
        """
        with self._lock:
            number = self.ratings.add_policy(name, path)
            if number in self._talkers and self._talkers[number].parent.name == path:
                return number
            parent = Parent(key, path)
            same = (talker for talker in self._talkers.values() if talker.parent.path == parent.path)
            talker = next(same, None) or Talker(parent)
            if self.scorer and talker.tokenizer.get_vocab() != self.scorer.parent.tokenizer.get_vocab():
                raise UserError(f"reward_model: '{self.scorer.parent.name}' has another tokenizer than "
                                f"'{path}'; use models of one family")
            self._talkers = {**self._talkers, number: talker}
            self.names = {**self.names, number: name}
            return number

    def promote(self, number: int) -> None:
        """Let a new model be rated beside the newest one before it. Older rounds are dropped from memory."""
        self.rated = [number, *self.rated[:1]]
        kept = {old for old in self.names if old in self.rated or not self.names[old].startswith(_ROUND)}
        with self._lock:
            self._talkers = {old: talker for old, talker in self._talkers.items() if old in kept}
            self.names = {old: name for old, name in self.names.items() if old in kept}

    def talker(self, number: int) -> Talker | None:
        return self._talkers.get(number)

    def longest(self, talker: Talker) -> int:
        """Tokens of an answer."""
        return self.max_new_tokens or talker.max_new_tokens


def ended(talker: Talker, answer: Answer) -> bool:
    return answer.tokens[-1:] == [talker.tokenizer.eos_token_id]


class Ahead(threading.Thread):
    """Samples answers for the next prompts, so that no rater waits.

    Args:
        ahead: prompts that nobody has seen yet and that have their answers.
        training: whether a round of training is running; then only a few prompts are sampled.

    Attributes:
        trouble: why nothing can be sampled; None: all is well.
        idle: there is nothing to sample now.
        scores: by the reward model of each (prompt, answer) that was rated; while idle, more are added.
    """

    def __init__(self, models: Models, precedence: Precedence, k: int, temperature: float, ahead: int,
                 training: Callable[[], bool] = lambda: False):
        super().__init__(name="ahead", daemon=True)
        self.models, self.precedence, self.training = models, precedence, training
        self.k, self.temperature, self.ahead = k, temperature, ahead
        self.trouble: str | None = None
        self.idle = False
        self.scores: dict[tuple[str, str], float] = {}
        self._scored: int | None = None  # the newest rating when all answers had their scores
        self._unfit: set[tuple[int, int]] = set()  # (prompt, policy): the prompt does not fit into the model
        self._wake, self._end = threading.Event(), threading.Event()

    def wake(self) -> None:
        """Look at once whether there is something to sample."""
        self.idle = False
        self._wake.set()

    def end(self) -> None:
        """Stop within a token. The thread is waited for: models must not be in use when Python ends."""
        self._end.set()
        self._wake.set()
        if self.is_alive():
            self.join(timeout=10)

    def run(self) -> None:
        while not self._end.is_set():
            self._wake.clear()
            try:
                sampled = self._sample() or self._score()
                self.trouble, pause = None, _PAUSE
            except Exception as error:  # a full disk, no memory on the GPU: the page must go on
                sampled, pause = False, _TROUBLE
                reason = one_line(error if isinstance(error, UserError) else
                                  f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}")
                if reason != self.trouble:
                    print(f"sampling: {reason}; tried again every {_TROUBLE:.0f} s", file=sys.stderr)
                self.trouble = reason
            if not sampled and not self._wake.is_set():
                self.idle = self.trouble is None
                self._wake.wait(pause)

    def _sample(self) -> bool:
        """Sample the answers of one model to one prompt. False: there is nothing to do."""
        if not self.precedence.wait(_PAUSE):
            return True
        policies = self.models.rated
        limit = min(self.ahead, 2) if self.training() else self.ahead
        passed_over = len({prompt for prompt, _ in self._unfit})
        for prompt, text, missing in self.models.ratings.to_sample(policies, self.k, limit + passed_over):
            for policy, count in missing.items():
                if (prompt, policy) not in self._unfit:
                    self._answer(prompt, text, policy, count)
                    return True
        return False

    def _answer(self, prompt: int, text: str, policy: int, count: int) -> None:
        talker = self.models.talker(policy)
        if talker is None:  # a round has just finished
            return
        longest = self.models.longest(talker)
        try:
            ids = talker.tokens(text, longest)
        except UserError as error:
            self._unfit.add((prompt, policy))
            print(f"prompt {prompt} is left out: {error}", file=sys.stderr)
            return
        answers = talker.answers(ids, count, longest, self.temperature, stop=self._must_stop)
        if not self._must_stop():  # else they may be cut short
            self.models.ratings.add_answers(
                prompt, policy, [(answer.text, ended(talker, answer)) for answer in answers],
                self.temperature)

    def _score(self) -> bool:
        """Score the answers of one rated prompt. False: all are."""
        scorer, talker = self.models.scorer, self.models.talker(self.models.rated[0])
        newest = self.models.ratings.rated(most=1)
        if scorer is None or not newest or newest[0]["id"] == self._scored:
            return False
        for row in self.models.ratings.rated():
            prompt = row["prompt"]
            missing = [text for text in row["completions"] if (prompt, text) not in self.scores]
            if not missing:
                continue
            try:
                ids = talker.tokens(prompt, self.models.longest(talker))
                answers = [Answer(text, tokens) for text, tokens in
                           zip(missing, talker.completions(prompt, missing), strict=True)]
                found = [answer.score for answer in scorer.scored(ids, answers)]
            except UserError:  # a prompt that does not fit is not scored
                found = [math.nan] * len(missing)
            self.scores |= zip([(prompt, text) for text in missing], found, strict=True)
            return True
        self._scored = newest[0]["id"]
        return False

    def _must_stop(self) -> bool:
        return self.precedence.is_taken() or self._end.is_set()


def chat(models: Models, numbers: list[int], messages: list[dict], temperature: float | None,
         max_new_tokens: int | None, stop: threading.Event, say: Callable[[dict], None]) -> None:
    """Answers of several models at once. Returns when all have ended, or `stop` is set.

    Args:
        say: called, from several threads, with each line of the stream.
    """
    threads = [threading.Thread(target=_chat, name=f"chat-{number}", daemon=True, args=(
        models, number, messages, temperature, max_new_tokens, stop, say)) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _chat(models: Models, number: int, messages, temperature, max_new_tokens, stop, say) -> None:
    try:
        talker = models.talker(number)
        if talker is None:
            raise UserError("this model is not offered any more; reload the page")
        longest = max_new_tokens or models.longest(talker)
        text = talker.text(messages)
        prompt = talker.tokens(text, longest)
        pieces = Pieces(talker.tokenizer, lambda text: say({"model": number, "text": text}))
        [answer] = talker.answers(prompt, 1, longest, temperature, pieces, stop.is_set)
        if models.scorer and not stop.is_set():
            [answer] = models.scorer.scored(prompt, [answer])
        say({"model": number, "done": True, "ended": ended(talker, answer), "text": answer.text,
             "html": safe_html(answer.text), "score": answer.score,
             "shortened": talker.shortens(text, longest)})
    except UserError as error:
        say({"model": number, "error": str(error)})
    except Exception as error:  # no memory on the GPU, say: the page shows it
        say({"model": number, "error": one_line(f"{type(error).__name__}: {error}")})
