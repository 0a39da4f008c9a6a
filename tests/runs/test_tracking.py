"""Experiment trackers: project, name, settings, run of a resume; TensorBoard has what metrics.jsonl has."""

import math
import re
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from utils.data.report import DataReport
from utils.distributed import build_accelerator
from utils.runs.run import Run
from utils.runs.tracking import start_trackers
from utils.stage_keys import StageConfig


@dataclass
class Toy(StageConfig):
    """A stage's configuration, with a value of each type."""

    sets: list = field(default_factory=lambda: ["a", "b"])
    nothing: float | None = None
    on: bool = True


@pytest.fixture(autouse=True)
def no_settings_of_wandb(monkeypatch):
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


def started(folder, main=True, **keys):
    """What the accelerator's trackers are opened with: (project, configuration, arguments of wandb.init)."""
    opened, config = [], Toy(output_dir=str(folder), **{"report_to": ["tensorboard", "wandb"], **keys})
    folder.mkdir(parents=True, exist_ok=True)
    accelerator = SimpleNamespace(
        log_with=config.report_to, is_main_process=main,
        init_trackers=lambda project, config, init_kwargs: opened.append((project, config,
                                                                          init_kwargs["wandb"])))
    start_trackers(accelerator, config, folder)
    return opened[0]


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
def test_all_stages_are_runs_of_one_project(stage, tmp_path, monkeypatch):
    project, config, run = started(tmp_path / "mine" / stage, seed=3)
    assert (project, run["name"], config["seed"]) == ("opt-rlhf", f"mine-{stage}", 3)
    assert all(isinstance(value, bool | int | float | str) for value in config.values())
    assert (config["sets"], config["nothing"], config["on"]) == ("['a', 'b']", "None", True)
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "my name")
    project, _, run = started(tmp_path / "other" / stage)
    assert project == "theirs" and "name" not in run, "wandb takes what the environment says"


def test_a_resume_goes_on_in_the_same_wandb_run(tmp_path, monkeypatch):
    _, _, first = started(tmp_path / "a")
    _, config, resumed = started(tmp_path / "a", resume=True)
    assert resumed == first and re.fullmatch("[0-9a-f]{8}", first["id"])
    assert first["resume"] == "allow" and first["dir"] == str(tmp_path / "a")
    assert config is None, "the settings were sent at the first start"
    _, _, other = started(tmp_path / "b")
    assert other["id"] != first["id"]
    _, _, again = started(tmp_path / "a")  # it ended before its first step
    assert again["id"] != first["id"]
    _, _, switched_on = started(tmp_path / "c", resume=True)
    assert switched_on["id"], "a resume that adds wandb opens a run"
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    assert started(tmp_path / "d")[2]["id"] == "mine"


@pytest.mark.parametrize("keys", [{"main": False}, {"report_to": ["tensorboard"]}])
def test_without_wandb_and_on_other_ranks_no_id_is_made(keys, tmp_path):
    assert started(tmp_path / "run", **keys)[2] == {} and not list((tmp_path / "run").iterdir())


def test_tensorboard_has_the_metrics_the_samples_and_the_settings(tmp_path):
    """Under the names of metrics.jsonl."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = Toy(output_dir=str(tmp_path / "mini" / "ppo"), report_to=["tensorboard"], learning_rate=0.125)
    run = Run(config, "ppo", DataReport())
    run.use_trackers(build_accelerator(config, run.folder, None))
    run.metrics(3, {"sft/loss": 0.5, "eval/score": math.nan, "objective/episodes": 4})
    run.metrics(4, {"sft/loss": 0.25, "test/accuracy": 0.75})
    run.samples(4, "validation", [{"prompt": "a post", "summary": "short"}])
    run.end_tracking()
    folder = run.folder / "tensorboard" / "opt-rlhf"
    found = EventAccumulator(str(folder)).Reload()
    logged = {(row["step"], name, value) for row in run.read_metrics() for name, value in row.items()
              if name != "step" and value is not None}
    assert logged == {(event.step, name, event.value) for name in found.Tags()["scalars"]
                      for event in found.Scalars(name)}
    [text] = found.Tensors("samples/validation/text_summary")
    assert text.step == 4 and b"a post" in text.tensor_proto.string_val[0]
    hparams = {}
    for path in folder.glob("*/events.*"):
        for content in EventAccumulator(str(path)).Reload().PluginTagToContent("hparams").values():
            hparams |= dict(HParamsPluginData.FromString(content).session_start_info.hparams)
    assert hparams["learning_rate"].number_value == 0.125 and hparams["sets"].string_value == "['a', 'b']"
