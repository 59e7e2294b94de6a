"""convert: a plain model to an ensemble of a named method."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable

from torch import nn

from ..nn._layout import positive
from ..ops._checks import reject
from . import batch_ensemble, deep, mc_dropout, mimo, mixture, sub_ensemble
from ._ensemble import Ensemble
from ._surgery import Pattern, Sites
from .stack import StackedEnsemble

# A converter takes the modules of a model and the number of members, then options by keyword, and gives the ensemble.
METHODS: dict[str, Callable[..., Ensemble | StackedEnsemble]] = {
    "mixture": mixture.convert,
    "batch_ensemble": batch_ensemble.convert,
    "deep": deep.convert,
    "sub_ensemble": sub_ensemble.convert,
    "mimo": mimo.convert,
    "mc_dropout": mc_dropout.convert,
}


def convert(
    model: nn.Module,
    method: str,
    num_members: int,
    *,
    include: Pattern | Iterable[Pattern] | None = None,
    exclude: Pattern | Iterable[Pattern] = (),
    **options: object,
) -> Ensemble | StackedEnsemble:
    """An ensemble of `num_members` out of a plain model, which is left as it is.

    The ensemble runs the model's own forward code on `[E*B, ...]`, the rows of all members, with its layers replaced by
    layers of members.  Forward code may do anything that treats rows independently.

    Args:
        model: any module made of layers that the method can convert and of modules without parameters.  Modules and
            parameters used several times stay so.
        method: one of these, whose docstrings list their options:

            "mixture", :class:`MixtureEnsemble`: members combine templates of weights, within a budget of parameters;
            "batch_ensemble", :class:`BatchEnsemble`: the model's weights, which each member scales;
            "deep", :func:`effens_kernels.ensembles.deep.convert`: copies with weights of their own, drawn anew;
            "sub_ensemble", :class:`SubEnsemble`: one trunk, and a head for each member;
            "mimo", :class:`MIMOEnsemble`: one network with an input and an output for each member;
            "mc_dropout", :class:`MCDropoutEnsemble`: the model with its dropout kept on.
        num_members: E.
        include: convert only what is named here: types, or paths in the model (`"trunk"` is all of it, wildcards as in
            `"blocks.*.conv1"`).  Everything else is shared by the members as it is.
        exclude: share what is named here as it is.  A path means a module and all that is inside it, a type the modules
            of that type themselves.
        options: those of the method.

    Returns:
        An :class:`Ensemble`, or of "deep" a :class:`StackedEnsemble`, which maps `[B, ...]` to `[E, B, ...]`.

    Raises:
        TypeError: `model` is no module; an option is unknown.
        ValueError: unknown method; a module type that cannot be converted (named, with its path); nothing to convert;
            the model is an ensemble already; a pattern that is nowhere in the model; an option out of range.

    Example:
        >>> import torch, effens_kernels as ek
        >>> layers = [layer for _ in range(6) for layer in (torch.nn.Linear(64, 64), torch.nn.ReLU())]
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.ReLU(), *layers, torch.nn.Linear(64, 4))
        >>> ensemble = ek.convert(model, "mixture", num_members=5, budget="1x")
        >>> ensemble(torch.randn(32, 8)).shape
        torch.Size([5, 32, 4])
    """
    if not isinstance(model, nn.Module):
        reject("convert", "model", "a torch.nn.Module", type(model).__name__, TypeError)
    if not isinstance(method, str) or method not in METHODS:
        reject("convert", "method", f"one of {', '.join(map(repr, METHODS))}", repr(method))
    positive("convert", num_members=num_members)
    converter = METHODS[method]
    known = list(inspect.signature(converter).parameters)[2:]
    for name in options:
        if name not in known:
            reject("convert", name, f"an option of {method!r}: {', '.join(known)}", "an unknown one", TypeError)
    return converter(Sites(model, include, exclude), num_members, **options)
