"""A contestant as CUDA graphs: the same kernels, without the host's time to issue them."""

from __future__ import annotations

from dataclasses import replace

import torch

from .contestants import Contestant, NotApplicableError
from .contestants.base import output_gradient

SUFFIX = " [graph]"
WARM_UP_STEPS = 3


def graphed(contestant: Contestant, device: str) -> Contestant:
    """Forward, backward, and a whole step, each captured as a graph of its own; a step is what a user would capture."""
    if device != "cuda":
        raise NotApplicableError("CUDA graphs need a GPU")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        gradient = output_gradient(contestant.forward().detach())
        for _ in range(WARM_UP_STEPS):
            contestant.clear()
            contestant.backward(contestant.forward(), gradient)
    torch.cuda.synchronize()

    # The step comes first: gradients that stay in the leaves are then those of the graph of backward, which is checked.
    step, forward, backward = (torch.cuda.CUDAGraph() for _ in range(3))
    contestant.clear()
    with torch.cuda.graph(step, stream=stream):
        contestant.backward(contestant.forward(), gradient)
    contestant.clear()
    with torch.cuda.graph(forward, stream=stream):
        output = contestant.forward()
    with torch.cuda.graph(backward, pool=forward.pool(), stream=stream):
        contestant.backward(output, gradient)
    torch.cuda.synchronize()
    # Only the values: a tape that lives on would tie the leaves to the stream of the capture in eager steps too.
    output = output.detach()

    def replay_forward() -> torch.Tensor:
        forward.replay()
        return output

    return replace(
        contestant,
        name=contestant.name + SUFFIX,
        function=replay_forward,
        arguments=(),
        leaves=(),
        backward=lambda *_: backward.replay(),
        step=step.replay,
    )
