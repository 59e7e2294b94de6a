"""The clock: contestants take turns in random order, so that a disturbance of the machine hits all of them alike.

A turn is a few training steps of one contestant: forward, then backward, each timed.  Short steps are preceded by an
untimed one, since a training loop runs one model and finds its own data in the caches.  Turns go round until the
time budget is spent; the result is the median over all steps, with the 20th and 80th percentile beside it.

On a GPU the clock is CUDA events.  The steps of a turn are issued one after the other without waiting, as a training
loop does, so that a step costs the GPU's time or the host's, whichever is longer.
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
MAX_STEPS_PER_TURN = 100  # of a GPU: the launches that may wait in its queue are limited


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


class HostClock:
    """For devices whose operations are done when they return."""

    max_steps = 10**9

    def mark(self) -> float:
        return perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def wait(self) -> None:
        """Until all marks are reached."""


class EventClock:
    """CUDA events: when the GPU reached a point of the current stream."""

    max_steps = MAX_STEPS_PER_TURN

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) * 1e-3

    def wait(self) -> None:
        torch.cuda.synchronize()


def clock(device: str) -> HostClock | EventClock:
    return EventClock() if device == "cuda" else HostClock()


def nothing() -> None:
    pass


@dataclass
class _Runner:
    contestant: Contestant
    clock: HostClock | EventClock
    before: Callable[[], None]  # every step, untimed
    gradient: Tensor = field(init=False)
    steps_per_turn: int = 1
    warm: bool = True
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)

    def warm_up(self) -> None:
        """Run untimed, and plan the turns from how long a step then takes."""
        output = self.contestant.forward()
        self.gradient = output_gradient(output)
        self.contestant.backward(output, self.gradient)
        del output
        seconds = max(1e-6, min(sum(self.steps(1)[0][:2]) for _ in range(WARM_UP_STEPS)))
        self.steps_per_turn = min(max(1, round(TURN_SECONDS / seconds)), self.clock.max_steps)
        self.warm = seconds < CACHE_SECONDS

    def step(self) -> list:
        """Marks before forward, between, and after backward; then before and after both as one call, if it has one."""
        self.contestant.clear()
        self.before()
        marks = [self.clock.mark()]
        output = self.contestant.forward()
        marks.append(self.clock.mark())
        self.contestant.backward(output, self.gradient)
        marks.append(self.clock.mark())
        if self.contestant.step is not None:
            self.before()
            marks.append(self.clock.mark())
            self.contestant.step()
            marks.append(self.clock.mark())
        return marks

    def steps(self, count: int) -> list[tuple[float, float, float]]:
        """Seconds of forward, backward, and both."""
        marks = [self.step() for _ in range(count)]
        self.clock.wait()
        found = []
        for begin, middle, end, *whole in marks:
            forward, backward = self.clock.seconds(begin, middle), self.clock.seconds(middle, end)
            found.append((forward, backward, self.clock.seconds(*whole) if whole else forward + backward))
        return found

    def turn(self) -> None:
        if self.warm:
            self.steps(1)
        for forward, backward, total in self.steps(self.steps_per_turn):
            self.forward.append(forward)
            self.backward.append(backward)
            self.total.append(total)
        self.contestant.clear()

    def timing(self) -> Timing:
        return Timing(Stat.of(self.forward), Stat.of(self.backward), Stat.of(self.total))


def measure(
    contestants: Sequence[Contestant],
    seconds: float,
    device: str = "cpu",
    min_rounds: int = MIN_ROUNDS,
    progress: Callable[[float], None] = lambda fraction: None,
    before: Callable[[], None] = nothing,
) -> dict[str, Timing]:
    """Time the contestants against each other for about `seconds` in all, at least `min_rounds` turns each.

    `before` runs untimed before every step.
    """
    runners = [_Runner(c, clock(device), before) for c in contestants]
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
