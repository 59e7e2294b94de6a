"""ALL rules of which backend runs, in one table, with reasons in words.

    reference   plain PyTorch, every device and dtype; PyTorch's own autograd
    cpu         C++ engine (csrc/cpu), CPU tensors
    triton      Triton kernels, CUDA tensors (CPU tensors under TRITON_INTERPRET=1)
    cuda        CUDA C++ kernels (csrc/kernels), CUDA tensors (CPU tensors where EFFENS_CUDA_EMULATION runs them)

`backend=` of an op, else EFFENS_BACKEND, selects explicitly and never falls back: it raises and says why.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from . import _env, _native, _tables

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Preferred first, by device type; any other device runs the reference.
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

_HALF = (torch.float16, torch.bfloat16)
_GPU_DTYPES = (torch.float32, *_HALF)
_ALL_DTYPES = (*_GPU_DTYPES, torch.float64)

_MIXING = {"cpu": _ALL_DTYPES, "triton": _GPU_DTYPES, "cuda": _GPU_DTYPES}

# op -> backend -> dtypes it implements.  The reference implements every op in every dtype.
IMPLEMENTED: dict[str, dict[str, tuple[torch.dtype, ...]]] = {
    "grouped_linear": {"cpu": _ALL_DTYPES, "triton": _GPU_DTYPES, "cuda": _GPU_DTYPES},
    "indexed_linear": {"cpu": _ALL_DTYPES, "triton": _GPU_DTYPES, "cuda": _GPU_DTYPES},
    "ragged_linear": {"cpu": _ALL_DTYPES, "triton": _GPU_DTYPES, "cuda": _GPU_DTYPES},
    "ensemble_mlp": {"cpu": _ALL_DTYPES, "triton": _GPU_DTYPES, "cuda": _GPU_DTYPES},  # see `takes_mlp`
    "rank1_linear": {"cpu": _ALL_DTYPES, "triton": _GPU_DTYPES, "cuda": _GPU_DTYPES},
    "rank1_mlp": {"cpu": _ALL_DTYPES, "triton": _GPU_DTYPES, "cuda": _GPU_DTYPES},  # layer by layer
    "ensemble_predict": {"cpu": _ALL_DTYPES, "triton": _GPU_DTYPES, "cuda": _GPU_DTYPES},
    "ensemble_predict_regression": {"cpu": _ALL_DTYPES, "triton": _GPU_DTYPES, "cuda": _GPU_DTYPES},
    "mix_templates": _MIXING,
    "mix_with_noise_": _MIXING,
    "mixture_linear": {"cpu": _ALL_DTYPES, "triton": _GPU_DTYPES, "cuda": _GPU_DTYPES},
    "mixture_conv1d": _MIXING,  # see `mixture_conv_route`
    "mixture_conv2d": _MIXING,
    "mixture_conv_transpose2d": _MIXING,
    "rank1_conv1d": {},  # see `rank1_conv_route`
    "rank1_conv2d": {},
    "rank1_conv_transpose2d": {},
    "sgd_step": {"cpu": _ALL_DTYPES, "triton": _GPU_DTYPES},
    "adamw_step": {"cpu": _ALL_DTYPES, "triton": _GPU_DTYPES},
}

# Of an op without a table of measurements on a GPU (`_tables`), torch's own products are taken where none of B, I and O
# is below this.  A heuristic: such products are bound by arithmetic, and cuBLAS uses instructions that these kernels do
# not (wgmma on sm_90), or has better schedules for float32.  Smaller ones are bound by launches and memory.
CUBLAS_FROM = 512

# And torch's matmul for mix_templates of so many FLOPs per byte of coefficients times templates, at which the kernels'
# ordinary multiply-adds take longer than memory does and tensor cores would not.  A heuristic too, unmeasured: M = T =
# 64 in float32, 32 in 16 bits.
MATMUL_FROM = 16

# Up to so many layers of so many outputs, which a block holds in shared memory, ensemble_mlp is one launch of the CUDA
# kernels (csrc/kernels/mlp.cuh); beyond, and in Triton, each layer is a launch of its own.
MLP_LAYERS = 8
MLP_WIDTH = 256

# On a CPU, with fewer rows B than I*O divided by this, torch's composition is faster, in training or without gradients.
# Measured on one thread of an AVX-512 processor, 2026-11-22, and right within a factor of 2 in B:
#   rank1_linear     I, O of 64 to 1024 and 3072 x 128; one product over the rows of all members, no sums per member
#   grouped_linear   large weights alone; each is packed for a product that reads it once
# Not for float16, whose range the composition's unscaled outputs may leave.
FEW_ROWS = {
    "rank1_linear": {
        torch.float32: {True: 1 << 12, False: 1 << 14},
        torch.bfloat16: {True: 1 << 12, False: 1 << 14},
    },
    "grouped_linear": {torch.float32: {True: 1 << 17, False: 1 << 16}},
}


class Problem(NamedTuple):
    """What the choice of a backend may depend on."""

    op: str
    device: str
    dtype: torch.dtype
    sizes: tuple[int, ...] = ()  # E, B, I, O; of mix_templates M, T, N
    index: int | None = None  # of the device
    training: bool = True  # gradients are wanted


def interpreting() -> bool:
    """Triton's interpreter is on: its kernels then run on CPU tensors, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def why_not_here(backend: str) -> str | None:
    """Why `backend` cannot run in this process, whatever the op; None if it can."""
    return _why_not_here(backend)


