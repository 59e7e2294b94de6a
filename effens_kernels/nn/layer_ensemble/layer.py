"""One layer of options: its modules as stages, and how the prefixes that end in it are computed from those before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ...ops._checks import reject
from .._fusing import fused_name
from .._layout import has_hooks
from .construction import sequential
from .prefix_tree import Level, Places, Run
from .stages import BatchNorm, Convolution, Each, LayerNorm, Linear, Plain, Stage, softmax_of_rows

# Without gradients, options that are computed one by one take so many bytes of images at a time: results go where they
# belong while they are in cache, and what lies between the stages of an option stays small.
BLOCK_BYTES = 2 * 2**20


class Layer(nn.ModuleList):
    """K options: a list of stages, one for each module of an option.

    Options that are made of different modules are one stage, `Each`.
    """

    def __init__(self, options: Sequence[nn.Module]) -> None:
        stages = stages_of(options)
        super().__init__(stages)
        self.num_options = len(options)
        # How many come before the first that has parameters: these are the same for all options.
        self._leading = next((n for n, stage in enumerate(stages) if not isinstance(stage, Plain)), len(stages))

    @property
    def batched(self) -> bool:
        """Whether all options are computed in one call of each stage, and not one by one."""
        return all(stage.batched for stage in list(self._modules.values())[self._leading :])

    def forward(self, held: list[Tensor], level: Level, onward: Sequence[Layer] = ()) -> Tensor:
        """[U, B, ...] from x [P, B, ...], the only element of `held`, which is taken out to be freed on the way.

        `onward`: layers that each prefix goes on to by an option of the same number, as options come one by one.
        """
        stages = list(self._modules.values())
        rest = stages[self._leading :] + [stage for layer in onward for stage in layer]
        x = held.pop()
        fresh = False
        for stage in stages[: self._leading]:  # once for each prefix before
            x = stage.of_each(x, None, fresh)
            fresh = _is_new(stage)
        held.append(x)
        del x
        return (_together if self.batched else _option_by_option)(held, level, rest)

    def plain(self, k: int) -> nn.Module:
        modules = [module for stage in self for module in stage.plain(k)]
        return modules[0] if len(modules) == 1 else sequential(modules, self.training)


def spans(layers: Iterable[Layer], levels: Iterable[Level]) -> list[tuple[Layer, Level, list[Layer]]]:
    """Each layer with its level, and the layers after it that one option at a time can go on to without a gathering.

    In a Deep Ensemble of convolutions that is the whole network, member by member.
    """
    found: list[tuple[Layer, Level, list[Layer]]] = []
    before: Level | None = None
    for layer, level in zip(layers, levels):
        goes_on = before is not None and before.is_diagonal and level.is_step and level.is_diagonal
        if goes_on and not layer.batched and not found[-1][0].batched:
            found[-1][2].append(layer)
        else:
            found.append((layer, level, []))
        before = level
    return found


def _together(held: list[Tensor], level: Level, stages: list[Stage]) -> Tensor:
    """All prefixes in one call of each stage."""
    x = held.pop()
    if stages and isinstance(stages[0], Linear):
        x, stages, fresh = stages[0].onward(x, level), stages[1:], True
    else:
        fresh = not level.is_step
        x = x if level.is_step else x.index_select(0, level.parent)
    for stage in stages:
        x = stage.of_each(x, level.option, fresh)
        fresh = fresh or _is_new(stage)
    return x


def _option_by_option(held: list[Tensor], level: Level, stages: list[Stage]) -> Tensor:
    x = held.pop()
    size = x.shape[1]
    keeps = torch.is_grad_enabled()
    apart = [stage.apart() for stage in stages]
    parts: list[Tensor] = []
    result: Tensor | None = None
    for run in level.runs:
        for parents, places, count in [(run.parents, run.places, run.count)] if keeps else _blocks(run, x, stages):
            rows = (x[parents] if isinstance(parents, slice) else x.index_select(0, parents)).flatten(0, 1)
            fresh = not isinstance(parents, slice)
            for stage, values in zip(stages, apart):
                rows = stage.of_one(rows, run.option, values[run.option], count, fresh)
                fresh = fresh or _is_new(stage)
            if rows.dim() == 0 or rows.shape[0] != count * size:
                reject(
                    "LayerEnsemble", "an option's result", f"[{count * size}, ...], a row for each of its input", rows
                )
            if count == level.size:
                return rows.unflatten(0, (count, size))
            if keeps:
                parts.append(rows)
                continue
            if result is None:
                result = _empty(level.size, size, rows)
            elif rows.shape[1:] != result.shape[2:]:
                reject("LayerEnsemble", "an option's result", f"{list(result.shape[2:])} like the others", rows[0])
            result[places] = rows.unflatten(0, (count, size))
            del rows
    if result is not None:
        return result
    if any(part.shape[1:] != parts[0].shape[1:] for part in parts):
        shapes = " and ".join(sorted({str(list(part.shape[1:])) for part in parts}))
        reject("LayerEnsemble", "results of the options", "of one shape", shapes)
    y = torch.cat(parts).unflatten(0, (level.size, size))  # of rows, which keeps channels_last
    return y if level.order is None else y.index_select(0, level.order)


def _blocks(run: Run, x: Tensor, stages: list[Stage]) -> Iterator[tuple[Places, Places, int]]:
    """Parts of a run of about BLOCK_BYTES; whole on a GPU, where memory is filled by many rows at once."""
    widest = x[0].numel()
    for stage in stages:
        if isinstance(stage, Convolution):
            widest = max(widest, widest // stage.template.in_channels * stage.template.out_channels)
            break
    step = run.count if x.is_cuda else max(1, BLOCK_BYTES // max(1, widest * x.element_size()))
    for begin in range(0, run.count, step):
        end = min(begin + step, run.count)
        yield _part(run.parents, begin, end), _part(run.places, begin, end), end - begin


def _part(places: Places, begin: int, end: int) -> Places:
    if not isinstance(places, slice):
        return places[begin:end]
    step = places.step
    return slice(places.start + begin * step, places.start + (end - 1) * step + 1, step)


def _empty(prefixes: int, size: int, rows: Tensor) -> Tensor:
    """[prefixes, size, ...] for rows [n, ...], in their memory format."""
    images = rows.dim() == 4 and not rows.is_contiguous() and rows.is_contiguous(memory_format=torch.channels_last)
    how = torch.channels_last if images else torch.contiguous_format
    shape = prefixes * size, *rows.shape[1:]
    return torch.empty(shape, dtype=rows.dtype, device=rows.device, memory_format=how).unflatten(0, (prefixes, size))


def _is_new(stage: Stage) -> bool:
    """Whether its result surely has memory of its own; that of Flatten, Identity, Dropout, ... may be its input's."""
    return isinstance(stage, (Linear, Convolution, BatchNorm, LayerNorm))


