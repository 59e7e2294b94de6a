"""Models of one architecture and different widths as models of one width, by zeros that training leaves alone."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..ops._checks import reject
from ._alike import check_models
from .stack import copied

__all__ = ["pad_widths", "unpad_widths"]

# Attributes that are sizes, by type, and how many axes of the weight these are (those that follow are the kernel's).
_CHANNELS = ("in_channels", "out_channels", "groups")
_SIZES: dict[type[nn.Module], tuple[tuple[str, ...], int]] = {
    nn.Linear: (("in_features", "out_features"), 2),
    nn.Bilinear: (("in1_features", "in2_features", "out_features"), 3),
    nn.Embedding: (("num_embeddings", "embedding_dim"), 2),
    nn.EmbeddingBag: (("num_embeddings", "embedding_dim"), 2),
    nn.PReLU: (("num_parameters",), 1),
    **{getattr(nn, f"Conv{n}d"): (_CHANNELS, 2) for n in (1, 2, 3)},
    **{getattr(nn, f"ConvTranspose{n}d"): (_CHANNELS, 2) for n in (1, 2, 3)},
    **{getattr(nn, f"{kind}Norm{n}d"): (("num_features",), 1) for kind in ("Batch", "Instance") for n in (1, 2, 3)},
}
_STATE = ("_parameters", "_buffers")

Name = tuple[str, str]  # of a tensor: the path of its module, and its name there


def pad_widths(models: Sequence[nn.Module], example: Tensor | tuple) -> list[nn.Module]:
    r"""Models of one architecture whose layers differ in width, as models of the largest widths, for `ek.stack`.

    .. math:: \tilde W = \begin{pmatrix} W & 0 \\ 0 & 0 \end{pmatrix}, \quad
              \tilde b = \begin{pmatrix} b \\ 0 \end{pmatrix}
              \quad\Rightarrow\quad \tilde h = \begin{pmatrix} h \\ 0 \end{pmatrix}, \quad
              \frac{\partial L}{\partial \tilde h} = \begin{pmatrix} \partial L / \partial h \\ 0 \end{pmatrix}

    The widths of the members of hyperparameter ensembles may then differ too (Wenzel et al. 2020, "Hyperparameter
    Ensembles for Robustness and Uncertainty Quantification").  Every model computes what it did, up to the order of
    sums, and stays so in training: a padded feature is 0 where activations have f(0) = 0, and its gradient is 0 since
    all weights that read it are, so that the gradients of all padding are exactly 0.  Optimizers of single elements
    (SGD, AdamW, all of `ek.optim`) leave padding at 0, weight decay included, and norms of gradients are the model's.

    Padded are Linear, Bilinear, convolutions (also flattened after), BatchNorm, InstanceNorm, Embedding and PReLU.
    Inputs and outputs of the whole model are of one width.

    Args:
        models: E models of one class, which stay as they are.
        example: an input of the models, or a tuple of their arguments.  Each model is verified on it: its results, in
            eval mode, and in both modes that gradients of padding are 0.

    Returns:
        E new models, with the same shapes, dtypes, device and mode.

    Raises:
        TypeError: no list of modules.
        ValueError: widths that differ in other modules, of which LayerNorm, GroupNorm and RMSNorm would count padding
            and MultiheadAttention and recurrent layers hold several matrices in one; grouped convolutions other than
            depthwise; activations with f(0) != 0 on padded features (sigmoid, softplus), and all else that the
            verification finds; models that differ in more than widths.

    Example:
        >>> import torch, effens_kernels as ek
        >>> nn = torch.nn
        >>> models = [nn.Sequential(nn.Linear(8, w), nn.ReLU(), nn.Linear(w, 3)) for w in (16, 24, 5)]
        >>> x = torch.randn(32, 8)
        >>> ensemble = ek.stack(ek.ensembles.pad_widths(models, x))
        >>> torch.allclose(ensemble(x)[2], models[2](x), atol=1e-5)
        True
        >>> ek.ensembles.unpad_widths(ek.unstack(ensemble), models)[2][0]
        Linear(in_features=8, out_features=5, bias=True)
    """
    op = "pad_widths"
    _check_list(op, "models", models)
    inputs = example if isinstance(example, tuple) else (example,)
    shapes = _widest(op, models)
    padded = [_resized(model, shapes, _sizes(models)) for model in models]
    check_models(padded)
    for e, (own, wide) in enumerate(zip(models, padded)):
        _verify(f"models[{e}]", own, wide, inputs)
    return padded


def unpad_widths(models: Sequence[nn.Module], like: Sequence[nn.Module]) -> list[nn.Module]:
    """The way back from :func:`pad_widths`: models at their own widths, with the values that they have now.

    Args:
        models: padded models, as `ek.unstack` gives them after training.
        like: for each of them a model of its own widths, such as the one that was padded; no values are taken from it.

    Returns:
        New models, which share no memory with these.

    Raises:
        TypeError: no lists of modules.
        ValueError: lists of different lengths; models that are not of one architecture but for widths, or wider than
            the padded ones.

    Example:
        >>> import torch, effens_kernels as ek
        >>> models = [torch.nn.Sequential(torch.nn.Linear(8, w), torch.nn.Linear(w, 3)) for w in (16, 5)]
        >>> padded = ek.ensembles.pad_widths(models, torch.randn(2, 8))
        >>> torch.equal(ek.ensembles.unpad_widths(padded, models)[1][0].weight, models[1][0].weight)
        True
    """
    op = "unpad_widths"
    for argument, given in (("models", models), ("like", like)):
        _check_list(op, argument, given)
    if len(models) != len(like):
        reject(op, "like", f"{len(models)} models, one for each", f"{len(like)}")
    result = []
    for e, (wide, own) in enumerate(zip(models, like)):
        shapes, present = _shapes(own), _shapes(wide)
        if shapes.keys() != present.keys():
            reject(op, f"like[{e}]", f"of the architecture of models[{e}]", "a model with other parameters or buffers")
        for name, shape in shapes.items():
            if len(shape) != len(present[name]) or any(a > b for a, b in zip(shape, present[name])):
                reject(op, f"like[{e}].{_path(name)}", f"at most {list(present[name])}, as padded", str(list(shape)))
        result.append(_resized(wide, shapes, _sizes([own])))
    return result


def _check_list(op: str, argument: str, models: object) -> None:
    if not isinstance(models, (list, tuple, nn.ModuleList)) or not all(isinstance(m, nn.Module) for m in models):
        reject(op, argument, "a list of torch.nn.Modules", type(models).__name__, TypeError)
    if not len(models):
        reject(op, argument, "at least one model", "an empty list")


def _path(name: Name) -> str:
    return ".".join(part for part in name if part)


def _tensors(model: nn.Module) -> dict[Name, Tensor]:
    return {
        (path, name): tensor
        for path, module in model.named_modules(remove_duplicate=False)
        for kind in _STATE
        for name, tensor in getattr(module, kind).items()
        if tensor is not None
    }


def _shapes(model: nn.Module) -> dict[Name, torch.Size]:
    return {name: tensor.shape for name, tensor in _tensors(model).items()}


def _sizes(models: Sequence[nn.Module]) -> dict[tuple[str, str], int]:
    """The largest of each module's attributes that are sizes, by its path."""
    sizes: dict[tuple[str, str], int] = {}
    for model in models:
        for path, module in model.named_modules(remove_duplicate=False):
            names, _ = _SIZES.get(type(module), ((), 0))
            for name in names:
                sizes[path, name] = max(sizes.get((path, name), 0), getattr(module, name))
    return sizes


def _depthwise(module: nn.Module) -> bool:
    return getattr(module, "groups", 1) > 1 and module.groups == getattr(module, "in_channels", 0)


def _widest(op: str, models: Sequence[nn.Module]) -> dict[Name, torch.Size]:
    """The largest shape of each tensor, or an error where other than widths of known layers differ."""
    widest = _shapes(models[0])
    for e, model in enumerate(models):
        for name, shape in _shapes(model).items():
            first = widest.setdefault(name, shape)
            if shape == first:
                continue
            module = model.get_submodule(name[0])
            here = f"models[{e}].{_path(name)} ({type(module).__name__})"
            _, axes = _SIZES.get(type(module), ((), 0))
            if not axes:
                reject(op, here, "of one shape in all models", f"{list(shape)}, before it {list(first)}")
            if len(shape) != len(first) or shape[axes:] != first[axes:]:
                reject(op, here, f"of one shape after {axes} axes", f"{list(shape)}, before it {list(first)}")
            if getattr(module, "groups", 1) > 1 and not _depthwise(module):
                reject(op, here, "of one shape in all models, or depthwise", f"groups={module.groups}")
            widest[name] = torch.Size(map(max, shape, first))
    return widest


@torch.no_grad()
def _resized(model: nn.Module, shapes: dict[Name, torch.Size], sizes: dict[tuple[str, str], int]) -> nn.Module:
    """A copy with tensors of these shapes, cut or filled with zeros, and modules of these sizes."""
    targets = {id(tensor): (name[1], shapes[name]) for name, tensor in _tensors(model).items()}

    def values(tensor: Tensor) -> Tensor:
        name, shape = targets[id(tensor)]
        result = tensor.new_full(shape, 1 if name == "running_var" else 0)
        both = tuple(slice(min(sizes)) for sizes in zip(shape, tensor.shape))
        result[both] = tensor[both]
        return result

    result = copied(model, values)
    for path, module in result.named_modules(remove_duplicate=False):
        for name in _SIZES.get(type(module), ((), 0))[0]:
            setattr(module, name, sizes[path, name])
    return result


def _verify(here: str, own: nn.Module, wide: nn.Module, inputs: tuple) -> None:
    """Refuse a model that computes otherwise when padded, or whose padding training would change."""
    shapes = _shapes(own)
    devices = {tensor.device for tensor in own.parameters() if tensor.is_cuda}
    own, wide = copy.deepcopy(own).eval(), copy.deepcopy(wide)
    with torch.random.fork_rng(list(devices)):
        with torch.no_grad():
            expected = _results(own, inputs)
        for training in (False, True):
            found = _results(wide.train(training), inputs)
            if not training and not all(map(_close, found, expected)):
                reject("pad_widths", here, "the same model when padded", "one with other results (features mixed?)")
            found = [y for y in found if y.requires_grad]
            tensors = {name: tensor for name, tensor in _tensors(wide).items() if tensor.requires_grad}
            if not found or not tensors:
                continue
            cotangents = [torch.randn_like(y) for y in found]
            grads = torch.autograd.grad(found, list(tensors.values()), cotangents, allow_unused=True)
            for name, grad in zip(tensors, grads):
                if grad is not None and _outside(grad, shapes[name]):
                    expected_words = "without gradients of its padding"
                    got = "one with (an activation with f(0) != 0 on padded features?)"
                    reject("pad_widths", f"{here}.{_path(name)}", expected_words, got)


def _results(model: nn.Module, inputs: tuple) -> list[Tensor]:
    y = pytree.tree_leaves(model(*inputs))
    return [value for value in y if isinstance(value, Tensor)]


def _close(found: Tensor, expected: Tensor) -> bool:
    """What is wrong in principle is far from rounding."""
    if found.shape != expected.shape or not expected.is_floating_point():
        return found.shape == expected.shape and torch.equal(found, expected)
    tolerance = torch.finfo(found.dtype).eps ** 0.5
    scale = expected.abs().max().item() if expected.numel() else 0.0
    return torch.allclose(found, expected, rtol=0, atol=tolerance * scale, equal_nan=True)


def _outside(grad: Tensor, shape: torch.Size) -> bool:
    """Whether a gradient has anything outside of the model's own entries."""
    grad = grad.clone()
    grad[tuple(slice(size) for size in shape)] = 0
    return bool((grad != 0).any())
