"""The clock: contestants take turns in random order, so that a disturbance of the machine hits all of them alike.

A turn is a few training steps of one contestant: forward, then backward, each timed.  Short steps are preceded by an
untimed one, since a training loop runs one model and finds its own data in the caches.  Turns go round until the
time budget is spent; the result is the median over all steps, with the 20th and 80th percentile beside it.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from .contestants.base import Contestant, output_gradient

WARM_UP_STEPS = 3
TURN_SECONDS = 0.02
CACHE_SECONDS = 0.01  # a step at least this long does not depend on what ran before it
MIN_ROUNDS = 7


@dataclass(frozen=True)
class Stat:
    """Seconds: median, 20th and 80th percentile of `count` steps."""

    median: float
    p20: float
    p80: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Stat:
        p20, median, p80 = np.percentile(seconds, (20, 50, 80)).tolist()
        return cls(median, p20, p80, len(seconds))


@dataclass(frozen=True)
class Timing:
    """Of training steps: forward, backward, and their sum step by step."""

    forward: Stat
    backward: Stat
    total: Stat


@dataclass
class _Runner:
    contestant: Contestant
    synchronize: Callable[[], None]
    gradient: Tensor = field(init=False)
    steps_per_turn: int = 1
    warm: bool = True
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        """Run untimed, and plan the turns from how long a step then takes."""
        output = self.contestant.forward()
        self.gradient = output_gradient(output)
        self.contestant.backward(output, self.gradient)
        seconds = min(sum(self.step()) for _ in range(WARM_UP_STEPS))
        self.steps_per_turn = max(1, round(TURN_SECONDS / seconds))
        self.warm = seconds < CACHE_SECONDS

    def step(self) -> tuple[float, float]:
        self.contestant.clear()
        self.synchronize()
        begin = perf_counter()
        output = self.contestant.forward()
        self.synchronize()
        middle = perf_counter()
        self.contestant.backward(output, self.gradient)
        self.synchronize()
        return middle - begin, perf_counter() - middle

    def turn(self) -> None:
        if self.warm:
            self.step()
        for _ in range(self.steps_per_turn):
            forward, backward = self.step()
            self.forward.append(forward)
            self.backward.append(backward)
        self.contestant.clear()

    def timing(self) -> Timing:
        total = [f + b for f, b in zip(self.forward, self.backward, strict=True)]
        return Timing(Stat.of(self.forward), Stat.of(self.backward), Stat.of(total))


def measure(
    contestants: Sequence[Contestant],
    seconds: float,
    device: str = "cpu",
    min_rounds: int = MIN_ROUNDS,
    progress: Callable[[float], None] = lambda fraction: None,
) -> dict[str, Timing]:
    """Time the contestants against each other for about `seconds` in all, at least `min_rounds` turns each."""
    runners = [_Runner(c, torch.cuda.synchronize if device == "cuda" else lambda: None) for c in contestants]
    shuffle = random.Random(0).shuffle
    with _no_garbage_collection():
        for runner in runners:
            runner.warm_up()
        begin, rounds = perf_counter(), 0
        while rounds < min_rounds or perf_counter() - begin < seconds:
            shuffle(runners)
            for runner in runners:
                runner.turn()
            rounds += 1
            progress(min(rounds / min_rounds, (perf_counter() - begin) / seconds, 1.0))
    return {runner.contestant.name: runner.timing() for runner in runners}


@contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """Run with this many intra-op threads; compiled code depends on the number, so it is forgotten before and after."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.compiler.reset()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
