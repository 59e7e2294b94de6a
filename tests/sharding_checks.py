"""What test_sharding.py checks in four processes: `python tests/sharding_checks.py RANK FOLDER SEED`.

A check runs in the processes of the mesh that it takes.  The first failure of a process ends it, and with it those that
wait for it; what each process has done is in FOLDER/RANK.json.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from stack_cases import CASES
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from torch.utils import _pytree as pytree

import effens_kernels as ek

PROCESSES = 4
ROWS = 4
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)
CHECKS: dict[str, tuple[int, Callable]] = {}


def check(processes: int) -> Callable:
    def known(function: Callable) -> Callable:
        CHECKS[function.__name__] = processes, function
        return function

    return known


# --------------------------------------------------------------------------------------------------------- ensembles


class Shared(nn.Module):
    """A trunk of plain layers, layers whose members share all, some or nothing, and a parameter that is frozen."""

    def __init__(self, num_members: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
        self.first = ek.nn.BatchEnsembleLinear(8, 8, num_members, shared_bias=True, activation="tanh")
        self.norm = ek.nn.EnsembleLayerNorm(8, num_members)
        self.batch_norm = ek.nn.EnsembleBatchNorm1d(8, num_members)
        self.bank = ek.nn.TemplateBank(3, (8, 8))
        self.mixed = ek.nn.MixtureLinear(8, 8, num_members, 2, bank=self.bank, start=1, disjoint=True)
        self.again = ek.nn.MixtureLinear(8, 8, num_members, 2, bank=self.bank, shared_bias=True)
        self.critics = ek.nn.EnsembleMLP(8, [8, 5], 2, num_members, num_heads=2, shared_layers=0)
        self.trunk[0].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.batch_norm(self.norm(self.first(self.trunk(x))))
        return self.critics(self.again(torch.tanh(self.mixed(x)))).flatten(2)


def mixture(num_members: int, **options: object) -> nn.Module:
    layers = [layer for _ in range(3) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())]
    plain = nn.Sequential(nn.Linear(6, 8), *layers, nn.LayerNorm(8), nn.Linear(8, 3))
    return ek.convert(plain, "mixture", num_members, budget="2x", **options)


def batch_ensemble(num_members: int) -> nn.Module:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    plain = nn.Sequential(nn.Unflatten(1, (3, 2)), nn.Linear(2, 8), encoder, nn.Flatten(), nn.BatchNorm1d(24))
    return ek.convert(nn.Sequential(*plain, nn.Linear(24, 3)), "batch_ensemble", num_members)


def stacked(name: str, num_members: int) -> nn.Module:
    return ek.stack([CASES[name].make() for _ in range(num_members)])


ENSEMBLES: dict[str, Callable[[int], nn.Module]] = {
    **{f"stack {name}": partial(stacked, name) for name in ("conv2d", "tied", "tokens", "statistics")},
    "mixture": mixture,
    "disjoint": partial(mixture, assignment="disjoint"),
    "blob": partial(mixture, single_blob=True),
    "batch ensemble": batch_ensemble,
    "layers": Shared,
    "mlp": lambda num_members: ek.nn.EnsembleMLP(6, [8, 8], 3, num_members, shared_layers=1),
    "rank1 mlp": lambda num_members: ek.nn.BatchEnsembleMLP(6, [8], 3, num_members),
}


def make(name: str, num_members: int) -> nn.Module:
    """The same in every process: seeds are."""
    return ENSEMBLES[name](num_members).double()


def inputs(name: str, lead: tuple[int, ...] = ()) -> list[Tensor]:
    case = CASES.get(name.removeprefix("stack "))
    found = case.inputs(lead) if case and "stack" in name else (torch.randn(*lead, ROWS, 6),)
    return [t.double().requires_grad_() if t.is_floating_point() else t for t in found]


def tensors(result: object) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def backward(result: object, first: int = 0) -> None:
    """Of a loss that adds up what is different for each member."""
    losses = []
    for t in tensors(result):
        weights = torch.arange(first + 1.0, first + 1 + len(t), dtype=t.dtype)
        losses.append((t.flatten(1).square().sum(1) * weights).sum())
    sum(losses).backward()


def same(sharded: nn.Module, expected: nn.Module, gradients: bool = True) -> None:
    """Parameters, buffers and gradients, by name; in the wrong process, only its part of them could be right."""
    theirs = dict(expected.named_parameters())
    assert list(theirs) == [name for name, _ in sharded.named_parameters()]
    for name, p in sharded.named_parameters():
        assert isinstance(p, DTensor), name
        close(whole(p), theirs[name], msg=lambda said, name=name: f"{name}: {said}")
        assert p.requires_grad == theirs[name].requires_grad
        if gradients and theirs[name].grad is not None:
            assert p.grad.placements == p.placements, name
            close(whole(p.grad), theirs[name].grad, msg=lambda said, name=name: f"gradient of {name}: {said}")
        elif gradients:
            assert p.grad is None, name
    for (name, b), (other, expected_b) in zip(sharded.named_buffers(), expected.named_buffers(), strict=True):
        assert name == other
        close(whole(b), expected_b, msg=lambda said, name=name: f"{name}: {said}")


def run_both(sharded: nn.Module, expected: nn.Module, given: list[Tensor], **options: object) -> None:
    """Results, then gradients of everything."""
    theirs = [t.detach().clone().requires_grad_(t.requires_grad) for t in given]
    result, expected_result = sharded(*given, **options), expected(*theirs, **options)
    own = sharded.members
    for t, e in zip(tensors(result), tensors(expected_result), strict=True):
        assert not isinstance(t, DTensor)
        close(t, e[own.start : own.stop])
    backward(result, own.start)
    backward(expected_result)
    same(sharded, expected)
    if isinstance(expected, (ek.ensembles.StackedEnsemble, ek.ensembles.Ensemble)) and not options:
        for t, e in zip(given, theirs):
            close(t.grad, e.grad) if t.requires_grad else None


# ------------------------------------------------------------------------------------------------------------ checks


@check(2)
def as_the_whole_ensemble(mesh: DeviceMesh) -> None:
    """3 members: two here, one there."""
    for name in ENSEMBLES:
        print(name, flush=True)
        ensemble = make(name, 3)
        sharded = ek.shard(copy.deepcopy(ensemble), mesh)
        same(sharded, ensemble, gradients=False)
        assert list(sharded.state_dict()) == list(ensemble.state_dict())
        assert (sharded.num_members, len(sharded.members)) == (3, 2 - mesh.get_rank())
        run_both(sharded, ensemble, inputs(name))
        ensemble.eval()
        assert sharded.eval().local.training is False
        with torch.no_grad():
            run = [t.detach() for t in inputs(name)]
            own = sharded.members
            for t, e in zip(tensors(sharded(*run)), tensors(ensemble(*run)), strict=True):
                close(t, e[own.start : own.stop])


@check(3)
def processes_with_fewer_members_and_with_none(mesh: DeviceMesh) -> None:
    for name, members, own in (
        ("stack conv2d", 5, (2, 2, 1)),
        ("stack tokens", 4, (2, 2, 0)),
        ("mixture", 1, (1, 0, 0)),
    ):
        print(name, members, flush=True)
        ensemble = make(name, members)
        sharded = ek.shard(copy.deepcopy(ensemble), mesh)
        assert len(sharded.members) == own[mesh.get_rank()]
        run_both(sharded, ensemble, inputs(name))
        steps(sharded, ensemble, name)
        run_both(sharded.eval(), ensemble.eval(), inputs(name, (members,)), per_member=True)


def steps(sharded: nn.Module, ensemble: nn.Module, name: str, **how: object) -> None:
    mine, theirs = (torch.optim.AdamW(m.parameters(), lr=0.01, **how) for m in (sharded, ensemble))
    for _ in range(3):
        given = inputs(name)
        norms = []
        for model, optimizer in ((sharded, mine), (ensemble, theirs)):
            optimizer.zero_grad()
            backward(model(*given), sharded.members.start if model is sharded else 0)
            norms.append(whole(clip_grad_norm_(model.parameters(), 1.0)))
            optimizer.step()
        close(*norms)
    same(sharded, ensemble)


@check(2)
def optimizers(mesh: DeviceMesh) -> None:
    for name in ("stack conv2d", "layers"):
        ensemble = make(name, 3)
        steps(ek.shard(copy.deepcopy(ensemble), mesh), ensemble, name, foreach=True)


@check(2)
def inputs_of_each_member(mesh: DeviceMesh) -> None:
    for name in ("stack conv2d", "mixture"):
        ensemble = make(name, 3)
        sharded = ek.shard(copy.deepcopy(ensemble), mesh)
        own = sharded.members
        given = inputs(name, (3,))
        result = sharded(*given, per_member=True)
        close(result, sharded(given[0][own.start : own.stop], per_member=True))
        ensemble = make(name, 3)
        sharded = ek.shard(copy.deepcopy(ensemble), mesh)
        run_both(sharded, ensemble, inputs(name, (3,)), per_member=True)
        for wrong in (4, 0):
            with pytest.raises(
                ValueError, match=rf"input should be \[E, ...\] of all E=3 members or of {len(own)} here"
            ):
                sharded(torch.randn(wrong, ROWS, 6, dtype=torch.float64), per_member=True)
    layer = ek.shard(ek.nn.EnsembleLinear(6, 3, 4), mesh)
    x = torch.randn(4, 5, 6)
    own = layer.members
    weight, bias = (p.full_tensor()[own.start : own.stop] for p in layer.parameters())
    torch.testing.assert_close(layer(x[own.start : own.stop]), x[own.start : own.stop] @ weight.mT + bias.unsqueeze(1))
    with pytest.raises(ValueError, match="EnsembleLinear: input"):
        layer(x)


@check(2)
def made_by_each_process(mesh: DeviceMesh) -> None:
    """Members of which nobody has all; what they share is that of the first process."""
    own = ek.distributed.local_members(3, mesh)
    models = [CASES["conv2d"].make().double() for _ in range(3)]
    sharded = ek.shard(ek.stack([models[e] for e in own]), mesh, from_local=True)
    assert sharded.members == own
    run_both(sharded, ek.stack(models), inputs("stack conv2d"))
    torch.manual_seed(1 + mesh.get_rank())
    part = ek.nn.BatchEnsembleMLP(6, [8], 3, 2 - mesh.get_rank()).double()
    parts = [None, None]
    dist.all_gather_object(parts, part.state_dict(), group=mesh.get_group())
    ensemble = ek.nn.BatchEnsembleMLP(6, [8], 3, 3).double()
    ensemble.load_state_dict(
        {n: t if n.endswith("weight") else torch.cat([p[n] for p in parts]) for n, t in parts[0].items()}
    )
    torch.manual_seed(3)
    run_both(ek.shard(part, mesh, from_local=True), ensemble, inputs("rank1 mlp"))
    with pytest.raises(ValueError, match=r"of 2 of all 3 members in process 0, got one of 1 \(from_local=True\)"):
        ek.shard(ek.nn.EnsembleLinear(2, 2, 1 + mesh.get_rank()), mesh, from_local=True)


@check(2)
def bad_input(mesh: DeviceMesh) -> None:
    linear = partial(ek.nn.EnsembleLinear, 2, 2)
    rank = mesh.get_rank()

    class Own(nn.Module):
        num_members = 3

        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(3))

    def refuses(message: str, ensemble: object, where: object = mesh, error: type = ValueError, **options) -> None:
        with pytest.raises(error, match=message):
            ek.shard(ensemble, where, **options)

    refuses("ensemble should be a torch.nn.Module, got list", [linear(3)], error=TypeError)
    refuses("mesh should be a torch.distributed.device_mesh.DeviceMesh, got int", linear(3), 2, TypeError)
    refuses("dim should be one of the mesh's dimensions, 'members', got 'data'", linear(3), dim="data")
    refuses("without an axis of members", nn.Linear(2, 2))
    refuses("without an axis of members", ek.nn.MultiHeadLinear(2, 2, 3))
    refuses(r"weight should be on cpu like the mesh, got float32\[3, 2, 2\] on meta", linear(3, device="meta"))
    refuses("not sharded yet", ek.shard(linear(3), mesh))
    refuses("not sharded yet", nn.Sequential(ek.shard(linear(3), mesh)))
    refuses("whose layers with members are of ek.nn, got Own at '1' with temperature", nn.Sequential(linear(3), Own()))
    refuses("one number of members, 3, got EnsembleLinear at '1' of 2", nn.Sequential(linear(3), linear(2)))
    refuses("without parametrizations", nn.utils.parametrizations.weight_norm(linear(3)))
    refuses("with members for each of 2 processes, or made by ek.stack or ek.convert", linear(1))
    # What is wrong in one process is an error in both.
    refuses("of 3 members, got 4", ek.nn.EnsembleLinear(2, 2, 3 + rank))
    refuses("the same in all processes", ek.nn.EnsembleLinear(2, 2 + rank, 3))
    refuses("without an axis of members", nn.Linear(2, 2) if rank else linear(3))
    sharded = ek.shard(stacked("mlp", 3), mesh)
    with pytest.raises(ValueError, match="member should be None"):
        sharded(torch.randn(2, 6), member=0)
    with pytest.raises(TypeError, match="input should be a plain tensor"):
        sharded(DTensor.from_local(torch.randn(2, 6), mesh, run_check=False))


def predictions(mesh: DeviceMesh, members: int) -> None:
    """Of classifiers that agree or not, some sure of themselves, and of what has no probabilities."""
    rank, own = mesh.get_rank(), ek.distributed.local_members(members, mesh)
    for dtype, batch in ((torch.float64, (7,)), (torch.float32, (2, 3)), (torch.float64, (0,))):
        logits = 5 * torch.randn(members, *batch, 4, dtype=dtype)
        if batch == (7,):
            logits[:, 1] = logits[0, 1] + 1e-9 * logits[:, 1]  # nearly one opinion
            logits[:, 2, 1:] = -torch.inf
            logits[members - 1, 3, 0] = torch.nan
        exact = ek.ensemble_predict(logits.double(), backend="reference")
        found = ek.distributed.ensemble_predict(logits[own.start : own.stop], mesh, backend="reference")
        for name, t, e in zip(exact._fields, found, exact):
            tolerance = 1e-12 if dtype == torch.float64 else 1e-5
            compare = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance, equal_nan=True)
            compare(t, e.to(dtype), msg=lambda said, name=name: f"{name} in process {rank}: {said}")
        if batch == (7,):
            assert found.mutual_information[1] < 1e-15
            assert all(torch.isfinite(t[:3]).all() and torch.isnan(t[3]).all() for t in found)
        means = 1e6 + torch.randn(members, *batch, dtype=torch.float64)
        for variances in (None, torch.rand_like(means)):
            here = variances if variances is None else variances[own.start : own.stop]
            of_all = ek.distributed.ensemble_predict_regression
            found = of_all(means[own.start : own.stop], here, mesh, backend="reference")
            for t, e in zip(found, ek.ensemble_predict_regression(means, variances, backend="reference")):
                close(t, e)


@check(2)
def predictions_of_all_members(mesh: DeviceMesh) -> None:
    predictions(mesh, 5)
    of_all = ek.distributed.ensemble_predict
    with pytest.raises(ValueError, match=r"logits should be \[E_own, \*batch, C\], got float32\[3\]"):
        of_all(torch.randn(3), mesh)
    with pytest.raises(ValueError, match="of at least one class"):
        of_all(torch.randn(3, 2, 0), mesh)
    with pytest.raises(ValueError, match="dim should be one of the mesh's dimensions"):
        of_all(torch.randn(3, 2, 2), mesh, "rows")
    with pytest.raises(ValueError, match=r"variances should be \[3, 2\] like means"):
        ek.distributed.ensemble_predict_regression(torch.randn(3, 2), torch.randn(2, 2), mesh)


@check(3)
def predictions_with_a_process_without_members(mesh: DeviceMesh) -> None:
    predictions(mesh, 4)
    predictions(mesh, 1)


@check(2)
def dropout(mesh: DeviceMesh) -> None:
    """Masks by each process's generator: of equal seeds the same in both, of seeds by process different."""
    ones = torch.ones(64, 16)
    for offset in (0, 1):
        sharded = ek.shard(ek.stack([nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5)) for _ in range(4)]), mesh)
        torch.manual_seed(5 + offset * mesh.get_rank())
        masks = sharded(ones) == 0
        assert not torch.equal(masks[0], masks[1])
        parts = [torch.empty_like(masks), torch.empty_like(masks)]
        dist.all_gather(parts, masks, group=mesh.get_group())
        assert torch.equal(*parts) == (offset == 0)
    torch.manual_seed(7)


