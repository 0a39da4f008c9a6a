"""The planner: parameters, ZeRO's published bytes and limits, properties, DeepSpeed's source, the script."""

import ast
import importlib.metadata
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import plan_memory
from families import CONFIGS, FAMILIES
from planning import flops, memory
from planning.architectures import OPT, kept_bytes, model_of
from planning.duration import needed_flops
from planning.fit import Setup, batches_of, cheapest, choices_of, held_models, plan, remedies
from planning.memory import CHOICES, FOUR_BITS, GIB, Held, Work, Zero, items_of, peak
from tiny_models import save_opt
from utils.config import UserError, parse_config
from utils.models.four_bit import layers_of, storage_of
from utils.models.loading import load_policy, load_scalar_model, without_dropout
from utils.models.parents import Parent

ROOT = Path(__file__).resolve().parents[2]
STATES = ("weights", "gradients", "optimizer")
NAMES = [zero.name for zero in CHOICES]
CHOICE = dict(zip(NAMES, CHOICES, strict=True))
SETUP = Setup(
    "facebook/opt-125m", None, "separate", 0, processes=1, per_node=1, device_memory=80 * GIB,
    host_memory=None, micro_batch=2, generation_batch=4, prompt=100, completion=20, k=4, precision="bf16",
    checkpointing=False,
)


def states(count: int, zero: Zero, processes: int, precision: str = "bf16") -> dict[str, int]:
    """Bytes of each term for a model of `count` parameters that is trained on GPUs."""
    model = model_of("facebook/opt-125m", "model")._replace(trained=(count,), frozen=0)
    work = Work("sft", 1, 1, 100, 20, 1, precision, False, processes, False)
    items = items_of([Held("policy", model, True)], zero, work)
    return {
        name: sum(item.bytes for item in items if item.name == name and item.place == "device")
        for name in STATES
    }


# ------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", list(OPT))
def test_parameters_are_those_of_the_formula(name):
    """Embeddings of words and 2048 + 2 positions; layers of 12 h^2 weights, 9 h biases, 4 h norms; a norm."""
    hidden, layers, _ = OPT[name]
    counted = model_of(name, "model").parameters
    words = 50272 * hidden + 2050 * hidden
    last = 2 * hidden
    if name == "facebook/opt-350m":  # embeddings of width 512 with two projections, no last norm
        words, last = 50272 * 512 + 2050 * hidden + 2 * 512 * hidden, 0
    assert counted == words + layers * (12 * hidden**2 + 13 * hidden) + last


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("facebook/opt-125m", 125_239_296),
        ("facebook/opt-350m", 331_196_416),
        ("facebook/opt-1.3b", 1_315_758_080),
        ("facebook/opt-6.7b", 6_658_473_984),
    ],
)
def test_parameters_are_those_of_the_checkpoints(name, published):
    assert model_of(name, "model").parameters == published


def test_adapters_have_two_factors_for_each_linear_layer():
    """Rank 8, in each layer: four linear layers of h x h, and two of h x 4h."""
    model = model_of("facebook/opt-125m", "model", lora_rank=8)
    assert sum(model.trained) == 12 * 8 * (4 * 2 * 768 + 2 * 5 * 768)
    assert model.frozen == 125_239_296 and model.head == 0


@pytest.mark.parametrize("scalar", [False, True])
def test_weights_in_4_bits_take_the_bytes_that_are_measured(scalar, tmp_path):
    """A loaded model's tensors. bitsandbytes' tables of the 16 and 256 numbers are no part of a weight."""
    folder = save_opt(tmp_path / "model", "reward" if scalar else "policy", hidden_size=256, ffn_dim=1024,
                      word_embed_proj_dim=256)
    config = SimpleNamespace(load_in_4bit=True, mixed_precision="no")
    load = load_scalar_model if scalar else load_policy
    model = load(Parent("model", str(folder)), storage=storage_of(config))
    states = [layer.weight.quant_state for _, layer in layers_of(model)]
    measured = (sum(weight.nbytes for weight in model.parameters())
                + sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states))
    planned = model_of(str(folder), "model", scalar, 0, True)
    assert planned.rounded == 2 * (4 * 256**2 + 2 * 256 * 1024)
    assert memory.stored_bytes(planned, 4) == pytest.approx(measured, rel=1e-4)


