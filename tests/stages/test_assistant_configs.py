"""configs/assistant and configs/smollm2-135m: the files are read, and fit each other."""

import pytest

import train_ppo
import train_reward
import train_sft
from utils.config import PROJECT, parse_config
from utils.data.sources import sources_of

CONFIGS = {"sft": train_sft.SFTStageConfig, "reward": train_reward.RewardStageConfig,
           "ppo": train_ppo.PPOStageConfig}


@pytest.fixture(params=["assistant", "smollm2-135m"])
def configs(request):
    folder = PROJECT / "configs" / request.param
    return {stage: parse_config(kind, None, ["--config", str(folder / f"{stage}.yaml")])
            for stage, kind in CONFIGS.items()}


def test_each_stage_starts_from_the_one_before(configs):
    assert configs["reward"].model == configs["ppo"].model == f"{configs['sft'].output_dir}/final"
    assert configs["ppo"].reward_model == f"{configs['reward'].output_dir}/final"


def test_data_is_on_the_hub_and_held_out_data_is_another_split(configs):
    for config, kind in ((configs["sft"], "actor"), (configs["reward"], "reward"), (configs["ppo"], "rlhf")):
        [train] = sources_of(getattr(config, f"{kind}_training_data"))
        [test] = sources_of(getattr(config, f"{kind}_test_data"))
        assert train.name == test.name and train.name.count("/") == 1
        assert (train.split, test.split) in ((None, None), ("train", "test"))
