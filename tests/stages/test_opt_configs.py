"""configs/opt-*/: a file's header is what the planner says of it, its batch is the published one, and its stage runs with it."""

import json
import re
import shlex
from functools import cache

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig

import train_ppo
import train_reward
import train_sft
from planning import memory
from planning.architectures import OPT, opt_config
from planning.fit import Setup, choices_of, plan
from planning.memory import CHOICES, GIB
from utils.config import PROJECT, parse_config

STAGES = {"sft": (train_sft, train_sft.SFTStageConfig), "reward": (train_reward, train_reward.RewardStageConfig),
          "ppo": (train_ppo, train_ppo.PPOStageConfig)}
SIZES = [name.removeprefix("facebook/") for name in OPT]
FILES = [PROJECT / "configs" / size / f"{stage}.yaml" for size in SIZES for stage in STAGES]
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
COUNTS = {"one": 1, "two": 2, "8": 8}
MACHINE = re.compile(r"# Machine: (?:(\w+) nodes?(?:, each)? with )?(\w+) GPUs? of (\d+) GiB (?:and|in a computer with) (\d+) "
                     r"GiB of memory; network access to the hub\.$", re.MULTILINE)
PLANNED = re.compile(r"# Planned by scripts/plan_memory\.py \(longest rows\), not measured: (\S+) GiB of (\d+) on (?:the|each) "
                     r"GPU, (\S+) of (\d+) on (?:the|each) (?:computer|node)\.$", re.MULTILINE)


def config_of(path, *words):
    return parse_config(STAGES[path.stem][1], path, list(words))


def header_of(path) -> str:
    return path.read_text().split("output_dir:")[0]


def machine_of(path) -> tuple[int, int, int, int]:
    """Nodes, GPUs of each, GiB of a GPU, GiB of a node."""
    nodes, gpus, gpu, node = MACHINE.search(header_of(path)).groups()
    return COUNTS[nodes or "one"], COUNTS[gpus], int(gpu), int(node)


def command_of(path) -> list[str]:
    lines = [line.removeprefix("#   ") for line in header_of(path).splitlines() if line.startswith("#   ")]
    return shlex.split(" ".join(line.removesuffix("\\") for line in lines))


@cache
def plan_of(path):
    """The planner's answer for a file on its machine, the longest rows that its limits allow."""
    config, (nodes, per_node, gpu, node) = config_of(path), machine_of(path)
    completion, k = {
        "sft": lambda: (config.max_completion_tokens, 1),
        "reward": lambda: (config.max_completion_tokens, config.max_completions),
        "ppo": lambda: (config.max_new_tokens, config.responses_per_prompt),
    }[path.stem]()
    setup = Setup(
        f"facebook/{path.parent.name}", None, getattr(config, "value_model", "separate"), config.lora_rank, nodes * per_node,
        per_node, gpu * GIB, node * GIB, config.per_device_batch_size, config.eval_batch_size, config.max_prompt_tokens,
        completion, k, config.mixed_precision, config.gradient_checkpointing,
    )
    name = "none" if config.deepspeed is None else config.deepspeed.removeprefix("configs/deepspeed/").removesuffix(".json")
    [zero] = choices_of([name])
    return plan(path.stem, zero, setup)


# ------------------------------------------------------------------------------------------------------- the headers


def test_every_size_has_its_three_files_and_there_are_no_others():
    assert sorted(FILES) == sorted((PROJECT / "configs").glob("opt-*/*"))


@every_file
def test_the_machines_figures_are_the_planners(path):
    device, gpu, host, node = PLANNED.search(header_of(path)).groups()
    assert (int(gpu), int(node)) == machine_of(path)[2:]
    one = plan_of(path)
    assert (device, host) == (f"{one.device / GIB:.1f}", f"{one.host / GIB:.1f}")


@every_file
def test_a_tenth_of_the_machine_is_left(path):
    _, _, gpu, node = machine_of(path)
    assert plan_of(path).device <= 0.9 * gpu * GIB and plan_of(path).host <= 0.9 * node * GIB