# Not to be traced by torch.compile, which cannot ask what this asks.  torch.compiler.assume_constant_result does the
# same, but imports the compiler.
why_not_here._dynamo_marked_constant = True


@cache
def _why_not_here(backend: str) -> str | None:
    if backend == "cpu":
        return _native.why_not()
    if backend == "triton":
        return _why_not_triton()
    if backend == "cuda":
        return _why_not_cuda()
    return None


def _why_not_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible (and TRITON_INTERPRET=1 is not set)"
    if torch.version.cuda and torch.cuda.get_device_capability() < (7, 5):
        return "Triton needs a GPU of compute capability 7.5 or later"
    return None


def _why_not_cuda() -> str | None:
    if not _native.available:
        return _native.why_not()
    if _native.emulates_cuda:
        return None
    if not _native.has_cuda_kernels():
        return "this build has no CUDA C++ kernels"
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible"
    reason = _native.cuda_ops.cuda_why_not()  # an old GPU, a build for others, an old driver
    return f"the CUDA C++ kernels do not run on this GPU: {reason}" if reason else None


def takes_device(backend: str) -> str:
    """The device of the tensors that `backend` takes in this process."""
    if backend == "cpu" or (backend == "triton" and interpreting()) or (backend == "cuda" and _native.emulates_cuda):
        return "cpu"
    return "cuda"


def why_not(backend: str, problem: Problem) -> str | None:
    """Why `backend` cannot run `problem`; None if it can."""
    if backend == "reference":
        return None
    dtypes = IMPLEMENTED[problem.op].get(backend)
    if dtypes is None:
        return f"it has no kernel for {problem.op}" + (
            "" if why_not_here(backend) is None else f" ({why_not_here(backend)})"
        )
    if problem.dtype not in dtypes:
        return f"{problem.op} has no {str(problem.dtype).removeprefix('torch.')} kernel there"
    if problem.device != takes_device(backend):
        return f"the tensors are on {problem.device}, it takes {takes_device(backend)} tensors"
    return why_not_here(backend)


@cache
def selects(backend: str, op: str, dtype: torch.dtype, requested: str | None) -> bool:
    """Whether `select` gives `backend` for tensors on its own device; for the short routes, which ask at every call."""
    try:
        return select(Problem(op, takes_device(backend), dtype), requested) == backend
    except ValueError:
        return False