@check(2)
def compiled_in_one_graph(mesh: DeviceMesh) -> None:
    ensemble = make("rank1 mlp", 3)
    sharded = ek.shard(copy.deepcopy(ensemble), mesh)
    compiled = torch.compile(sharded, fullgraph=True, backend="aot_eager")
    given, own = inputs("rank1 mlp"), sharded.members
    result, expected = compiled(*given), ensemble(*given)
    close(result, expected[own.start : own.stop])
    backward(result, own.start)
    backward(expected)
    same(sharded, ensemble)


@check(2)
def checkpoints(mesh: DeviceMesh) -> None:
    """Saved here by two processes; the test loads it in one.  And what one process saved is loaded by two."""
    folder = Path(sys.argv[2])
    ensemble = make("layers", 3)
    one = copy.deepcopy(ensemble)
    sharded = ek.shard(ensemble, mesh)
    optimizer = torch.optim.AdamW(sharded.parameters(), lr=0.01)
    given = inputs("layers")
    backward(sharded(*given), sharded.members.start)
    optimizer.step()
    model_state, optimizer_state = get_state_dict(sharded, optimizer)
    dcp.save(
        {"model": model_state, "optimizer": optimizer_state},
        checkpoint_id=folder / "by two",
        process_group=mesh.get_group(),
    )
    reference = torch.optim.AdamW(one.parameters(), lr=0.01)
    backward(one(*given))
    reference.step()
    if mesh.get_rank() == 0:
        state = dict(zip(("model", "optimizer"), get_state_dict(one, reference)))
        torch.save(state, folder / "expected.pt")
        dcp.save({"model": one.state_dict()}, checkpoint_id=folder / "by one", no_dist=True)
    dist.barrier(group=mesh.get_group())
    other = ek.shard(make("layers", 3), mesh)
    state = {"model": other.state_dict()}
    dcp.load(state, checkpoint_id=folder / "by one", process_group=mesh.get_group())
    other.load_state_dict(state["model"])
    same(other, one, gradients=False)
    whole_again = StateDictOptions(full_state_dict=True)
    plain, other = make("layers", 3), ek.shard(make("layers", 3), mesh)
    plain.load_state_dict(get_model_state_dict(sharded, options=whole_again))
    set_model_state_dict(other, plain.state_dict(), options=whole_again)
    same(other, plain, gradients=False)
    same(plain_copy := copy.deepcopy(sharded), plain, gradients=False)
    close(plain_copy(*given), sharded(*given))
    assert sharded.float()(given[0].float()).dtype == torch.float32


