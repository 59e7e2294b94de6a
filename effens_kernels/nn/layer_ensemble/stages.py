"""What options are made of: a stage for each module of an option, with the parameters of all K options.

A stage computes prefixes of a layer in one of two ways:

* `of_each(x, option, fresh)`: x [U, B, ...], every prefix by its own option [U], all in one call;
* `of_one(x, k, own, prefixes, fresh)`: x [n*B, ...], the rows of n prefixes that all end in option k, whose values
  `own` are those that `apart()` gives for it.

`fresh` says that nobody else needs x: without gradients it may be overwritten.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import grouped_linear, indexed_linear
from ...ops._activations import ACTIVATIONS
from ...ops._checks import reject
from .._fusing import MODULES
from . import _batch_norm
from .prefix_tree import Level

Values = Mapping[str, Tensor | None]

_IN_PLACE: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.ReLU: torch.relu_,
    nn.SiLU: lambda x: F.silu(x, inplace=True),
    nn.Sigmoid: torch.sigmoid_,
    nn.Tanh: torch.tanh_,
}


class Stage(nn.Module):
    """Parameters and buffers of K modules along a new first axis, under their names."""

    batched = True  # whether there is `of_each`

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.num_options = len(modules)
        first = modules[0]
        self._template = (copy.deepcopy(first).to("meta"),)  # what torch.nn's module is; in a tuple, not as a child
        with torch.no_grad():
            for name, value in first._parameters.items():
                if value is None:
                    self.register_parameter(name, None)
                else:
                    stacked = torch.stack([getattr(module, name) for module in modules])
                    self.register_parameter(name, nn.Parameter(stacked, value.requires_grad))
            for name, value in first._buffers.items():
                of_all = None if value is None else torch.stack([getattr(module, name) for module in modules])
                self.register_buffer(name, of_all, persistent=name not in first._non_persistent_buffers_set)
        self.train(first.training)

    @property
    def template(self) -> nn.Module:
        return self._template[0]

    def of_each(self, x: Tensor, option: Tensor, fresh: bool) -> Tensor:
        raise NotImplementedError

    def of_one(self, x: Tensor, k: int, own: Values, prefixes: int, fresh: bool) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def plain(self, k: int) -> list[nn.Module]:
        """torch.nn's modules of option k, with copies of its values."""
        module = copy.deepcopy(self.template)
        for name in module._parameters:
            value = getattr(self, name)
            if value is not None:
                setattr(module, name, nn.Parameter(value[k].clone(), value.requires_grad))
        for name in module._buffers:
            value = getattr(self, name)
            if value is not None:
                setattr(module, name, value[k].clone())
        return [module.train(self.training)]

    def apart(self) -> list[Values]:
        """For each option its parameters and buffers, by name: views, all made at once."""
        named = {**self._parameters, **self._buffers}
        columns = [[None] * self.num_options if value is None else value.unbind(0) for value in named.values()]
        return [dict(zip(named, values)) for values in zip(*columns)] if named else [{}] * self.num_options

    def extra_repr(self) -> str:
        return f"{self.template!r}, num_options={self.num_options}"


