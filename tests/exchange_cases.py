"""What the tests of exchange share: formulas of other libraries' layers, where those are not installed."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from effens_kernels.testing import assert_accurate

StateOf = Callable[[nn.Module], dict[str, Tensor]]


def parameter(*sizes: int, **place) -> nn.Parameter:
    return nn.Parameter(torch.randn(sizes, **place) / math.sqrt(sizes[-1]))


def tabm_package():
    return pytest.importorskip("tabm", reason="tabm is not installed")


def torch_uncertainty_layers():
    """Its layers alone: the package itself imports lightning and torchvision, which they do not use."""
    spec = importlib.util.find_spec("torch_uncertainty")
    if spec is None or importlib.util.find_spec("einops") is None:
        pytest.skip("torch-uncertainty is not installed: pip install --no-deps torch-uncertainty einops")
    if "torch_uncertainty" not in sys.modules:
        package = types.ModuleType("torch_uncertainty")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["torch_uncertainty"] = package
        try:
            importlib.import_module("torch_uncertainty.layers")
        finally:
            del sys.modules["torch_uncertainty"]
    return sys.modules["torch_uncertainty.layers"]


# ------------------------------------------------------------------------------------------- tabm's formulas


class Tabm:
    """Layers of `[B, k, ...]` with tabm's names, axes and constructors."""

    class LinearBatchEnsemble(nn.Module):
        __module__ = "tabm"

        def __init__(self, in_features, out_features, bias=True, *, k, scaling_init="normal", dtype=None):
            super().__init__()
            self.weight = parameter(out_features, in_features, dtype=dtype)
            self.r = nn.Parameter(torch.randn(k, in_features, dtype=dtype))
            self.s = nn.Parameter(torch.randn(k, out_features, dtype=dtype))
            self.register_parameter("bias", parameter(k, out_features, dtype=dtype) if bias else None)

        def forward(self, x):
            y = torch.einsum("bki,oi->bko", x * self.r, self.weight) * self.s
            return y if self.bias is None else y + self.bias

    class LinearEnsemble(nn.Module):
        __module__ = "tabm"

        def __init__(self, in_features, out_features, bias=True, *, k, dtype=None):
            super().__init__()
            self.weight = parameter(k, in_features, out_features, dtype=dtype)
            self.register_parameter("bias", parameter(k, out_features, dtype=dtype) if bias else None)

        def forward(self, x):
            y = torch.einsum("bki,kio->bko", x, self.weight)
            return y if self.bias is None else y + self.bias

    class ElementwiseAffine(nn.Module):
        __module__ = "tabm"

        def __init__(self, shape, bias=True, dtype=None):
            super().__init__()
            self.weight = nn.Parameter(1 + torch.randn(shape, dtype=dtype) / 3)
            self.register_parameter("bias", nn.Parameter(torch.randn(shape, dtype=dtype)) if bias else None)

        def forward(self, x):
            return x * self.weight if self.bias is None else x * self.weight + self.bias

    class BatchNorm1dEnsemble(nn.Module):
        __module__ = "tabm"

        def __init__(self, num_features, *, k, affine=True, **options):
            super().__init__()
            self.k = k
            self.impl = nn.BatchNorm1d(k * num_features, affine=False, **options)
            self.affine = Tabm.ElementwiseAffine((k, num_features), dtype=options.get("dtype")) if affine else None

        def forward(self, x):
            y = self.impl(x.flatten(1)).view(x.shape)
            return y if self.affine is None else self.affine(y)

    class LayerNormEnsemble(nn.Module):
        __module__ = "tabm"

        def __init__(self, normalized_shape, *, k, elementwise_affine=True, **options):
            super().__init__()
            self.k = k
            self.impl = nn.LayerNorm(normalized_shape, elementwise_affine=False, **options)
            shape = k, *self.impl.normalized_shape
            self.affine = Tabm.ElementwiseAffine(shape, dtype=options.get("dtype")) if elementwise_affine else None

        def forward(self, x):
            y = self.impl(x)
            return y if self.affine is None else self.affine(y)

    class TabM(nn.Module):
        __module__ = "tabm"

        def __init__(
            self, *, n_num_features, d_out, n_blocks, d_block, k, arch_type, start_scaling_init=None, dropout=0.0
        ):
            super().__init__()
            sizes = [n_num_features] + n_blocks * [d_block]
            make = {
                "tabm": lambda i, o: Tabm.LinearBatchEnsemble(i, o, k=k),
                "tabm-mini": nn.Linear,
                "tabm-packed": lambda i, o: Tabm.LinearEnsemble(i, o, k=k),
            }[arch_type]
            self.k, self.backbone = k, nn.Module()
            self.backbone.blocks = nn.ModuleList(
                nn.Sequential(make(i, o), nn.ReLU(), nn.Dropout(dropout)) for i, o in zip(sizes, sizes[1:])
            )
            if arch_type == "tabm-mini":
                self.backbone.affine = Tabm.ElementwiseAffine((k, n_num_features), bias=False)
            self.output = None if d_out is None else Tabm.LinearEnsemble(d_block, d_out, k=k)

        def forward(self, x):
            x = x.unsqueeze(1).expand(-1, self.k, -1) if x.dim() == 2 else x
            x = self.backbone.affine(x) if hasattr(self.backbone, "affine") else x
            for block in self.backbone.blocks:
                x = block(x)
            return x if self.output is None else self.output(x)


