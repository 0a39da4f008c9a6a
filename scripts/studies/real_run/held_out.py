"""What the finished stages reach on posts that none of them has trained on."""

import json
from pathlib import Path

from studies.real_run.figures import (
    Scorer,
    arithmetic,
    baselines,
    compared,
    judged_pairs,
    kl_to,
    rouge,
    written_by,
)
from studies.real_run.posts import read_rows
from studies.real_run.records import Figures
from studies.real_run.stages import Runs

SHOWN = 10  # posts whose summaries are written to real.json


class Posts:
    """Posts that no stage has trained on, and what the finished stages reach on them."""

    def __init__(self, runs: Runs, source: Path):
        self.config, self.out, self.source = runs.config, runs.out, source
        self.settings, self.rewarding = runs.settings("ppo"), runs.settings("reward")
        self.rows = read_rows(source / "tldr_valid.jsonl.gz")[: self.config.test_posts]
        self.prompts = [row["prompt"] for row in self.rows]
        self.temperatures = {"sampled": self.settings.temperature, "greedy": self.settings.eval_temperature}

    def written(self, folder: str, kinds=("sampled", "greedy")) -> dict:
        with arithmetic(self.settings):
            return written_by(folder, self.prompts, self.settings, {kind: self.temperatures[kind]
                                                                    for kind in kinds})

    def after_sft(self, base: str) -> dict:
        """ROUGE of the base model, of SFT, and of what needs no model."""
        model = {"base": self.written(base, ["greedy"]), "sft": self.written(str(self.out / "sft/final"))}
        texts = baselines(self.rows, str(self.out / "sft/final")) | {
            f"{name}, {kind}": summaries.texts for name, kinds in model.items()
            for kind, summaries in kinds.items()}
        return {"rouge": {name: rouge(column, self.rows) for name, column in texts.items()},
                "samples": [{name: kinds["greedy"].texts[i].strip() for name, kinds in model.items()}
                            for i in range(min(SHOWN, len(self.rows)))]}

    def after_reward(self) -> dict:
        """Accuracy of both reward models by kind of the worse summary, and on GPT-4's choices."""
        scorers = self.scorers()
        held_out = [json.loads(line) for line in
                    (self.out / "data/rankings/held_out.jsonl").read_text(encoding="utf-8").splitlines()]
        found = {"largest difference to a stock pipeline": scorers["reward"].difference_to_a_stock_pipeline(
            self.prompts[:8], [row["completion"] for row in self.rows[:8]])}
        pairs = self.source / "tldr_valid_gpt4_judged.jsonl.gz"
        with arithmetic(self.rewarding):
            found["accuracy"] = {name: scorer.accuracy_by_kind(held_out) for name, scorer in scorers.items()}
            if self.config.judged_pairs and pairs.is_file():
                found["gpt-4"] = judged_pairs(scorers, read_rows(pairs)[: self.config.judged_pairs])
        return found

    def after_ppo(self) -> dict:
        """Win rates over SFT by both reward models, ROUGE, KL."""
        figures = Figures(self.out)
        sft, ppo = (self.written(str(self.out / name / "final")) for name in ("sft", "ppo"))
        columns = [(kind, policy[kind]) for kind in self.temperatures for policy in (ppo, sft)]
        with arithmetic(self.settings):
            kl = kl_to(str(self.out / "sft/final"), self.prompts, ppo["sampled"], self.settings)
        with arithmetic(self.rewarding):
            scores = {name: scorer.scores_of_tokens(self.prompts, [summaries.tokens for _, summaries in
                                                                   columns], name)
                      for name, scorer in self.scorers().items()}
        return {
            "kl": kl,
            "rouge": figures["rouge"] | {f"ppo, {kind}": rouge(ppo[kind].texts, self.rows)
                                         for kind in self.temperatures},
            "samples": [sample | {"ppo": text.strip()} for sample, text in
                        zip(figures["samples"], ppo["greedy"].texts, strict=False)],
            "ppo over sft": {
                f"{name}, {kind}": compared(ppo[kind], sft[kind], [row[2 * i : 2 * i + 2] for row in found],
                                            self.config.seed)
                for name, found in scores.items() for i, kind in enumerate(self.temperatures)},
        }

    def scorers(self) -> dict[str, Scorer]:
        return {name: Scorer(str(self.out / name / "final"), self.rewarding) for name in ("reward", "judge")}