def has_few_rows(op: str, dtype: torch.dtype, rows: int, inputs: int, outputs: int, training: bool) -> bool:
    """Whether `op` on the CPU is faster as torch's composition (`FEW_ROWS`).

    Not asked when compiling: the answer would bind an exported program to one side of the line.
    """
    lines = FEW_ROWS.get(op, {}).get(dtype)
    if lines is None or torch.compiler.is_compiling():
        return False
    return rows * lines[training] < inputs * outputs


def select(problem: Problem, requested: str | None = None) -> str:
    """The backend that runs `problem`: the requested one, else EFFENS_BACKEND, else the first preference that can."""
    requested = _env.BACKEND if requested is None else requested
    if requested is None:
        if problem.device == "cuda" and problem.sizes:
            backend = _measured(problem)
            if backend is not None and why_not(backend, problem) is None:
                return backend
            if backend is None and _is_bound_by_arithmetic(problem):
                return "reference"
        if problem.op in FEW_ROWS and problem.device == "cpu" and problem.sizes:
            if has_few_rows(problem.op, problem.dtype, *problem.sizes[1:], problem.training):
                return "reference"
        for backend in PREFERENCE.get(problem.device, ("reference",)):
            if why_not(backend, problem) is None:
                return backend
        return "reference"
    if requested not in BACKENDS:
        raise ValueError(
            f"{problem.op}: backend should be None or one of {', '.join(map(repr, BACKENDS))}, got {requested!r}"
        )
    reason = why_not(requested, problem)
    if reason is not None:
        raise ValueError(f"{problem.op}: backend {requested!r} cannot run this call: {reason}")
    return requested


def _is_bound_by_arithmetic(problem: Problem) -> bool:
    if problem.op == "mix_templates":
        rows, count, _ = problem.sizes
        return 2 * rows * count >= MATMUL_FROM * problem.dtype.itemsize * (rows + count)
    if problem.op == "rank1_linear" and problem.dtype == torch.float16:  # whose range unscaled outputs may leave
        return False
    return min(problem.sizes[1:]) >= CUBLAS_FROM