def test_ppo_of_7b_fits_into_24_gib_in_4_bits_only():
    setup = SETUP._replace(model="facebook/opt-6.7b", lora_rank=64, device_memory=24 * GIB, micro_batch=1,
                           generation_batch=16, checkpointing=True, prompt=512, completion=53, processes=1)
    assert not plan("ppo", CHOICE["none"], setup).fits
    one = plan("ppo", CHOICE["none"], setup._replace(load_in_4bit=True))
    assert one.fits
    # two models of 32 layers with 12 h^2 rounded weights each; positions and words of both in float32
    weights = 2 * (32 * 12 * 4096**2 * FOUR_BITS + 4 * 4096 * (50272 + 2050))
    adapters = 2 * 4 * 32 * 64 * 18 * 4096  # rank 64: 4 layers of h x h, 2 of h x 4h
    [item] = [item for item in one.items if item.name == "weights"]
    assert item.bytes == pytest.approx(weights + adapters, rel=2e-3)  # without biases and norms


def test_zero_3_is_not_planned_for_4_bits():
    assert [zero.name for zero in choices_of([], True)] == ["none", "zero1", "zero2", "zero2_offload"]
    for words, said in ((["--load_in_4bit", "true"], "load_in_4bit: .* give --lora_rank too"),
                        ("--load_in_4bit true --lora_rank 8 --zero zero3".split(), "zero: ZeRO-3 does not")):
        with pytest.raises(UserError, match=f"^{said}"):
            plan_memory.main(parse_config(plan_memory.PlanConfig, None, words))


# --------------------------------------------------------------------------------------------- states by hand


