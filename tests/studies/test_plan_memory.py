"""The planner: parameters, published bytes of ZeRO and published limits, properties, mistakes, the script from outside."""

import json
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

import plan_memory
from families import CONFIGS, FAMILIES
from planning import flops, memory
from planning.architectures import OPT, kept_bytes, model_of
from planning.duration import needed_flops
from planning.fit import Setup, batches_of, cheapest, choices_of, held_models, plan, remedies
from planning.memory import CHOICES, GIB, Held, Work, Zero, items_of, peak
from utils.models.loading import without_dropout

STATES = ("weights", "gradients", "optimizer")
NAMES = [zero.name for zero in CHOICES]
CHOICE = dict(zip(NAMES, CHOICES, strict=True))
SETUP = Setup("facebook/opt-125m", None, "separate", 0, processes=1, per_node=1, device_memory=80 * GIB, host_memory=None,
              micro_batch=2, generation_batch=4, prompt=100, completion=20, k=4, precision="bf16", checkpointing=False)


def states(count: int, zero: Zero, processes: int, precision: str = "bf16") -> dict[str, int]:
    """Bytes by term of a model of so many parameters, everywhere."""
    model = model_of("facebook/opt-125m", "model")._replace(trained=(count,), frozen=0)
    work = Work("sft", 1, 1, 100, 20, 1, precision, False, processes, False)
    items = items_of([Held("policy", model, True)], zero, work)
    return {name: sum(item.bytes for item in items if item.name == name and item.place == "device") for name in STATES}


# ------------------------------------------------------------------------------------------------------ parameters


@pytest.mark.parametrize("name", list(OPT))
def test_parameters_are_those_of_the_formula(name):
    """Embeddings of words and of 2048 + 2 positions; a layer of 12 h^2 weights, 9 h biases and 4 h of norms; a last norm."""
    hidden, layers, _ = OPT[name]
    counted = model_of(name, "model").parameters
    words = 50272 * hidden + 2050 * hidden
    last = 2 * hidden
    if name == "facebook/opt-350m":  # narrow embeddings with two projections, no last norm
        words, last = 50272 * 512 + 2050 * hidden + 2 * 512 * hidden, 0
    assert counted == words + layers * (12 * hidden**2 + 13 * hidden) + last


@pytest.mark.parametrize(("name", "published"), [("facebook/opt-125m", 125_239_296), ("facebook/opt-350m", 331_196_416),
                                                 ("facebook/opt-1.3b", 1_315_758_080), ("facebook/opt-6.7b", 6_658_473_984)])
def test_parameters_are_those_of_the_checkpoints(name, published):
    assert model_of(name, "model").parameters == published


def test_adapters_have_two_factors_for_each_linear_layer():
    """Rank 8: four of h x h, and two of h x 4h."""
    model = model_of("facebook/opt-125m", "model", lora_rank=8)
    assert sum(model.trained) == 12 * 8 * (4 * 2 * 768 + 2 * 5 * 768)
    assert model.frozen == 125_239_296 and model.head == 0


# ---------------------------------------------------------------------------------------------------- states by hand


@pytest.mark.parametrize(("name", "gigabytes"), [("none", 120), ("zero1", 31.4), ("zero2", 16.6), ("zero3", 1.9)])
def test_figure_1_of_the_zero_paper(name, gigabytes):
    """7.5 billion parameters on 64 GPUs (1910.02054): baseline, P_os, P_os+g, P_os+g+p."""
    assert sum(states(7_500_000_000, CHOICE[name], 64).values()) / 1e9 == pytest.approx(gigabytes, abs=0.05)


@pytest.mark.parametrize("name", NAMES[:4])
@pytest.mark.parametrize("parameters", [125_239_296, 1_315_758_080])
def test_mixed_precision_takes_16_bytes_a_parameter(name, parameters):
    """On one GPU, whatever is sharded: 2.0 GB of OPT-125m and 21.05 GB of OPT-1.3B."""
    assert sum(states(parameters, CHOICE[name], 1).values()) == {125_239_296: 2_003_828_736, 1_315_758_080: 21_052_129_280}[
        parameters]


