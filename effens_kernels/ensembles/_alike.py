"""Whether models are members of one ensemble: one architecture, which differ in parameters and buffers alone."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin
from torch.nn.utils.parametrize import type_before_parametrizations

from ..ops._checks import reject
from ._dropout import OWN

# Of every module; what they hold is compared by itself, or is no part of the computation.
_OWN = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_SCALARS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type)


def check_models(models: Sequence[nn.Module]) -> None:
    """Refuse, with its path, the first thing that keeps models from being members of one ensemble."""
    if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
        reject("stack", "models", "a list of torch.nn.Modules", f"one {type(models).__name__}", TypeError)
    if not isinstance(models, (list, tuple, nn.ModuleList)):
        reject("stack", "models", "a list of torch.nn.Modules", type(models).__name__, TypeError)
    if not len(models):
        reject("stack", "models", "at least one model", "an empty list")
    for e, model in enumerate(models):
        if not isinstance(model, nn.Module):
            reject("stack", f"models[{e}]", "a torch.nn.Module", type(model).__name__, TypeError)
    seen: dict[int, str] = {}
    for e, model in enumerate(models):
        check_one("stack", f"models[{e}]", model)
        own: dict[int, str] = {}
        for name, tensor in _state(model):
            path = f"models[{e}].{name}"
            if id(tensor) in seen:
                reject("stack", path, "the model's own", f"the object that is {seen[id(tensor)]}")
            own.setdefault(id(tensor), path)
        seen |= own
    if not seen:
        reject("stack", "models", "with parameters or buffers", "models without")
    for e, model in enumerate(models[1:], 1):
        Comparison(models[0], model, e).run()


def _state(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def check_one(op: str, path: str, model: nn.Module) -> None:
    """What no model may have."""
    for name, tensor in _state(model):
        if isinstance(tensor, UninitializedTensorMixin):
            reject(op, f"{path}.{name}", "initialized (run a lazy module once)", type(tensor).__name__)
    registered = {id(module) for module in model.modules()} | {id(tensor) for _, tensor in _state(model)}
    for at, module in model.named_modules():
        here = f"{path}.{at}" if at else path
        kind = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            reject(op, here, "a Python module", f"{kind}, a TorchScript one")
        if isinstance(vars(module).get("_plain"), nn.Module):
            reject(op, here, "a plain module", kind)
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            reject(op, here, "a plain module", f"{kind} ({op} its .module, and wrap the ensemble)")
        if hasattr(module, "_orig_mod"):
            reject(op, here, "a module that is not compiled", f"{kind} ({op} its ._orig_mod, compile the ensemble)")
        if any(getattr(module, hooks) for hooks in _HOOKS):
            reject(op, here, "without hooks, which would see all members at once", f"{kind} with hooks")
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            reject(op, here, "without extra state, which cannot be stacked", f"{kind} with get_extra_state")
        for name, value in vars(module).items():
            if name not in _OWN:
                _refuse_hidden(op, f"{here}.{name}", value, registered)
    for name, tensor in _state(model):
        here = f"{path}.{name}"
        if tensor.is_quantized or tensor.layout is not torch.strided:
            what = "a quantized tensor" if tensor.is_quantized else f"layout {tensor.layout}"
            reject(op, here, "a dense (strided) tensor", what)
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            reject(op, here, "a plain tensor", f"a {type(tensor).__name__}")


def _refuse_hidden(op: str, path: str, value: object, registered: set[int], depth: int = 0) -> None:
    """Modules and parameters that PyTorch does not know of would be those of the first model for all members."""
    if isinstance(value, (nn.Module, nn.Parameter)) and id(value) not in registered:
        reject(
            op,
            path,
            "registered (nn.ModuleList, nn.ParameterList)",
            f"{type(value).__name__} in a plain attribute",
        )
    if isinstance(value, torch.ScriptObject):
        reject(op, path, "a Python object", "a TorchScript object (a quantized module's weight?)")
    if isinstance(value, Tensor) and id(value) not in registered and value.grad_fn is not None:
        reject(op, path, "a leaf (a result of an earlier forward?)", "a tensor with a grad_fn")
    if depth < 8 and isinstance(value, (list, tuple, set, dict)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_hidden(op, f"{path}[{key!r}]", part, registered, depth + 1)


class Comparison:
    """Of models[e] with models[0]."""

    def __init__(self, first: nn.Module, other: nn.Module, e: int) -> None:
        self.first, self.other, self.e = first, other, e
        self.pairs: set[tuple[int, int]] = set()  # of objects that are being compared, which may refer to each other

    def differ(self, path: str, other: object, first: object) -> NoReturn:
        here = f"models[{self.e}]" + (f".{path}" if path else "")
        raise ValueError(f"stack: models should be of one architecture, got {here}: {other}, in models[0] {first}")

    def run(self) -> None:
        first = dict(self.first.named_modules(remove_duplicate=False))
        other = dict(self.other.named_modules(remove_duplicate=False))
        for path, module in first.items():
            if path not in other:
                self.differ(path, "no such module", type(module).__name__)
            a, b = (type_before_parametrizations(m) for m in (module, other[path]))
            if a is not b:
                self.differ(path, *_names(b, a))
        for path in other:
            if path not in first:
                self.differ(path, type(other[path]).__name__, "no such module")
        self._objects([*first.items()], [*other.items()], "module")
        for path, module in first.items():
            self._tensors(path, module, other[path])
        self._objects(_state(self.first), _state(self.other), "tensor")
        for path, module in first.items():
            for name in sorted(vars(module).keys() | vars(other[path]).keys()):
                if name not in _OWN and not (name == "p" and type(module) in OWN):  # each member's own
                    here = f"{path}.{name}" if path else name
                    missing = object()
                    a, b = (vars(m).get(name, missing) for m in (module, other[path]))
                    if a is missing or b is missing:
                        self.differ(here, *("missing" if v is missing else _shown(v) for v in (b, a)))
                    if not self.same(a, b):
                        self.differ(here, *_told_apart(b, a))

    def _tensors(self, path: str, first: nn.Module, other: nn.Module) -> None:
        for kind in ("_parameters", "_buffers"):
            a, b = getattr(first, kind), getattr(other, kind)
            for name in [*a, *(name for name in b if name not in a)]:
                here = f"{path}.{name}" if path else name
                told = [_told(d[name]) if name in d else "missing" for d in (b, a)]
                if told[0] != told[1]:
                    self.differ(here, *told)
        if first._non_persistent_buffers_set != other._non_persistent_buffers_set:
            shown = (f"non-persistent buffers {sorted(m._non_persistent_buffers_set)}" for m in (other, first))
            self.differ(path, *shown)

    def _objects(self, first: list[tuple[str, object]], other: list[tuple[str, object]], what: str) -> None:
        """One object under several names is one in every model."""
        names = [{}, {}]
        for (path, a), (_, b) in zip(first, other):
            ties = [named.setdefault(id(o), path) for named, o in zip(names, (a, b))]
            if ties[0] != ties[1]:
                told = [f"the {what} at {tie}" if tie != path else f"a {what} of its own" for tie in ties]
                self.differ(path, told[1], told[0])

    def same(self, a: object, b: object) -> bool:
        """Whether what modules have besides tensors and modules computes the same."""
        if a is b or (id(a), id(b)) in self.pairs:
            return True
        if isinstance(a, nn.Module) and isinstance(b, nn.Module):  # registered ones, compared by themselves
            return True
        if type(a) is not type(b):
            return False
        if isinstance(a, Tensor):
            return _told(a) == _told(b) and (isinstance(a, nn.Parameter) or torch.equal(a, b))
        if isinstance(a, _SCALARS):
            return a == b or (a != a and b != b)
        self.pairs.add((id(a), id(b)))
        if isinstance(a, dict):
            return list(a) == list(b) and all(self.same(a[k], b[k]) for k in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(self.same, a, b))
        if isinstance(a, FunctionType):
            cells = ([c.cell_contents for c in f.__closure__ or ()] for f in (a, b))
            parts = ((f.__defaults__, f.__kwdefaults__) for f in (a, b))
            return a.__code__ == b.__code__ and self.same(*parts) and self.same(*cells)
        if isinstance(a, MethodType):
            return self.same(a.__func__, b.__func__) and self.same(a.__self__, b.__self__)
        if isinstance(a, weakref.ref):
            return self.same(a(), b())
        if isinstance(a, partial):
            return self.same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
        if type(a).__eq__ is not object.__eq__:
            return _equal(a, b)
        return hasattr(a, "__dict__") and self.same(vars(a), vars(b))


def _equal(a: object, b: object) -> bool:
    if hasattr(a, "shape") and hasattr(a, "dtype"):  # arrays, which compare element by element
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    return bool(a == b)


def _told(tensor: Tensor | None) -> str:
    """What parameters and buffers of one name have in common."""
    if tensor is None:
        return "None"
    dtype = str(tensor.dtype).removeprefix("torch.")
    frozen = " without requires_grad" if isinstance(tensor, nn.Parameter) and not tensor.requires_grad else ""
    return f"{dtype}{list(tensor.shape)} on {tensor.device}{frozen}"


def _shown(value: object) -> str:
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # addresses tell nobody what differs
    return text if len(text) <= 60 else f"{text[:57]}..."


def _told_apart(b: object, a: object) -> tuple[str, str]:
    shown = _shown(b), _shown(a)
    return shown if shown[0] != shown[1] else ("one that differs", shown[1])


def _names(b: type, a: type) -> tuple[str, str]:
    if b.__name__ != a.__name__:
        return b.__name__, a.__name__
    return f"{b.__module__}.{b.__qualname__} ({id(b):#x})", f"{a.__module__}.{a.__qualname__} ({id(a):#x})"
