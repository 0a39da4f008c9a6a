"""configs/opt/: each size's figures are the planner's, its batch is the published one, and its stages run."""

import json
import re
import shlex
from dataclasses import asdict
from functools import cache
from itertools import takewhile

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

STAGES = {"sft": (train_sft, train_sft.SFTStageConfig),
          "reward": (train_reward, train_reward.RewardStageConfig),
          "ppo": (train_ppo, train_ppo.PPOStageConfig)}
SIZES = [name.removeprefix("facebook/opt-") for name in OPT]
CASES = [(size, stage) for size in SIZES for stage in STAGES]
every_size_and_stage = pytest.mark.parametrize(("size", "stage"), CASES)
FOLDER = PROJECT / "configs" / "opt"
COUNTS = {"one": 1, "two": 2, "8": 8}
MACHINE = re.compile(r"# Machine: (?:(\w+) nodes?(?:, each)? with )?(\w+) GPUs? of (\d+) GiB "
                     r"(?:and|in a computer with) (\d+) GiB of memory\.$", re.MULTILINE)
PLANNED = re.compile(r"# Planned: (\S+) GiB of (\d+) on (?:the|each) GPU, "
                     r"(\S+) of (\d+) on (?:the|each) (?:computer|node)\.$", re.MULTILINE)


def config_of(size, stage, *words):
    files = [str(FOLDER / f"{stage}.yaml"), str(FOLDER / f"{size}.yaml")]
    return parse_config(STAGES[stage][1], None, ["--config", *files, *words])


def header_of(size, stage) -> str:
    """The comments with which the stage's section of the size's file begins."""
    section = (FOLDER / f"{size}.yaml").read_text().split(f"\n{stage}:\n")[1]
    return "\n".join(takewhile(lambda line: line.startswith("  #"), section.splitlines()))


def machine_of(size, stage) -> tuple[int, int, int, int]:
    """Nodes, GPUs of each, GiB of a GPU, GiB of a node."""
    nodes, gpus, gpu, node = MACHINE.search(header_of(size, stage)).groups()
    return COUNTS[nodes or "one"], COUNTS[gpus], int(gpu), int(node)


def command_of(size, stage) -> list[str]:
    mark = "  #   "
    lines = [line for line in header_of(size, stage).splitlines() if line.startswith(mark)]
    return shlex.split(" ".join(line.removeprefix(mark).removesuffix("\\") for line in lines))


@cache
def plan_of(size, stage):
    """The planner's answer for a stage on its machine, with the longest rows that its limits allow."""
    config, (nodes, per_node, gpu, node) = config_of(size, stage), machine_of(size, stage)
    completion, k = {
        "sft": lambda: (config.max_completion_tokens, 1),
        "reward": lambda: (config.max_completion_tokens, config.max_completions),
        "ppo": lambda: (config.max_new_tokens, config.responses_per_prompt),
    }[stage]()
    setup = Setup(
        f"facebook/opt-{size}", None, getattr(config, "value_model", "separate"), config.lora_rank,
        nodes * per_node, per_node, gpu * GIB, node * GIB, config.per_device_batch_size,
        config.eval_batch_size, config.max_prompt_tokens, completion, k, config.mixed_precision,
        config.gradient_checkpointing,
    )
    name = (config.deepspeed or "none").removeprefix("configs/deepspeed/").removesuffix(".json")
    [zero] = choices_of([name])
    return plan(stage, zero, setup)


# ----------------------------------------------------------------------------------------------- the headers


def test_there_are_three_recipes_and_a_file_for_each_size():
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.yaml" for name in [*STAGES, *SIZES]}
    assert [path for path in (PROJECT / "configs").iterdir() if path.name.startswith("opt-")] == []


@every_size_and_stage
def test_the_machines_figures_are_the_planners(size, stage):
    device, gpu, host, node = PLANNED.search(header_of(size, stage)).groups()
    assert (int(gpu), int(node)) == machine_of(size, stage)[2:]
    one = plan_of(size, stage)
    assert (device, host) == (f"{one.device / GIB:.1f}", f"{one.host / GIB:.1f}")


@every_size_and_stage
def test_a_tenth_of_the_machine_is_left(size, stage):
    _, _, gpu, node = machine_of(size, stage)
    one = plan_of(size, stage)
    assert one.device <= 0.9 * gpu * GIB and one.host <= 0.9 * node * GIB


