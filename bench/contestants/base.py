"""What a contestant is: one way to compute a workload and its gradients, and the check that all compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Norm of the difference relative to the norm of the result.  Loose on purpose: the tests judge accuracy, this only
# makes sure that all contestants do the same work.  (Rounding flips the sign of pre-activations near zero, so that
# correct gradients of deep models differ by several percent in bfloat16, and by half of one in float32.)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 5e-2, torch.bfloat16: 2e-1}

LOOP, COMPILE, OURS, LIMIT = "Python loop", "torch.compile", "effens_kernels", "limit"
COMPILE_MAX = "torch.compile (max-autotune)"
COMPILED = (COMPILE, COMPILE_MAX)
PER_MEMBER = "mm per member"


class NotApplicableError(Exception):
    """A contestant cannot run a workload; the message is the reason that the tables show."""


class Problem(NamedTuple):
    """A workload in one dtype on one device: what contestants are built for."""

    workload: Any
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class Contestant:
    """One way to compute a workload, on parameters of its own.

    `function(*arguments)` gives the output and `leaves` are the tensors that need gradients.  After a backward pass
    `gradients()` gives them by name; names, shapes and the output are the same for all contestants of a problem.
    """

    name: str
    function: Callable[..., Tensor]
    arguments: tuple
    leaves: Sequence[Tensor]
    gradients: Callable[[], Mapping[str, Tensor]]
    # "peer", "ours", "backend" (ours, but not the one that runs by default), "limit", or "bound": a second limit
    kind: str = "peer"
    note: str = ""
    backward: Callable[[Tensor, Tensor], None] = torch.autograd.backward
    step: Callable[[], None] | None = None  # forward and backward in one call, where that is another way than both

    def forward(self) -> Tensor:
        return self.function(*self.arguments)

    def clear(self) -> None:
        """Drop the gradients, as `optimizer.zero_grad()` does."""
        for leaf in self.leaves:
            leaf.grad = None

    def compiled(self, name: str = COMPILE, **options: str) -> Contestant:
        return replace(self, name=name, function=torch.compile(self.function, **options), note=f"of {self.name}")


class Product(NamedTuple):
    """y = x W^T with x [rows, I] and W [O, I]; `rows` counts the rows of all members."""

    rows: int
    inputs: int
    outputs: int
    x_needs_gradient: bool

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs

    @property
    def backward_flops(self) -> int:
        return self.flops * (1 + self.x_needs_gradient)


def limit(products: Sequence[Product], dtype: torch.dtype, device: str) -> Contestant:
    """The matrix products that no implementation can avoid, and nothing else.

    One plain `torch.mm` each for y = x W^T, dx = g W (where x needs a gradient) and dW = g^T x, the rows of all
    members in one operand: the members' FLOPs in the shape that a GEMM library likes best.  Operands are allocated
    beforehand; no bias, no activation, no autograd.
    """

    def operand(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    forward, backward = [], []
    for rows, inputs, outputs, x_needs_gradient in products:
        x, w, g = operand(rows, inputs), operand(outputs, inputs), operand(rows, outputs)
        forward.append((x, w.t()))
        backward += [(g, w)] * x_needs_gradient + [(g.t(), x)]

    def multiply(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        for a, b in pairs:
            y = torch.mm(a, b)
        return y

    return Contestant(LIMIT, multiply, (forward,), (), dict, kind="limit", backward=lambda *_: multiply(backward))


def limit_per_member(products: Sequence[Product], members: int, dtype: torch.dtype, device: str) -> Contestant:
    """The same FLOPs as one plain `torch.mm` per member: what a GEMM library does with products of that size."""

    def operand(*shape: int) -> Tensor:
        return torch.randn(members, *shape, dtype=dtype, device=device)

    forward, backward = [], []
    for rows, inputs, outputs, x_needs_gradient in products:
        x, w, g = operand(rows // members, inputs), operand(outputs, inputs), operand(rows // members, outputs)
        forward.append((x, w.mT, torch.empty_like(g)))
        backward += [(g, w, torch.empty_like(x))] * x_needs_gradient + [(g.mT, x, torch.empty_like(w))]

    def multiply(triples: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        for a, b, c in triples:
            for e in range(members):
                torch.mm(a[e], b[e], out=c[e])
        return triples[0][-1]

    return Contestant(PER_MEMBER, multiply, (forward,), (), dict, kind="bound", backward=lambda *_: multiply(backward))


def copy_limit(forward_bytes: int, backward_bytes: int, device: str) -> Contestant:
    """A copy of the bytes that no implementation can avoid to move, half of them read and half written."""

    def buffers(count: int) -> tuple[Tensor, Tensor]:
        source = torch.randint(256, (max(1, count // 2),), dtype=torch.uint8, device=device)
        return source, torch.empty_like(source)

    forward, backward = buffers(forward_bytes), buffers(backward_bytes)

    def copy(source: Tensor, target: Tensor) -> Tensor:
        return target.copy_(source)[:1]  # nobody needs a gradient of the size of all bytes

    def copy_backward(*_: Tensor) -> None:
        copy(*backward)

    return Contestant(LIMIT, copy, forward, (), dict, kind="limit", backward=copy_backward)


def one_after_the_other(first: Contestant, second: Contestant) -> Contestant:
    """A limit that consists of two."""

    def forward(*_: object) -> Tensor:
        second.forward()
        return first.forward()

    def backward(output: Tensor, gradient: Tensor) -> None:
        second.backward(output, gradient)
        first.backward(output, gradient)

    return Contestant(LIMIT, forward, (), (), dict, kind="limit", backward=backward)


@dataclass(frozen=True)
class Suite:
    """Workloads of one kind, and how to build each contestant for them."""

    name: str
    title: str
    workloads: tuple[Any, ...]
    peers: Mapping[str, Callable[[Problem], Contestant]]  # by name, in the order of the tables' columns
    ours: Callable[[Problem], list[Contestant]]
    products: Callable[[Any], list[Product]]
    more_workloads: tuple[Any, ...] = ()  # of the full run
    plain: Callable[[Problem], Contestant] | None = None  # the limit, where it is not matrix products alone
    compiles: bool = True  # whether the fastest peer is compiled too: not where a graph has thousands of calls

    def limit(self, problem: Problem) -> Contestant:
        if self.plain is not None:
            return self.plain(problem)
        return limit(self.products(problem.workload), problem.dtype, problem.device)

    def flops(self, workload: Any) -> tuple[int, int]:
        """Forward, backward."""
        products = self.products(workload)
        return sum(p.flops for p in products), sum(p.backward_flops for p in products)


def results(contestant: Contestant) -> dict[str, Tensor]:
    """The output and all gradients, for an output gradient that is the same for all contestants."""
    contestant.clear()
    output = contestant.forward()
    contestant.backward(output, output_gradient(output))
    found = {"output": output.detach(), **{f"gradient of {k}": g.detach() for k, g in contestant.gradients().items()}}
    contestant.clear()
    return found


def check_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float | None = None) -> None:
    """Raise NotApplicableError where `results` of a contestant differ from those of another."""
    if found.keys() != expected.keys():
        raise NotApplicableError(f"it computes {sorted(found)}, not {sorted(expected)}")
    for name, exact in expected.items():
        value = found[name]
        if value.shape != exact.shape:
            raise NotApplicableError(f"{name} is {list(value.shape)}, should be {list(exact.shape)}")
        difference = torch.linalg.vector_norm(value.double() - exact.double())
        scale = torch.linalg.vector_norm(exact.double())
        if not difference <= (tolerance or TOLERANCE[exact.dtype]) * scale:
            raise NotApplicableError(f"{name} differs by {(difference / scale).item():.1g} in relative norm")


def output_gradient(output: Tensor) -> Tensor:
    return _normal(output.shape).to(output, copy=True)


@lru_cache(maxsize=2)  # large ones take longer to draw than to use
def _normal(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))