def takes_mlp(widths: Sequence[int], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the CUDA kernels take ensemble_mlp of these layers in one launch; `widths`: I, hidden, O.

    Rows of hidden values stay in shared memory.  The smallest block, with a wide input and layers of 256 in float32,
    takes 124,416 bytes of it; half that width, or 16 bits, 87,552.
    """
    if len(widths) > MLP_LAYERS + 1 or min(widths) == 0 or max(widths[1:]) > MLP_WIDTH:
        return False
    return 2 * max(widths[1:]) * dtype.itemsize <= 4 * MLP_WIDTH or shared_memory(device) >= 124_416


def shared_memory(device: torch.device) -> int:
    """Bytes that a block of a CUDA kernel may have."""
    if device.type != "cuda":  # emulated
        return 227 << 10
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def mixture_route(problem: Problem, templates: int, shared: bool, has_blocks: bool = False) -> str:
    """How mixture_linear runs: as "weights" mixed, then one product per member; the same in "blocks"; or as "outputs".

    Weights and blocks take E products of B rows.  Whole weights are written and read besides; blocks stay in cache,
    but rows are read again for each of them.  Outputs of templates take T products of all rows, which are B if `shared`
    and else E*B, and no weight of a member.

    On a CPU the costs below decide, in about the time of a multiply-add.  They were fitted to 370 sizes (E 4 to 32, T 3
    to 16, B 1 to 256, I and O 64 to 1024, float32, training, one thread of an AVX-512 processor, 2026-11-22), where the
    loser took up to 8 times as long, and the choice at most 1.3 times as long as the best.  On a GPU, which has not
    been measured, the number of products decides.  Not outputs in float16, whose range they may leave.
    """
    members, batch, inputs, outputs = problem.sizes
    rows = batch if shared else members * batch
    size = inputs * outputs
    if problem.device != "cpu":
        costs = {"weights": members * batch, "outputs": templates * rows}
    else:
        products = 2 if shared else 3  # rows per member want their gradient, and outputs computed again
        per_weight, per_output = (60, 8) if shared else (110, 4)
        of_template = (products * rows + per_weight) * size + per_output * members * batch * outputs
        costs = {
            "weights": (members * (products * batch + 90) + 60 * templates) * size,
            "outputs": templates * of_template + (1 << 21),
        }
        read_again = members * batch * max(inputs, outputs) * problem.dtype.itemsize
        if has_blocks and size * members * batch > 0 and (batch <= 32 or read_again <= BLOCKS_READ_AGAIN):
            whole = not shared and mixes_whole_for_inputs(templates * size * problem.dtype.itemsize)
            mixing = 20 + 0.75 * templates + (40 if whole else 0)
            costs["blocks"] = (members * (products * batch + mixing) + 60 * templates) * size
    if problem.dtype == torch.float16:
        del costs["outputs"]
    return min(costs, key=costs.__getitem__)


# What blocks of weights read again and again should stay in L2: x, or the gradient of y.
BLOCKS_READ_AGAIN = 3 << 19


def mixes_whole_for_inputs(template_bytes: int) -> bool:
    """Whether mixture_linear's dx takes weights mixed whole even where all else takes blocks.

    Its blocks are of columns, and templates are read a few numbers here and there; measured slower, 1.2 times, where
    they have more pages than a processor keeps addresses of.
    """
    return template_bytes > 8 << 20


def rank1_conv_route(problem: Problem, requested: str | None = None, pointwise: bool = False) -> str:
    """How a BatchEnsemble convolution, which has no kernels of its own, runs: "reference", "folded" or "rank1_linear".

    Folded into one weight per member, the scales cost work on weights and one copy of the results, forward and
    backward; as factors of images (the reference) they cost two passes over the images forward, more backward, and
    memory for what these keep.  Measured 2026-11-22 on a CPU with AVX-512 and AMX, one thread, float32 and bfloat16,
    4 members of 32 images, forward and backward, in times of PyTorch's convolution of as many images: folded 0.7 to
    1.25, factors 1.0 to 4.2, one grouped convolution 1.05 to 7.0. Factors won where weights are as large as the
    images (256 channels of 8 x 8, 3 x 3 kernels: 1.03 against 1.19 in bfloat16), but by less than what they keep is
    worth. With many small members (16 of 8 images of 16 channels) folding takes 1.4 to 1.6, and nothing else is
    better in both types.
    A `pointwise` convolution, of 1 x 1 kernels on channels_last images, is a linear layer of pixels: there folding
    takes 1.2 to 1.7, as copies count beside so small a product, and the engine's rank1_linear 1.0 to 1.6.  No GPU has
    been measured.
    """
    select(problem, requested)  # refuses what has no kernel
    if (_env.BACKEND if requested is None else requested) is not None:
        return "reference"
    if pointwise and problem.device == "cpu" and selects("cpu", "rank1_linear", problem.dtype, "cpu"):
        return "rank1_linear"
    return "folded"


def mixture_conv_route(problem: Problem, requested: str | None = None) -> tuple[str, bool]:
    """How a convolution of mixed weights runs: the backend that mixes, and whether autograd is to see all of it.

    `problem.sizes` are those of mix_templates: rows, templates, numbers of a template.  Chosen automatically, mixing
    runs where mix_templates would.  The convolution is PyTorch's once per member, see `rank1_conv_route`; for a 1 x 1
    kernel too, where mixture_linear of pixels has not been measured against it.
    """
    if (_env.BACKEND if requested is None else requested) is None:
        return select(problem._replace(op="mix_templates")), False
    backend = select(problem, requested)
    return backend, backend == "reference"


def _measured(problem: Problem) -> str | None:
    if torch.compiler.is_compiling():  # sizes may be symbols, and a table needs numbers
        return None
    return _tables.fastest(problem.op, problem.dtype, problem.sizes, problem.index)
