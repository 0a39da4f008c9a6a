"""The memory model: bytes of each term in one process, where they are, and when they are allocated.

Without DeepSpeed, weights are float32 and mixed precision is autocast's. DeepSpeed's engine holds all models,
including the frozen ones, in 16 bits under mixed precision, with float32 master weights. What ZeRO shards and
moves was read in the source of DeepSpeed 0.19.8: ZeRO-1 and ZeRO-2 are `DeepSpeedZeroOptimizer`
(runtime/zero/stage_1_and_2.py), ZeRO-3 is `DeepSpeedZeroOptimizer_Stage3` (runtime/zero/stage3.py). Each term
names the method that it counts, and tests/studies/test_plan_memory.py looks for these methods in the
DeepSpeed that is installed. The paper is Rajbhandari et al., arXiv 1910.02054.

The constants are those of configs/deepspeed/. Each term is one function, so a wrong estimate is corrected
there.
"""

from typing import NamedTuple

import torch

from planning.architectures import Model, kept_bytes
from utils.zero import FILE_BYTES

GIB = 2**30
PHASES = ("loading", "generation", "update", "step", "saving")  # a process is in one of them at a time
ALWAYS = PHASES
RUNNING = PHASES[1:]
TRAINING = ("update", "step")

REUSE = 10**9  # stage3_max_reuse_distance [parameters]
SUB_GROUP = {"zero3": 10**9, "zero3_offload": 10**8, "zero3_nvme": 10**8}  # sub_group_size [parameters]
FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight: NF4, a scale of 8 bits, and that one's scale
SWAP_BUFFERS = 4  # offload_optimizer.buffer_count

# Memory of a process before it holds a tensor.
DEVICE_BASE = 1.0 * GIB  # on a GPU: CUDA's context, cuBLAS's workspace, NCCL's buffers
HOST_BASE = 2.5 * GIB  # on the host of a GPU: CUDA's libraries
CPU_BASE = 0.5 * GIB  # without a GPU: torch, transformers, trl and DeepSpeed, measured


class Zero(NamedTuple):
    """A ZeRO configuration: what is sharded over the processes, and what is offloaded."""

    name: str
    stage: int  # 0: DDP without DeepSpeed
    optimizer: str = "device"  # where optimizer states are: device, host, nvme
    weights: str = "device"  # where weights are while they are not used


# from the fastest to the slowest: first each shards more, then each moves more over the PCI bus
CHOICES = [Zero("none", 0), Zero("zero1", 1), Zero("zero2", 2), Zero("zero3", 3),
           Zero("zero2_offload", 2, "host"), Zero("zero3_offload", 3, "host", "host"),
           Zero("zero3_nvme", 3, "nvme", "host")]


class Held(NamedTuple):
    """A model that a stage holds in memory."""

    role: str  # policy, value_model, ref_policy, reward_model
    model: Model
    trained: bool


