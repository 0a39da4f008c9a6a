"""A step that is the same each time, recorded as a CUDA graph and replayed.

Decoding a token launches hundreds of small kernels, and Python takes longer to launch each than a GPU to run
it. A recording is launched at once. Whatever a step must not take from Python, such as its number, it reads
from tensors.
"""

import threading
import warnings
import weakref
from contextlib import contextmanager

import torch

# Of each thread: the stream that it records on, and its newest graph, whose memory serves the next one. Two
# threads that write at the same time must not share it.
_own = threading.local()
_unrecordable = weakref.WeakSet()  # models


class Replayed:
    """`step()` on a GPU: two ordinary calls, then a recording of it, replayed from the third call on.

    The second call finds out whether anything in the step waits for the device, which no recording can hold.
    Such a model stays with ordinary calls, and a warning says so once.

    Args:
        step: takes and returns nothing; it works in place on tensors that outlive it. It may be called again
            after it has raised.
        model: what it runs.
    """

    def __init__(self, step, model: torch.nn.Module):
        self.step, self.model, self.calls, self.graph = step, model, 0, None

    def __call__(self) -> None:
        self.calls += 1
        if self.graph is None and self.calls > 2 and self.model not in _unrecordable:
            self._try(self._record)
        if self.graph is not None:
            self.graph.replay()
        elif self.calls == 2 and self.model not in _unrecordable:
            self._try(self._step_without_waiting)
            if self.model in _unrecordable:
                self.step()
        else:
            with _side_stream():
                self.step()

    def _try(self, attempt) -> None:
        try:
            attempt()
        except RuntimeError as error:
            _unrecordable.add(self.model)
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"sampling launches each kernel from Python, which is slower: a step of "
                          f"{type(self.model).__name__} cannot be recorded as a CUDA graph ({reason})",
                          stacklevel=2)

    def _step_without_waiting(self) -> None:
        """Raises RuntimeError where the step waits for the device."""
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with _side_stream():
                self.step()
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def _record(self) -> None:
        graph, newest = torch.cuda.CUDAGraph(), getattr(_own, "graph", None)
        with _side_stream():
            # torch.cuda.graph() would also empty the allocator's cache, which the next update fills again
            graph.capture_begin(pool=newest and newest.pool(), capture_error_mode="thread_local")
            try:
                self.step()
            finally:
                graph.capture_end()
        self.graph = _own.graph = graph


@contextmanager
def _side_stream():
    """Nothing can be recorded on the default stream, and cuBLAS has a workspace for each stream."""
    if not hasattr(_own, "stream"):
        _own.stream = torch.cuda.Stream()
    outer = torch.cuda.current_stream()
    _own.stream.wait_stream(outer)
    try:
        with torch.cuda.stream(_own.stream):
            yield
    finally:
        outer.wait_stream(_own.stream)
