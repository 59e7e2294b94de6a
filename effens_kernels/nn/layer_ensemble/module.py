"""LayerEnsemble: a network with options for each layer, run along any set of paths, each shared prefix once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor, nn

from ...ops._checks import reject
from .._layout import positive
from . import paths
from .construction import check_chain, fresh_copy, layers_of, options_per_layer, read_layers, sequential
from .layer import Layer, spans
from .prefix_tree import PrefixTree, TreeCache

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class LayerEnsemble(nn.Module):
    r"""A network whose layers have options: a path chooses one for each layer, and is one network of the ensemble.

    .. math:: y_s = \mathrm{LE}_N^{(s_N)}\bigl(\dots \mathrm{LE}_1^{(s_1)}(x)\bigr), \qquad 0 \le s_q < K_q

    Oleksienko and Iosifidis 2022, "Layer Ensembles", equation 1.  Paths that agree in their first layers share these:
    whatever set of paths is run, each prefix is computed once, layer by layer, all prefixes of a layer in one call
    (Linear) or one call for each option (convolutions).  Without gradients a layer's outputs are freed as soon as the
    next layer's are there.  `docs/layer-ensembles.md` has the details.

    Args:
        layers: for each layer its options, a sequence of modules, or a single module, which all paths share (K = 1).
            An option may be a `torch.nn.Sequential` of several.  Modules are copied.
        samples: `[S, N]`, the paths that are run when `forward` is given none.
        prior_scale: adds the output of an untrained twin of other random weights, times this number, to each path's
            (Osband et al. 2018, "Randomized Prior Functions").  The twin takes the same paths, is never trained (its
            values are buffers, and it stays in evaluation mode), and is saved with the state.

    Parameters of Linear, convolution, BatchNorm and LayerNorm options are stacked, `layers.0.0.weight` `[K, O, I]` for
    the first module of the first layer's options; activations, pooling, Flatten, Dropout and other modules of torch.nn
    without parameters are shared by the options.  Options that are no such modules, or are made of different ones, stay
    modules of their own, `layers.0.0.options.0.weight`, called one after the other; they have to treat rows
    independently (BatchNorm inside them is called once per prefix).

    `forward(input, samples=None)`: `input` `[B, ...]` is seen by all paths; `samples` `[S, N]` are integers (or what
    :meth:`tree` made of them), in any order and with repetitions.  The result is `[S, B, ...]` in their order.

    While training, BatchNorm takes the statistics of each prefix's own rows, as every path would alone; an option's
    running statistics are updated once for each prefix that ends in it, in the order of :class:`PrefixTree`.  Dropout
    draws once for each prefix, not for each path.

    Raises:
        TypeError: layers that are no modules; samples that are no tensor of integers.
        ValueError: no layers or no options; layers whose sizes do not chain; no samples, samples of another number of
            layers, or an option out of range (with its path and layer).

    Example:
        >>> import torch, effens_kernels as ek
        >>> from torch import nn
        >>> hidden = [nn.Sequential(nn.Linear(8, 64), nn.ReLU()) for _ in range(3)]
        >>> model = ek.nn.LayerEnsemble([hidden, [nn.Linear(64, 4) for _ in range(5)]])
        >>> model.num_options, model.num_paths
        ((3, 5), 15)
        >>> x = torch.randn(32, 8)
        >>> model(x, torch.tensor([[0, 4], [2, 1], [0, 2], [0, 4]])).shape
        torch.Size([4, 32, 4])
        >>> model(x, model.sample(7)).shape  # 7 different paths at random
        torch.Size([7, 32, 4])
        >>> plain = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        >>> ek.nn.LayerEnsemble.from_model(plain, num_options=6).num_paths
        216
        >>> ek.nn.LayerEnsemble.deep_ensemble(plain, num_members=6)(x).shape
        torch.Size([6, 32, 4])
        >>> ek.nn.LayerEnsemble.deep_sub_ensemble(plain, num_members=6, trunk=2).num_options
        (1, 1, 6)
    """

    def __init__(
        self,
        layers: Iterable[nn.Module | Sequence[nn.Module]],
        *,
        samples: Tensor | None = None,
        prior_scale: float | None = None,
    ) -> None:
        super().__init__()
        options = read_layers(layers)
        self.layers = nn.ModuleList(Layer(of_layer) for of_layer in options)
        check_chain(options)
        self.prior_scale = prior_scale
        if prior_scale is None:
            self.prior = None
        else:
            if isinstance(prior_scale, bool) or not isinstance(prior_scale, (int, float)):
                reject("LayerEnsemble", "prior_scale", "None or a number", repr(prior_scale), TypeError)
            self.prior = LayerEnsemble([[fresh_copy(option) for option in of_layer] for of_layer in options])
            _freeze(self.prior)
        self._trees = TreeCache()
        self.samples = samples
        # Modules keep their modes, as BatchNorm that is frozen in a model in training.
        self.training = any(option.training for of_layer in options for option in of_layer)
        for holder in (self.layers, *self.layers):
            holder.training = self.training

    # -------------------------------------------------------------------------------------------------- constructors

    @classmethod
    def from_model(
        cls, model: nn.Sequential, num_options: int | Sequence[int], *, prior_scale: float | None = None
    ) -> LayerEnsemble:
        """Options for the layers of a plain model, each drawn anew by its modules' `reset_parameters`.

        A layer is a module with parameters, and what follows it up to the next one: norms, activations, pooling and
        other modules without parameters.  Modules before the first belong to it.

        Args:
            model: it is not changed.
            num_options: of each layer, or one number for all.
            prior_scale: as of the constructor.
        """
        layers = layers_of(model)
        counts = options_per_layer(num_options, len(layers))
        return cls(
            [[fresh_copy(layer) for _ in range(count)] for layer, count in zip(layers, counts)], prior_scale=prior_scale
        )

    @classmethod
    def from_models(cls, models: Sequence[nn.Sequential], *, prior_scale: float | None = None) -> LayerEnsemble:
        """The layers of K models of one architecture as options, with their weights; `samples` are the K models."""
        if not models:
            reject("LayerEnsemble.from_models", "models", "at least one", "none")
        of_models = [layers_of(model) for model in models]
        if len({len(layers) for layers in of_models}) > 1:
            counts = " and ".join(str(len(layers)) for layers in of_models)
            reject("LayerEnsemble.from_models", "models", "of one number of layers", counts)
        model = cls([list(options) for options in zip(*of_models)], prior_scale=prior_scale)
        model.samples = model.diagonal_paths()
        return model

    @classmethod
    def deep_ensemble(
        cls, model: nn.Sequential, num_members: int, *, prior_scale: float | None = None
    ) -> LayerEnsemble:
        """A Deep Ensemble (Lakshminarayanan et al. 2017): `samples` are E paths that share no option."""
        positive("LayerEnsemble.deep_ensemble", num_members=num_members)
        return cls.deep_sub_ensemble(model, num_members, trunk=0, prior_scale=prior_scale)

    @classmethod
    def deep_sub_ensemble(
        cls, model: nn.Sequential, num_members: int, trunk: int, *, prior_scale: float | None = None
    ) -> LayerEnsemble:
        """A Deep Sub-Ensemble (Valdenegro-Toro 2019): the first `trunk` layers have one option, the others E.

        `samples` are E paths that share the trunk and nothing else.
        """
        name, layers = "LayerEnsemble.deep_sub_ensemble", len(layers_of(model))
        positive(name, num_members=num_members)
        if isinstance(trunk, bool) or not isinstance(trunk, int):
            reject(name, "trunk", "an int", repr(trunk), TypeError)
        if not 0 <= trunk <= layers:
            reject(name, "trunk", f"0 to {layers} layers", repr(trunk))
        ensemble = cls.from_model(model, [1] * trunk + [num_members] * (layers - trunk), prior_scale=prior_scale)
        ensemble.samples = ensemble.diagonal_paths()
        return ensemble

    # --------------------------------------------------------------------------------------------------------- paths

    @property
    def num_options(self) -> tuple[int, ...]:
        """K of each layer."""
        return tuple(layer.num_options for layer in self.layers)

    @property
    def num_paths(self) -> int:
        """The product of K over the layers, however large."""
        return prod(self.num_options)

    @property
    def samples(self) -> Tensor | None:
        """`[S, N]`, the paths that are run when `forward` is given none."""
        return self._samples

    @samples.setter
    def samples(self, samples: Tensor | None) -> None:
        self._samples = None if samples is None else self._checked(samples).cpu().long()

    def sample(self, count: int, unique: bool = True, generator: torch.Generator | None = None) -> Tensor:
        """`[count, N]`: paths drawn at random, each equally likely, all different if `unique`.

        Memory and time are those of `count` paths, whatever `num_paths` is.
        """
        positive("LayerEnsemble.sample", count=count)
        return paths.drawn(count, self.num_options, unique, generator)

    def all_paths(self, start: int = 0, stop: int | None = None) -> Tensor:
        """`[stop - start, N]`: paths number `start` to `stop` (None: the last), the last layer changing first."""
        stop = self.num_paths if stop is None else stop
        if not 0 <= start < stop <= self.num_paths:
            expected = f"0 <= start < stop <= {self.num_paths}"
            reject("LayerEnsemble.all_paths", "the range", expected, f"start={start}, stop={stop}")
        if stop >= 2**63:
            reject("LayerEnsemble.all_paths", "stop", "below 2**63", repr(stop))
        return paths.at(torch.arange(start, stop), self.num_options)

    def diagonal_paths(self) -> Tensor:
        """`[K, N]`: K networks that share no option, but for layers that have only one."""
        return paths.diagonal(self.num_options, "LayerEnsemble.diagonal_paths")

    def tree(self, samples: Tensor) -> PrefixTree:
        """The prefixes of paths, which `forward` takes in their place.

        Trees of the last few sets of paths are remembered, so this is needed only where `forward` should not look at
        values, as in `torch.compile(fullgraph=True)`.  `tree.num_prefixes` says how many prefixes each layer computes.
        """
        samples = self._known_type(samples)
        return _outside_of_graphs(self, samples) if torch.compiler.is_compiling() else self._tree(samples)

    def _tree(self, samples: Tensor) -> PrefixTree:
        samples = samples.detach().cpu()
        tree = self._trees.get(samples)
        if tree is None:
            tree = PrefixTree(self._checked(samples), self.num_options)
            self._trees.put(samples, tree)
        return tree

    def _known_type(self, samples: object) -> Tensor:
        if not isinstance(samples, Tensor) or samples.dtype not in _INTEGERS:
            reject("LayerEnsemble", "samples", "a tensor of integers", samples, TypeError)
        return samples

    def _checked(self, samples: Tensor) -> Tensor:
        samples, layers = self._known_type(samples), len(self.layers)
        if samples.dim() != 2 or samples.shape[1] != layers or not len(samples):
            reject("LayerEnsemble", "samples", f"[S, N={layers}] of at least one path", samples)
        counts = torch.tensor(self.num_options, device=samples.device)
        wrong = (samples < 0) | (samples >= counts)
        if wrong.any():
            path, layer = wrong.nonzero()[0].tolist()
            k = self.num_options[layer]
            expected = f"options 0 to {k - 1} (K={k}) in layer {layer}"
            reject("LayerEnsemble", "samples", expected, f"{samples[path, layer].item()} in path {path}")
        return samples

    # ------------------------------------------------------------------------------------------------------- running

    def forward(self, input: Tensor, samples: Tensor | PrefixTree | None = None) -> Tensor:
        if not isinstance(input, Tensor):
            reject("LayerEnsemble", "input", "a torch.Tensor", input, TypeError)
        if input.dim() < 2:
            reject("LayerEnsemble", "input", "[B, ...]", input)
        samples = self._samples if samples is None else samples
        if samples is None:
            reject("LayerEnsemble", "samples", "given, or set as its attribute", "None")
        given = isinstance(samples, PrefixTree)
        tree = samples if given else self.tree(samples)
        if given and tree.num_options != self.num_options:
            reject("LayerEnsemble", "samples", f"a tree of {self.num_options} options", f"one of {tree.num_options}")
        tree = tree.on(input.device)
        y = self._run(input, tree)
        if self.prior is not None:
            z = self.prior._run(input, tree)
            y = torch.add(y, z, alpha=self.prior_scale)
        return y if tree.inverse is None else y.index_select(0, tree.inverse)

    def _run(self, input: Tensor, tree: PrefixTree) -> Tensor:
        """[U, B, ...], the paths without repetitions."""
        held = [input.unsqueeze(0)]
        for layer, level, onward in spans(self.layers, tree.levels):
            held.append(layer(held, level, onward))  # which takes out what it was given, and frees it
        return held.pop()

    @torch.no_grad()
    def path(self, options: Sequence[int] | Tensor) -> nn.Sequential:
        """One path as a plain model, with copies of its parameters; without the prior."""
        options = torch.as_tensor(options)
        (chosen,) = self._checked(options.unsqueeze(0)).tolist()
        return sequential([layer.plain(k) for layer, k in zip(self.layers, chosen)], self.training)

    def train(self, mode: bool = True) -> LayerEnsemble:
        super().train(mode)
        if self.prior is not None:
            self.prior.eval()
        return self

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_trees": TreeCache()}

    def extra_repr(self) -> str:
        prior = "" if self.prior is None else f", prior_scale={self.prior_scale}"
        return f"num_options={self.num_options}, num_paths={self.num_paths}{prior}"


def _outside_of_graphs(model: LayerEnsemble, samples: Tensor) -> PrefixTree:
    return torch.compiler.disable(model._tree)(samples)  # here, since as a decorator it imports the compiler


_outside_of_graphs._torchdynamo_disable = True  # what the decorator says to the compiler


def _freeze(model: nn.Module) -> None:
    """Parameters become buffers: saved and moved with the model, and no optimizer's business."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())
    model.eval()
