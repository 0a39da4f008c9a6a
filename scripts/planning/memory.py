"""The terms: how many bytes each thing takes in one process, where it lies, and when it is alive.

Without DeepSpeed weights are float32 and mixed precision is autocast's. DeepSpeed's engine holds all models, the frozen ones
too, in 16 bits under mixed precision, with float32 masters. What is sharded and moved by ZeRO-1, 2 (DeepSpeed 0.19.8,
runtime/zero/stage_1_and_2.py) and ZeRO-3 (stage3.py) was read in that source; the paper is Rajbhandari et al., 1910.02054.

Constants are those of configs/deepspeed/. Each function is one term; correct it there.
"""

from typing import NamedTuple

import torch

from planning.architectures import Model, kept_bytes
from utils.zero import FILE_BYTES

GIB = 2**30
PHASES = ("loading", "generation", "update", "step", "saving")  # of which one is at a time
ALWAYS = PHASES
RUNNING = PHASES[1:]
TRAINING = ("update", "step")

REUSE = 10**9  # stage3_max_reuse_distance [parameters]
SUB_GROUP = {"zero3": 10**9, "zero3_offload": 10**8, "zero3_nvme": 10**8}  # sub_group_size [parameters]
SWAP_BUFFERS = 4  # offload_optimizer.buffer_count

# The process before it holds a tensor. A GPU: CUDA's context, cuBLAS's workspace, NCCL's buffers. Its host: CUDA's libraries.
# A CPU: torch, transformers, trl and DeepSpeed, measured (0.5 GiB).
DEVICE_BASE, HOST_BASE, CPU_BASE = 1.0 * GIB, 2.5 * GIB, 0.5 * GIB


class Zero(NamedTuple):
    """A choice of what is sharded over the processes, and where the rest lies."""

    name: str
    stage: int
    optimizer: str = "device"  # where optimizer states are: device, host, nvme
    weights: str = "device"  # where weights are between their uses


# from the fastest to the slowest: each shards more, and then moves more over the PCI bus
CHOICES = [Zero("none", 0), Zero("zero1", 1), Zero("zero2", 2), Zero("zero3", 3), Zero("zero2_offload", 2, "host"),
           Zero("zero3_offload", 3, "host", "host"), Zero("zero3_nvme", 3, "nvme", "host")]


class Held(NamedTuple):
    """A model in memory."""

    role: str  # policy, value_model, ref_policy, reward_model
    model: Model
    trained: bool