@pytest.mark.parametrize(
    ("name", "gigabytes"), [("none", 120), ("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)]
)
def test_figure_1_of_the_zero_paper(name, gigabytes):
    """7.5 billion parameters on 64 GPUs (arXiv 1910.02054): baseline, P_os, P_os+g, P_os+g+p."""
    assert sum(states(7_500_000_000, CHOICE[name], 64).values()) / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize("name", NAMES[:4])
@pytest.mark.parametrize("parameters", [125_239_296, 1_315_758_080])
def test_mixed_precision_takes_16_bytes_a_parameter(name, parameters):
    """On one GPU nothing is sharded: 2.0 GB for OPT-125m and 21.05 GB for OPT-1.3B."""
    by_hand = {125_239_296: 2_003_828_736, 1_315_758_080: 21_052_129_280}
    assert sum(states(parameters, CHOICE[name], 1).values()) == by_hand[parameters]


def test_float32_takes_16_bytes_too_and_zero_a_copy_of_the_weights_more():
    assert states(100, CHOICE["none"], 1, "fp32") == {"weights": 400, "gradients": 400, "optimizer": 800}
    assert states(100, CHOICE["zero2"], 1, "fp32") == {"weights": 400, "gradients": 400, "optimizer": 1200}
    assert states(100, CHOICE["zero3"], 1, "fp32") == {"weights": 400, "gradients": 400, "optimizer": 800}


@pytest.mark.parametrize(("name", "host"), [("zero2_offload", 2 + 4 + 12), ("zero3_offload", 2 + 2 + 4 + 12)])
def test_offloaded_bytes_a_parameter(name, host):
    """Gradients in 16 bits and float32, master weights, moments; with ZeRO-3 the 16-bit weights too."""
    items = items_of(held_models("sft", SETUP), CHOICE[name], SETUP.work("sft"))
    on_host = [item.bytes for item in items if item.place == "host" and item.name in STATES]
    assert sum(on_host) == host * 125_239_296


def test_page_locked_memory_comes_in_powers_of_two():
    """100 parameters: 200 bytes become 256, twice; 400 become 512, twice."""
    model = model_of("facebook/opt-125m", "model")._replace(trained=(100,), frozen=0)
    [item] = memory.pinned([Held("policy", model, True)], CHOICE["zero2_offload"], SETUP.work("sft"))
    assert item.bytes == 2 * 56 + 2 * 112


def test_ddp_copies_float32_gradients_and_autocast_16_bit_weights():
    held, work = held_models("sft", SETUP), SETUP.work("sft")

    def bytes_in_update(term, **changes):
        items = term(held, CHOICE["none"], work._replace(**changes))
        return sum(item.bytes for item in items if "update" in item.alive)

    buckets = [bytes_in_update(memory.exchange_buffers, processes=count) for count in (1, 2)]
    casts = [bytes_in_update(memory.gathered, precision=precision) for precision in ("fp32", "bf16")]
    assert buckets == [0, 4 * 125_239_296] and casts == [0, 2 * 125_239_296]


def test_zero3_keeps_half_the_reuse_distance_and_what_is_fetched_ahead():
    """In 16 bits: half of 10^9 parameters and .9 x 2048^2, or the whole model where it has fewer."""
    for name, live in (("facebook/opt-1.3b", 500_000_000 + 3_774_873), ("facebook/opt-125m", 125_239_296)):
        setup = SETUP._replace(model=name, processes=2)
        items = memory.gathered(held_models("sft", setup), CHOICE["zero3"], setup.work("sft"))
        assert [item.bytes for item in items if "update" in item.alive] == [2 * live]


@pytest.mark.parametrize(("model", "choice", "memory_of_a_gpu", "held"), [
    ("125m", "zero3", None, [2 * 125_239_296]), ("1.3b", "zero3_nvme", None, [2**30]),
    ("1.3b", "zero2", None, []), ("1.3b", "zero3", 80 * GIB, []),
])
def test_a_process_on_a_cpu_holds_one_file_to_save_it(model, choice, memory_of_a_gpu, held):
    setup = SETUP._replace(model=f"facebook/opt-{model}", device_memory=memory_of_a_gpu)
    items = memory.saving(held_models("sft", setup), CHOICE[choice], setup.work("sft"))
    assert [item.bytes for item in items] == held


@pytest.mark.parametrize(("choice", "processes", "memory_of_a_gpu", "copied"), [
    ("zero3", 1, 80 * GIB, False), ("zero3_offload", 1, 80 * GIB, True), ("zero3_offload", 1, None, False),
    ("zero3_nvme", 1, None, False), ("zero3", 2, 80 * GIB, True), ("zero3_offload", 2, None, True),
])
def test_one_process_copies_the_weights_only_from_where_they_lie_to_its_gpu(
        choice, processes, memory_of_a_gpu, copied):
    """`ds_tensor.data.to(device)` in `NoGatherHandle` copies nothing that is on the device already."""
    setup = SETUP._replace(processes=processes, device_memory=memory_of_a_gpu)
    items = memory.gathered(held_models("sft", setup), CHOICE[choice], setup.work("sft"))
    assert [item.bytes for item in items] == [2 * 125_239_296] * 2 * copied


def test_a_sub_group_is_closed_by_the_tensor_that_fills_it(monkeypatch):
    monkeypatch.setitem(memory.SUB_GROUP, "zero3", 10)
    work = SETUP.work("sft")
    assert memory.sub_group([4, 4, 7, 3, 2], CHOICE["zero3"], work) == 15
    assert memory.sub_group([4, 4, 7, 3, 2], CHOICE["zero3"], work._replace(processes=2)) == 10


# ----------------------------------------------------------------------------------------- DeepSpeed's source

DEEPSPEED = Path(importlib.util.find_spec("deepspeed").submodule_search_locations[0])
# Every method that the memory model names, and names in its body that the model counts on.
READ = {
    ("stage_1_and_2.py", "DeepSpeedZeroOptimizer", "__init__"): {
        "single_partition_of_fp32_groups",
        "param_buffer_of_bit16_for_cpu_offload_groups",
        "temp_grad_buffer_for_cpu_offload",
        "temp_grad_buffer_for_gpu_offload",
    },
    ("stage_1_and_2.py", "DeepSpeedZeroOptimizer", "initialize_optimizer_states"): {
        "single_partition_of_fp32_groups",
        "grad",
    },
    ("stage3.py", "DeepSpeedZeroOptimizer_Stage3", "_create_fp32_partitions"): {
        "fp32_partitioned_groups_flat",
        "clone",
        "offload_optimizer",
    },
    ("stage3.py", "DeepSpeedZeroOptimizer_Stage3", "_create_fp16_sub_groups"): {
        "sub_group_size",
        "partition_numel",
    },
    ("stage3.py", "DeepSpeedZeroOptimizer_Stage3", "initialize_optimizer_states"): {
        "gradient_buffer",
        "subgroup_gradient_buffer",
        "offload_optimizer",
    },
    ("partition_parameters.py", "NoGatherHandle", "__init__"): {"ds_tensor", "to", "current_device_name"},
}


def methods_of(tree: ast.Module, class_name: str) -> dict[str, ast.FunctionDef]:
    """The methods of a class by name; none where the class is missing."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name]
    return {node.name: node for found in classes for node in found.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("cited", READ, ids=lambda cited: ".".join(cited[1:]))
def test_deepspeed_still_has_the_methods_that_the_terms_were_read_in(cited):
    """A new version that renames one must be read again before the plan is believed."""
    file, class_name, method = cited
    tree = ast.parse((DEEPSPEED / "runtime" / "zero" / file).read_text(encoding="utf-8"))
    methods = methods_of(tree, class_name)
    assert method in methods
    names = {node.attr if isinstance(node, ast.Attribute) else node.id for node in ast.walk(methods[method])
             if isinstance(node, ast.Attribute | ast.Name)}
    assert names >= READ[cited]


def test_the_terms_name_these_methods_and_no_lines():
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts" / "planning").glob("*.py"))
    named = set(re.findall(r"`(DeepSpeed\w+|NoGather\w+)\.(\w+)`", text))
    assert named == {(class_name, method) for _, class_name, method in READ}
    assert not re.search(r"\.py\W{1,3}\d|\(:\d", text)


def test_the_deepspeed_that_was_read_is_the_one_that_is_pinned():
    [read] = re.findall(r"source of DeepSpeed\s+([\d.]+\d)", memory.__doc__)
    [pinned] = re.findall(
        r"^deepspeed==(\S+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert read == pinned == importlib.metadata.version("deepspeed")


# ---------------------------------------------------------------------------------------- activations, caches


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [24, 60])
def test_kept_bytes_are_those_that_autograd_keeps(family, length, tmp_path):
    """A real model and a real forward pass keep the same. Attention kernels differ a little."""
    CONFIGS[family]().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_config(
        CONFIGS[family](), dtype=torch.float32, attn_implementation="sdpa"
    )
    model = without_dropout(model).train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(length)[None] % 31
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        positions = torch.arange(length)[None]
        model.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    real = sum(
        tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in weights
    )
    assert kept_bytes(str(tmp_path), "model", False, length, torch.float32) == pytest.approx(real, rel=0.1)


def test_activations_of_opt_by_hand():
    """12 h for each token: inputs, outputs of 2 norms, query, key, value, attention's output, MLP's 4 h."""
    length = 100
    numbers = kept_bytes("facebook/opt-125m", "model", False, length, torch.bfloat16) / 2
    normalisers, mask = 12 * length * 2, length**2  # 12 heads, float32
    by_hand = 12 * (12 * 768 * length + normalisers + mask)
    assert numbers == pytest.approx(by_hand, rel=0.02)


def test_checkpointing_keeps_a_layers_input_and_one_layer():
    held, work = held_models("sft", SETUP), SETUP.work("sft")
    plain, recomputed = (memory.activations(held, CHOICE["zero2"], work._replace(checkpointing=flag))[0].bytes
                         for flag in (False, True))
    row = kept_bytes("facebook/opt-125m", "model", False, 120, torch.bfloat16)
    assert plain == pytest.approx(2 * row * 13 / 12, rel=1e-3)
    assert recomputed == pytest.approx(2 * (12 * 120 * 768 * 2 + row * 2 / 12), rel=1e-3)


def test_the_cache_holds_a_prompt_once_for_its_branches():
    """By hand: 12 layers, keys and values, 768 numbers of 2 bytes; 4 prompts of 100 tokens and 4 x 20."""
    items = memory.generation(held_models("ppo", SETUP), CHOICE["zero2"], SETUP.work("ppo"))
    assert [item.bytes for item in items if item.name == "kv cache"] == [
        4 * (100 + 4 * 20) * 12 * 2 * 768 * 2
    ]


def test_the_reward_stages_evaluation_holds_what_a_layer_keeps_of_its_rows():
    """By hand, 12 h numbers for each token as above, in 16 bits: 4 rows of 100 + 4 x 20 tokens.

    The other stages sample, which takes more.
    """
    work = SETUP.work("reward")
    [item] = memory.scoring(held_models("reward", SETUP), CHOICE["zero2"], work)
    assert item.bytes == pytest.approx(4 * 2 * (12 * 768 * 180 + 12 * 180 * 2 + 180**2), rel=0.02)
    assert item.alive == ("generation",)
    assert not memory.scoring(held_models("ppo", SETUP), CHOICE["zero2"], SETUP.work("ppo"))


def test_logits_are_those_of_response_positions():
    """2 prompts x 4 completions x 20 tokens, 50,272 words. The reward stage has no head, LoRA trains none."""
    held, work = held_models("ppo", SETUP), SETUP.work("ppo")
    table, head = memory.logits(held, CHOICE["zero2"], work)
    assert table.bytes == 2 * 2 * 4 * 20 * 50272 and head.bytes == 6 * 50272 * 768
    assert memory.logits(held, CHOICE["none"], work._replace(precision="fp32"))[0].bytes == 4 * 160 * 50272
    assert not memory.logits(held_models("reward", SETUP), CHOICE["zero2"], SETUP.work("reward"))
    assert not memory.logits(held_models("ppo", SETUP._replace(lora_rank=8)), CHOICE["zero2"], work)


# ----------------------------------------------------------------------------------------------- which models


@pytest.mark.parametrize(("changes", "roles"), [
    ({}, ["policy", "value_model", "ref_policy", "reward_model"]),
    ({"value_model": "shared"}, ["policy", "ref_policy", "reward_model"]),
    ({"value_model": "none"}, ["policy", "ref_policy", "reward_model"]),
    ({"lora_rank": 8}, ["policy", "value_model"]),
    ({"lora_rank": 8, "value_model": "none"}, ["policy", "reward_model"]),
])
def test_models_of_ppo(changes, roles):
    held = held_models("ppo", SETUP._replace(**changes))
    assert [one.role for one in held] == roles
    assert [one.role for one in held if one.trained] == [
        role for role in roles if role in ("policy", "value_model")
    ]


def test_a_reward_model_of_its_own_size():
    held = {
        one.role: one.model for one in held_models("ppo", SETUP._replace(reward_model="facebook/opt-350m"))
    }
    assert held["value_model"].parameters == held["reward_model"].parameters == 331_196_416 + 512
    assert held["policy"].parameters == held["ref_policy"].parameters == 125_239_296


# ------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("zero", CHOICES, ids=NAMES)
def test_more_gpus_never_take_more_of_each(stage, zero):
    """One exception: a single process has no DDP buckets."""
    counts = [2, 3, 8, 64, 512] if zero.name == "none" else [1, 2, 3, 8, 64, 512]
    peaks = [plan(stage, zero, SETUP._replace(processes=count, per_node=count)).device for count in counts]
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("processes", [1, 2, 64])
def test_each_stage_of_zero_has_no_more_states(processes):
    totals = [
        sum(states(10**9, CHOICE[name], processes).values()) for name in ("zero3", "zero2", "zero1", "none")
    ]
    assert totals == sorted(totals)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("zero", CHOICES, ids=NAMES)
def test_the_largest_batches_fit_and_one_more_does_not(stage, zero):
    setup = SETUP._replace(device_memory=12 * GIB)
    largest = batches_of(plan(stage, zero, setup), setup)
    alone = setup._replace(micro_batch=1, generation_batch=1)
    for field, count, flag in (
        ("micro_batch", largest.micro_batch, False),
        ("micro_batch", largest.recomputing, True),
        ("generation_batch", largest.generation_batch, False),
    ):
        assert count > 0
        for batch, fits in ((count, True), (count + 1, False)):
            assert plan(stage, zero, alone._replace(**{field: batch, "checkpointing": flag})).fits == fits
    assert largest.recomputing >= largest.micro_batch


def test_the_fastest_that_fits_is_chosen():
    plans = [plan("ppo", zero, SETUP) for zero in choices_of([])]
    assert cheapest(plans).zero.name == "none"
    small = [plan("ppo", zero, SETUP._replace(device_memory=5 * GIB)) for zero in choices_of([])]
    best = cheapest(small)
    assert best.fits and not any(one.fits for one in small[: small.index(best)])
    assert cheapest([one._replace(fits=False) for one in small]) is None


def test_host_memory_counts_the_processes_of_a_node():
    setup = SETUP._replace(processes=16, per_node=8)
    one = plan("sft", CHOICE["zero3_offload"], setup)
    assert one.host == 8 * peak(one.items, "host")
    assert not plan("sft", CHOICE["zero3_offload"], setup._replace(host_memory=one.host - 1)).fits


def test_on_a_cpu_all_of_it_is_the_hosts():
    setup = SETUP._replace(
        device_memory=None, host_memory=24 * GIB, precision="fp32", processes=2, per_node=2
    )
    one = plan("sft", CHOICE["zero3_offload"], setup)
    assert one.device == 0 and one.host == 2 * peak(one.items, "device", "host")
    assert all(item.name != "pinned" for item in one.items)


def test_a_remedy_is_one():
    """What the advice names makes the stage fit."""
    setup = SETUP._replace(model="facebook/opt-1.3b", device_memory=24 * GIB, checkpointing=True)
    choices = choices_of(["none", "zero2"])
    assert not any(plan("ppo", zero, setup).fits for zero in choices)
    advice = remedies("ppo", choices, setup)
    assert "--lora_rank 8" in advice and advice[-1].startswith("--gpus ")
    advised = int(advice[-1].split()[1])
    for gpus, fits in ((advised, True), (advised // 2, False)):
        more = setup._replace(processes=gpus, per_node=min(gpus, 8))
        assert any(plan("ppo", zero, more).fits for zero in choices) == fits


def test_no_number_of_gpus_helps_when_the_policy_alone_is_too_large():
    setup = SETUP._replace(model="facebook/opt-66b", processes=64, per_node=8)
    assert "whole policy" in remedies("ppo", choices_of(["zero3"]), setup)[-1]


# ------------------------------------------------------------------------------------------- published limits


@pytest.mark.parametrize(
    ("gigabytes", "largest"),
    [
        (32, "facebook/opt-2.7b"),
        (48, "facebook/opt-6.7b"),
        (40, "facebook/opt-6.7b"),
        (80, "facebook/opt-13b"),
    ],
)
def test_the_largest_models_of_deepspeed_chat(gigabytes, largest):
    """Table 3 of the DeepSpeed-Chat release: the largest OPT on one GPU (V100, A6000, A100, A100).

    Its scripts (step3, single_gpu) train only adapters of rank 128, in fp16, with a reference model of its
    own, a trained value model and a reward model of OPT-350m, gradient checkpointing, 256 + 256 tokens and no
    offload. On one GPU its fp16 optimizer keeps what ZeRO-2 keeps: weights in 16 bits, and float32 states for
    what is trained.
    """
    scalar = model_of("facebook/opt-350m", "reward_model", scalar=True)
    work = Work("ppo", 1, 1, 256, 256, 1, "fp16", True, 1, False)

    def fits(name):
        held = [
            Held("policy", model_of(name, "model", lora_rank=128), True),
            Held("value_model", scalar, True),
            Held("ref_policy", model_of(name, "model"), False),
            Held("reward_model", scalar, False),
        ]
        return peak(items_of(held, CHOICE["zero2"], work), "device") <= gigabytes * GIB

    assert [name for name in OPT if fits(name)][-1] == largest


# ------------------------------------------------------------------------------------------------------- time


def test_operations_are_those_of_the_benchmark():
    """An SFT example, a reward row, and a PPO update of one prompt, for each kind of value model.

    A value model on the policy's trunk saves the 4 passes of the update (3 forward passes' FLOPs each), none
    at all also the pass before it.
    """
    size = flops.Size(768, 12, 3072, 50272)
    assert needed_flops("sft", SETUP, 3, 4) == 3 * flops.sft(size, [100], [[20]])
    assert needed_flops("reward", SETUP, 3, 4) == 3 * flops.reward(size, [100], [[20] * 4])
    assert needed_flops("ppo", SETUP, 8, 4) == 2 * flops.ppo(size, [100], 4, 20, 4)
    trunk = flops.groups_trunk(size, [100], [[20] * 4])
    separate, shared, none = (needed_flops("ppo", SETUP._replace(value_model=kind), 4, 4)
                              for kind in ("separate", "shared", "none"))
    assert separate - shared == 4 * 3 * trunk and separate - none == (4 * 3 + 1) * trunk


# ------------------------------------------------------------------------------------------------- the script


def run(monkeypatch, *words):
    """Run the script with these words on its command line."""
    monkeypatch.setattr(sys, "argv", ["plan_memory.py", *map(str, words)])
    plan_memory.start(plan_memory.main, plan_memory.read_config(plan_memory.PlanConfig, None, ""))


def test_all_of_it(monkeypatch, capsys, tmp_path):
    run(
        monkeypatch,
        "--model",
        "facebook/opt-13b",
        "--gpus",
        8,
        "--zero",
        "zero2",
        "zero3_offload",
        "--reward_model",
        "facebook/opt-350m",
        "--peak_tflops",
        312,
        "--utilisation",
        0.5,
        "--output",
        tmp_path / "plan.json",
    )
    shown = capsys.readouterr().out
    assert "zero3_offload" in shown and "hours" in shown
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert [(row["stage"], row["zero"]) for row in rows] == [
        (stage, zero) for stage in ("sft", "reward", "ppo") for zero in ("zero2", "zero3_offload")]
    for row in rows:
        assert row["fits"] == (row["device_bytes"] <= 80 * GIB)
        assert row["hours"] == pytest.approx(row["flops"] / (8 * 156e12) / 3600)
        on_device = [term for term in row["terms"] if term["place"] == "device"]
        phases = [
            sum(term["bytes"] for term in on_device if phase in term["alive"]) for phase in memory.PHASES
        ]
        assert row["device_bytes"] == max(phases)


def test_a_local_folder_on_this_machine(monkeypatch, capsys, tmp_path):
    run(
        monkeypatch,
        "--model",
        "assets/opt-mini",
        "--gpus",
        0,
        "--processes",
        2,
        "--stage",
        "sft",
        "--prompt_length",
        100,
        "--figure",
        tmp_path / "plan.png",
    )
    shown = capsys.readouterr().out
    assert (
        "2 processes on this CPU, fp32" in shown
        and "none is the fastest that fits" in shown
        and "hours" not in shown
    )
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_clear_warning_where_nothing_fits(monkeypatch, capsys):
    run(
        monkeypatch,
        "--model",
        "facebook/opt-1.3b",
        "--gpu_memory",
        16,
        "--stage",
        "ppo",
        "--zero",
        "none",
        "zero1",
    )
    assert "ppo: NOTHING FITS. It would with one of: " in capsys.readouterr().out


@pytest.mark.parametrize(("words", "said"), [
    (["--model", "nobody/nothing"], "model: the architecture of 'nobody/nothing' cannot be read"),
    (["--model", "outputs/none/sft/final"], "model: no model folder at"),
    (["--reward_model", "opt-350m"], "reward_model: no model folder at"),
    (["--gpus", "-1"], "'gpus' must be at least 0"),
    (["--gpu_memory", "0"], "'gpu_memory' must be at least"),
    (["--cpu_memory", "-3"], "'cpu_memory' must be at least"),
    (["--stage", "dpo"], "'dpo'"),
    (["--zero", "zero4"], "zero: unknown configuration 'zero4'; choose from: none | zero1"),
    (["--precision", "int8"], "precision: unknown precision 'int8'; choose from: bf16"),
    (["--gpus", "0", "--precision", "fp16"], "precision: a CPU trains in fp32 or bf16"),
    (["--gpus", "2", "--processes", "2"], "processes: with GPUs there is one process for each GPU"),
    (["--gpus", "8", "--gpus_per_node", "3"], "gpus_per_node: 8 GPUs do not divide into nodes of 3"),
    (["--prompt_length", "2040"], "2048 positions"),
    (["--output", "plan.txt"], "output: "), (["--figure", "nowhere/plan.png"], "figure: "),
    (["--utilisation", "1.5"], "'utilisation' must be at most"),
])
def test_mistakes(words, said, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, *words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.startswith("error: ") and error.count("\n") == 1