@every_file
def test_the_command_starts_this_file_on_all_of_the_machine(path):
    nodes, per_node, _, _ = machine_of(path)
    offloaded = "offload" in (config_of(path).deepspeed or "")
    start = ["python"] if nodes * per_node == 1 else ["torchrun", "--nproc_per_node", str(per_node)]
    if nodes > 1:
        start = ["torchrun", "--nnodes", str(nodes), *start[1:], "--rdzv_backend", "c10d", "--rdzv_endpoint", "HOST:29500"]
    if offloaded and per_node > 1:
        start = ["OMP_NUM_THREADS=8", *start]
    name = str(path.relative_to(PROJECT))
    assert command_of(path) == [*start, f"scripts/train_{path.stem}.py", "--config", name]
    assert (PROJECT / "scripts" / f"train_{path.stem}.py").is_file()


# --------------------------------------------------------------------------------------------------------- the values

# what may differ between sizes; all else is N+'s, and that of opt-1.3b
MACHINES_KEYS = {"output_dir", "model", "reward_model", "deepspeed", "per_device_batch_size", "gradient_accumulation_steps",
                 "gradient_checkpointing", "eval_batch_size", "lora_rank"}


@every_file
def test_the_global_batch_is_the_published_one(path):
    """128 examples, 16 rows of comparisons, 128 prompts with 4 responses in one optimizer step; every process the same."""
    config, processes = config_of(path), machine_of(path)[0] * machine_of(path)[1]
    if path.stem == "ppo":
        assert (config.prompts_per_update, config.responses_per_prompt, config.num_minibatches) == (128, 4, 1)
        assert 128 // processes % config.per_device_batch_size == 0 and 128 % processes == 0
    else:
        batch = config.per_device_batch_size * config.gradient_accumulation_steps * processes
        assert batch == {"sft": 128, "reward": 16}[path.stem]


@every_file
def test_what_is_learnt_does_not_depend_on_the_size(path):
    ours, reference = (yaml.safe_load(file.read_text()) for file in (path, PROJECT / "configs/opt-1.3b" / path.name))
    assert {name: ours.get(name) for name in ours.keys() | reference if name not in MACHINES_KEYS} == {
        name: value for name, value in reference.items() if name not in MACHINES_KEYS}


@every_file
def test_stages_hand_on_within_a_size(path):
    size, config = path.parent.name, config_of(path)
    assert config.output_dir == f"outputs/{size}/{path.stem}" and config.mixed_precision == "bf16"
    assert config.model == (f"facebook/{size}" if path.stem == "sft" else f"outputs/{size}/sft/final")
    if path.stem == "ppo":
        assert config.reward_model == f"outputs/{size}/reward/final"


# --------------------------------------------------------------------------------------- the planner and configs/deepspeed/


def zero_of(name: str) -> dict:
    return json.loads((PROJECT / "configs" / "deepspeed" / f"{name}.json").read_text())["zero_optimization"]


def test_the_planners_choices_are_the_files():
    files = {path.stem for path in (PROJECT / "configs" / "deepspeed").glob("*.json")}
    assert files == {zero.name for zero in CHOICES} - {"none"}


@pytest.mark.parametrize("zero", CHOICES[1:], ids=lambda zero: zero.name)
def test_the_planner_knows_what_is_sharded_and_where_it_lies(zero):
    settings, places = zero_of(zero.name), {"cpu": "host", "nvme": "nvme", None: "device"}
    assert settings["stage"] == zero.stage
    assert places[settings.get("offload_optimizer", {}).get("device")] == zero.optimizer
    assert places[settings.get("offload_param", {}).get("device")] == zero.weights
    # what its terms take for granted: buckets of hidden^2 and what is fetched ahead, two buckets, page-locked memory
    assert {settings[key] for key in settings if key.endswith("bucket_size")} == {"auto"} and settings["overlap_comm"] is True
    assert all(settings[key]["pin_memory"] is True for key in settings if key.startswith("offload_"))


