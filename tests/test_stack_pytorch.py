"""ek.stack inside PyTorch: compilers, autocast, copies and files, optimizers, checkpoints, processes."""

from __future__ import annotations

import copy
import io
import pickle
import socket
import subprocess
import sys

import pytest
import torch
from common import ROOT
from stack_cases import CASES, B, E
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import effens_kernels as ek

AOT = "aot_eager"  # as in test_compile
EVALUATED = ("mlp", "conv2d", "encoder")
COMPILED = [name for name in CASES if name not in ("recurrent", "weight_norm")]  # see test_what_torch_cannot_compile


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(result: object) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]


def stacked(name: str, training: bool = True) -> nn.Module:
    return ek.stack([CASES[name].make().train(training) for _ in range(E)])


def step(ensemble: nn.Module, call, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Results, gradients and buffers."""
    result = tensors(call(*inputs))
    sum(t.square().sum() for t in result).backward()
    grads = [p.grad for p in ensemble.parameters() if p.grad is not None]
    return [*(t.detach() for t in result), *grads, *ensemble.buffers()]


def close(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- compilers


# In training all of them: forward and backward.
IN_BOTH_MODES = [(name, training) for name in COMPILED for training in (True, False) if training or name in EVALUATED]


@pytest.mark.filterwarnings("error:There is a performance drop")
@pytest.mark.parametrize(("name", "training"), IN_BOTH_MODES)
def test_compiled_in_one_graph(name, training):
    ensemble = stacked(name, training)
    other = copy.deepcopy(ensemble)
    inputs = CASES[name].inputs(())
    compiled = torch.compile(ensemble, fullgraph=True, backend=AOT)
    close(step(ensemble, compiled, inputs), step(other, other, inputs))
    with torch.no_grad():
        close(tensors(compiled(*inputs)), tensors(other(*inputs)))
    assert ensemble.training == training
    assert [m.training for m in ensemble._plain.modules()] == [m.training for m in other._plain.modules()]


def test_compiled_by_inductor():
    ensemble = stacked("mlp")
    other = copy.deepcopy(ensemble)
    inputs = CASES["mlp"].inputs(())
    close(step(ensemble, torch.compile(ensemble, fullgraph=True), inputs), step(other, other, inputs))


def test_compiled_per_member_and_one_member():
    ensemble = stacked("mlp")
    x = torch.randn(E, B, 6)
    compiled = torch.compile(ensemble, fullgraph=True, backend=AOT)
    close([compiled(x, per_member=True)], [ensemble(x, per_member=True)])
    close([compiled(x[0], member=1)], [ensemble(x[0], member=1)])


def test_any_batch_is_one_graph():
    """But for PyTorch's own rules: LayerNorm's keeps the size, and convolutions have one for 16 rows and more."""
    ensemble = ek.stack([nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 4)) for _ in range(E)])
    counter = CompileCounterWithBackend(AOT)
    compiled = torch.compile(ensemble, fullgraph=True, dynamic=True, backend=counter)
    for batch in (8, 5, 33):
        x = torch.randn(batch, 2, 3)
        close([compiled(x)], [ensemble(x)])
    assert counter.frame_count == 1


def test_what_torch_cannot_compile():
    """torch.compile takes torch.nn.LSTM and the like only by request, and breaks the graph there."""
    ensemble = stacked("recurrent")
    with pytest.raises(Exception, match=r"RNN|LSTM|GRU"):
        torch.compile(ensemble, fullgraph=True, backend="eager")(*CASES["recurrent"].inputs(()))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMPILED)
def test_exported(name):
    ensemble = stacked(name, training=False)
    inputs = CASES[name].inputs(())
    program = torch.export.export(ensemble, inputs)
    close(tensors(program.module()(*inputs)), tensors(ensemble(*inputs)))
    assert set(program.state_dict) >= set(ensemble.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_exported_for_any_batch_and_to_a_file():
    ensemble = ek.stack([nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3)) for _ in range(E)])
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(ensemble, (torch.randn(B, 2, 3),), dynamic_shapes={"args": ({0: batch},)})
    file = io.BytesIO()
    torch.export.save(program.run_decompositions(), file)
    file.seek(0)
    x = torch.randn(17, 2, 3)
    close([torch.export.load(file).module()(x)], [ensemble(x)])


def test_per_sample_gradients():
    """torch.func around an ensemble."""
    ensemble = stacked("mlp").double()
    x = torch.randn(B, 6, dtype=torch.float64)
    parameters = dict(ensemble.named_parameters())

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(ensemble, parameters, (row.unsqueeze(0),)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for b in range(B):
        expected = torch.autograd.grad(loss(parameters, x[b]), list(parameters.values()))
        close([g[b] for g in found.values()], list(expected))


# --------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("name", ["mlp", "conv2d", "tokens", "attention"])
def test_autocast(name):
    models = [CASES[name].make() for _ in range(E)]
    ensemble = ek.stack(models)
    inputs = CASES[name].inputs(())
    with torch.autocast("cpu", torch.bfloat16):
        expected = [tensors(model(*inputs)) for model in models]
        result = tensors(ensemble(*inputs))
    for one, all_of_them in zip(zip(*expected), result):
        assert all_of_them.dtype == one[0].dtype
        torch.testing.assert_close(all_of_them, torch.stack(one), rtol=5e-2, atol=5e-2)
    sum(t.float().square().sum() for t in result).backward()
    assert all(p.grad.dtype == torch.float32 for p in ensemble.parameters() if p.grad is not None)


# -------------------------------------------------------------------------------------------------- copies and files


@pytest.mark.parametrize("name", [n for n in CASES if n != "weight_norm"])  # torch pickles no parametrized module
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(name, how):
    ensemble = stacked(name)
    if how == "deepcopy":
        other = copy.deepcopy(ensemble)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(ensemble))
    else:
        file = io.BytesIO()
        torch.save(ensemble, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    inputs = CASES[name].inputs(())
    expected = step(ensemble, ensemble, inputs)
    with torch.no_grad():
        for p in ensemble.parameters():
            p.zero_()
    ensemble.eval()
    close(step(other, other, inputs), expected)
    assert other.training
    assert len(ek.unstack(other)) == E


def test_safetensors(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    for name in ("conv2d", "tied"):
        ensemble, other = stacked(name), stacked(name)
        safetensors.save_model(ensemble, str(tmp_path / "ensemble.safetensors"))
        safetensors.load_model(other, str(tmp_path / "ensemble.safetensors"))
        inputs = CASES[name].inputs(())
        assert torch.equal(tensors(ensemble(*inputs))[0], tensors(other(*inputs))[0])


def test_moves():
    ensemble = stacked("conv2d")
    assert all(p.dtype == torch.float64 for p in ensemble.double().parameters())
    assert ensemble(torch.randn(B, 6, dtype=torch.float64)).dtype == torch.float64
    assert ensemble.norm.num_batches_tracked.dtype == torch.int64
    expected = ensemble(torch.ones(B, 6, dtype=torch.float64))
    moved = ensemble.to(torch.float32, memory_format=torch.channels_last)
    assert moved is ensemble
    assert moved.strided.weight[2].is_contiguous(memory_format=torch.channels_last)
    assert not moved.strided.weight[2].is_contiguous()
    torch.testing.assert_close(moved(torch.ones(B, 6)).double(), expected, rtol=1e-3, atol=1e-3)
    assert moved.to(memory_format=torch.contiguous_format).strided.weight.is_contiguous()
    ensemble = ensemble.double()
    assert ensemble.to("meta")(torch.randn(B, 6, dtype=torch.float64, device="meta")).shape == (E, B, 3)


# ------------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("how", [{"foreach": True}, {"fused": True}, {}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_step_as_on_the_models(kind, how):
    """Elementwise optimizers do to an ensemble what they do to its members."""
    models = [CASES["conv2d"].make().double() for _ in range(E)]
    ensemble = ek.stack(models)
    own = [kind(model.parameters(), lr=0.01, **how) for model in models]
    optimizer = kind(ensemble.parameters(), lr=0.01, **how)
    for _ in range(3):
        x = torch.randn(B, 6, dtype=torch.float64)
        ensemble(x).square().mean((1, 2)).sum().backward()
        for model in models:
            model(x).square().mean().backward()
        for one in (optimizer, *own):
            one.step()
            one.zero_grad()
    for model, again in zip(models, ek.unstack(ensemble)):
        close(list(again.state_dict().values()), list(model.state_dict().values()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around_the_ensemble(reentrant):
    models = [nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4, 3)) for _ in range(E)]
    ensemble, x = ek.stack(models), torch.randn(B, 2, 3, requires_grad=True)
    results = []
    for call in (ensemble, lambda x: checkpoint(ensemble, x, use_reentrant=reentrant)):
        torch.manual_seed(0)
        ensemble.zero_grad(set_to_none=True)
        x.grad = None
        y = call(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad.clone(), *(p.grad.clone() for p in ensemble.parameters())])
    close(*results)


# -------------------------------------------------------------------------------------------------------- processes

WORKER = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, "tests")
from stack_cases import CASES
import effens_kernels as ek
torch.set_num_threads(1)
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
torch.manual_seed(0)
ensemble = ek.stack([CASES["conv1d"].make().double() for _ in range(3)]).eval()
x = torch.randn(8, 6, dtype=torch.float64)
whole = ensemble(x).square().mean()
expected = torch.autograd.grad(whole, list(ensemble.parameters()))
torch.manual_seed(rank)  # the first process's values are everyone's
if rank:
    with torch.no_grad():
        for p in ensemble.parameters():
            p.normal_()
parallel = torch.nn.parallel.DistributedDataParallel(ensemble)
parallel(x[4 * rank : 4 * rank + 4]).square().mean().backward()
for p, e in zip(ensemble.parameters(), expected):
    torch.testing.assert_close(p.grad, e)
try:
    ek.unstack(parallel)
except TypeError as error:
    assert "unstack its .module" in str(error), error
assert len(ek.unstack(parallel.module)) == 3
dist.destroy_process_group()
"""


def test_two_processes():
    """DistributedDataParallel, each process with half of the rows."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(rank), port], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(2)
    ]
    said = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(said)
