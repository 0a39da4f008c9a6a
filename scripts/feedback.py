"""A web page on this machine: talk to a model, rate its answers, and train it on the ratings.

    python scripts/feedback.py                                   # the demo's models and posts
    python scripts/feedback.py --model outputs/mine/ppo/final --reward_model outputs/mine/reward/final \\
        --base outputs/mine/sft/final --prompts mine/prompts.jsonl
    python scripts/feedback.py --export ratings.jsonl            # writes what has been rated, and ends

Open the address that it prints. While one prompt is rated, the answers to the next ones are sampled. Ratings
are kept in a database (`ratings`), which the stages take as data: `reward_training_data: ratings.db`. The
page's button runs the three stages on it, and offers the new model.

It serves this machine only. To serve others, name a host and a file with a token: docs/feedback.md.
"""

import json
import socket
from dataclasses import dataclass, fields
from pathlib import Path

from utils.config import PROJECT, UserError, find_input, key, refuse_missing_file
from utils.data.sources import parse_sources, refuse_missing_sources
from utils.feedback.security import is_loopback
from utils.launch import read_config, start


@dataclass
class FeedbackConfig:
    """What is served, and to whom."""

    model: list[str] = key([], "Models whose answers are rated; none: the demo's last one.")
    compare: list[str] = key([], "Further models to talk to, which are not rated.")
    reward_model: str | None = key(None, "Reward model that scores answers in the chat, is compared with the "
                                   "ratings, and that a round's reward stage starts from; none: the demo's "
                                   "with the demo's model, else no scores.")
    base: str | None = key(None, "SFT model that the reward stage of a round starts from without a "
                           "reward_model; none: the first of `model`.")
    prompts: str | None = key(None, "Prompts to rate, in any layout of PPO's data, which a round's PPO "
                              "trains on, too; none: the demo's with the demo's model, else those of "
                              "`ratings`.", parse=parse_sources, there=refuse_missing_sources)
    prompt_count: int = key(2000, "Prompts that are taken from `prompts`, drawn by `seed`.", unit="prompts",
                            low=1, high=10**6)
    k: int = key(4, "Answers to each prompt.", unit="answers", low=2, high=9)
    temperature: float = key(1.0, "Sampling temperature of the answers that are rated.", low=0.01, high=100.0)
    max_new_tokens: int | None = key(None, "Longest answer; none: what each model was trained with, or 256.",
                                     unit="tokens", low=1, high=1_000_000)
    ahead: int = key(20, "Prompts that have their answers before anybody sees them.", unit="prompts", low=1,
                     high=10_000)
    repeat_share: float = key(0.1, "How often a rater gets an earlier prompt again, which shows how "
                              "consistent they are.", low=0.0, high=0.5)
    overlap_share: float = key(0.1, "Share of the prompts that every rater gets, which shows how far they "
                               "agree.", low=0.0, high=1.0)
    ratings: str = key("outputs/feedback/ratings.db", "Database of the ratings; it is made if it is not "
                       "there.")
    output_dir: str = key("outputs/feedback", "Folder of the training rounds.")
    sft_config: str = key("configs/personal/sft.yaml", "Configuration of a round's SFT stage.")
    reward_config: str = key("configs/personal/reward.yaml", "Configuration of a round's reward stage.")
    ppo_config: str = key("configs/personal/ppo.yaml", "Configuration of a round's PPO.")
    least_ratings: int = key(10, "Rated prompts that a round needs.", unit="prompts", low=4, high=10**6)
    ppo_ratings: int = key(30, "Rated prompts from which a round has a reward stage and PPO; with fewer it "
                           "is SFT on the best answers alone.", unit="prompts", low=4, high=10**6)
    host: str = key("127.0.0.1", "Address to serve on; one that others reach needs `token_file`.")
    port: int = key(8017, "Port to serve on; 0: any that is free.", low=0, high=65_535)
    names: list[str] = key([], "Names under which browsers reach the page, beside this machine's own: that "
                           "of a proxy, say.")
    token_file: str | None = key(None, "File with the token that whoever opens the page must type.",
                                 there=refuse_missing_file)
    seed: int = key(0, "Seed of the sampling, and of the choice of prompts.", low=0, high=2**32 - 1)
    export: str | None = key(None, "File that the ratings are written to; nothing is served then.")
    export_layout: str = key("jsonl", "Layout of `export`.",
                             choices=["jsonl", "edits", "argilla", "label_studio"])

    def __post_init__(self):
        if not self.token_file and not is_loopback(self.host):
            raise UserError(f"host: others reach '{self.host}', so a token is needed; name a file that "
                            "has one with --token_file")

    def without_effect(self) -> dict[str, str]:
        if self.export is None:
            idle = {"base": "a round's reward stage starts from reward_model"} if self.reward_model else {}
            return idle | {"export_layout": "it is for export, which is not given"}
        others = {field.name for field in fields(self)} - {"export", "export_layout", "ratings"}
        return dict.fromkeys(others, "export writes the ratings and ends")


