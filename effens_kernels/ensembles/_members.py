"""What a member's own forward code runs as, when all members run it at once under torch.func.vmap.

A mode sees every call of PyTorch that the code makes, wherever it is made from, and sends those of RULES to ops that
take all members together.  Everything else is left to torch.func's own rules.

    F.linear                          grouped_linear, all members in one call, with the activation in an nn.Sequential
    F.conv1d ... conv_transpose3d     one convolution per member; rows of all members where they share the weight
    F.scaled_dot_product_attention    one attention on the rows of all members
    nn.MultiheadAttention             these two
    nn.LSTM, GRU, RNN                 one call per member
    F.embedding                       torch.func's rule, which does not know padding_idx
    norms, pooling, ...               torch.func's rules, all members in one call

What members share, tensors and parameters, meets PyTorch's own operations, once for all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import _dispatch
from ..ops import _member_calls
from ..ops._activations import ACTIVATIONS
from ..ops._checks import DTYPES, autocast
from ..ops._convolution import read, read_transposed
from ..ops.grouped_linear import grouped_linear
from ._levels import beneath, current_level, differs
from ._sequential import linear_activation


class Fused(TorchFunctionMode):
    """Calls of `members` members, of which gradients are wanted if `training`.

    With `shares`, dropout leaves what members share shared; otherwise it parts them.
    """

    def __init__(self, members: int, training: bool, shares: bool = False) -> None:
        super().__init__()
        self.members, self.training, self.shares = members, training, shares
        self.saving = _saving()
        self.level: int | None = None

    def __enter__(self) -> Fused:
        self.level = current_level() if self.level is None else self.level
        return super().__enter__()

    def calls_beneath(self, *tensors: Tensor) -> bool:
        """Whether members differ in all of these, and the members' own tensors may be taken: no vmap of theirs runs."""
        return self.level is not None and current_level() == self.level and all(differs(t, self.level) for t in tensors)

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        if self.saving != _saving():  # whatever the call: what it saves would be read when vmap is over
            raise RuntimeError(SAVING)
        rule = RULES.get(func)
        if torch.compiler.is_compiling() and getattr(func, "__name__", None) == "unflatten":
            rule = _unflatten  # torch.compile cannot trace this method beneath a mode, nor find it in a table
        return func(*args, **kwargs) if rule is None else rule(self, *args, **kwargs)


SAVING = "saved_tensors_hooks within a member"


def _saving() -> object:
    """Who takes what autograd saves; torch.utils.checkpoint does, to compute it again when vmap is long over."""
    return None if torch.compiler.is_compiling() else torch._C._autograd._top_saved_tensors_default_hooks(True)


def _suits(x: Tensor, *others: Tensor | None) -> bool:
    """Whether ops of this package take these tensors; PyTorch words what is wrong with them otherwise."""
    return x.dtype in DTYPES and all(t is None or (t.dtype == x.dtype and t.device == x.device) for t in others)


def _differs(*tensors: Tensor | None) -> bool:
    """Whether members differ in any of these."""
    return any(t is not None and torch._C._functorch.is_batchedtensor(t) for t in tensors)


def _linear(
    mode: Fused, input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    x, w, b = autocast(input, weight, bias)
    fits = w.dim() == 2 and x.dim() > 0 and x.shape[-1] == w.shape[1] and (b is None or b.shape == w.shape[:1])
    if not fits or not _suits(x, w, b) or not _differs(x, w, b):
        return ACTIVATIONS[activation].apply(F.linear(input, weight, bias))
    rows = x.unsqueeze(0) if x.dim() == 1 else x if x.dim() == 2 else x.flatten(0, -2)
    sizes = mode.members, rows.shape[0], w.shape[1], w.shape[0]
    problem = _dispatch.Problem("grouped_linear", x.device.type, x.dtype, sizes, x.device.index, mode.training)
    backend = _dispatch.select(problem)
    if mode.calls_beneath(w):
        shared_bias = not differs(b, mode.level)

        def linear(rows: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
            b = b.expand(mode.members, -1) if b is not None and shared_bias else b
            return grouped_linear(rows, w, b, activation=activation, backend=backend)

        y = beneath(mode.level, linear, rows, w, b)
    else:
        b = None if b is None else b.unsqueeze(0)
        y = grouped_linear(rows, w.unsqueeze(0), b, activation=activation, backend=backend).squeeze(0)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], w.shape[0])


def _convolution(
    plain: Callable,
    axes: int,
    mode: Fused,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: object = 1,
    padding: object = 0,
    dilation: object = 1,
    groups: int = 1,
) -> Tensor:
    x, w, b = autocast(input, weight, bias)
    if not _suits(x, w, b) or w.dim() != axes + 2 or x.dim() not in (axes + 1, axes + 2):
        return plain(input, weight, bias, stride, padding, dilation, groups)
    x, options = read(plain.__name__, x, w.shape[2:], stride, padding, dilation, groups)
    return _images(x, w, b, options, axes)