class Work(NamedTuple):
    """What one process computes, and in which arithmetic."""

    stage: str
    micro_batch: int  # prompt groups of a forward pass that is trained
    generation_batch: int  # prompts that are sampled for at once; in the reward stage rows that are scored at once
    prompt: int  # tokens
    completion: int  # tokens of each
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
        return -(-count // self.processes)


class Item(NamedTuple):
    """A term: its bytes in one process."""

    name: str
    bytes: int
    place: str = "device"
    alive: tuple[str, ...] = RUNNING


def trained_of(held: list[Held]) -> list[int]:
    return [size for one in held if one.trained for size in one.model.trained]


def base(work: Work) -> list[Item]:
    """Libraries and their workspaces; a CPU process has one memory for both."""
    if work.cpu:
        return [Item("base", int(CPU_BASE), alive=ALWAYS)]
    return [Item("base", int(DEVICE_BASE), alive=ALWAYS), Item("base", int(HOST_BASE), "host", ALWAYS)]


def loading(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Each process reads whole models into its host memory in float32, before they go to the device (models.py).

    On a CPU that is where they stay. ZeRO-3 makes them in shards (zero.Init).
    """
    whole = 4 * sum(one.model.parameters for one in held)
    return [] if zero.stage == 3 else [Item("loading", whole, "device" if work.cpu else "host", ("loading",))]


def weight_bytes(zero: Zero, work: Work) -> int:
    """Bytes of a weight: DeepSpeed's engine casts the model, autocast does not."""
    return 4 if zero.stage == 0 else work.compute_bytes


def weights(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Weights of trained models, and apart from them the frozen ones. ZeRO-3 shards both."""
    items = []
    for trained, name in ((True, "weights"), (False, "frozen models")):
        count = sum(one.model.parameters for one in held if one.trained == trained)
        count = work.share(count) if zero.stage == 3 else count
        items.append(Item(name, count * weight_bytes(zero, work), zero.weights))
    return items


def gradients(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Gradients of what is trained.

    Without DeepSpeed and in ZeRO-1, 2 they are freed after a step. ZeRO-3 keeps one flat buffer. With the optimizer on the host
    there is a float32 copy besides, for its step (stage_1_and_2.py, :937; stage3.py, :1338); on NVMe that is swapped out.
    """
    count, size = sum(trained_of(held)), weight_bytes(zero, work)
    if zero.stage < 2:
        return [Item("gradients", size * count, alive=TRAINING)]
    mine = work.share(count)
    if zero.optimizer == "device":
        return [Item("gradients", size * mine, alive=RUNNING if zero.stage == 3 else TRAINING)]
    # what ZeRO-2 has accumulated of several micro-batches, and ZeRO-3's flat buffer (it has that of one, too)
    return [Item("gradients", size * mine, "host"), Item("gradients", 4 * mine, zero.optimizer)]


def optimizer(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Adam's two moments in float32, and the float32 master where the weights are not it.

    In float32 ZeRO-1 and 2, and ZeRO-3 with offload, clone the weights all the same (stage_1_and_2.py, :560; stage3.py, :1158);
    ZeRO-3 on the device does not (:1163).
    """
    count = sum(trained_of(held))
    mine = work.share(count) if zero.stage else count
    master = zero.stage > 0 and not (zero.stage == 3 and zero.optimizer == "device" and not work.mixed)
    return [Item("optimizer", (8 + 4 * master) * mine, zero.optimizer)]


def step(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """The float32 copy of the gradients that the optimizer steps with, when activations are gone; in ZeRO-3 of a sub-group."""
    if zero.stage == 0 or zero.optimizer != "device":
        return []
    sizes = trained_of(held)
    count = sub_group(sizes, zero, work) if zero.stage == 3 else work.share(sum(sizes))
    return [Item("step", 4 * count, alive=("step",))]


def sub_group(sizes: list[int], zero: Zero, work: Work) -> int:
    """Parameters in the largest sub-group of ZeRO-3's step, which is closed by the tensor that fills it (stage3.py, :1210)."""
    limit, largest, current = SUB_GROUP[zero.name], 0, 0
    for size in sizes:
        current += work.share(size)
        largest = max(largest, current)
        current = 0 if current >= limit else current
    return largest


def exchange_buffers(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Buffers in which gradients are exchanged and moved.

    DDP copies all gradients into its buckets. ZeRO has buckets of hidden^2 ("auto"): two in ZeRO-1, 2 (`overlap_comm`), one in
    ZeRO-3. An offloaded ZeRO-2 step has a 16-bit copy of the weights on the host (stage_1_and_2.py, :568) and a buffer for the
    largest gradient on both sides (:653). NVMe goes through buffers of 4 sub-groups in float32.
    """
    sizes, size = trained_of(held), weight_bytes(zero, work)
    if zero.stage == 0:
        return [Item("buffers", 4 * sum(sizes) * (work.processes > 1))]
    bucket, largest = held[0].model.hidden ** 2, max(sizes)
    items = [Item("buffers", bucket * size * (1 if zero.stage == 3 else 2))]
    if zero.stage == 2 and zero.optimizer == "host":
        items += [Item("buffers", largest * size), Item("buffers", (work.share(sum(sizes)) + largest) * size, "host")]
    if zero.name == "zero3":  # the float32 gradients of a sub-group, until the first step is over (stage3.py, :1306)
        items.append(Item("buffers", 4 * sub_group(sizes, zero, work)))
    if zero.optimizer == "nvme":
        items.append(Item("buffers", SWAP_BUFFERS * 4 * sub_group(sizes, zero, work), "host"))
    return items


def pinned(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """What torch adds to page-locked memory, which it hands out in powers of two. On a CPU nothing is pinned."""
    if work.cpu or zero.optimizer != "host":
        return []
    mine, size = work.share(sum(trained_of(held))), work.compute_bytes
    # weights or their copy, gradients; and float32: masters and gradients in ZeRO-2, gradients by sub-group in ZeRO-3
    buffers = [size * mine] * 2
    if zero.stage == 2:
        buffers += [4 * mine] * 2
    else:
        group = min(mine, sub_group(trained_of(held), zero, work))
        buffers += [4 * group] * (mine // max(1, group)) + [4 * (mine % max(1, group))]
    return [Item("pinned", sum((1 << (count - 1).bit_length()) - count for count in buffers if count), "host")]


def gathered(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Weights that ZeRO-3 makes whole, or autocast casts.

    Sampling gathers the whole policy once. In training a weight is kept when it is used again within `stage3_max_reuse_distance`
    parameters: those of the last layers, half that distance before the turn to the backward pass, and what is fetched ahead
    (.9 hidden^2). One process has them whole, and copies only what lies elsewhere (partition_parameters.py, :105). Autocast keeps
    a 16-bit copy of each trainable weight.
    """
    policy, count = held[0].model, sum(one.model.parameters for one in held if one.trained)
    if zero.stage == 0:
        cast = 2 * work.mixed
        return [Item("gathered", cast * sum(trained_of(held)), alive=("update",)),
                Item("gathered", cast * sum(policy.trained) * samples(work), alive=("generation",))]
    if zero.stage < 3 or work.processes == 1 and (work.cpu or zero.weights == "device"):
        return []
    ahead = int(0.9 * policy.hidden**2)
    live = min(count, max(REUSE // 2, policy.largest) + ahead)
    return [Item("gathered", work.compute_bytes * live, alive=("update",)),
            Item("gathered", work.compute_bytes * policy.parameters * samples(work), alive=("generation",))]


def samples(work: Work) -> bool:
    """Whether a stage generates: PPO in its rollouts, SFT for ROUGE."""
    return work.stage != "reward"


def activations(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """What autograd keeps of all trained models: their forward passes come before the one backward pass.

    With checkpointing: the input of each layer, and one layer whole. On the way back each tensor that is kept meets its
    gradient: those of one layer are counted. Autocast leaves the stream between layers and the norms
    in float32, and casts the norm's output for query, key and value each: 8 bytes x hidden more a layer.
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
    """Bytes that are kept of one row."""
    dtype = torch.bfloat16 if work.mixed else torch.float32
    row = kept_bytes(model.name, "model", model.scalar, work.length, dtype)
    return row + (8 * model.hidden * model.layers * work.length if zero.stage == 0 and work.mixed else 0)


def logits(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """The probabilities at response positions, which the gradient of the head needs: one float32 table (utils/models/lm_head.py).

    And in the backward pass its copy in 16 bits, and the head's gradient in float32 before it is that of the weight. A frozen
    head keeps nothing.
    """
    policy = held[0].model
    if work.stage == "reward" or not policy.head:
        return []
    positions, cast = work.micro_batch * work.k * work.completion, 2 * work.mixed
    return [Item("logits", (4 + cast) * positions * policy.vocabulary, alive=("update",)),
            Item("logits", (4 + cast) * policy.head, alive=("update",))]


def generation(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Sampling: K branches share their prompt's keys and values (utils/models/generation.py).

    Besides the cache: the prompts' forward pass, which has alive at most what one layer would keep, and tables over the
    vocabulary (logits in both arithmetics, divided by the temperature, and their softmax).
    """
    if not samples(work):
        return []
    policy, rows = held[0].model, work.generation_batch
    prefill = rows * row_bytes(policy, zero, work._replace(k=0)) // policy.layers
    tables = rows * work.k * policy.vocabulary * (work.compute_bytes + 12)
    cache = rows * work.length * policy.cached * work.compute_bytes
    return [Item("kv cache", cache, alive=("generation",)), Item("sampling", prefill + tables, alive=("generation",))]


def scoring(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """The reward stage's evaluation: it keeps nothing, so that at most what one layer would keep is alive.

    Its rows are the longest that there are, and more at once than are trained on. PPO scores no more tokens than it samples from.
    """
    if samples(work):
        return []
    model = held[0].model
    rows = work.generation_batch * row_bytes(model, zero, work) // model.layers
    return [Item("scoring", rows, alive=("generation",))]


def saving(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Under ZeRO-3 the weights of one file are whole to be written (utils/zero.py). Beside GPUs a node has room for them."""
    if zero.stage < 3 or not work.cpu:
        return []
    largest = max(one.model.parameters for one in held) * weight_bytes(zero, work)
    return [Item("saving", min(FILE_BYTES, largest), alive=("saving",))]


TERMS = [weights, gradients, optimizer, step, exchange_buffers, pinned, gathered, activations, logits, generation, scoring,
         loading, saving]


def items_of(held: list[Held], zero: Zero, work: Work) -> list[Item]:
    """Every term of one process. The policy, or the only model, is the first of `held`."""
    items = base(work) + [item for term in TERMS for item in term(held, zero, work)]
    return [item for item in items if item.bytes]


def peak(items: list[Item], *places: str) -> int:
    """The most bytes that are alive at once in these places."""
    return max(sum(item.bytes for item in items if item.place in places and phase in item.alive) for phase in PHASES)