def test_float32_takes_16_bytes_too_and_zero_a_copy_of_the_weights_more():
    assert states(100, CHOICE["none"], 1, "fp32") == {"weights": 400, "gradients": 400, "optimizer": 800}
    assert states(100, CHOICE["zero2"], 1, "fp32") == {"weights": 400, "gradients": 400, "optimizer": 1200}
    assert states(100, CHOICE["zero3"], 1, "fp32") == {"weights": 400, "gradients": 400, "optimizer": 800}


@pytest.mark.parametrize(("name", "host"), [("zero2_offload", 2 + 4 + 12), ("zero3_offload", 2 + 2 + 4 + 12)])
def test_offloaded_bytes_a_parameter(name, host):
    """ZeRO-2 keeps 16-bit gradients, float32 ones, master and moments on the host; ZeRO-3 the 16-bit weights, too."""
    held = held_models("sft", SETUP)
    items = [item for item in items_of(held, CHOICE[name], SETUP.work("sft")) if item.place == "host" and item.name in STATES]
    assert sum(item.bytes for item in items) == host * 125_239_296


def test_page_locked_memory_comes_in_powers_of_two():
    """100 parameters: 200 bytes become 256, twice; 400 become 512, twice."""
    model = model_of("facebook/opt-125m", "model")._replace(trained=(100,), frozen=0)
    [item] = memory.pinned([Held("policy", model, True)], CHOICE["zero2_offload"], SETUP.work("sft"))
    assert item.bytes == 2 * 56 + 2 * 112


def test_ddp_copies_float32_gradients_and_autocast_16_bit_weights():
    held, work = held_models("sft", SETUP), SETUP.work("sft")
    def found(term, **changes):
        items = term(held, CHOICE["none"], work._replace(**changes))
        return sum(item.bytes for item in items if "update" in item.alive)
    assert [found(memory.exchange_buffers, processes=count) for count in (1, 2)] == [0, 4 * 125_239_296]
    assert [found(memory.gathered, precision=precision) for precision in ("fp32", "bf16")] == [0, 2 * 125_239_296]


def test_zero3_keeps_half_the_reuse_distance_and_what_is_fetched_ahead():
    """In 16 bits: half of 10^9 parameters, and .9 x 2048^2; or the whole model where it has less."""
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
    assert [item.bytes for item in memory.saving(held_models("sft", setup), CHOICE[choice], setup.work("sft"))] == held


@pytest.mark.parametrize(("choice", "processes", "memory_of_a_gpu", "copied"), [
    ("zero3", 1, 80 * GIB, False), ("zero3_offload", 1, 80 * GIB, True), ("zero3_offload", 1, None, False),
    ("zero3_nvme", 1, None, False), ("zero3", 2, 80 * GIB, True), ("zero3_offload", 2, None, True),
])
def test_one_process_copies_the_weights_only_from_where_they_lie_to_its_gpu(choice, processes, memory_of_a_gpu, copied):
    """`NoGatherHandle` takes `ds_tensor.data.to(device)`, which is the tensor itself where it is there already."""
    setup = SETUP._replace(processes=processes, device_memory=memory_of_a_gpu)
    items = memory.gathered(held_models("sft", setup), CHOICE[choice], setup.work("sft"))
    assert [item.bytes for item in items] == [2 * 125_239_296] * 2 * copied


def test_a_sub_group_is_closed_by_the_tensor_that_fills_it(monkeypatch):
    monkeypatch.setitem(memory.SUB_GROUP, "zero3", 10)
    work = SETUP.work("sft")
    assert memory.sub_group([4, 4, 7, 3, 2], CHOICE["zero3"], work) == 15
    assert memory.sub_group([4, 4, 7, 3, 2], CHOICE["zero3"], work._replace(processes=2)) == 10