@check(4)
def rows_dealt_out_too(mesh: DeviceMesh) -> None:
    """Two processes for the members, by two for the rows: gradients are means over these, sums over those."""
    mesh = DeviceMesh("cpu", mesh.mesh.view(2, 2).t(), mesh_dim_names=("data", "members"))
    row = mesh.get_local_rank("data")
    for name in ("stack conv3d", "rank1 mlp"):
        ENSEMBLES.setdefault("stack conv3d", partial(stacked, "conv3d"))
        ensemble = make(name, 3).eval()  # running statistics would be those of a process's rows
        sharded = ek.shard(copy.deepcopy(ensemble), mesh)
        assert len(sharded.members) == 2 - mesh.get_local_rank("members")
        given = inputs(name)[0].detach()
        backward(sharded(given[2 * row : 2 * row + 2]), sharded.members.start)
        backward(ensemble(given))
        for p in ensemble.parameters():
            p.grad /= 2
        same(sharded, ensemble)
        # The first process's values are everyone's where several have the same.
        torch.manual_seed(11 + dist.get_rank())
        other = ek.shard(make(name, 3), mesh)
        values = [p.full_tensor() for p in other.parameters()]
        parts = [None] * 4
        dist.all_gather_object(parts, values)
        for part in parts:
            assert all(torch.equal(a, b) for a, b in zip(part, parts[0], strict=True))
        torch.manual_seed(13)


# --------------------------------------------------------------------------------------------------------- processes


def main(rank: int, folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=1200))
    meshes = {n: DeviceMesh("cpu", torch.arange(n), mesh_dim_names=("members",)) for n in (2, 3, 4)}
    done = {}
    for name, (processes, function) in CHECKS.items():
        if rank >= processes:
            continue
        print(f"-- {name}", flush=True)
        torch.manual_seed(seed)
        try:
            function(meshes[processes])
        except BaseException:
            done[name] = traceback.format_exc()
        else:
            done[name] = ""
        (folder / f"{rank}.json").write_text(json.dumps(done))
        if done[name]:
            os._exit(1)  # those that wait for this process see it
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
