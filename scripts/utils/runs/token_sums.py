"""Means over all tokens of many micro-batches and of all ranks (detail 12)."""

import torch
from accelerate import Accelerator
from torch import Tensor


class TokenSums:
    """Adds up sums over tokens, so that the mean is over tokens and not over micro-batches."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.sums, self.maxima = accelerator, {}, {}

    def add(self, sums: dict[str, Tensor], maxima: dict[str, Tensor] | None = None) -> None:
        """Scalars of one micro-batch. `sums` holds "tokens", their number."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        for name, value in (maxima or {}).items():
            self.maxima[name] = torch.maximum(self.maxima.get(name, value), value)

    def merge(self, other: "TokenSums") -> None:
        self.add(other.sums, other.maxima)

    def means(self) -> dict[str, float]:
        """Sums over tokens, and maxima, of all ranks; all ranks must call it with the same names."""
        sums = self._reduced(self.sums, "sum")
        tokens = sums.pop("tokens")
        return {name: value / tokens for name, value in sums.items()} | self._reduced(self.maxima, "max")

    def _reduced(self, values: dict[str, Tensor], how: str) -> dict[str, float]:
        """Over all ranks; the host waits for the device once."""
        names = sorted(values)
        together = torch.stack([values[name].double() for name in names])
        return dict(zip(names, self.accelerator.reduce(together, how).tolist(), strict=True))