class Linear(Stage):
    """`weight` `[K, O, I]`, with the activation that follows it."""

    def __init__(self, modules: Sequence[nn.Linear], activation: str | None) -> None:
        super().__init__(modules)
        self.activation = activation

    def onward(self, x: Tensor, level: Level) -> Tensor:
        """From the prefixes of the layer before, [P, B, ..., I], to those of this one, [U, B, ..., O]."""
        rows = x.shape[1:-1]
        x, weight, bias, how = self._checked(x).flatten(1, -2), self.weight, self.bias, self.activation
        if level.is_step and self.num_options == 1:  # one weight for all rows
            y = grouped_linear(x.flatten(0, 1).unsqueeze(0), weight, bias, activation=how)
        elif level.is_product:  # the same rows for all weights
            y = grouped_linear(x.flatten(0, 1), weight, bias, activation=how)
        elif level.is_step and level.is_diagonal and level.size == self.num_options:
            y = grouped_linear(x, weight, bias, activation=how)
        else:
            y = indexed_linear(x, weight, bias, x_index=level.parent, weight_index=level.option, activation=how)
        return y.reshape(level.size, *rows, y.shape[-1])

    def of_each(self, x: Tensor, option: Tensor, fresh: bool) -> Tensor:
        rows, own = x.shape[1:-1], torch.arange(len(x), device=x.device)
        x = self._checked(x).flatten(1, -2)
        y = indexed_linear(x, self.weight, self.bias, x_index=own, weight_index=option, activation=self.activation)
        return y.reshape(len(x), *rows, y.shape[-1])

    def of_one(self, x: Tensor, k: int, own: Values, prefixes: int, fresh: bool) -> Tensor:
        y = F.linear(self._checked(x), own["weight"], own["bias"])
        return _activated(y, MODULES.get(self.activation), ACTIVATIONS[self.activation].apply)

    def plain(self, k: int) -> list[nn.Module]:
        activation = [] if self.activation is None else [MODULES[self.activation]().train(self.training)]
        return [*super().plain(k), *activation]

    def _checked(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.weight.shape[2] or x.dim() < 2:
            expected = f"[..., I={self.weight.shape[2]}] where it reaches {self.template}"
            reject("LayerEnsemble", "input", expected, f"{list(x.shape[-1:])} features")
        return x

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


class Convolution(Stage):
    """PyTorch's convolution, option by option."""

    batched = False

    def of_one(self, x: Tensor, k: int, own: Values, prefixes: int, fresh: bool) -> Tensor:
        return self.template._conv_forward(x, own["weight"], own["bias"])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Convolution:
        """Weights of images go through as [K*O, C, kh, kw], which may become channels_last."""

        def of_four_axes(t: Tensor) -> Tensor:
            return fn(t.flatten(0, 1)).unflatten(0, t.shape[:2]) if t.dim() == 5 else fn(t)

        return super()._apply(of_four_axes if isinstance(self.template, nn.Conv2d) else fn, recurse)


class BatchNorm(Stage):
    """Statistics of each prefix's own rows while training, and of each option's running ones otherwise."""

    def of_each(self, x: Tensor, option: Tensor, fresh: bool) -> Tensor:
        if _batch_norm.takes_batch_statistics(self):
            return _batch_norm.by_batch_statistics(self, x, option)
        return _batch_norm.by_running_statistics(self, x, option, fresh)

    def of_one(self, x: Tensor, k: int, own: Values, prefixes: int, fresh: bool) -> Tensor:
        if _batch_norm.takes_batch_statistics(self):
            rows = x.unflatten(0, (prefixes, -1))
            option = torch.full((prefixes,), k, device=x.device)
            return _batch_norm.by_batch_statistics(self, rows, option).flatten(0, 1)
        mean, var = own["running_mean"], own["running_var"]
        return F.batch_norm(x, mean, var, own["weight"], own["bias"], False, 0.0, self.template.eps)


class LayerNorm(Stage):
    def of_each(self, x: Tensor, option: Tensor, fresh: bool) -> Tensor:
        shape, eps = self.template.normalized_shape, self.template.eps
        if self.num_options == 1:
            (own,) = self.apart()
            return F.layer_norm(x, shape, own["weight"], own["bias"], eps)
        y = F.layer_norm(x, shape, None, None, eps)
        between = (1,) * (x.dim() - 1 - len(shape))
        weight, bias = (
            None if t is None else t[option].view(len(x), *between, *shape) for t in (self.weight, self.bias)
        )
        if weight is None:
            return y
        if torch.is_grad_enabled():
            return y * weight if bias is None else torch.addcmul(bias, y, weight)
        y = y.mul_(weight)
        return y if bias is None else y.add_(bias)

    def of_one(self, x: Tensor, k: int, own: Values, prefixes: int, fresh: bool) -> Tensor:
        return F.layer_norm(x, self.template.normalized_shape, own["weight"], own["bias"], self.template.eps)


class Plain(Stage):
    """A module of torch.nn without parameters, which takes rows one by one: the same for all options."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        nn.Module.__init__(self)
        self.num_options = len(modules)
        self.module = copy.deepcopy(modules[0])
        if hasattr(self.module, "inplace"):
            self.module.inplace = False  # prefixes share their input
        self.train(modules[0].training)

    def of_each(self, x: Tensor, option: Tensor | None, fresh: bool) -> Tensor:
        return self.of_one(x.flatten(0, 1), 0, {}, len(x), fresh).unflatten(0, x.shape[:2])

    def of_one(self, x: Tensor, k: int, own: Values, prefixes: int, fresh: bool) -> Tensor:
        return _activated(x, type(self.module) if fresh else None, self.module)

    def plain(self, k: int) -> list[nn.Module]:
        return [copy.deepcopy(self.module)]

    def extra_repr(self) -> str:
        return f"num_options={self.num_options}"


class Each(Stage):
    """Modules of any kind, called one after the other, each with the rows of all prefixes that end in it.

    So they have to take rows one by one.  What is known not to, BatchNorm inside that is training and softmax over the
    rows, is called once per prefix.  Modules that may overwrite their input get a copy, since prefixes share theirs.
    """

    batched = False

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        nn.Module.__init__(self)
        self.num_options = len(modules)
        self.options = nn.ModuleList(copy.deepcopy(module) for module in modules)
        self._overwrites = any(_may_overwrite(m) for option in self.options for m in option.modules())
        self.training = modules[0].training

    def of_one(self, x: Tensor, k: int, own: Values, prefixes: int, fresh: bool) -> Tensor:
        module = self.options[k]
        if prefixes > 1 and any(_mixes_rows(m) for m in module.modules()):
            parts = x.chunk(prefixes)  # views, which autograd does not let anybody overwrite
            return torch.cat([module(rows.clone() if self._overwrites else rows) for rows in parts])
        return module(x.clone() if self._overwrites and not fresh else x)

    def plain(self, k: int) -> list[nn.Module]:
        return [copy.deepcopy(self.options[k])]

    def extra_repr(self) -> str:
        return f"num_options={self.num_options}"


def softmax_of_rows(module: nn.Module) -> bool:
    return isinstance(module, (nn.Softmax, nn.LogSoftmax, nn.Softmin)) and module.dim == 0


def _mixes_rows(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return _batch_norm.takes_batch_statistics(module)
    return softmax_of_rows(module)


def _may_overwrite(module: nn.Module) -> bool:
    """What torch.nn's modules say of themselves; of others nothing is known."""
    return getattr(module, "inplace", False) or not type(module).__module__.startswith("torch.nn.modules.")


def _activated(x: Tensor, kind: type[nn.Module] | None, otherwise: Callable[[Tensor], Tensor]) -> Tensor:
    if kind in _IN_PLACE and not torch.is_grad_enabled():
        return _IN_PLACE[kind](x)
    return otherwise(x)