def _transposed(
    plain: Callable,
    axes: int,
    mode: Fused,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: object = 1,
    padding: object = 0,
    output_padding: object = 0,
    groups: int = 1,
    dilation: object = 1,
) -> Tensor:
    x, w, b = autocast(input, weight, bias)
    if not _suits(x, w, b) or w.dim() != axes + 2 or x.dim() not in (axes + 1, axes + 2):
        return plain(input, weight, bias, stride, padding, output_padding, groups, dilation)
    options = read_transposed(plain.__name__, axes, stride, padding, output_padding, groups, dilation)
    return _images(x, w, b, options, axes)


def _images(x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple, axes: int) -> Tensor:
    one = x.dim() == axes + 1
    y = _member_calls.convolution(x.unsqueeze(0) if one else x, weight, bias, *options)
    return y.squeeze(0) if one else y


def _attention(
    mode: Fused,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    plain = F.scaled_dot_product_attention
    if dropout_p > 0.0 and mode.shares and not _differs(query, key, value, attn_mask):
        return _dropped_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if dropout_p > 0.0:  # torch.func maps the composition that drops
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    q, k, v = autocast(query, key, value)
    return _member_calls.attention(q, k, v, attn_mask, is_causal, scale, enable_gqa)


def _dropped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool, scale: float | None, grouped: bool
) -> Tensor:
    """Attention that drops the same for all members."""
    if grouped:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask
    return _dropped(scores.softmax(-1), p) @ v


def _dropped(x: Tensor, p: float, axes: int = 0) -> Tensor:
    """Dropout, the same for all members and along the last axes."""
    part = x.detach()[(..., *(slice(0, 1),) * axes)]
    return x * _member_calls.shared_noise(part, p)


def _dropout(
    plain: Callable,
    axes: int | None,
    mode: Fused,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    *inplace: bool,
    **options: bool,
) -> Tensor:
    axes = input.dim() - 2 if axes is None else axes
    fits = axes == 0 or input.dim() == axes + 2
    if not mode.shares or not training or not 0.0 < p <= 1.0 or not fits or _differs(input):
        return plain(input, p, training, *inplace, **options)
    y = _dropped(input, p, axes)
    return input.copy_(y) if any((*inplace, *options.values())) else y


def _embedding(
    mode: Fused, input: Tensor, weight: Tensor, padding_idx: int | None = None, *more: object, **options: object
) -> Tensor:
    if padding_idx is None:
        return F.embedding(input, weight, None, *more, **options)
    # torch.func's rule lets gradients of padding through, for all members but the first (torch 2.13).
    y = F.embedding(input, weight, None, *more, **options)
    return torch.where((input == padding_idx % weight.shape[0]).unsqueeze(-1), y.detach(), y)


def _embedding_beneath(mode: Fused, weight: Tensor, input: Tensor, padding_idx: int = -1, *options: object) -> Tensor:
    """What F.embedding calls, which is all that torch.compile shows."""
    y = torch.embedding(weight, input, -1, *options)
    return y if padding_idx < 0 else torch.where((input == padding_idx).unsqueeze(-1), y.detach(), y)


def _norm(plain: Callable, mode: Fused, input: Tensor, *more: object, **options: object) -> Tensor:
    """Under autocast, input of 16 bits meets statistics and parameters of 32, which torch.func's rules do not take."""
    if plain in (F.group_norm, torch.group_norm):  # asks for a memory format, which torch.func has no answer to
        input = input.contiguous()
    dtypes = [t.dtype for t in (*more, *options.values()) if isinstance(t, Tensor) and t.is_floating_point()]
    if all(dtype == input.dtype for dtype in dtypes):
        return plain(input, *more, **options)
    wide = torch.promote_types(input.dtype, dtypes[0])
    return plain(input.to(wide), *more, **options).to(input.dtype)


def _pooled(mode: Fused, input: Tensor, output_size: object) -> Tensor:
    if output_size in (1, (1, 1), [1, 1]):  # what it is; torch.func loops over members where images are channels_last
        return input.mean((-2, -1), keepdim=True)
    return F.adaptive_avg_pool2d(input, output_size)


def _prelu(mode: Fused, input: Tensor, weight: Tensor) -> Tensor:
    return F.prelu(input, weight.to(input.dtype))


def _recurrent(kind: str, mode: Fused, x: Tensor, *arguments: object) -> object:
    if not isinstance(arguments[2], bool):  # a packed sequence
        return _member_calls.RECURRENT[kind](x, *arguments)
    state, weights, *options = arguments
    state = list(state) if kind == "lstm" else [state]
    return tuple(_member_calls.recurrent(kind, x, state, list(weights), *options))


