"""The rows of the cost table: how each kind of ensemble is made of one network, trained, and asked for predictions.

Every method takes the data and the settings and gives what it has trained.  The network, the number of epochs and the
batches are the same for all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from cost_training import Loop, Settings, Trained
from image_data import Images
from layer_ensemble_models import mlp
from torch import Tensor, nn
from torch.nn import functional as F

import effens_kernels as ek


class Claim(NamedTuple):
    """Costs as they are commonly quoted, as multiples of one network's; M and T are numbers of networks run."""

    training: str = ""
    inference: str = ""
    kept: str = ""  # memory


class Method(NamedTuple):
    run: Callable[[Images, Settings], Trained]
    claim: Claim = Claim()


def network(data: Images, settings: Settings, dropout: float = 0.0) -> nn.Sequential:
    return mlp(data.num_features, settings.hidden, data.num_classes, dropout)


def adamw(parameters: object, settings: Settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, settings.rate, weight_decay=settings.weight_decay, fused=True)


def each_alone(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Members see the same batch; the sum of their losses, so that each learns as it would alone."""
    return lambda x, y: ek.losses.ensemble_cross_entropy(model(x), y, reduction="sum")


def each_its_share(model: nn.Module, members: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Members see parts of the batch, but for rows that are left over: in all, the products of one network.

    Of a last batch with fewer rows than members, each sees all.
    """

    def loss(x: Tensor, y: Tensor) -> Tensor:
        if len(y) < members:
            return ek.losses.ensemble_cross_entropy(model(x), y)
        rows = len(y) // members * members
        x, y = (t[:rows].unflatten(0, (members, -1)) for t in (x, y))
        return ek.losses.ensemble_cross_entropy(model(x, per_member=True), y)

    return loss


def trained_together(model: nn.Module, data: Images, settings: Settings, groups: object = None) -> Trained:
    loop = Loop(data, settings)
    loop.run(model, adamw(groups or model.parameters(), settings), each_alone(model))
    return loop.trained(model, model.state_dict())


# ------------------------------------------------------------------------------------------------- the methods


def single(data: Images, settings: Settings) -> Trained:
    model, loop = network(data, settings), Loop(data, settings)
    loop.run(model, adamw(model.parameters(), settings), lambda x, y: F.cross_entropy(model(x), y))
    return loop.trained(lambda x: model(x)[None], model.state_dict())


def loop_of_networks(data: Images, settings: Settings) -> Trained:
    """As people write it, without this package."""
    models = nn.ModuleList([network(data, settings) for _ in range(settings.members)])
    loop = Loop(data, settings)
    loop.run(
        models,
        adamw(models.parameters(), settings),
        lambda x, y: sum(F.cross_entropy(model(x), y) for model in models),
    )
    return loop.trained(lambda x: torch.stack([model(x) for model in models]), models.state_dict())


def standard(data: Images, settings: Settings) -> Trained:
    models = [network(data, settings) for _ in range(settings.members)]
    return trained_together(ek.stack(models), data, settings)


def batch_ensemble(data: Images, settings: Settings) -> Trained:
    model = ek.convert(network(data, settings), "batch_ensemble", settings.members, scale_init="random_sign")
    return trained_together(model, data, settings)


def batch_ensemble_split(data: Images, settings: Settings) -> Trained:
    """Each member sees its share of every batch, as in the paper: one network's products in training."""
    model = ek.convert(network(data, settings), "batch_ensemble", settings.members, scale_init="random_sign")
    loop = Loop(data, settings)
    loop.run(model, adamw(model.parameters(), settings), each_its_share(model, settings.members))
    return loop.trained(model, model.state_dict())


def mixture(data: Images, settings: Settings) -> Trained:
    model = ek.convert(network(data, settings), "mixture", settings.members, budget="2x", bank_single_layers=True)
    return trained_together(model, data, settings, model.optimizer_groups(settings.weight_decay))


def layer_ensemble(data: Images, settings: Settings) -> Trained:
    """Two options for each of three layers: eight networks that share their layers."""
    model = ek.nn.LayerEnsemble.from_model(network(data, settings), 2)
    paths = model.all_paths()
    loop = Loop(data, settings)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return ek.losses.ensemble_cross_entropy(model(x, paths), y, reduction="sum")

    loop.run(model, adamw(model.parameters(), settings), loss)
    return loop.trained(lambda x: model(x, paths), model.state_dict())


def sub_ensemble(data: Images, settings: Settings) -> Trained:
    """Members part at the last of three layers, and share the first two."""
    model = ek.convert(network(data, settings), "sub_ensemble", settings.members, split="4")
    return trained_together(model, data, settings)


def mimo(data: Images, settings: Settings) -> Trained:
    """Three members, which is what the paper found networks to have room for; every row twice in a batch."""
    model, loop = ek.convert(network(data, settings), "mimo", 3, keep_weights=False), Loop(data, settings)
    generator = settings.generator(2)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        x, y = ek.ensembles.mimo_batch(x, y, 3, input_repetition=0.5, batch_repetition=2, generator=generator)
        return ek.losses.ensemble_cross_entropy(model(x, per_member=True), y)

    loop.run(model, adamw(model.parameters(), settings), loss)
    return loop.trained(model, model.state_dict())


def snapshot(data: Images, settings: Settings) -> Trained:
    """The epochs of one network, in as many cycles of the learning rate as there are members."""
    model, loop = network(data, settings), Loop(data, settings)
    optimizer = torch.optim.AdamW(model.parameters(), 2 * settings.rate, weight_decay=settings.weight_decay, fused=True)
    steps = settings.epochs * len(range(0, len(data.y_train), settings.batch))
    snapshots = ek.ensembles.SnapshotEnsemble(model, optimizer, num_steps=steps, num_cycles=settings.members)
    loop.run(model, optimizer, lambda x, y: F.cross_entropy(model(x), y), after_step=snapshots.step)
    ensemble = snapshots.ensemble().eval()
    return loop.trained(ensemble, ensemble.state_dict())


def swag(data: Images, settings: Settings) -> Trained:
    """One training whose second half wanders at a constant rate; members are samples of where it went."""
    model, loop = network(data, settings), Loop(data, settings)
    loss = lambda x, y: F.cross_entropy(model(x), y)  # noqa: E731
    first = settings.epochs // 2
    loop.run(model, adamw(model.parameters(), settings), loss, epochs=first)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=settings.weight_decay)
    found = ek.ensembles.SWAG(model, rank=10)
    loop.run(model, optimizer, loss, epochs=settings.epochs - first, after_epoch=lambda: found.collect(model))
    ensemble = found.sample(settings.members, generator=settings.generator(2)).eval()
    return loop.trained(ensemble, found.state_dict())


