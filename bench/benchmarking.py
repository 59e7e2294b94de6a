"""What the pytest-benchmark suites share: one test for each (workload, contestant), grouped by workload."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from .contestants import Contestant, NotApplicableError, Problem, Suite
from .contestants.base import LIMIT, LOOP, OURS, check_equal, output_gradient, results
from .timing import fixed_threads

ROUNDS, WARM_UP_ROUNDS = 20, 3


def cases(suite: Suite) -> list:
    """Parameters (workload, contestant's name) for `pytest.mark.parametrize`."""
    return [
        pytest.param(workload, name, id=f"{workload}-{name.replace(' ', '_')}")
        for workload in suite.workloads
        for name in (*suite.peers, OURS, LIMIT)
    ]


def run(benchmark: Callable, suite: Suite, workload: object, name: str, threads: int = 1) -> None:
    """Time forward + backward of one contestant, after checking that it computes what the loop does."""
    problem = Problem(workload, torch.float32, "cpu")
    benchmark.group = f"{suite.name}: {workload}"
    with fixed_threads(threads):
        contestant = _verified(suite, problem, name)
        gradient = output_gradient(contestant.forward())

        def step() -> None:
            contestant.backward(contestant.forward(), gradient)

        benchmark.pedantic(step, setup=contestant.clear, rounds=ROUNDS, warmup_rounds=WARM_UP_ROUNDS)


def _verified(suite: Suite, problem: Problem, name: str) -> Contestant:
    """The contestant, checked against the loop; a peer that cannot run the problem skips the test and says why."""
    if name == LIMIT:
        return suite.limit(problem)
    expected = _results_of_loop(suite.peers[LOOP], problem)
    if name == OURS:
        contestant = suite.ours(problem)[0]
        check_equal(results(contestant), expected)
        return contestant
    try:
        contestant = suite.peers[name](problem)
        check_equal(results(contestant), expected)
    except (NotApplicableError, RuntimeError) as error:
        pytest.skip(f"not applicable: {error}")
    return contestant


@lru_cache(maxsize=1)
def _results_of_loop(loop: Callable[[Problem], Contestant], problem: Problem) -> dict[str, Tensor]:
    return results(loop(problem))