# ------------------------------------------------------------------------------------------------ activations, caches


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [24, 60])
def test_kept_bytes_are_those_that_autograd_keeps(family, length, tmp_path):
    """Of a real model and a real forward pass. Attention kernels differ a little in what they keep."""
    CONFIGS[family]().save_pretrained(tmp_path)
    config = CONFIGS[family]()
    model = without_dropout(AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")).train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(length)[None] % 31
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(length)[None], use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in weights)
    assert kept_bytes(str(tmp_path), "model", False, length, torch.float32) == pytest.approx(real, rel=0.1)


def test_activations_of_opt_by_hand():
    """A layer keeps 2 norms' inputs and outputs, query, key, value, attention's output and the MLP's 4 h: 12 h a token."""
    length = 100
    numbers = kept_bytes("facebook/opt-125m", "model", False, length, torch.bfloat16) / 2
    by_hand = 12 * (12 * 768 * length + 12 * length * 2 + length**2)  # 12 heads' normalisers in float32, the mask
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
    assert [item.bytes for item in items if item.name == "kv cache"] == [4 * (100 + 4 * 20) * 12 * 2 * 768 * 2]


def test_the_reward_stages_evaluation_holds_what_a_layer_keeps_of_its_rows():
    """By hand, 12 h numbers a token as below in 16 bits: 4 rows of 100 + 4 x 20 tokens; the other stages have their samples."""
    work = SETUP.work("reward")
    [item] = memory.scoring(held_models("reward", SETUP), CHOICE["zero2"], work)
    assert item.bytes == pytest.approx(4 * 2 * (12 * 768 * 180 + 12 * 180 * 2 + 180**2), rel=0.02)
    assert item.alive == ("generation",) and not memory.scoring(held_models("ppo", SETUP), CHOICE["zero2"], SETUP.work("ppo"))


def test_logits_are_those_of_response_positions():
    """2 prompts x 4 completions x 20 tokens, 50,272 words; no head in the reward stage, none that LoRA trains."""
    held = held_models("ppo", SETUP)
    table, head = memory.logits(held, CHOICE["zero2"], SETUP.work("ppo"))
    assert table.bytes == 6 * 2 * 4 * 20 * 50272 and head.bytes == 6 * 50272 * 768
    assert memory.logits(held, CHOICE["none"], SETUP.work("ppo")._replace(precision="fp32"))[0].bytes == 4 * 160 * 50272
    assert not memory.logits(held_models("reward", SETUP), CHOICE["zero2"], SETUP.work("reward"))
    assert not memory.logits(held_models("ppo", SETUP._replace(lora_rank=8)), CHOICE["zero2"], SETUP.work("ppo"))


# --------------------------------------------------------------------------------------------------- which models


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
    assert [one.role for one in held if one.trained] == [role for role in roles if role in ("policy", "value_model")]


def test_a_reward_model_of_its_own_size():
    held = {one.role: one.model for one in held_models("ppo", SETUP._replace(reward_model="facebook/opt-350m"))}
    assert held["value_model"].parameters == held["reward_model"].parameters == 331_196_416 + 512
    assert held["policy"].parameters == held["ref_policy"].parameters == 125_239_296


# ----------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("zero", CHOICES, ids=NAMES)
def test_more_gpus_never_take_more_of_each(stage, zero):
    """But for DDP's buckets, which one process does without."""
    counts = [2, 3, 8, 64, 512] if zero.name == "none" else [1, 2, 3, 8, 64, 512]
    found = [plan(stage, zero, SETUP._replace(processes=count, per_node=count)).device for count in counts]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize("processes", [1, 2, 64])
