"""One linear op of the package: its schemas, shape rules and derivatives, over the fwd and bwd of any kernel backend.

    z = F(factors) + bias,    y = a(z)        F linear in each of its factors: (x, weight), (x, weight, r, s), ...

Each backend's module has

    fwd(*factors, bias, activation, save_preactivation) -> (y, z)
    bwd(grad, *factors, saved, activation, *need) -> the gradients of the factors and of the bias, in this order

where bias is [E, O] or None, `saved` is what a' is a function of (see `_activations`): y, z, or an empty tensor, and an
empty tensor stands in place of what is not needed.  As F is linear in each factor, second derivatives are again fwd
and bwd, with one factor replaced at a time.

fwd may return more tensors than y and z: what bwd would have to compute again.  Eager calls keep them, and give them to
bwd as its last arguments; without them it computes.

Where integers say which matrices meet (`indexed_linear`, `ragged_linear`), these `indices` follow the factors in both,
and have no gradient.  The factors are then x and weight, both with I last, and weight [E, O, I] says what E is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ._activations import ACTIVATIONS, saves_preactivation
from ._backend_modules import MODULES
from ._registration import is_plain_eager, needs_grad, register, register_derivative


class LinearForm:
    """`factors` are the names of F's arguments, the first of them x; `result` gives the shape of y from the operands.

    Operands are the factors and then the indices.
    """

    def __init__(
        self, name: str, factors: tuple[str, ...], result: Callable[..., tuple[int, ...]], indices: tuple[str, ...] = ()
    ) -> None:
        self.name, self.factors, self.indices, self.result = name, factors, indices, result
        self.operand_count = len(factors) + len(indices)
        self._kernels: dict[str, ModuleType] = {}
        tensors = ", ".join(f"Tensor {operand}" for operand in (*factors, *indices))
        needs = ", ".join(f"bool need_{factor}" for factor in (*factors, "bias"))
        grads = ", ".join(f"Tensor grad_{factor}" for factor in (*factors, "bias"))
        self.fwd_op = register(
            f"{name}_fwd({tensors}, Tensor? bias, str? activation, bool save_preactivation, str backend) -> "
            "(Tensor y, Tensor z)",
            lambda *arguments: self.kernels(arguments[-1]).fwd(*arguments[:-1])[:2],
            self._fake_fwd,
        )
        self.bwd_op = register(
            f"{name}_bwd(Tensor grad, {tensors}, Tensor saved, str? activation, {needs}, str backend) -> ({grads})",
            lambda *arguments: self.kernels(arguments[-1]).bwd(*arguments[:-1]),
            self._fake_bwd,
        )
        register_derivative(self.fwd_op, self._fwd_setup, self._fwd_derivative)
        register_derivative(self.bwd_op, self._bwd_setup, self._bwd_derivative)
        self.function = _eager_function(self)

    def kernels(self, backend: str) -> ModuleType:
        """The module whose fwd and bwd run on `backend`, imported at first use, since Triton takes long to import."""
        module = self._kernels.get(backend)
        if module is None:
            module = importlib.import_module(f".{self.name}.{MODULES[backend]}", __package__)
            self._kernels[backend] = module
        return module

    def apply(self, backend: str, activation: str | None, *tensors: Tensor | None) -> Tensor:
        """y of the factors and the bias, which have been checked."""
        if is_plain_eager(*tensors):
            return self.apply_plain(backend, activation, *tensors)
        save = saves_preactivation(activation) and needs_grad(*tensors)
        return self.fwd_op(*tensors, activation, save, backend)[0]

    def apply_plain(self, backend: str, activation: str | None, *tensors: Tensor | None) -> Tensor:
        """On plain tensors (see `is_plain_eager`)."""
        if needs_grad(*tensors):
            outputs = self.function.apply(backend, activation, *tensors)
            return outputs[0] if saves_preactivation(activation) else outputs
        return self.kernels(backend).fwd(*tensors, activation, False)[0]

    # ---------------------------------------------------------------------------------------------- shape rules

    def _fake_fwd(self, *arguments):
        *operands, _, _, save_preactivation, _ = arguments
        shape = self.result(*operands)
        return operands[0].new_empty(shape), operands[0].new_empty(shape if save_preactivation else 0)

    def _fake_bwd(self, grad, *arguments):
        operands, need = arguments[: self.operand_count], arguments[self.operand_count + 2 : -1]
        x, *factors = operands[: len(self.factors)]
        members, *_, outputs = factors[0].shape[:2] if self.indices else self.result(*operands)
        grads = torch.empty_like(x), *(f.new_empty(f.shape) for f in factors), x.new_empty((members, outputs))
        return tuple(g if n else _empty(x) for g, n in zip(grads, need))

    # ---------------------------------------------------------------------------------------------- derivatives

    def derivative(self, ctx, grad_y, grad_z, operands, saved, need):
        """Gradients of the operands, which indices have none of, and the bias; ctx has `activation` and `backend`.

        grad_z arrives only in second derivatives, where bwd_op was a function of z.
        """
        count = len(self.factors)
        need = *need[:count], need[-1]
        grads = (None,) * len(need)
        for grad, activation, extra in ((grad_y, ctx.activation, saved), (grad_z, None, ())):
            if grad is None:
                continue
            arguments = (grad, *operands, *(extra or (_empty(operands[0]),)), activation, *need)
            if torch.is_grad_enabled() or not is_plain_eager(grad, *operands):  # the op that records its own derivative
                more = self.bwd_op(*arguments, ctx.backend)
            else:
                more = self.kernels(ctx.backend).bwd(*arguments)
            grads = tuple((m if g is None else g + m) if n else None for g, m, n in zip(grads, more, need))
        return *grads[:count], *((None,) * len(self.indices)), grads[-1]

    def _fwd_setup(self, ctx, inputs, output):
        *operands, bias, ctx.activation, save_preactivation, ctx.backend = inputs
        ctx.recompute = saves_preactivation(ctx.activation) and not save_preactivation
        ctx.save_for_backward(*operands, *((bias,) if ctx.recompute else _saved(ctx.activation, *output)))
        ctx.set_materialize_grads(False)

    def _fwd_derivative(self, ctx, grad_y, grad_z):
        tensors = ctx.saved_tensors  # once: torch.utils.checkpoint gives them a single time
        operands, saved = tensors[: self.operand_count], tensors[self.operand_count :]
        if ctx.recompute:
            saved = [self.fwd_op(*operands, *saved, None, False, ctx.backend)[0]]
        if grad_z is not None and grad_z.numel() == 0:
            grad_z = None
        need = ctx.needs_input_grad[: self.operand_count + 1]
        return *self.derivative(ctx, grad_y, grad_z, operands, saved, need), None, None, None

    def _bwd_setup(self, ctx, inputs, output):
        ctx.save_for_backward(*inputs[: self.operand_count + 2])
        ctx.activation, *ctx.need, ctx.backend = inputs[self.operand_count + 2 :]
        ctx.set_materialize_grads(False)

    def _bwd_derivative(self, ctx, *directions):
        """Of L2 = sum of directions . gradients, which is g . v with v = dF(directions) + direction of the bias."""
        count = len(self.factors)
        grad, *operands, saved = ctx.saved_tensors
        factors, indices = operands[:count], operands[count:]
        *directions, dbias = (d if n else None for d, n in zip(directions, ctx.need))
        need_factors = ctx.needs_input_grad[1 : count + 1]
        activation = ACTIVATIONS[ctx.activation]
        slope = activation.slope(saved) if saved.numel() else None
        g = grad if slope is None else grad * slope

        terms, grads = [], [None] * count
        for i, direction in enumerate(directions):
            if direction is None:
                continue
            moved = (*factors[:i], direction, *factors[i + 1 :], *indices)
            terms.append(self.fwd_op(*moved, None if terms else dbias, None, False, ctx.backend)[0])
            need = [n and j != i for j, n in enumerate(need_factors)]
            if any(need):
                more = self.bwd_op(g, *moved, _empty(grad), None, *need, False, ctx.backend)
                grads = [(m if h is None else h + m) if n else h for h, m, n in zip(grads, more, need)]
        if not terms and dbias is not None:
            terms.append(self._spread(dbias, factors, indices, grad, ctx.backend))
        if not terms:
            return (None,) * (count + self.operand_count + 5)
        v = sum(terms[1:], terms[0])
        grad_saved = None if slope is None else v * grad * activation.curvature(saved)
        nothing = (None,) * len(indices)
        return v if slope is None else v * slope, *grads, *nothing, grad_saved, *((None,) * (count + 3))

    def _spread(self, bias, factors, indices, y, backend):
        """The bias alone, over all of y: where indices say where it goes, what F makes of no inputs."""
        if not indices:
            return bias[:, None, :].expand_as(y)
        return self.fwd_op(*(f[..., :0] for f in factors), *indices, bias, None, False, backend)[0]


def _eager_function(form: LinearForm) -> type[torch.autograd.Function]:
    """The eager route: ctx style, which costs a quarter of a registered rule per call.

    Where the derivative needs z, z is a second output, so that second derivatives see what it depends on.
    """
    count, operand_count = len(form.factors), form.operand_count
    no_index = (None,) * len(form.indices)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, backend, activation, *tensors):
            save_preactivation = saves_preactivation(activation)
            y, z, *more = form.kernels(backend).fwd(*tensors, activation, save_preactivation)
            ctx.save_for_backward(*tensors[:operand_count], *more, *_saved(activation, y, z))
            ctx.set_materialize_grads(False)
            ctx.activation, ctx.backend, ctx.more = activation, backend, len(more)
            return (y, z) if save_preactivation else y

        @staticmethod
        def backward(ctx, grad_y, grad_z=None):
            tensors = ctx.saved_tensors
            end = operand_count + ctx.more
            operands, more, saved = tensors[:operand_count], tensors[operand_count:end], tensors[end:]
            need = ctx.needs_input_grad[2:]
            if grad_z is None and grad_y is not None and not torch.is_grad_enabled() and is_plain_eager(grad_y):
                saved = saved or tensors[:1]  # where nothing is saved, `saved` is not read
                need = *need[:count], need[-1]
                grads = form.kernels(ctx.backend).bwd(grad_y, *operands, *saved, ctx.activation, *need, *more)
                grads = [g if n else None for g, n in zip(grads, need)]
                return None, None, *grads[:count], *no_index, grads[-1]
            return None, None, *form.derivative(ctx, grad_y, grad_z, operands, saved, need)

    Function.__name__ = Function.__qualname__ = "".join(part.title() for part in form.name.split("_"))
    return Function


def _saved(activation: str | None, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    saves = ACTIVATIONS[activation].saves
    return () if saves == "nothing" else (y,) if saves == "output" else (z,)


def _empty(like: Tensor) -> Tensor:
    return like.new_empty(0)