# ------------------------------------------------------------------------------ torch-uncertainty's formulas


def members_of(x: Tensor, count: int) -> Tensor:
    return x.view(count, x.shape[0] // count, *x.shape[1:])


class Scaled(nn.Module):
    """BatchEnsemble around any product: rows `[M*B, ...]`, member by member."""

    PRODUCT = "linear"

    def __init__(self, product, inputs, outputs, num_estimators, bias, place):
        super().__init__()
        setattr(self, self.PRODUCT, product)
        self.num_estimators = num_estimators
        self.r_group = nn.Parameter(1 + torch.randn(num_estimators, inputs, **place) / 2)
        self.s_group = nn.Parameter(1 + torch.randn(num_estimators, outputs, **place) / 2)
        self.register_parameter("bias", parameter(num_estimators, outputs, **place) if bias else None)

    def forward(self, x):
        product, parts = getattr(self, self.PRODUCT), []
        for e, part in enumerate(members_of(x, self.num_estimators)):
            axes = (-1,) + (1,) * (x.dim() - 2)
            y = product(part * self.r_group[e].view(axes)) * self.s_group[e].view(axes)
            parts.append(y if self.bias is None else y + self.bias[e].view(axes))
        return torch.cat(parts)


class Mask(nn.Module):
    def __init__(self, channels, num_masks):
        super().__init__()
        masks = torch.zeros(num_masks, channels, dtype=torch.float64).bernoulli_(0.6)
        self.masks = nn.Parameter(masks, requires_grad=False)

    def forward(self, x):
        parts = [
            part * m.view(-1, *(1,) * (x.dim() - 2)) for part, m in zip(members_of(x, len(self.masks)), self.masks)
        ]
        return torch.cat(parts).to(x.dtype)


class TorchUncertainty:
    """Layers of `[M*B, ...]` with torch-uncertainty's names, axes and constructors."""

    class BatchLinear(Scaled):
        __module__ = "torch_uncertainty.layers"

        def __init__(self, in_features, out_features, num_estimators, bias=True, **place):
            product = nn.Linear(in_features, out_features, False, **place)
            super().__init__(product, in_features, out_features, num_estimators, bias, place)

    class BatchConv1d(Scaled):
        __module__ = "torch_uncertainty.layers"
        PRODUCT, KIND = "conv", nn.Conv1d

        def __init__(self, in_channels, out_channels, kernel_size, num_estimators, *, bias=True, dtype=None, **how):
            product = self.KIND(in_channels, out_channels, kernel_size, bias=False, dtype=dtype, **how)
            super().__init__(product, in_channels, out_channels, num_estimators, bias, {"dtype": dtype})

    class BatchConv2d(BatchConv1d):
        __module__ = "torch_uncertainty.layers"
        KIND = nn.Conv2d

    class BatchConvTranspose2d(BatchConv1d):
        __module__ = "torch_uncertainty.layers"
        PRODUCT, KIND = "conv_transpose", nn.ConvTranspose2d

    class MaskedLinear(nn.Module):
        __module__ = "torch_uncertainty.layers"

        def __init__(self, in_features, out_features, num_estimators, scale, bias=True, **place):
            super().__init__()
            self.mask = Mask(in_features, num_estimators)
            self.linear = nn.Linear(in_features, out_features, bias, **place)

        def forward(self, x):
            return self.linear(self.mask(x))

    class MaskedConv2d(nn.Module):
        __module__ = "torch_uncertainty.layers"
        KIND = nn.Conv2d

        def __init__(self, in_channels, out_channels, kernel_size, num_estimators, scale, **how):
            super().__init__()
            self.mask = Mask(in_channels, num_estimators)
            self.conv = self.KIND(in_channels, out_channels, kernel_size, **how)

        def forward(self, x):
            return self.conv(self.mask(x))

    class MaskedConvTranspose2d(MaskedConv2d):
        __module__ = "torch_uncertainty.layers"
        KIND = nn.ConvTranspose2d

    class PackedLinear(nn.Module):
        __module__ = "torch_uncertainty.layers"

        def __init__(
            self,
            in_features,
            out_features,
            alpha,
            num_estimators,
            gamma=1,
            bias=True,
            first=False,
            last=False,
            implementation="einsum",
            **place,
        ):
            super().__init__()
            inputs, outputs = in_features * (1 if first else alpha), out_features * (num_estimators if last else alpha)
            self.groups = 1 if first else num_estimators * gamma
            self.num_estimators, self.first, self.last = num_estimators, first, last
            self.weight = parameter(self.groups, outputs // self.groups, inputs // self.groups, **place)
            self.register_parameter("bias", parameter(outputs, **place) if bias else None)
            if implementation == "sparse":
                self.weight = nn.Parameter(torch.block_diag(*self.weight).to_sparse())

        def forward(self, x):
            weight = self.weight
            y = x @ (weight.t() if weight.is_sparse else torch.block_diag(*weight).mT)
            y = y if self.bias is None else y + self.bias
            return torch.cat(y.chunk(self.num_estimators, -1)) if self.last else y


# ---------------------------------------------------------------------------------------------- comparisons


def gradients(module: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Of the sum of `weights` times the output: x, and parameters by name."""
    x = x.detach().requires_grad_()
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    y = module(x)
    return {"output": y.detach(), **dict(zip(("input", *named), torch.autograd.grad(y, (x, *named.values()), weights)))}


def translated(found: dict[str, Tensor], module: nn.Module, state_of: StateOf) -> dict[str, Tensor]:
    """Gradients by the other library's names: they have the axes of what they are gradients of."""
    shadow = copy.deepcopy(module)
    for name, p in shadow.named_parameters():
        if name in found:
            p.data = found[name]
    state = state_of(shadow)
    rest = {name: found[name] for name in ("output", "input")}
    return {**rest, **state}


def assert_same(
    ours: nn.Module, theirs: nn.Module, x: Tensor, x_ours: Tensor | None = None, state_of: StateOf | None = None
) -> None:
    """Output and gradients are as near to their float64 values as what the other library computes."""
    weights = torch.randn_like(theirs(x))
    expected = gradients(theirs, x, weights)
    exact = gradients(copy.deepcopy(theirs).double(), x.double(), weights.double())
    x_ours = x if x_ours is None else x_ours
    actual = gradients(ours, x_ours, weights.view_as(ours(x_ours)))
    if state_of is not None:
        actual = translated(actual, ours, state_of)
    for name, value in expected.items():
        assert_accurate(actual[name].view_as(value), exact[name], value, name, terms=value.numel())


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name], value), name