def test_each_stage_of_zero_has_no_more_states(processes):
    found = [sum(states(10**9, CHOICE[name], processes).values()) for name in ("zero3", "zero2", "zero1", "none")]
    assert found == sorted(found)


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo"])
@pytest.mark.parametrize("zero", CHOICES, ids=NAMES)
def test_the_largest_batches_fit_and_one_more_does_not(stage, zero):
    setup = SETUP._replace(device_memory=12 * GIB)
    found = batches_of(plan(stage, zero, setup), setup)
    alone = setup._replace(micro_batch=1, generation_batch=1)
    for field, count, flag in (("micro_batch", found.micro_batch, False), ("micro_batch", found.recomputing, True),
                               ("generation_batch", found.generation_batch, False)):
        assert count > 0
        at = [plan(stage, zero, alone._replace(**{field: n, "checkpointing": flag})).fits for n in (count, count + 1)]
        assert at == [True, False]
    assert found.recomputing >= found.micro_batch


def test_the_fastest_that_fits_is_chosen():
    plans = [plan("ppo", zero, SETUP._replace(device_memory=memory_ * GIB)) for memory_ in (80,) for zero in choices_of([])]
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
    setup = SETUP._replace(device_memory=None, host_memory=24 * GIB, precision="fp32", processes=2, per_node=2)
    one = plan("sft", CHOICE["zero3_offload"], setup)
    assert one.device == 0 and one.host == 2 * peak(one.items, "device", "host")
    assert all(item.name != "pinned" for item in one.items)