def _seen_through(plain: Callable) -> Callable:
    """A Python function of torch.nn.functional whose inner calls a mode is to see; itself it must not ask for one."""
    names = {**vars(F), "has_torch_function": lambda tensors: False}
    function = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    function.__kwdefaults__ = plain.__kwdefaults__
    return function


_multi_head_attention = _seen_through(F.multi_head_attention_forward)


def _multi_head(mode: Fused, *args: object, **kwargs: object) -> object:
    with mode:
        return _multi_head_attention(*args, **kwargs)


def _unflatten(mode: Fused, tensor: Tensor, dim: int, sizes: object) -> Tensor:
    return torch.unflatten(tensor, dim, sizes)


RULES: dict[Callable, Callable] = {
    F.linear: _linear,
    linear_activation: _linear,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head,
    F.embedding: _embedding,
    F.prelu: _prelu,
    F.adaptive_avg_pool2d: _pooled,
    **{plain: partial(_dropout, plain, 0) for plain in (F.dropout, torch.dropout)},
    **{getattr(F, f"dropout{n}d"): partial(_dropout, getattr(F, f"dropout{n}d"), n) for n in (1, 2, 3)},
    torch.feature_dropout: partial(_dropout, torch.feature_dropout, None),
    **{
        plain: partial(_norm, plain)
        for name in ("batch_norm", "group_norm", "instance_norm")
        for plain in (getattr(F, name), getattr(torch, name))
    },
    torch.embedding: _embedding_beneath,
    **{getattr(F, f"conv{n}d"): partial(_convolution, getattr(F, f"conv{n}d"), n) for n in (1, 2, 3)},
    **{
        getattr(F, f"conv_transpose{n}d"): partial(_transposed, getattr(F, f"conv_transpose{n}d"), n) for n in (1, 2, 3)
    },
    **{function: partial(_recurrent, kind) for kind, function in _member_calls.RECURRENT.items()},
}


Settings = list[tuple[nn.Module, str, object]]


def without_fast_paths(model: nn.Module) -> Settings:
    """What keeps torch.nn from kernels that run one member; in eager code it is enough that there is a mode."""
    settings: Settings = []
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            settings.append((module, "use_nested_tensor", False))
        elif isinstance(module, nn.TransformerEncoderLayer):
            settings.append((module, "activation_relu_or_gelu", 0))
        elif isinstance(module, nn.MultiheadAttention) and not module.training:
            settings += [(module, "dropout", 0.0), (module, "training", True)]
    return settings


def assign(settings: Settings) -> Settings:
    """Assign to modules' attributes; returns what undoes it."""
    before = [(module, name, getattr(module, name)) for module, name, _ in settings]
    for module, name, value in settings:
        setattr(module, name, value)
    return before


# --------------------------------------------------------------------------------------------------------- errors

# What PyTorch says (a part of it), and why that is.
REASONS = (
    (".item()", "a tensor that differs between members becomes one Python number there"),
    ("data-dependent control flow", "which way the code goes would depend on the values of each member"),
    ("data pointer of Tensor", "values are taken out of PyTorch there (numpy, tolist)"),
    ("dynamic shape", "the shape of the result would depend on the values of each member"),
    (
        "vmapped over but `self` not being vmapped over",
        "it writes values of each member into a tensor that all members share",
    ),
    ("which will be updated in place", "it updates running statistics that all members share"),
    (
        "doesn't match the broadcast shape",
        "it writes values of each member into a tensor that all members share, or shapes do not fit",
    ),
    (
        "must override the setup_context staticmethod",
        "an autograd.Function there (torch.utils.checkpoint is one) "
        "has no rule for torch.func.vmap; a checkpoint goes around the whole ensemble",
    ),
    (
        SAVING,
        "torch.utils.checkpoint there would compute again after torch.func.vmap is over; a checkpoint goes around the "
        "whole ensemble",
    ),
    ("memory_format", "torch.func knows one memory format there (x.to(memory_format=...) can be mapped)"),
    ("Batching rule not implemented", "torch.func has no rule to run this operation for all members"),
)


def explained(error: RuntimeError, member: nn.Module, op: str) -> RuntimeError:
    """The error with the path of the module in which it happened, and why."""
    said = str(error).splitlines()[0] if str(error) else repr(error)
    reason = next((why for part, why in REASONS if part in str(error)), None)
    words = f"cannot run for all members at once, since {reason}" if reason else "failed"
    return RuntimeError(f"{op}: {_place(error, member)} {words} (PyTorch: {said})")


def _place(error: BaseException, member: nn.Module) -> str:
    paths = {id(module): path for path, module in member.named_modules()}
    found = member
    trace = error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in paths:
            found = owner
        trace = trace.tb_next
    path = paths[id(found)]
    kind = found._get_name()  # as its repr says: a stand-in for a class of torch.nn has that one's
    return f"{path} ({kind})" if path else f"the model's forward ({kind})"