if __name__ == "__main__":
    CONFIG = read_config(FeedbackConfig, None, __doc__)

import random

import torch
import uvicorn

from utils.data.rows import load_examples
from utils.feedback.application import Application, Shares
from utils.feedback.database import Ratings
from utils.feedback.exports import export_file
from utils.feedback.rounds import SFT_ALONE, Rounds, policy_of, script
from utils.feedback.sampling import Ahead, Models, Precedence
from utils.feedback.security import Sessions, installation_key, read_token
from utils.models.parents import Parent
from utils.models.talk import Scorer, last_model, share_layout, short_names
from utils.paths import find_local
from utils.runs.folder import claim

DEMO = PROJECT / "outputs" / "tldr_mini"
PAGE = Path(__file__).resolve().parent / "utils" / "feedback" / "page"
_WAITING = 128  # connections that wait while models load
_CONNECTIONS = 500  # at once; more get the status 503


def fill_in_demo(config: FeedbackConfig) -> None:
    """Where no model is named: the demo's models and posts.

    Raises:
        UserError: when the demo has not run.
    """
    if config.model:
        return
    config.model = [last_model(DEMO)]
    there = {stage: str(DEMO / stage / "final") for stage in ("sft", "reward")
             if (DEMO / stage / "final" / "config.json").is_file()}
    others = [path for stage, path in there.items() if stage == "sft" and [path] != config.model]
    config.compare = config.compare or others
    config.reward_model = config.reward_model or there.get("reward")
    config.prompts = config.prompts or str(PROJECT / "data" / "tldr_mini" / "rlhf_train.jsonl.gz")


def listen(host: str, port: int) -> socket.socket:
    """A socket on which browsers can connect; done first, since models take long to load.

    Raises:
        UserError: when the address is not ours, or the port is in use.
    """
    try:
        [family, kind, protocol, _, address] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        server = socket.socket(family, kind, protocol)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(address)
        server.listen(_WAITING)
    except socket.gaierror as error:
        raise UserError(f"host: '{host}' is no address ({error.strerror})") from None
    except OSError as error:
        raise UserError(f"port: {port} on {host} cannot be served ({error.strerror}); name another one with "
                        "--port, or 0 for any that is free") from None
    return server


def load_models(config: FeedbackConfig, ratings: Ratings) -> Models:
    """The models that are offered: those that are named, and those of the last rounds."""
    scorer = Scorer(Parent("reward_model", config.reward_model)) if config.reward_model else None
    models = Models(ratings, scorer, config.max_new_tokens)
    paths = [*config.model, *config.compare]
    numbers = [models.add(name, path, "model" if place < len(config.model) else "compare")
               for place, (name, path) in enumerate(zip(short_names(paths), paths, strict=True))]
    share_layout([models.talker(number) for number in numbers])
    models.rated = list(dict.fromkeys(numbers[: len(config.model)]))
    finished = [row for row in ratings.rounds() if row["state"] == "finished"]
    for row in finished[-2:]:
        policy = policy_of(Path(row["folder"]))
        if policy.is_dir():
            models.promote(models.add(row["name"], str(policy)))
        else:
            print(f"note: the policy of {row['name']} is gone: '{policy}'")
    return models


def add_prompts(config: FeedbackConfig, ratings: Ratings) -> None:
    """Put prompts into the database, as long as it has fewer than are wanted.

    Raises:
        UserError: when there is none at all.
    """
    if config.prompts:
        rows = load_examples(config.prompts, "prompts", need_completion=False)
        chosen = random.Random(config.seed).sample(range(len(rows)), min(len(rows), config.prompt_count))
        ratings.add_prompts(map(rows.stored_prompt, chosen), "prompts")
    elif not ratings.queue([], config.k)["prompts"]:
        raise UserError(f"prompts: none are given, and '{config.ratings}' has none; name a file with "
                        "--prompts")