def test_a_remedy_is_one():
    """What the advice names makes it fit."""
    setup = SETUP._replace(model="facebook/opt-1.3b", device_memory=24 * GIB, checkpointing=True)
    choices = choices_of(["none", "zero2"])
    assert not any(plan("ppo", zero, setup).fits for zero in choices)
    advice = remedies("ppo", choices, setup)
    assert "--lora_rank 8" in advice and advice[-1].startswith("--gpus ")
    count = int(advice[-1].split()[1])
    for name, fits in ((count, True), (count // 2, False)):
        assert any(plan("ppo", zero, setup._replace(processes=name, per_node=min(name, 8))).fits for zero in choices) == fits


def test_no_number_of_gpus_helps_when_the_policy_alone_is_too_large():
    setup = SETUP._replace(model="facebook/opt-66b", processes=64, per_node=8)
    assert "whole policy" in remedies("ppo", choices_of(["zero3"]), setup)[-1]


# ----------------------------------------------------------------------------------------------- published limits


@pytest.mark.parametrize(("gigabytes", "largest"), [(32, "facebook/opt-2.7b"), (48, "facebook/opt-6.7b"),
                                                    (40, "facebook/opt-6.7b"), (80, "facebook/opt-13b")])
def test_the_largest_models_of_deepspeed_chat(gigabytes, largest):
    """Table 3 of its release: the largest OPT on one GPU (V100, A6000, A100, A100).

    Its scripts (step3, single_gpu): adapters of rank 128 alone are trained, fp16, a reference model of its own, a trained value
    model and a reward model of OPT-350m, gradient checkpointing, 256 + 256 tokens, no offload. On one GPU ZeRO-2 is what
    its fp16 optimizer keeps: weights in 16 bits, and the rest in float32 for what is trained.
    """
    scalar = model_of("facebook/opt-350m", "reward_model", scalar=True)
    work = Work("ppo", 1, 1, 256, 256, 1, "fp16", True, 1, False)

    def fits(name):
        held = [Held("policy", model_of(name, "model", lora_rank=128), True), Held("value_model", scalar, True),
                Held("ref_policy", model_of(name, "model"), False), Held("reward_model", scalar, False)]
        return peak(items_of(held, CHOICE["zero2"], work), "device") <= gigabytes * GIB

    assert [name for name in OPT if fits(name)][-1] == largest


# --------------------------------------------------------------------------------------------------------- time


def test_operations_are_those_of_the_benchmark():
    """One SFT example, one reward row, and an update of one prompt; a value model on the trunk costs no pass in the update."""
    size = flops.Size(768, 12, 3072, 50272)
    assert needed_flops("sft", SETUP, 3, 4) == 3 * flops.sft(size, [100], [[20]])
    assert needed_flops("reward", SETUP, 3, 4) == 3 * flops.reward(size, [100], [[20] * 4])
    assert needed_flops("ppo", SETUP, 8, 4) == 2 * flops.ppo(size, [100], 4, 20, 4)
    trunk = flops.groups_trunk(size, [100], [[20] * 4])
    assert needed_flops("ppo", SETUP, 4, 4) - needed_flops("ppo", SETUP._replace(value_model="shared"), 4, 4) == 4 * 3 * trunk
    assert needed_flops("ppo", SETUP, 4, 4) - needed_flops("ppo", SETUP._replace(value_model="none"), 4, 4) == 13 * trunk


# ----------------------------------------------------------------------------------------------------- the script


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["plan_memory.py", *map(str, words)])
    plan_memory.start(plan_memory.main, plan_memory.PlanConfig, None, plan_memory.__doc__)


def test_all_of_it(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "--model", "facebook/opt-13b", "--gpus", 8, "--zero", "zero2", "zero3_offload", "--reward_model",
        "facebook/opt-350m", "--peak_tflops", 312, "--utilisation", 0.5, "--output", tmp_path / "plan.json")
    shown = capsys.readouterr().out
    assert "zero3_offload" in shown and "hours" in shown
    rows = json.loads((tmp_path / "plan.json").read_text())
    assert [(row["stage"], row["zero"]) for row in rows] == [
        (stage, zero) for stage in ("sft", "reward", "ppo") for zero in ("zero2", "zero3_offload")]
    for row in rows:
        assert row["fits"] == (row["device_bytes"] <= 80 * GIB)
        assert row["hours"] == pytest.approx(row["flops"] / (8 * 156e12) / 3600)
        on_device = [term for term in row["terms"] if term["place"] == "device"]
        phases = [sum(term["bytes"] for term in on_device if phase in term["alive"]) for phase in memory.PHASES]
        assert row["device_bytes"] == max(phases)


def test_a_local_folder_on_this_machine(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "--model", "assets/opt-mini", "--gpus", 0, "--processes", 2, "--stage", "sft", "--prompt_length", 100,
        "--figure", tmp_path / "plan.png")
    shown = capsys.readouterr().out
    assert "2 processes on this CPU, fp32" in shown and "none is the fastest that fits" in shown and "hours" not in shown
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


def test_a_clear_warning_where_nothing_fits(monkeypatch, capsys):
    run(monkeypatch, "--model", "facebook/opt-1.3b", "--gpu_memory", 16, "--stage", "ppo", "--zero", "none", "zero1")
    assert "ppo: NOTHING FITS. It would with one of: " in capsys.readouterr().out


@pytest.mark.parametrize(("words", "said"), [
    (["--model", "nobody/nothing"], "model: the architecture of 'nobody/nothing' cannot be read"),
    (["--model", "outputs/none/sft/final"], "model: no model folder at"),
    (["--reward_model", "opt-350m"], "reward_model: no model folder at"),
    (["--gpus", "-1"], "'gpus' must be at least 0"),
    (["--gpu_memory", "0"], "'gpu_memory' must be at least"),
    (["--cpu_memory", "-3"], "'cpu_memory' must be at least"),
    (["--stage", "dpo"], "'dpo'"),
    (["--zero", "zero4"], "zero: 'zero4' is none; there are: none | zero1"),
    (["--precision", "int8"], "precision: 'int8' is none"),
    (["--gpus", "0", "--precision", "fp16"], "precision: a CPU trains in fp32 or bf16"),
    (["--gpus", "2", "--processes", "2"], "processes: it is for --gpus 0"),
    (["--gpus", "8", "--gpus_per_node", "3"], "gpus_per_node: 8 GPUs are no whole nodes of 3"),
    (["--prompt_length", "2040"], "2048 positions"),
    (["--output", "plan.txt"], "output: "), (["--figure", "nowhere/plan.png"], "figure: "),
    (["--utilisation", "1.5"], "'utilisation' must be between"),
])
def test_mistakes(words, said, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, *words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and error.startswith("error: ") and error.count("\n") == 1
