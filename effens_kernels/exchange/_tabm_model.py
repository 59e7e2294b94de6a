"""The ensemble inside a tabm.TabM, of this package's layers: built to fit a state, under the same names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..nn import BatchEnsembleLinear, EnsembleLinear
from ..nn._layout import checked_activation, members_first
from ..ops import rank1_linear
from ..ops._activations import ACTIVATIONS
from ..ops._checks import reject


class TabM(nn.Module):
    """Blocks of a layer, an activation and dropout, then a layer of outputs; `[B, I]` or `[B, E, I]` to `[B, E, O]`.

    Layers are of BatchEnsemble ("tabm"), of each member ("tabm-packed"), or shared by all members, whose inputs are
    scaled before the first ("tabm-mini").
    """

    def __init__(
        self, layers: list[nn.Module], output: nn.Module | None, scales: Tensor | None, activation: str, dropout: float
    ) -> None:
        super().__init__()
        self.activation = activation
        self.backbone = nn.Module()
        self.backbone.blocks = nn.ModuleList(nn.Sequential(layer, nn.Dropout(dropout)) for layer in layers)
        if scales is not None:
            self.backbone.affine = nn.Module()
            self.backbone.affine.weight = nn.Parameter(scales)
        self.output = output
        self.num_members = layers[0].num_members if scales is None else len(scales)

    def forward(self, input: Tensor) -> Tensor:
        x = members_first("TabM", input, self.num_members, batch_first=True)
        for number, (layer, dropout) in enumerate(self.backbone.blocks):
            if type(layer) is not nn.Linear:
                x = layer(x)
            elif number:
                x = ACTIVATIONS[self.activation].apply(layer(x))
            else:
                r = self.backbone.affine.weight
                ones = r.new_ones(len(r), layer.out_features)
                x = rank1_linear(x, layer.weight, r, ones, layer.bias, activation=self.activation)
            x = dropout(x)
        return (x if self.output is None else self.output(x)).transpose(0, 1)

    @classmethod
    def _like(cls, op: str, state: Mapping[str, Tensor], activation: str | None, dropout: float) -> TabM:
        """An ensemble of the architecture and sizes of tabm's state, without its values."""
        checked_activation(op, activation)
        for name in state:
            if not isinstance(name, str) or not name.startswith(("backbone.", "output.")):
                reject(op, "state", "of names that begin with backbone. or output. (leave out the others)", repr(name))

        def sizes(name: str, axes: int) -> torch.Size:
            value = state.get(name)
            if not isinstance(value, Tensor) or value.dim() != axes:
                reject(op, "state", f"with {name!r} of {axes} axes", "none" if value is None else value)
            return value.shape

        def has_bias(layer: str) -> bool:
            return f"{layer}.bias" in state

        paths: list[str] = []
        while (path := f"backbone.blocks.{len(paths)}.0") + ".weight" in state:
            paths.append(path)
        if not paths:
            reject(op, "state", "of a tabm.TabM", "no backbone.blocks.0.0.weight")
        mini = "backbone.affine.weight" in state
        layers: list[nn.Module] = []
        with torch.device("meta"):
            for path in paths:
                if mini:
                    outputs, inputs = sizes(f"{path}.weight", 2)
                    layer = nn.Linear(inputs, outputs, has_bias(path))
                elif f"{path}.r" in state:
                    outputs, inputs = sizes(f"{path}.weight", 2)
                    members = sizes(f"{path}.r", 2)[0]
                    layer = BatchEnsembleLinear(inputs, outputs, members, has_bias(path), activation=activation)
                else:
                    members, inputs, outputs = sizes(f"{path}.weight", 3)
                    layer = EnsembleLinear(inputs, outputs, members, has_bias(path), activation=activation)
                if layers and layers[-1].out_features != inputs:
                    expected = f"with {path}.weight of {layers[-1].out_features} inputs, the outputs before it"
                    reject(op, "state", expected, state[f"{path}.weight"])
                layers.append(layer)
            scales = torch.empty(sizes("backbone.affine.weight", 2)) if mini else None
            output = None
            if "output.weight" in state:
                members, inputs, outputs = sizes("output.weight", 3)
                output = EnsembleLinear(inputs, outputs, members, has_bias("output"))
            model = cls(layers, output, scales, activation, dropout)
        weight = state[f"{paths[0]}.weight"]
        for layer in (*layers, output):
            if layer is not None and getattr(layer, "num_members", model.num_members) != model.num_members:
                reject(op, "state", f"of {model.num_members} members everywhere", f"{layer.num_members} of a layer")
        return model.to(weight.dtype).to_empty(device=weight.device)