def stages_of(config: FeedbackConfig, folder: Path, ranked: int) -> dict[str, list[str]]:
    """The commands of a round of training. Each round begins with the first model and all ratings.

    The model first learns from the best answers, so that PPO begins near to what the person likes. Fewer than
    `ppo_ratings` ranked prompts make no reward model that PPO could learn from, so SFT is all then.
    """
    prompts = config.prompts or str(folder / "ratings.db")
    prompts = prompts if isinstance(prompts, str) else json.dumps(prompts)
    seed = ["--seed", str(config.seed)]
    sft = [script("train_sft.py"), "--config", config.sft_config, "--model", config.model[0],
           "--actor_training_data", str(folder / "ratings.db"), "--output_dir", str(folder / "sft"), *seed]
    if ranked < config.ppo_ratings:
        return {"sft": [*sft, *SFT_ALONE]}
    return {
        "sft": sft,
        "reward": [script("train_reward.py"), "--config", config.reward_config,
                   "--model", config.reward_model or config.base or config.model[0],
                   "--reward_training_data", str(folder / "ratings.db"),
                   "--output_dir", str(folder / "reward"), *seed],
        "ppo": [script("train_ppo.py"), "--config", config.ppo_config,
                "--model", str(folder / "sft" / "final"),
                "--reward_model", str(folder / "reward" / "final"), "--rlhf_training_data", prompts,
                "--output_dir", str(folder / "ppo"), *seed],
    }


def why_no_training(config: FeedbackConfig) -> str | None:
    """Why no round can be started from the page; None: one can."""
    stages = (config.sft_config, config.reward_config, config.ppo_config)
    missing = [path for path in stages if find_local(path) is None]
    return f"there is no file '{missing[0]}'" if missing else None


class Page:
    """All parts of the page, from a configuration."""

    def __init__(self, config: FeedbackConfig):
        self.config = config
        token = read_token(find_local(config.token_file)) if config.token_file else None
        fill_in_demo(config)
        self.socket = listen(config.host, config.port)
        output = Path(config.output_dir)
        self.ratings = Ratings(Path(config.ratings))
        output.mkdir(parents=True, exist_ok=True)
        claim(output)
        add_prompts(config, self.ratings)
        self.models = load_models(config, self.ratings)
        self.rounds = Rounds(self.ratings, output, self.stages, self.offer, why_no_training(config),
                             config.least_ratings, config.ppo_ratings)
        precedence = Precedence()
        self.ahead = Ahead(self.models, precedence, config.k, config.temperature, config.ahead,
                           self.rounds.is_running)
        self.application = Application(
            self.ratings, self.models, self.ahead, precedence, self.rounds,
            Sessions(installation_key(output / "session.key"), token),
            Shares(config.k, config.repeat_share, config.overlap_share), PAGE)

    def stages(self, folder: Path) -> dict[str, list[str]]:
        """The commands of a round with what is rated now."""
        _, ranked = self.ratings.learnable()
        return stages_of(self.config, folder, ranked)

    def offer(self, name: str, policy: Path) -> None:
        """Offer the policy of a round that has finished."""
        self.models.promote(self.models.add(name, str(policy)))
        self.ahead.wake()

    def say_what_is_served(self) -> None:
        queue = self.ratings.queue(self.models.rated, self.config.k)
        host, port = self.config.host, self.socket.getsockname()[1]
        if host in ("0.0.0.0", "::"):  # all addresses of this machine
            host = socket.gethostname()
        print(f"models: {', '.join(self.models.names.values())}; reward model: "
              f"{self.config.reward_model or 'none'}")
        print(f"prompts: {queue['prompts']}, {queue['rated']} of them rated; ratings: {self.ratings.path}")
        print(f"open http://{f'[{host}]' if ':' in host else host}:{port}/ in a browser; Ctrl-C ends",
              flush=True)

    def server(self) -> uvicorn.Server:
        """What serves the page; its log has no addresses, so no token or name is in it."""
        application = self.application.guarded(self.config.host, self.config.names)
        return uvicorn.Server(uvicorn.Config(
            application, log_level="warning", access_log=False, server_header=False, lifespan="off",
            ws="none", timeout_graceful_shutdown=2, limit_concurrency=_CONNECTIONS))

    def serve(self, server: uvicorn.Server) -> None:
        """Serve until a signal comes, or `server.should_exit` is set."""
        self.ahead.start()
        self.say_what_is_served()
        try:
            server.run(sockets=[self.socket])
        finally:
            self.close()

    def close(self) -> None:
        self.ahead.end()
        self.rounds.end()
        self.ratings.close()


def export(config: FeedbackConfig) -> None:
    """Write what has been rated into a file."""
    source, target = find_input(config.ratings, "ratings"), Path(config.export)
    if not target.parent.is_dir() or target.exists():
        raise UserError(f"export: '{target}' must be a new file in a folder that exists")
    export_file(source, target, config.export_layout)
    print(f"the ratings of '{source}' are in '{target}' ({config.export_layout})")


def main(config: FeedbackConfig) -> None:
    if config.export:
        return export(config)
    torch.manual_seed(config.seed)
    page = Page(config)
    page.serve(page.server())


if __name__ == "__main__":
    start(main, CONFIG)