# --------------------------------------------------------------------------------------------- from modules to stages


def stages_of(options: Sequence[nn.Module]) -> list[Stage]:
    pieces = [_pieces(option) for option in options]
    kinds = [[_kind(piece) for piece in of_option] for of_option in pieces]
    same = all(
        len(of_option) == len(pieces[0]) and all(a is b for a, b in zip(of_kind, kinds[0]))
        for of_option, of_kind in zip(pieces, kinds)
    )
    columns = list(zip(*pieces))
    if not same or any(k is not Each and not _alike(column) for k, column in zip(kinds[0], columns)):
        return [Each(options)]
    stages: list[Stage] = []
    n = 0
    while n < len(columns):
        kind, column = kinds[0][n], columns[n]
        n += 1
        if kind is Linear:
            activation = fused_name(columns[n][0]) if n < len(columns) and kinds[0][n] is Plain else None
            n += activation is not None
            stages.append(Linear(column, activation))
        else:
            stages.append(kind(column))
    return stages


def _pieces(option: nn.Module) -> list[nn.Module]:
    if type(option) is nn.Sequential and not has_hooks(option):
        return [piece for module in option for piece in _pieces(module)]
    return [option]


def _kind(module: nn.Module) -> type[Stage]:
    kind = type(module)
    if has_hooks(module) or not kind.__module__.startswith("torch.nn.modules."):
        return Each
    if kind is nn.Linear:
        return Linear
    if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd) and "Lazy" not in kind.__name__:
        return Convolution
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return BatchNorm
    if kind is nn.LayerNorm:
        return LayerNorm
    mixes = isinstance(module, _BatchNorm) or softmax_of_rows(module)
    has_state = any(True for _ in module.parameters()) or any(True for _ in module.buffers())
    return Each if mixes or has_state or any(True for _ in module.children()) else Plain


def _alike(modules: Sequence[nn.Module]) -> bool:
    """One type, the same options, and parameters that can be stacked."""

    def about(module: nn.Module) -> tuple[object, ...]:
        public = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        state = [
            (name, t.shape, t.dtype, t.device, t.requires_grad)
            for name, t in (*module.named_parameters(), *module.named_buffers())
        ]
        return type(module), public, state

    return all(about(module) == about(modules[0]) for module in modules)
