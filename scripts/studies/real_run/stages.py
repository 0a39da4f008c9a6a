"""The stages of one output folder, run as a user runs them."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import train_ppo
import train_reward
import train_sft
from studies.gpu_checks.device import free_memory
from studies.real_run.records import read_json, write_json
from utils.config import PROJECT, UserError, parse_config

STAGES = {"sft": train_sft.SFTStageConfig, "reward": train_reward.RewardStageConfig,
          "ppo": train_ppo.PPOStageConfig}


class Runs:
    """The stages of one output folder, each from its configuration and the options given here."""

    def __init__(self, config):
        self.config, self.out = config, Path(config.output_dir)

    def words(self, stage: str, name: str, seed: int, options: dict) -> list[str]:
        given = {"output_dir": self.out / name, "seed": seed, **options}
        files = [stage, *(name for name in ("gpu", "lora") if name == self.config.machine or name == "lora"
                          and self.config.lora)]
        return ["--config", *(str(PROJECT / "configs" / "smollm2-135m" / f"{name}.yaml") for name in files),
                *(word for option, value in given.items() for word in (f"--{option}", str(value))),
                *getattr(self.config, stage).split()]

    def settings(self, stage: str):
        """What the stage runs with."""
        return parse_config(STAGES[stage], None, self.words(stage, stage, self.config.seed, {}))

    def run(self, stage: str, name: str | None = None, seed: int | None = None, **options) -> dict:
        """Run a stage as a user does, unless it is finished; its summary.

        Raises:
            UserError: when it did not end well. It has said why.
        """
        name, seed = name or stage, self.config.seed if seed is None else seed
        folder = self.out / name
        if not (folder / "summary.json").is_file():
            words = [sys.executable, PROJECT / "scripts" / f"train_{stage}.py",
                     *self.words(stage, name, seed, options)]
            if (folder / "checkpoints").is_dir() and any((folder / "checkpoints").iterdir()):
                words.append("--resume")
            free_memory()  # the stage may need what sampling here has left in the cache
            began = time.time()
            if subprocess.run(words).returncode:
                raise UserError(f"{name}: this stage did not end well; the same command goes on from here")
            write_json(self.out / "times" / f"{name}.json", {"began": began, "ended": time.time()})
        return read_json(folder / "summary.json")

    def together(self, jobs: dict) -> dict[str, dict]:
        """Summaries of several stages by name, each a function that runs one. A card has room for all."""
        with ThreadPoolExecutor(len(jobs) if self.config.machine == "gpu" else 1) as pool:
            return dict(zip(jobs, pool.map(lambda job: job(), jobs.values()), strict=True))
