"""Sample calls of ensemble_mlp for the tests, their gradients by name, and the chain of grouped_linear it equals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from common import Named, leaves
from torch import Tensor

from effens_kernels import grouped_linear
from effens_kernels.ops.ensemble_mlp import reference
from effens_kernels.testing import strided


@dataclass(frozen=True)
class MLPCase:
    """One sample call, readable as a test id such as `E3-B17-4x33x2-relu`."""

    members: int
    batch: int
    widths: tuple[int, ...]  # I, hidden, O
    activation: str | None = "relu"
    out_activation: str | None = None
    shared: bool = False  # x is [B, I]
    shared_layers: tuple[int, ...] = ()  # those with [1, O, I]
    bias: str = "all"  # "all", "none", or "some": of every second layer
    x_layout: str = "contiguous"
    weight_layout: str = "contiguous"

    def __str__(self) -> str:
        parts = [f"E{self.members}", f"B{self.batch}", "x".join(map(str, self.widths)), str(self.activation)]
        parts += [f"out_{self.out_activation}"] * bool(self.out_activation) + ["shared"] * self.shared
        parts += ["layers" + "".join(map(str, self.shared_layers)) + "_shared"] * bool(self.shared_layers)
        parts += [f"{self.bias}_bias"] * (self.bias != "all")
        parts += [f"x_{self.x_layout}"] * (self.x_layout != "contiguous")
        parts += [f"w_{self.weight_layout}"] * (self.weight_layout != "contiguous")
        return "-".join(parts)

    @property
    def depth(self) -> int:
        return len(self.widths) - 1

    @property
    def options(self) -> dict[str, str | None]:
        return {"activation": self.activation, "out_activation": self.out_activation}

    def inputs_for(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int | None = None) -> Inputs:
        """Fresh random inputs, scaled so that every layer's outputs are of order 1."""
        generator = torch.Generator()
        generator.manual_seed(generator.seed() if seed is None else seed)
        rows = (self.batch, self.widths[0])
        x = strided(rows if self.shared else (self.members, *rows), self.x_layout, generator, dtype, device)
        weights, biases = [], []
        for n, (i, o) in enumerate(zip(self.widths, self.widths[1:])):
            copies = 1 if n in self.shared_layers else self.members
            weight = strided((copies, o, i), self.weight_layout, generator, dtype, device)
            weights.append(weight.mul_((2 / max(1, i)) ** 0.5))
            has_bias = self.bias == "all" or (self.bias == "some" and n % 2 == 0)
            biases.append(strided((copies, o), "contiguous", generator, dtype, device) if has_bias else None)
        return Inputs(x, weights, biases)

    def grad_for(self, like: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        members = 1 if self.shared and len(self.shared_layers) == self.depth else self.members
        shape = (members, self.batch, self.widths[-1])
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)

    def terms(self, name: str) -> int:
        """How many products are summed into one element of the result `name`, over the layers it comes through."""
        forward = sum(self.widths[:-1])
        backward = sum(self.widths[1:]) * (self.members if self.shared else 1)
        rows = self.batch * (self.members if self.shared_layers else 1)
        return forward if name == "y" else forward + backward + (0 if name == "x" else rows)


@dataclass
class Inputs:
    x: Tensor
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]

    def tensors(self) -> dict[str, Tensor]:
        named = {"x": self.x}
        for n, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            named |= {f"weights[{n}]": weight} | ({} if bias is None else {f"biases[{n}]": bias})
        return named

    def map(self, f: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(f(self.x), [f(w) for w in self.weights], [None if b is None else f(b) for b in self.biases])

    def leaves(self) -> Inputs:
        return self.map(lambda t: leaves([t])[0])


def gradients(call: Callable[..., Tensor], inputs: Inputs, grad: Tensor, **options) -> Named:
    """{"y": ..., "x": dL/dx, "weights[0]": ..., ...} for dL/dy = grad."""
    inputs = inputs.leaves()
    y = call(inputs.x, inputs.weights, inputs.biases, **options)
    named = inputs.tensors()
    return {"y": y.detach(), **dict(zip(named, torch.autograd.grad(y, list(named.values()), grad)))}


def chain(x, weights, biases, activation="relu", out_activation=None, backend="cpu") -> Tensor:
    """Layer after layer, each one call of grouped_linear."""

    def linear(x, weight, bias, activation):
        return grouped_linear(x, weight, bias, activation=activation, backend=backend)

    return reference.layers(linear, x, weights, biases, activation, out_activation)
