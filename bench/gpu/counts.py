"""What a call costs besides its kernels' time: how many are launched, and how long the host takes to issue them."""

from __future__ import annotations

import re
from time import perf_counter
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from ..contestants import Contestant
from ..contestants.base import output_gradient
from ..timing import Stat, clock

# Work of the GPU that is no kernel.
NO_KERNEL = re.compile(r"Memcpy|Memset|.*\bSync\b")
REPEATS = {"cuda": 500, "cpu": 2}
HOST_SECONDS = 0.5  # for one contestant, where steps are long
PER_WAIT = {"cuda": 20, "cpu": 1}  # calls: a full launch queue would make the host wait


def launches(contestant: Contestant, device: str) -> dict[str, Any]:
    """Kernels of one forward and one backward, by name."""
    if device != "cuda":
        return {"reason": "kernels are counted on a GPU alone"}
    contestant.clear()
    output = contestant.forward()
    gradient = output_gradient(output.detach())
    contestant.backward(output, gradient)
    contestant.clear()
    forward, backward = [], []
    found: list[Any] = []
    with _recording(forward):
        found.append(contestant.forward())
    with _recording(backward):
        contestant.backward(found.pop(), gradient)
    contestant.clear()
    if not forward:
        return {"reason": "the profiler saw no kernel"}
    return {
        "forward": len(forward),
        "backward": len(backward),
        "forward kernels": [name[:60] for name in forward[:6]],
        "backward kernels": [name[:60] for name in backward[:6]],
    }


class _recording:
    """Fills a list with the names of the kernels that run inside."""

    def __init__(self, names: list[str]) -> None:
        self.names = names

    def __enter__(self) -> None:
        torch.cuda.synchronize()
        self.profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        self.profile.__enter__()

    def __exit__(self, *error: object) -> None:
        torch.cuda.synchronize()
        self.profile.__exit__(*error)
        self.names += [
            event.name
            for event in self.profile.events()
            if event.device_type == DeviceType.CUDA
            and not getattr(event, "is_user_annotation", False)
            and not NO_KERNEL.match(event.name)
        ]


def host_seconds(contestant: Contestant, device: str) -> dict[str, dict[str, float]]:
    """Until forward and backward return to Python; the GPU's work may go on."""
    ticks = clock(device)
    gradient = output_gradient(contestant.forward().detach())
    forward, backward = [], []
    ticks.wait()
    begin = perf_counter()
    contestant.backward(contestant.forward(), gradient)
    ticks.wait()
    repeats = min(REPEATS[device], max(2, round(HOST_SECONDS / (perf_counter() - begin))))
    for n in range(repeats + PER_WAIT[device]):  # the first ones warm up
        contestant.clear()
        if n % PER_WAIT[device] == 0:
            ticks.wait()
        begin = perf_counter()
        output = contestant.forward()
        middle = perf_counter()
        contestant.backward(output, gradient)
        end = perf_counter()
        if n >= PER_WAIT[device]:
            forward.append(middle - begin)
            backward.append(end - middle)
    ticks.wait()
    contestant.clear()
    return {"forward": vars(Stat.of(forward)), "backward": vars(Stat.of(backward))}