@every_size_and_stage
def test_the_command_starts_this_stage_on_all_of_the_machine(size, stage):
    nodes, per_node, _, _ = machine_of(size, stage)
    offloaded = "offload" in (config_of(size, stage).deepspeed or "")
    start = ["python"] if nodes * per_node == 1 else ["torchrun", "--nproc_per_node", str(per_node)]
    if nodes > 1:
        start = ["torchrun", "--nnodes", str(nodes), *start[1:], "--rdzv_backend", "c10d",
                 "--rdzv_endpoint", "HOST:29500"]
    if offloaded and per_node > 1:
        start = ["OMP_NUM_THREADS=8", *start]
    files = [f"configs/opt/{stage}.yaml", f"configs/opt/{size}.yaml"]
    assert command_of(size, stage) == [*start, f"scripts/train_{stage}.py", "--config", *files]
    assert (PROJECT / "scripts" / f"train_{stage}.py").is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_a_recipes_command_is_that_of_a_size(stage):
    lines = (FOLDER / f"{stage}.yaml").read_text().splitlines()
    [command] = [line.removeprefix("#   ") for line in lines if line.startswith("#   ")]
    assert shlex.split(command) == command_of("125m", stage)


# ------------------------------------------------------------------------------------------------ the values

# keys of the machine: what a size's file may set, and a recipe may not
MACHINES_KEYS = {"output_dir", "model", "reward_model", "deepspeed", "per_device_batch_size",
                 "gradient_accumulation_steps", "gradient_checkpointing", "eval_batch_size", "lora_rank"}


@every_size_and_stage
def test_the_global_batch_is_the_published_one(size, stage):
    """128 examples, 16 rows of comparisons, 128 prompts with 4 responses in one optimizer step."""
    config, processes = config_of(size, stage), machine_of(size, stage)[0] * machine_of(size, stage)[1]
    if stage == "ppo":
        assert (config.prompts_per_update, config.responses_per_prompt, config.num_minibatches) == (128, 4, 1)
        assert 128 // processes % config.per_device_batch_size == 0 and 128 % processes == 0
    else:
        batch = config.per_device_batch_size * config.gradient_accumulation_steps * processes
        assert batch == {"sft": 128, "reward": 16}[stage]


@pytest.mark.parametrize("size", SIZES)
def test_a_size_sets_the_machine_and_not_what_is_learnt(size):
    sections = yaml.safe_load((FOLDER / f"{size}.yaml").read_text())
    assert list(sections) == list(STAGES)
    for stage, keys in sections.items():
        fields = set(STAGES[stage][1].__dataclass_fields__)
        assert set(keys) - {"deepspeed"} == MACHINES_KEYS & fields - {"deepspeed", "lora_rank"}, stage


@pytest.mark.parametrize("stage", STAGES)
def test_a_recipe_sets_what_is_learnt_and_not_the_machine(stage):
    assert not MACHINES_KEYS & set(yaml.safe_load((FOLDER / f"{stage}.yaml").read_text()))


TLDR, COMPARISONS = "CarperAI/openai_summarize_tldr", "CarperAI/openai_summarize_comparisons"
LEARNT = {  # what N+, ST and IG print, for all sizes
    "sft": {"actor_training_data": TLDR, "actor_validation_data": TLDR, "actor_test_data": TLDR,
            "max_prompt_tokens": 512, "max_completion_tokens": 64, "max_new_tokens": 53,
            "num_train_epochs": 1.0, "learning_rate": None, "adam_eps": 1e-5, "eval_steps": 100,
            "eval_rows": 300, "test_rows": 1000},
    "reward": {"reward_training_data": COMPARISONS, "reward_validation_data": None,
               "reward_test_data": COMPARISONS, "centring_data": TLDR, "max_prompt_tokens": 512,
               "max_completion_tokens": 169, "max_completions": 9, "num_train_epochs": 1.0,
               "learning_rate": None, "adam_eps": 1e-5, "eval_steps": 100, "eval_rows": 300,
               "test_rows": 2000},
    "ppo": {"rlhf_training_data": TLDR, "rlhf_validation_data": TLDR, "rlhf_test_data": TLDR,
            "max_prompt_tokens": 512, "max_new_tokens": 53, "total_episodes": 1_000_000,
            "prompts_per_update": 128, "responses_per_prompt": 4, "ppo_epochs": 4, "num_minibatches": 1,
            "learning_rate": None, "adam_eps": 1e-5, "temperature": 0.7, "kl_coef": 0.05, "gamma": 1.0,
            "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "missing_eos_score": -1.0,
            "kl_budget": 20.0, "kl_limit": 100.0, "eval_steps": 50, "eval_rows": 300, "test_rows": 1000,
            "save_steps": 50},
}


@every_size_and_stage
def test_what_is_learnt_is_the_same_for_every_size_and_all_else_is_the_default(size, stage):
    config, defaults = asdict(config_of(size, stage)), asdict(STAGES[stage][1]())
    science = {name: value for name, value in config.items() if name not in MACHINES_KEYS}
    assert science == {name: defaults[name] for name in science} | LEARNT[stage] | {"mixed_precision": "bf16"}
    assert config["lora_rank"] == 0


