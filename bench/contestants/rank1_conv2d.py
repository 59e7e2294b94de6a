"""BatchEnsemble convolutions: `rank1_conv2d` against what users write; the limit is one plain convolution.

The plain convolution has the images of all members in one batch: the same FLOPs in the shape that the library likes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from effens_kernels import rank1_conv2d

from ..workloads import CONV_WORKLOADS, ConvWorkload
from .base import LIMIT, LOOP, OURS, Contestant, Problem, Product, Suite

MORE_WORKLOADS = (
    ConvWorkload(4, 32, 256, 256, 8),
    ConvWorkload(4, 32, 128, 128, 16, kernel=1),
    ConvWorkload(4, 32, 64, 128, 32, stride=2),
    ConvWorkload(4, 32, 64, 64, 32, channels_last=True),
)
NAMES = ("x", "weight", "r", "s", "bias")
Convolution = Callable[..., Tensor]


@lru_cache(maxsize=1)
def _values(problem: Problem) -> tuple[Tensor, ...]:
    return problem.workload.inputs_for(problem.dtype, problem.device, seed=0)


def _start(problem: Problem) -> list[Tensor]:
    """The same values for every contestant; images that all members see are data and need no gradient."""
    leaves = [t.clone().requires_grad_() for t in _values(problem)]
    leaves[0].requires_grad_(not problem.workload.shared)
    return leaves


def _contestant(name: str, problem: Problem, function: Convolution, kind: str = "peer") -> Contestant:
    tensors, workload = _start(problem), problem.workload
    leaves = {name: t for name, t in zip(NAMES, tensors) if t.requires_grad}
    return Contestant(
        name,
        lambda *inputs: function(*inputs, workload.stride, workload.kernel // 2),
        tuple(tensors),
        list(leaves.values()),
        lambda: {name: leaf.grad for name, leaf in leaves.items()},
        kind,
    )


def loop(problem: Problem) -> Contestant:
    """One member after the other, images scaled before and after."""

    def function(x, weight, r, s, bias, stride, padding):
        members = []
        for e in range(len(r)):
            images = (x if x.dim() == 4 else x[e]) * r[e, :, None, None]
            members.append(
                F.conv2d(images, weight, None, stride, padding) * s[e, :, None, None] + bias[e, :, None, None]
            )
        return torch.stack(members)

    return _contestant(LOOP, problem, function)


def broadcast(problem: Problem) -> Contestant:
    """Scaled images of all members in one batch."""

    def function(x, weight, r, s, bias, stride, padding):
        images = x * r[:, None, :, None, None]
        y = F.conv2d(images.flatten(0, 1), weight, None, stride, padding).unflatten(0, (len(r), -1))
        return y * s[:, None, :, None, None] + bias[:, None, :, None, None]

    return _contestant("broadcast", problem, function)


def grouped(problem: Problem) -> Contestant:
    """Weights of each member written out, all members as groups of one convolution."""

    def function(x, weight, r, s, bias, stride, padding):
        members = len(r)
        folded = weight * (s[:, :, None] * r[:, None, :])[..., None, None]
        images = x.repeat(1, members, 1, 1) if x.dim() == 4 else x.transpose(0, 1).flatten(1, 2)
        y = F.conv2d(images, folded.flatten(0, 1), bias.flatten(), stride, padding, groups=members)
        return y.unflatten(1, (members, -1)).transpose(0, 1)

    return _contestant("grouped convolution", problem, function)


def ours(problem: Problem) -> list[Contestant]:
    return [_contestant(OURS, problem, rank1_conv2d, "ours")]


def plain(problem: Problem) -> Contestant:
    x, weight, _, _, bias = _values(problem)
    return plain_convolution(problem.workload, x, weight, bias[0])


def plain_convolution(workload: ConvWorkload, x: Tensor, weight: Tensor, bias: Tensor) -> Contestant:
    """One weight on the images of all members."""
    images = x.repeat(workload.members, 1, 1, 1) if workload.shared else x.flatten(0, 1)
    if workload.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    options = [workload.stride] * 2, [workload.kernel // 2] * 2, [1, 1], False, [0, 0], 1
    mask = [not workload.shared, True, True]

    def forward(images: Tensor) -> Tensor:
        return torch.convolution(images, weight, bias, *options)

    def backward(_: Tensor, gradient: Tensor) -> None:
        torch.ops.aten.convolution_backward(gradient, images, weight, bias.shape, *options, mask)

    return Contestant(LIMIT, forward, (images,), (), dict, kind="limit", backward=backward)


def products(workload: ConvWorkload) -> list[Product]:
    side = (workload.size - 1) // workload.stride + 1
    rows = workload.members * workload.batch * side * side
    return [Product(rows, workload.inputs * workload.kernel**2, workload.outputs, not workload.shared)]


SUITE = Suite(
    name="conv",
    title="BatchEnsemble convolutions: rank1_conv2d",
    workloads=CONV_WORKLOADS,
    more_workloads=MORE_WORKLOADS,
    peers={LOOP: loop, "broadcast": broadcast, "grouped convolution": grouped},
    ours=ours,
    products=products,
    plain=plain,
)
