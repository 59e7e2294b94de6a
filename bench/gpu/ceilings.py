"""The part `ceilings`: what this device can do at most, measured: bytes copied and products of a GEMM library."""

from __future__ import annotations

import torch

from ..timing import Stat, clock
from .context import Context
from .precision import PRECISIONS, precision

COPY_BYTES = 4 << 30  # far more than any L2
SIDE = 8192
REPEATS = {"cuda": 20, "cpu": 3}


def run(context: Context) -> None:
    context.data["copy"] = copy(context.device)
    context.save()
    for name in PRECISIONS:
        context.data[name] = products(name, context.device)
        context.save()


def copy(device: str) -> dict[str, float]:
    """Bytes read plus bytes written, by second."""
    count = 1 << 20
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        count = min(COPY_BYTES, free // 4)
    source = torch.randint(256, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _seconds(lambda: target.copy_(source), device)
    return {"bytes": 2 * count, "TB/s": 2 * count / seconds.median * 1e-12, **_spread(seconds)}


def products(name: str, device: str) -> dict[str, float]:
    """A square product on random data: zeros take less power, and run faster than data ever does."""
    side, (dtype, _) = SIDE if device == "cuda" else 64, PRECISIONS[name]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    with precision(name):
        seconds = _seconds(lambda: torch.mm(a, b, out=c), device)
    return {"side": side, "TFLOP/s": 2 * side**3 / seconds.median * 1e-12, **_spread(seconds)}


def _seconds(body: object, device: str) -> Stat:
    ticks = clock(device)
    for _ in range(3):
        body()
    marks = []
    for _ in range(REPEATS[device]):
        begin = ticks.mark()
        body()
        marks.append((begin, ticks.mark()))
    ticks.wait()
    return Stat.of([max(1e-9, ticks.seconds(*pair)) for pair in marks])


def _spread(seconds: Stat) -> dict[str, float]:
    return {"seconds": seconds.median, "p20": seconds.p20, "p80": seconds.p80}
