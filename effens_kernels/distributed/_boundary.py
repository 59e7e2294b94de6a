"""Between an ensemble of DTensors and the plain tensors that this process computes with."""

from __future__ import annotations

import torch
from torch import Tensor

from ._mesh import Shares


class _Scaled(torch.autograd.Function):
    """The same values; the gradient times a factor, where 0 makes 0 of everything."""

    @staticmethod
    def forward(ctx, t, factor):
        ctx.factor = factor
        return t.view_as(t)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor if ctx.factor else torch.zeros_like(grad), None


def distributed(t: Tensor, shares: Shares, owned: bool) -> Tensor:
    """The DTensor of which this process has `t`."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not owned:
        return DTensor.from_local(t, shares.mesh, [Replicate()] * shares.mesh.ndim, run_check=False)
    placements = [Shard(0) if axis == shares.axis else Replicate() for axis in range(shares.mesh.ndim)]
    shape = torch.Size((shares.num_members, *t.shape[1:]))
    return DTensor.from_local(t, shares.mesh, placements, run_check=False, shape=shape, stride=t.stride())


def from_the_first(t: Tensor, shares: Shares, owned: bool) -> None:
    """Where several processes have a tensor, the values of the first of them."""
    import torch.distributed as dist

    for axis in shares.others if owned else range(shares.mesh.ndim):
        if shares.mesh.size(axis) > 1 and t.numel():
            values = t.contiguous()
            dist.broadcast(values, group=shares.mesh.get_group(axis), group_src=0)
            t.copy_(values)


def local_of(t: Tensor, shares: Shares) -> Tensor:
    """What this process computes with.  A process without members makes up one, of ones, and gives no gradients.

    Backward makes a gradient of this process that of all: the sum over the members of all processes where they share
    the parameter, the mean over processes that have the same members and other rows.
    """
    from torch.distributed.tensor import Partial

    owned = t.placements[shares.axis].is_shard()
    if t.requires_grad and torch.is_grad_enabled():
        grads = list(t.placements)
        for axis in shares.others if owned else range(len(grads)):
            grads[axis] = Partial()
        # Backward of a redistribution to where it is already is the reduction of partial gradients.
        local = t.redistribute(placements=t.placements).to_local(grad_placements=grads)
        if shares.replicas > 1:
            local = _Scaled.apply(local, 1 / shares.replicas)
    else:
        local = t.to_local()
    if shares.own:
        return local
    if owned:
        return torch.cat([local, local.new_ones((1, *local.shape[1:]))])
    return _Scaled.apply(local, 0.0)


def shared_input(x: Tensor, shares: Shares) -> Tensor:
    """The same rows for all members; their gradient is the sum over the members of all processes."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    if not (x.requires_grad and torch.is_grad_enabled()):
        return x
    spread = DTensor.from_local(x, shares.members, [Replicate()], run_check=False)
    local = spread.to_local(grad_placements=[Partial()])
    return local if shares.own else _Scaled.apply(local, 0.0)