@every_size_and_stage
def test_stages_hand_on_within_a_size(size, stage):
    config = config_of(size, stage)
    assert config.output_dir == f"outputs/opt-{size}/{stage}"
    assert config.model == (f"facebook/opt-{size}" if stage == "sft" else f"outputs/opt-{size}/sft/final")
    if stage == "ppo":
        assert config.reward_model == f"outputs/opt-{size}/reward/final"


# ------------------------------------------------------------------------ the planner and configs/deepspeed/


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
    # what its terms take for granted: buckets of hidden^2 and prefetching, two buckets, page-locked memory
    assert {settings[key] for key in settings if key.endswith("bucket_size")} == {"auto"}
    assert settings["overlap_comm"] is True
    assert all(settings[key]["pin_memory"] is True for key in settings if key.startswith("offload_"))


def test_the_planners_constants_are_those_of_the_files():
    for name, limit in memory.SUB_GROUP.items():
        settings = zero_of(name)
        assert settings["sub_group_size"] == limit
        assert settings["stage3_max_reuse_distance"] == settings["stage3_max_live_parameters"] == memory.REUSE
    assert set(memory.SUB_GROUP) == {zero.name for zero in CHOICES if zero.stage == 3}
    nvme = zero_of("zero3_nvme")
    assert nvme["offload_optimizer"]["buffer_count"] == memory.SWAP_BUFFERS


# ----------------------------------------------------------------------------------------- two steps of each

DATA = "data/tldr_mini"
SMALL = {  # the data and the sizes; what is learnt, and how, is the file's
    "sft": f"--actor_training_data {DATA}/actor_validation.jsonl.gz --actor_validation_data none "
           f"--actor_test_data {DATA}/actor_test.jsonl.gz",
    "reward": f"--reward_training_data {DATA}/reward_validation.jsonl.gz "
              f"--reward_test_data {DATA}/reward_test.jsonl.gz "
              f"--centring_data {DATA}/actor_validation.jsonl.gz",
    "ppo": f"--rlhf_training_data {DATA}/rlhf_validation.jsonl.gz --rlhf_validation_data none "
           f"--rlhf_test_data {DATA}/rlhf_test.jsonl.gz",
}
STEPS = {
    "sft": "--max_steps 2 --per_device_batch_size 2 --gradient_accumulation_steps 2 --max_new_tokens 4 "
           "--logging_steps 1",
    "reward": "--max_steps 2 --per_device_batch_size 2 --gradient_accumulation_steps 1 --logging_steps 1",
    "ppo": "--total_episodes 8 --prompts_per_update 2 --ppo_epochs 2 --max_new_tokens 4",
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PROJECT / "assets" / "opt-mini")


def shrunken(size: str, words: int) -> OPTConfig:
    """OPT of that size with the traits it has, 32 wide and two layers deep."""
    config = opt_config(f"facebook/opt-{size}")
    narrow = config.word_embed_proj_dim != config.hidden_size
    config.update({"hidden_size": 32, "word_embed_proj_dim": 16 if narrow else 32, "ffn_dim": 64,
                   "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": words})
    return config


def test_the_shrunken_models_keep_what_sets_a_size_apart():
    shrunk = {size: shrunken(size, 100) for size in SIZES}
    traits = {size: (one.word_embed_proj_dim, one.do_layer_norm_before) for size, one in shrunk.items()}
    assert {size for size in SIZES if traits[size] != (32, True)} == {"350m"}
    assert traits["350m"] == (16, False)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_the_three_stages_of_a_size_train(size, tokenizer, tmp_path):
    """Two optimizer steps of each stage's main() on a CPU, each from the model of the stage before."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shrunken(size, len(tokenizer))).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    parents = {"sft": ["--model", tmp_path / "base"], "reward": ["--model", tmp_path / "sft/final"],
               "ppo": ["--model", tmp_path / "sft/final", "--reward_model", tmp_path / "reward/final"]}
    for stage, (script, _) in STAGES.items():
        words = [*parents[stage], *SMALL[stage].split(), *STEPS[stage].split(),
                 "--eval_rows", 4, "--test_rows", 4, "--mixed_precision", "no", "--deepspeed", "none",
                 "--output_dir", tmp_path / stage]
        script.main(config_of(size, stage, *map(str, words)))
        rows = [json.loads(line) for line in (tmp_path / stage / "metrics.jsonl").read_text().splitlines()]
        norm = {"sft": "sft/grad_norm", "reward": "reward/grad_norm", "ppo": "policy/grad_norm"}[stage]
        steps = [row["step"] for row in rows if row.get(norm, 0) > 0]
        assert steps == ([1] if stage == "ppo" else [1, 2])  # PPO: an update of two passes
        assert (tmp_path / stage / "final" / "model.safetensors").is_file()
