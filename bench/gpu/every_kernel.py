"""Calls every variant of the CUDA kernels once: what the sanitizers watch.

python -m bench.gpu.every_kernel [--device cuda] [--quick]

Tile sizes, dtypes and TF32, forward and all gradients, odd and even sizes, rows that are aligned and not, shared x or
one per member, each activation; layers by number, and of members of any size; rows and templates of mix_templates in
one slice and in several; perceptrons of which members share nothing, their rows or a layer.  Results are compared with
float64, so that a kernel that does nothing does not pass.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import torch

from effens_kernels import _dispatch, _native
from effens_kernels.ops._activations import ACTIVATIONS
from effens_kernels.ops.ensemble_mlp import reference as ensemble_mlp
from effens_kernels.testing import OPS, Case, IndexedCase, LinearCase, MixCase, RaggedCase, Rank1Case, error

from ..contestants.ensemble_mlp import MLPWorkload

TILES = (0, 1, 2)
MATHS = {
    "float32": (torch.float32, False, 1e-5),
    "tf32": (torch.float32, True, 5e-3),
    "float16": (torch.float16, False, 5e-3),
    "bfloat16": (torch.bfloat16, False, 4e-2),
}
# 130 is more than one tile of every size, the last one nearly empty.
CASES = (
    LinearCase(2, 130, 33, 130, activation="relu"),
    LinearCase(2, 96, 48, 160, activation="gelu"),
    LinearCase(3, 17, 130, 40, shared=True, activation="silu"),
    LinearCase(2, 64, 96, 64, shared=True),
    LinearCase(5, 7, 24, 10, shared=True, activation="relu"),
    LinearCase(2, 40, 264, 24, activation="tanh", x_layout="transposed"),
    LinearCase(2, 40, 40, 40, activation="relu", x_layout="inner", weight_layout="inner"),
    LinearCase(2, 24, 40, 48, x_layout="offset", weight_layout="offset"),
    LinearCase(3, 1, 17, 1, activation="gelu"),
    IndexedCase(4, 130, 33, 130, activation="relu", sources=3, groups=5),
    IndexedCase(3, 40, 264, 24, activation="gelu", x_layout="transposed", groups=4),
    IndexedCase(40, 17, 24, 40, weight_layout="offset", sources=7, groups=70),
    RaggedCase(3, 390, 33, 130, activation="relu"),
    RaggedCase(5, 160, 264, 24, activation="gelu", x_layout="inner"),
    RaggedCase(70, 130, 24, 40, weight_layout="offset"),
    Rank1Case(2, 130, 33, 130, activation="relu"),
    Rank1Case(3, 96, 48, 160, shared=True, activation="gelu"),
    Rank1Case(5, 17, 130, 40, activation="tanh", x_layout="offset", weight_layout="offset"),
    Rank1Case(9, 64, 96, 64, shared=True),
    Rank1Case(1, 1100, 24, 40),
    MixCase((4,), 3, (64, 128)),
    MixCase((5,), 7, (4099,)),
    MixCase((33,), 17, (600,)),
    MixCase((70,), 140, (264,)),
    MixCase((300,), 3, (130,), layout="offset"),
    # relu would flip signs near zero.
    MLPWorkload(2, 130, (33, 64, 64, 8), "gelu", "tanh", shared=False),
    MLPWorkload(3, 17, (300, 130, 5), "silu", "gelu"),
    MLPWorkload(2, 65, (24, 40, 256, 16), "tanh", shared=False, shared_layers=(1,)),
    MLPWorkload(2, 40, (17, 3), None),
)
QUICK = (
    LinearCase(2, 9, 21, 13, shared=True, activation="gelu"),
    LinearCase(2, 8, 16, 24),
    IndexedCase(3, 9, 21, 13, activation="relu", sources=2, groups=5),
    RaggedCase(3, 40, 21, 13, activation="gelu"),
    Rank1Case(3, 9, 21, 13, activation="relu"),
    MixCase((5,), 7, (37,)),
    MLPWorkload(2, 9, (21, 13, 4), "gelu"),
)
OF_CASE = {IndexedCase: "indexed_linear", RaggedCase: "ragged_linear", Rank1Case: "rank1_linear"}  # op
TOO_LITTLE = "too little shared memory"  # an honest refusal of a tile that the GPU has no room for


Results = Iterator[tuple[str, dict[str, tuple[torch.Tensor, ...]]]]


def calls(cases: tuple[Case | MLPWorkload, ...], device: str) -> Results:
    """(name, {"y": (result, exact value), "x": its gradient and so on}) of one forward and backward each."""
    for case in cases:
        if isinstance(case, MixCase):
            yield from _mixing_calls(case, device)
            continue
        if isinstance(case, MLPWorkload):
            yield from _mlp_calls(case, device)
            continue
        op = OPS[OF_CASE.get(type(case), "grouped_linear")]
        indices = {name: o for name, o in case.options().items() if isinstance(o, torch.Tensor)}
        fwd, bwd = (getattr(_native.cuda_ops, f"{op.name}_{direction}") for direction in ("fwd", "bwd"))
        activation = ACTIVATIONS[case.activation]
        save = activation.saves == "preactivation"
        for math, (dtype, tf32, _) in MATHS.items():
            # On the CPU, so that the sanitizer sees nothing but copies beside our kernels.
            *factors, bias = case.inputs_for(dtype, "cpu", seed=0)
            wide = [t.double().requires_grad_() for t in (*factors, bias)]
            z = op.reference(*wide, None, **indices)
            grad = torch.randn(z.shape).to(dtype)
            y = activation.apply(z)
            exact = [y.detach(), *torch.autograd.grad(y, wide, grad.double())]
            # What the kernels' own forward rounds would flip signs near zero of relu: backward is given the exact one.
            saved = (z if save else y).detach().to(device, dtype)
            for tile in TILES:
                name = f"{op.name} {case}, {math}, tile {tile}"
                inputs = [_with_layout(t, device) for t in (*factors, *indices.values())]
                need = (True,) * len(wide)
                try:
                    found = fwd(*inputs, bias.to(device), activation.code, save, tf32, tile)[:1]
                    found += bwd(grad.to(device), *inputs, saved, activation.code, *need, tf32, tile)
                except RuntimeError as refusal:
                    _pass_over(name, refusal)
                    continue
                yield name, dict(zip(("y", *op.arguments), zip((t.cpu() for t in found), exact, strict=True)))


def _mixing_calls(case: MixCase, device: str) -> Results:
    """mix_templates has no activation, no TF32 and two tiles."""
    op = OPS["mix_templates"]
    fwd, bwd = _native.cuda_ops.mix_templates_fwd, _native.cuda_ops.mix_templates_bwd
    for math in ("float32", "float16", "bfloat16"):
        coefficients, templates = (t.flatten(1) for t in case.inputs_for(MATHS[math][0], "cpu", seed=0))
        grad = torch.randn(case.rows, case.columns).to(templates.dtype)
        wide = [t.double().requires_grad_() for t in (coefficients, templates)]
        y = op.reference(*wide)
        exact = [y.detach(), *torch.autograd.grad(y, wide, grad.double())]
        for tile in TILES[:2]:
            inputs = [_with_layout(t, device) for t in (coefficients, templates)]
            for need in ((True, True), (True, False), (False, True)):
                found = fwd(*inputs, tile), *bwd(grad.to(device), *inputs, *need, tile)
                wanted = {
                    name: (t.cpu(), value)
                    for name, t, value, asked in zip(("y", *op.arguments), found, exact, (True, *need), strict=True)
                    if asked
                }
                gradients = "".join(name[0] for name in list(wanted)[1:])
                yield f"{op.name} {case}, {math}, tile {tile}, gradients {gradients}", wanted


def _mlp_calls(case: MLPWorkload, device: str) -> Results:
    """ensemble_mlp has lists of tensors, and hands backward what forward saves."""
    fwd, bwd = _native.cuda_ops.ensemble_mlp_fwd, _native.cuda_ops.ensemble_mlp_bwd
    codes = ACTIVATIONS[case.activation].code, ACTIVATIONS[case.out_activation].code
    layers = range(len(case.widths) - 1)
    names = ["y", "x", *(f"{kind}[{n}]" for kind in ("weights", "biases") for n in layers)]
    for math, (dtype, tf32, _) in MATHS.items():
        x, weights, biases = case.inputs_for(dtype, "cpu", seed=0)
        grad = torch.randn(case.members, case.batch, case.widths[-1]).to(dtype)
        leaves = [t.double().requires_grad_() for t in (x, *weights, *biases)]
        rest = leaves[1 : 1 + len(weights)], leaves[1 + len(weights) :]
        y = ensemble_mlp.ensemble_mlp(leaves[0], *rest, case.activation, case.out_activation)
        exact = [y.detach(), *torch.autograd.grad(y, leaves, grad.double())]
        x, weights, biases = x.to(device), [t.to(device) for t in weights], [t.to(device) for t in biases]
        for tile in TILES:
            name = f"ensemble_mlp {case}, {math}, tile {tile}"
            try:
                y, hidden = fwd(x, weights, biases, *codes, True, tf32, tile)
                found = y, *bwd(grad.to(device), x, weights, y, hidden, *codes, True, tf32, tile)
            except RuntimeError as refusal:
                _pass_over(name, refusal)
                continue
            yield name, dict(zip(names, zip((t.cpu() for t in found), exact, strict=True), strict=True))


def _pass_over(name: str, refusal: RuntimeError) -> None:
    if TOO_LITTLE not in str(refusal):
        raise refusal
    print(f"{name}: {TOO_LITTLE}", flush=True)


def _with_layout(t: torch.Tensor, device: str) -> torch.Tensor:
    """On the device with the same strides and offset, which a plain copy would not keep."""
    room = t.untyped_storage().nbytes() // t.element_size()
    whole = t.as_strided((room,), (1,), 0).to(device)
    return whole.as_strided(t.shape, t.stride(), t.storage_offset())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: in the emulation")
    parser.add_argument("--quick", action="store_true", help="two small shapes instead of all")
    args = parser.parse_args()
    reason = _dispatch.why_not_here("cuda")
    if reason is None and _dispatch.takes_device("cuda") != args.device:
        reason = f"the CUDA kernels take {_dispatch.takes_device('cuda')} tensors here"
    if reason is not None:
        print(f"cannot run: {reason}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    count, wrong = 0, []
    for name, results in calls(QUICK if args.quick else CASES, args.device):
        count += 1
        allowed = MATHS[name.split(", ")[1]][2]
        wrong += [
            f"{name}: {'y' if what == 'y' else f'gradient of {what}'} is off by {error(value, wanted):.1e}"
            for what, (value, wanted) in results.items()
            if not error(value, wanted) <= allowed
        ]
    print(f"{count} variants called, {len(wrong)} results wrong", flush=True)
    print(*wrong[:20], sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
