"""Two ensembles as people write them, a Python loop over `nn.Linear`, and the same two on effens_kernels' layers.

Every model maps `x` [batch, ensemble, state_dim] to [batch, ensemble, heads, actions].

    Ensemble1      one trunk for everybody, `num_heads` output layers per member     (few parameters)
    Ensemble2      one whole network with `num_heads` output layers per member       (many parameters)
    FastEnsemble1  Ensemble1 as one `EnsembleMLP` whose hidden layers are shared
    FastEnsemble2  Ensemble2 as one `EnsembleMLP`
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import effens_kernels as ek

# ------------------------------------------------------------------------------------------- loops over nn.Linear


class MLP(nn.Module):
    """Three hidden layers and `num_heads` output layers: [batch, state_dim] to [heads, batch, actions]."""

    def __init__(self, state_dim: int, hidden_dim: int, num_actions: int, num_heads: int) -> None:
        super().__init__()
        self.input_layer = nn.Linear(state_dim, hidden_dim)
        self.h1 = nn.Linear(hidden_dim, hidden_dim)
        self.h2 = nn.Linear(hidden_dim, hidden_dim)
        self.output_heads = nn.ModuleList(nn.Linear(hidden_dim, num_actions) for _ in range(num_heads))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.input_layer(x))
        x = torch.relu(self.h1(x))
        x = torch.relu(self.h2(x))
        return torch.stack([head(x) for head in self.output_heads])


class Ensemble1(nn.Module):
    """One trunk; each member has its own heads, which read that member's slice of the features."""

    def __init__(self, state_dim: int, hidden_dim: int, num_actions: int, num_heads: int, ensemble_size: int) -> None:
        super().__init__()
        self.input_layer = nn.Linear(state_dim, hidden_dim)
        self.h1 = nn.Linear(hidden_dim, hidden_dim)
        self.h2 = nn.Linear(hidden_dim, hidden_dim)
        self.ensemble = nn.ModuleList(
            nn.ModuleList(nn.Linear(hidden_dim, num_actions) for _ in range(num_heads)) for _ in range(ensemble_size)
        )

    def features(self, x: Tensor) -> Tensor:
        x = torch.relu(self.input_layer(x))
        x = torch.relu(self.h1(x))
        return torch.relu(self.h2(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        members = [torch.stack([head(x[:, e, :]) for head in heads], dim=1) for e, heads in enumerate(self.ensemble)]
        return torch.stack(members, dim=1)


class Ensemble2(nn.Module):
    """One whole MLP per member."""

    def __init__(self, state_dim: int, hidden_dim: int, num_actions: int, num_heads: int, ensemble_size: int) -> None:
        super().__init__()
        self.ensemble = nn.ModuleList(MLP(state_dim, hidden_dim, num_actions, num_heads) for _ in range(ensemble_size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([net(x[:, e, :]).transpose(0, 1) for e, net in enumerate(self.ensemble)], dim=1)


# --------------------------------------------------------------------------------------- the same on effens_kernels


class FastEnsemble2(nn.Module):
    """Ensemble2; each layer of all members is one product, a member's heads are side by side in the last one."""

    shared_layers = 0

    def __init__(self, state_dim: int, hidden_dim: int, num_actions: int, num_heads: int, ensemble_size: int) -> None:
        super().__init__()
        self.heads = (num_heads, num_actions)
        self.members = ek.nn.EnsembleMLP(
            state_dim,
            [hidden_dim] * 3,
            num_heads * num_actions,
            ensemble_size,
            shared_layers=self.shared_layers,
            batch_first=True,
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.members(x)
        return y.view(*y.shape[:2], *self.heads)


class FastEnsemble1(FastEnsemble2):
    """Ensemble1; the same, but that all members share the hidden layers: no member's features are sliced out."""

    shared_layers = 3


# -------------------------------------------------------------------------------------------- from one to the other


def stacked(model: Ensemble1 | Ensemble2, read: Callable[[Tensor], Tensor] = Tensor.detach) -> dict[str, Tensor]:
    """The loop model's parameters under the names and shapes of the fast one: `fast.load_state_dict(stacked(loop))`.

    `read` takes what is wanted from each parameter, e.g. `lambda p: p.grad` for the gradients.
    """
    result = {}
    for name in ("weight", "bias"):

        def get(layer: nn.Linear, name: str = name) -> Tensor:
            return read(getattr(layer, name))

        if isinstance(model, Ensemble1):
            for n, layer in enumerate(("input_layer", "h1", "h2")):
                result[f"members.layers.{n}.{name}"] = get(getattr(model, layer)).unsqueeze(0)
            members = [torch.cat([get(head) for head in heads]) for heads in model.ensemble]
        else:
            for n, layer in enumerate(("input_layer", "h1", "h2")):
                result[f"members.layers.{n}.{name}"] = torch.stack([get(getattr(net, layer)) for net in model.ensemble])
            members = [torch.cat([get(head) for head in net.output_heads]) for net in model.ensemble]
        result[f"members.layers.3.{name}"] = torch.stack(members)
    return result
