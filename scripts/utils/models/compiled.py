"""torch.compile of what is trained (`compile_trunk`): it joins the small kernels of a layer.

The layers are compiled, not the trunk around them. All layers of a model then share what is compiled, so it
costs the same for 4 layers and for 48. The masks of prompt groups, which are made in Python, stay outside.
Attention has kernels of its own and stays outside, too: a layer becomes what stands before it and what stands
behind it. Numbers of rows and tokens are left open. A single row and several are compiled apart, since the
compiler takes a size of 1 for a constant; so are passes with and without gradients.

A decoding step has other shapes all the time, and on a GPU it is recorded: sampling takes the layers as they
are.
"""

import time
import weakref
from contextlib import contextmanager, nullcontext
from textwrap import shorten

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from utils.errors import UserError
from utils.models.outputs import trunk

_compiled = weakref.WeakSet()  # layers
MEASURED = 3  # steps; the last of them compiles nothing as a rule


def compile_layers(model) -> None:
    """Let the layers of a model's trunk be compiled when they are first called, in place.

    Raises:
        UserError: when the model has no layers that transformers marks as such, or nothing can be compiled
            on this machine.
    """
    layers = layers_of(model)
    if not layers:
        raise UserError(f"compile_trunk: {type(model).__name__} has no layers that transformers marks as "
                        "such; leave the key out")
    refuse_without_compiler(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for layer in layers:
        layer.compile(dynamic=True)
        _compiled.add(layer)


def layers_of(model) -> list[torch.nn.Module]:
    """The layers that a trunk is made of."""
    return [module for module in trunk(model).modules() if isinstance(module, GradientCheckpointingLayer)]


def refuse_without_compiler(device: torch.device) -> None:
    """Compile something small. Raises UserError with the compiler's reason where that fails."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # of compilers, of which there are several
        reason = shorten(f"{type(error).__name__}: {error}", 150, placeholder=" ...")
        raise UserError(f"compile_trunk: torch.compile does not work on this machine ({reason}); on a CPU it "
                        "needs g++, on a GPU triton and gcc") from None


def uncompiled(model):
    """A context in which the layers of a model are called as they are."""
    compiled = any(layer in _compiled for layer in layers_of(model))
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()


class Cost:
    """What compiling costs, said once: by how much the first steps took longer than the last of MEASURED.

    Args:
        log: a function of a line.
    """

    def __init__(self, log):
        self.log, self.seconds = log, []

    @contextmanager
    def step(self):
        """Around each step of a loop."""
        if len(self.seconds) == MEASURED:
            yield
            return
        began = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - began)
        if len(self.seconds) == MEASURED:
            *first, last = self.seconds
            extra = max(0.0, sum(first) - last * len(first))
            self.log(f"compile_trunk: compiling took about {extra:.0f} s ({_spelled(first)} s of the first "
                     f"steps, {last:.2f} s of the next)")


def _spelled(seconds: list[float]) -> str:
    return ", ".join(f"{each:.2f}" for each in seconds)