class Work(NamedTuple):
    """What one process computes, and in which precision."""

    stage: str
    micro_batch: int  # prompt groups in a forward pass of training
    generation_batch: int  # prompts sampled for at once; in the reward stage, rows scored at once
    prompt: int  # tokens
    completion: int  # tokens of each completion
    k: int  # completions of a prompt
    precision: str  # bf16, fp16, fp32
    checkpointing: bool
    processes: int
    cpu: bool

    @property
    def mixed(self) -> bool:
        return self.precision != "fp32"

    @property
    def compute_bytes(self) -> int:
        return 2 if self.mixed else 4

    @property
    def length(self) -> int:
        """Tokens of a row: a prompt with all its completions."""
        return self.prompt + self.k * self.completion

    def share(self, count: int) -> int:
        """The part of `count` parameters that one process has when they are sharded."""
        return -(-count // self.processes)


class Item(NamedTuple):
    """Bytes of one term in one process."""

    name: str
    bytes: int
    place: str = "device"  # device, host, nvme
    alive: tuple[str, ...] = RUNNING  # phases in which they are allocated


def trained_of(held: list[Held]) -> list[int]:
    """Parameters of each trainable tensor of all models."""
    return [size for one in held if one.trained for size in one.model.trained]


def base(work: Work) -> list[Item]:
    """Libraries and their workspaces. Without a GPU a process has one memory, counted as the device."""
    if work.cpu:
        return [Item("base", int(CPU_BASE), alive=ALWAYS)]
    return [Item("base", int(DEVICE_BASE), alive=ALWAYS), Item("base", int(HOST_BASE), "host", ALWAYS)]


def loading(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Whole models in float32: each process reads them into host memory before they go to the device.

    On a CPU they stay there. ZeRO-3 creates the models in shards (`deepspeed.zero.Init`).
    """
    if zero.stage == 3:
        return []
    if any(one.model.rounded for one in held):  # tensor by tensor, where they stay
        largest = 4 * max(one.model.largest for one in held)
        return [Item("loading", sum(stored_bytes(one.model, 4) for one in held) + largest,
                     alive=("loading",))]
    whole = 4 * sum(one.model.parameters for one in held)
    return [Item("loading", whole, "device" if work.cpu else "host", ("loading",))]


def weight_bytes(zero: Zero, work: Work) -> int:
    """Bytes of one weight. DeepSpeed's engine casts the model, autocast does not."""
    return 4 if zero.stage == 0 else work.compute_bytes


def stored_bytes(model: Model, size: int) -> int:
    """Bytes of a model's weights, of which those that are not in 4 bits take `size` bytes each."""
    return int(model.rounded * FOUR_BITS) + (model.parameters - model.rounded) * size


def weights(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Weights of the trained and of the frozen models, as two items. ZeRO-3 shards both."""
    items = []
    for trained, name in ((True, "weights"), (False, "frozen models")):
        size = weight_bytes(zero, work)
        count = sum(stored_bytes(one.model, size) for one in held if one.trained == trained)
        count = work.share(count // size) * size if zero.stage == 3 else count
        items.append(Item(name, count, zero.weights))
    return items


def gradients(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Gradients of the trained parameters.

    Without DeepSpeed and in ZeRO-1 and ZeRO-2 they are freed after a step. ZeRO-3 keeps one flat buffer. An
    optimizer on the host steps with a second, float32 copy
    (`DeepSpeedZeroOptimizer.initialize_optimizer_states`,
    `DeepSpeedZeroOptimizer_Stage3.initialize_optimizer_states`). With NVMe that copy is swapped out.
    """
    count, size = sum(trained_of(held)), weight_bytes(zero, work)
    if zero.stage < 2:
        return [Item("gradients", size * count, alive=TRAINING)]
    mine = work.share(count)
    if zero.optimizer == "device":
        return [Item("gradients", size * mine, alive=RUNNING if zero.stage == 3 else TRAINING)]
    # ZeRO-2's buffer accumulates over micro-batches; ZeRO-3 has its flat buffer even with one micro-batch
    return [Item("gradients", size * mine, "host"), Item("gradients", 4 * mine, zero.optimizer)]


def optimizer(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Adam's two moments in float32, and float32 master weights unless the weights themselves serve as such.

    When training is in float32, ZeRO-1 and ZeRO-2 clone the weights all the same
    (`DeepSpeedZeroOptimizer.__init__`). So does ZeRO-3 with offload, but not on the device
    (`DeepSpeedZeroOptimizer_Stage3._create_fp32_partitions`).
    """
    count = sum(trained_of(held))
    mine = work.share(count) if zero.stage else count
    master = zero.stage > 0 and not (zero.stage == 3 and zero.optimizer == "device" and not work.mixed)
    return [Item("optimizer", (8 + 4 * master) * mine, zero.optimizer)]


def step(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """The float32 copy of the gradients that the optimizer steps with, after the activations are freed.

    ZeRO-3 copies one sub-group at a time.
    """
    if zero.stage == 0 or zero.optimizer != "device":
        return []
    sizes = trained_of(held)
    count = sub_group(sizes, zero, work) if zero.stage == 3 else work.share(sum(sizes))
    return [Item("step", 4 * count, alive=("step",))]


def sub_group(sizes: list[int], zero: Zero, work: Work) -> int:
    """Parameters of one process in the largest sub-group of ZeRO-3's step.

    A sub-group is closed by the tensor that fills it
    (`DeepSpeedZeroOptimizer_Stage3._create_fp16_sub_groups`).
    """
    limit, largest, current = SUB_GROUP[zero.name], 0, 0
    for size in sizes:
        current += work.share(size)
        largest = max(largest, current)
        current = 0 if current >= limit else current
    return largest


def exchange_buffers(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Buffers through which gradients are exchanged between processes and moved between devices.

    DDP copies all gradients into its buckets. ZeRO has buckets of hidden^2 ("auto"): two in ZeRO-1 and ZeRO-2
    (`overlap_comm`), one in ZeRO-3. ZeRO-2 with offload has a 16-bit copy of the weights on the host, and a
    buffer for the largest gradient on host and device (both in `DeepSpeedZeroOptimizer.__init__`). States on
    NVMe pass through buffers of 4 sub-groups in float32.
    """
    sizes, size = trained_of(held), weight_bytes(zero, work)
    if zero.stage == 0:
        return [Item("buffers", 4 * sum(sizes) * (work.processes > 1))]
    bucket, largest = held[0].model.hidden ** 2, max(sizes)
    items = [Item("buffers", bucket * size * (1 if zero.stage == 3 else 2))]
    if zero.stage == 2 and zero.optimizer == "host":
        copied = work.share(sum(sizes)) + largest
        items += [Item("buffers", largest * size), Item("buffers", copied * size, "host")]
    if zero.name == "zero3":
        # float32, on the device until the first step
        # (`DeepSpeedZeroOptimizer_Stage3.initialize_optimizer_states`)
        items.append(Item("buffers", 4 * sub_group(sizes, zero, work)))
    if zero.optimizer == "nvme":
        items.append(Item("buffers", SWAP_BUFFERS * 4 * sub_group(sizes, zero, work), "host"))
    return items


def pinned(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Padding of page-locked memory: torch hands it out in powers of two. Without a GPU nothing is pinned."""
    if work.cpu or zero.optimizer != "host":
        return []
    mine, size = work.share(sum(trained_of(held))), work.compute_bytes
    # 16 bits: the weights or their copy, and the gradients. float32: master weights and gradients in ZeRO-2,
    # the gradients of each sub-group in ZeRO-3.
    buffers = [size * mine] * 2
    if zero.stage == 2:
        buffers += [4 * mine] * 2
    else:
        group = min(mine, sub_group(trained_of(held), zero, work))
        buffers += [4 * group] * (mine // max(1, group)) + [4 * (mine % max(1, group))]
    padding = sum((1 << (count - 1).bit_length()) - count for count in buffers if count)
    return [Item("pinned", padding, "host")]


def gathered(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Full weights that ZeRO-3 gathers, and the 16-bit copy of each trainable weight that autocast keeps.

    Sampling gathers the whole policy once. In training ZeRO-3 keeps a gathered weight when it is used again
    within `stage3_max_reuse_distance` parameters. These are the last layers: half that distance before the
    backward pass begins. Prefetching adds .9 hidden^2 parameters. A single process already has full weights
    and copies only those that are on another device (`NoGatherHandle.__init__`,
    runtime/zero/partition_parameters.py).
    """
    policy = held[0].model
    if zero.stage == 0:
        cast = 2 * work.mixed
        return [Item("gathered", cast * sum(trained_of(held)), alive=("update",)),
                Item("gathered", cast * sum(policy.trained) * samples(work), alive=("generation",))]
    if zero.stage < 3 or work.processes == 1 and (work.cpu or zero.weights == "device"):
        return []
    count = sum(one.model.parameters for one in held if one.trained)
    ahead = int(0.9 * policy.hidden**2)
    live = min(count, max(REUSE // 2, policy.largest) + ahead)
    return [Item("gathered", work.compute_bytes * live, alive=("update",)),
            Item("gathered", work.compute_bytes * policy.parameters * samples(work), alive=("generation",))]


def dense(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Weights in 4 bits are turned back for a product, one layer at a time."""
    widest = max(one.model.widest for one in held)
    return [Item("gathered", work.compute_bytes * widest, alive=("generation", "update"))]


def samples(work: Work) -> bool:
    """Whether the stage samples text: PPO for its rollouts, SFT for ROUGE."""
    return work.stage != "reward"


def activations(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """What autograd keeps for the backward pass, and the gradients of one layer's activations.

    All trained models are counted, because their forward passes precede the one backward pass. With gradient
    checkpointing autograd keeps the input of each layer, and all tensors of one layer, which is recomputed.
    """
    total = back = 0
    for model in (one.model for one in held if one.trained):
        row = row_bytes(model, zero, work)
        if work.checkpointing:
            stream = weight_bytes(zero, work) * model.hidden * work.length
            row = model.layers * stream + -(-row // model.layers)
        total += row * work.micro_batch
        back = max(back, row_bytes(model, zero, work) // model.layers * work.micro_batch)
    return [Item("activations", total + back, alive=("update",))]


def row_bytes(model: Model, zero: Zero, work: Work) -> int:
    """Bytes that autograd keeps of one row without checkpointing.

    Autocast leaves the residual stream and LayerNorm in float32, and casts LayerNorm's output for query, key
    and value each: 8 bytes more for each layer, token and hidden dimension.
    """
    dtype = torch.bfloat16 if work.mixed else torch.float32
    row = kept_bytes(model.name, "model", model.scalar, work.length, dtype)
    autocast = zero.stage == 0 and work.mixed
    return row + (8 * model.hidden * model.layers * work.length if autocast else 0)


def logits(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Tables of the language-model head in the update (utils/models/lm_head.py). A frozen head keeps nothing.

    The head's gradient needs the probabilities at response positions: one table (positions, vocabulary), in
    16 bits under autocast. A GPU on which it would take more than 1/16 of the memory computes it again; that
    is not counted. The gradient of the head's weight is float32 before it is cast to 16 bits.
    """
    policy = held[0].model
    if work.stage == "reward" or not policy.head:
        return []
    positions, cast = work.micro_batch * work.k * work.completion, 2 * work.mixed
    return [Item("logits", (4 - cast) * positions * policy.vocabulary, alive=("update",)),
            Item("logits", (4 + cast) * policy.head, alive=("update",))]


def generation(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Sampling (utils/models/generation.py). The K responses share their prompt's keys and values.

    Besides the cache there are the prompts' forward pass, with at most the tensors of one layer at a time,
    and tables (rows, vocabulary): the logits in 16 bits and in float32, divided by the temperature, and their
    softmax.
    """
    if not samples(work):
        return []
    policy, rows = held[0].model, work.generation_batch
    prefill = rows * row_bytes(policy, zero, work._replace(k=0)) // policy.layers
    tables = rows * work.k * policy.vocabulary * (work.compute_bytes + 12)
    cache = rows * work.length * policy.cached * work.compute_bytes
    return [Item("kv cache", cache, alive=("generation",)),
            Item("sampling", prefill + tables, alive=("generation",))]


def scoring(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """The reward stage's evaluation, without autograd: at most the tensors of one layer at a time.

    It scores more rows at once than a micro-batch trains on. In PPO sampling takes more than scoring does.
    """
    if samples(work):
        return []
    model = held[0].model
    rows = work.generation_batch * row_bytes(model, zero, work) // model.layers
    return [Item("scoring", rows, alive=("generation",))]


def saving(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Under ZeRO-3 the weights of one file are gathered on the host to be written (utils/zero.py).

    On a machine with GPUs this is left out: host memory is much larger than one file. A model in 4 bits is
    merged in the host's memory as a whole, in the 16 bits that the files of a large model have.
    """
    if held[0].model.rounded:
        return [Item("saving", 2 * held[0].model.parameters, "device" if work.cpu else "host", ("saving",))]
    if zero.stage < 3 or not work.cpu:
        return []
    largest = max(one.model.parameters for one in held) * weight_bytes(zero, work)
    return [Item("saving", min(FILE_BYTES, largest), alive=("saving",))]


TERMS = [weights, gradients, optimizer, step, exchange_buffers, pinned, gathered, dense, activations, logits,
         generation, scoring, loading, saving]


def items_of(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """All terms of one process that are not 0. The first of `held` is the policy, or the only model."""
    items = base(work) + [item for term in TERMS for item in term(held, zero, work)]
    return [item for item in items if item.bytes]


def peak(items: list[Item], *places: str) -> int:
    """The most bytes that are allocated in these places in any one phase."""
    return max(sum(item.bytes for item in items if item.place in places and phase in item.alive)
               for phase in PHASES)