def hyperparameters(data: Images, settings: Settings) -> Trained:
    """Members with rates of learning, weight decays and label smoothing of their own, from low to high."""
    members = settings.members
    spread = torch.linspace(-1, 1, members)
    model = ek.stack([network(data, settings) for _ in range(members)])
    optimizer = ek.optim.EnsembleAdamW(
        model.parameters(), lr=settings.rate * 3.0**spread, weight_decay=settings.weight_decay * 10.0**spread
    )
    smoothing = 0.05 * (1 + spread)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return ek.losses.ensemble_cross_entropy(model(x), y, label_smoothing=smoothing, reduction="sum")

    loop = Loop(data, settings)
    loop.run(model, optimizer, loss)
    return loop.trained(model, model.state_dict())


def mc_dropout(data: Images, settings: Settings) -> Trained:
    model, loop = network(data, settings, dropout=0.2), Loop(data, settings)
    loop.run(model, adamw(model.parameters(), settings), lambda x, y: F.cross_entropy(model(x), y))
    ensemble = ek.convert(model, "mc_dropout", settings.members).eval()
    return loop.trained(ensemble, model.state_dict())


def masksembles(data: Images, settings: Settings) -> Trained:
    """Masks drawn once in place of dropout; each member sees its share of every batch, as in the paper."""
    members, plain = settings.members, network(data, settings, dropout=0.2)
    model = ek.convert(plain, "masksembles", members, example=data.x_train[:2], scale=2.0)
    loop = Loop(data, settings)
    loop.run(model, adamw(model.parameters(), settings), each_its_share(model, members))
    return loop.trained(model, model.state_dict())


METHODS = {
    "single network": Method(single),
    "standard ensemble, a loop": Method(loop_of_networks, Claim("M", "M", "M")),
    "standard ensemble": Method(standard, Claim("M", "M", "M")),
    "hyperparameter ensemble": Method(hyperparameters),
    "BatchEnsemble": Method(batch_ensemble, Claim("1.1", "1.1", "1.05")),
    "BatchEnsemble, batch split": Method(batch_ensemble_split, Claim("1.1", "1.1", "1.05")),
    "MixtureEnsemble": Method(mixture),
    "Layer Ensemble": Method(layer_ensemble),
    "sub-ensemble": Method(sub_ensemble),
    "MIMO": Method(mimo, Claim("1.2", "1", "1.1")),
    "Snapshot": Method(snapshot, Claim("1", "M", "M")),
    "SWAG": Method(swag, Claim("1.1", "T", "1.2")),
    "MC dropout": Method(mc_dropout),
    "Masksembles": Method(masksembles),
}