def test_the_planners_constants_are_those_of_the_files():
    for name, limit in memory.SUB_GROUP.items():
        settings = zero_of(name)
        assert settings["sub_group_size"] == limit
        assert settings["stage3_max_reuse_distance"] == settings["stage3_max_live_parameters"] == memory.REUSE
    assert set(memory.SUB_GROUP) == {zero.name for zero in CHOICES if zero.stage == 3}
    nvme = zero_of("zero3_nvme")
    assert nvme["offload_optimizer"]["buffer_count"] == memory.SWAP_BUFFERS


# ------------------------------------------------------------------------------------------------------- two steps of each

DATA = "data/tldr_mini"
SMALL = {  # the data and the sizes; what is learnt, and how, is the file's
    "sft": f"--actor_training_data {DATA}/actor_validation.jsonl.gz --actor_validation_data none "
           f"--actor_test_data {DATA}/actor_test.jsonl.gz",
    "reward": f"--reward_training_data {DATA}/reward_validation.jsonl.gz --reward_test_data {DATA}/reward_test.jsonl.gz "
              f"--centring_data {DATA}/actor_validation.jsonl.gz",
    "ppo": f"--rlhf_training_data {DATA}/rlhf_validation.jsonl.gz --rlhf_validation_data none "
           f"--rlhf_test_data {DATA}/rlhf_test.jsonl.gz",
}
STEPS = {
    "sft": "--max_steps 2 --per_device_batch_size 2 --gradient_accumulation_steps 2 --max_new_tokens 4 --logging_steps 1",
    "reward": "--max_steps 2 --per_device_batch_size 2 --gradient_accumulation_steps 1 --logging_steps 1",
    "ppo": "--total_episodes 8 --prompts_per_update 2 --ppo_epochs 2 --max_new_tokens 4",
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PROJECT / "assets" / "opt-mini")


def shrunken(size: str, words: int) -> OPTConfig:
    """OPT of that size with the traits it has, 32 wide and two layers deep."""
    config = opt_config(f"facebook/{size}")
    narrow = config.word_embed_proj_dim != config.hidden_size
    config.update({"hidden_size": 32, "word_embed_proj_dim": 16 if narrow else 32, "ffn_dim": 64, "num_hidden_layers": 2,
                   "num_attention_heads": 4, "vocab_size": words})
    return config


def test_the_shrunken_models_keep_what_sets_a_size_apart():
    traits = {size: (shrunken(size, 100).word_embed_proj_dim, shrunken(size, 100).do_layer_norm_before) for size in SIZES}
    assert {size for size in SIZES if traits[size] != (32, True)} == {"opt-350m"} and traits["opt-350m"] == (16, False)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_three_files_of_a_size_train(size, tokenizer, tmp_path):
    """Two optimizer steps of each stage's main() on a CPU, each from the model that the one before has left."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shrunken(size, len(tokenizer))).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    parents = {"sft": ["--model", tmp_path / "base"], "reward": ["--model", tmp_path / "sft/final"],
               "ppo": ["--model", tmp_path / "sft/final", "--reward_model", tmp_path / "reward/final"]}
    for stage, (script, _) in STAGES.items():
        words = [*parents[stage], *SMALL[stage].split(), *STEPS[stage].split(), "--eval_rows", 4, "--test_rows", 4,
                 "--mixed_precision", "no", "--deepspeed", "none", "--output_dir", tmp_path / stage]
        script.main(config_of(PROJECT / "configs" / size / f"{stage}.yaml", *map(str, words)))
        rows = [json.loads(line) for line in (tmp_path / stage / "metrics.jsonl").read_text().splitlines()]
        norm = {"sft": "sft/grad_norm", "reward": "reward/grad_norm", "ppo": "policy/grad_norm"}[stage]
        steps = [row["step"] for row in rows if row.get(norm, 0) > 0]
        assert steps == ([1] if stage == "ppo" else [1, 2])  # PPO: an update of two passes
        assert (tmp_path / stage / "final" / "model.safetensors").is_file()
