"""The Triton kernels compiled ahead of time for sm_80, sm_90 and sm_100, without a GPU: what they take of each.

`launch` is replaced by a recorder and the ops run on meta tensors, so what is compiled is exactly what a call with
these shapes would launch.  Where conftest.py turns the interpreter on, the compiler runs in a process of its own; run
`TRITON_INTERPRET=0 python -m pytest -rA tests/test_triton_aot.py` to see it test by test, with the table of budgets.
"""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton_budgets import SHARED_MEMORY, TYPES, Launch, compile_for, excesses, specialize

from effens_kernels.ops import triton_engine as engine
from effens_kernels.ops._activations import ACTIVATIONS, saves_preactivation
from effens_kernels.ops.ensemble_predict import triton as ensemble_predict
from effens_kernels.ops.ensemble_predict_regression import triton as ensemble_predict_regression
from effens_kernels.ops.grouped_linear import triton as grouped_linear
from effens_kernels.ops.indexed_linear import triton as indexed_linear
from effens_kernels.ops.mix_templates import triton as mix_templates
from effens_kernels.ops.ragged_linear import triton as ragged_linear
from effens_kernels.ops.rank1_linear import triton as rank1_linear

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

# ------------------------------------------------------------------------------------------------ what is launched


@dataclass(frozen=True)
class Call:
    """One forward and backward of grouped_linear, on meta tensors."""

    members: int
    batch: int
    inputs: int
    outputs: int
    dtype: torch.dtype = torch.bfloat16
    activation: str | None = "gelu"
    shared: bool = False
    bias: bool = True
    tf32: bool = False
    weight_inner: bool = False  # stored [E, I, O]
    far: bool = False  # rows of x so far apart that offsets within a tile take 64 bits
    need: tuple[bool, ...] = field(default=(True, True, True))

    op: ClassVar[ModuleType] = grouped_linear

    def __str__(self) -> str:
        words = [
            TYPES[self.dtype] + "_tf32" * self.tf32,
            f"E{self.members}",
            f"B{self.batch}",
            f"I{self.inputs}",
            f"O{self.outputs}",
            str(self.activation),
        ]
        words += ["shared"] * self.shared + ["nobias"] * (not self.bias) + ["w_inner"] * self.weight_inner
        words += ["far"] * self.far
        return "-".join(words)

    def launches(self, capability: int) -> tuple[list[Launch], list[Launch]]:
        """(forward, backward) on a GPU of that compute capability."""
        recorded: list[Launch] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.op, "launch", lambda plan, *tensors: recorded.append(Launch(plan, tensors)))
            patch.setattr(self.op, "capability", lambda device: capability)
            patch.setattr(self.op, "precision", lambda dtype: "tf32" if self.tf32 else "ieee")
            empty = functools.partial(torch.empty, dtype=self.dtype, device="meta")
            factors, indices = self.factors(empty), self.indices(empty)
            bias = empty(self.members, self.outputs) if self.bias else None
            y, z = self.op.fwd(*factors, *indices, bias, self.activation, saves_preactivation(self.activation))
            forward = len(recorded)
            saved = {"nothing": empty(0), "output": y, "preactivation": z}[ACTIVATIONS[self.activation].saves]
            grads = self.op.bwd(empty(y.shape), *factors, *indices, saved, self.activation, *self.need)
        for grad, like, needed in zip(grads, (*factors, bias), self.need, strict=True):
            assert grad.shape == (like.shape if needed else (0,))
        return recorded[:forward], recorded[forward:]

    def factors(self, empty: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return self.x(empty), self.weight(empty, self.members)

    def indices(self, empty: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return ()

    def x(self, empty: Callable[..., Tensor]) -> Tensor:
        x = empty((self.batch, self.inputs) if self.shared else (self.members, self.batch, self.inputs))
        return torch.empty_strided(x.shape, (1 << 40, 1 << 23, 1), dtype=x.dtype, device="meta") if self.far else x

    def weight(self, empty: Callable[..., Tensor], *members: int) -> Tensor:
        if self.weight_inner:
            return empty(*members, self.inputs, self.outputs).mT
        return empty(*members, self.outputs, self.inputs)


@dataclass(frozen=True)
class Rank1Call(Call):
    """One forward and backward of rank1_linear."""

    need: tuple[bool, ...] = field(default=(True,) * 5)

    op: ClassVar[ModuleType] = rank1_linear

    def __str__(self) -> str:
        return f"rank1-{super().__str__()}"

    def factors(self, empty: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        scales = empty(self.members, self.inputs), empty(self.members, self.outputs)
        return self.x(empty), self.weight(empty), *scales


@dataclass(frozen=True)
class IndexedCall(Call):
    """One forward and backward of indexed_linear."""

    sources: int = 8
    groups: int = 32
    index: torch.dtype = torch.int64

    op: ClassVar[ModuleType] = indexed_linear

    def __str__(self) -> str:
        return f"indexed-{super().__str__()}-P{self.sources}-G{self.groups}-{TYPES[self.index]}"

    def indices(self, empty: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return empty(self.groups, dtype=self.index), empty(self.groups, dtype=self.index)

    def x(self, empty: Callable[..., Tensor]) -> Tensor:
        return Call(self.sources, self.batch, self.inputs, self.outputs, far=self.far).x(empty)


@dataclass(frozen=True)
class RaggedCall(Call):
    """One forward and backward of ragged_linear, with N for B."""

    index: torch.dtype = torch.int64

    op: ClassVar[ModuleType] = ragged_linear

    def __str__(self) -> str:
        return f"ragged-{super().__str__()}-{TYPES[self.index]}"

    def indices(self, empty: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return (empty(self.members + 1, dtype=self.index),)

    def x(self, empty: Callable[..., Tensor]) -> Tensor:
        x = empty(self.batch, self.inputs)
        return torch.empty_strided(x.shape, (1 << 23, 1), dtype=x.dtype, device="meta") if self.far else x


@dataclass(frozen=True)
class MixCall:
    """One forward and backward of mix_templates."""

    rows: int
    count: int
    columns: int
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False
    far: bool = False  # rows of templates so far apart that offsets within a tile take 64 bits
    need: tuple[bool, bool] = field(default=(True, True))

    def __str__(self) -> str:
        words = TYPES[self.dtype] + "_tf32" * self.tf32, f"M{self.rows}", f"T{self.count}", f"N{self.columns}"
        return "-".join(("mix", *words)) + "-far" * self.far

    def launches(self, capability: int) -> tuple[list[Launch], list[Launch]]:
        """(forward, backward) on a GPU of that compute capability."""
        recorded: list[Launch] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mix_templates, "launch", lambda plan, *tensors: recorded.append(Launch(plan, tensors)))
            patch.setattr(mix_templates, "capability", lambda device: capability)
            patch.setattr(mix_templates, "precision", lambda dtype: "tf32" if self.tf32 else "ieee")
            empty = functools.partial(torch.empty, dtype=self.dtype, device="meta")
            coefficients, templates = empty(self.rows, self.count), empty(self.count, self.columns)
            if self.far:
                templates = torch.empty_strided(templates.shape, (1 << 27, 1), dtype=self.dtype, device="meta")
            y = mix_templates.fwd(coefficients, templates)
            forward = len(recorded)
            grads = mix_templates.bwd(empty(y.shape), coefficients, templates, *self.need)
        for grad, like, needed in zip(grads, (coefficients, templates), self.need, strict=True):
            assert grad.shape == (like.shape if needed else (0,))
        return recorded[:forward], recorded[forward:]


@dataclass(frozen=True)
class PredictCall:
    """One forward and backward of ensemble_predict or, without classes, of ensemble_predict_regression."""

    members: int
    rows: int
    classes: int = 0
    dtype: torch.dtype = torch.bfloat16
    transposed: bool = False  # stored [B, E, C]
    far: bool = False  # rows so far apart that offsets within a tile take 64 bits
    given: tuple[bool, ...] = field(default=(True,) * 5)  # gradients of results; variances

    def __str__(self) -> str:
        words = "predict", TYPES[self.dtype], f"E{self.members}", f"B{self.rows}", f"C{self.classes}"
        some = "".join("01"[given] for given in self.given) if not all(self.given) else ""
        return "-".join(filter(None, (*words, "transposed" * self.transposed, "far" * self.far, some)))

    def launches(self, capability: int) -> tuple[list[Launch], list[Launch]]:
        """(forward, backward) on a GPU of that compute capability."""
        op = ensemble_predict if self.classes else ensemble_predict_regression
        recorded: list[Launch] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(op, "launch", lambda plan, *tensors: recorded.append(Launch(plan, tensors)))
            patch.setattr(op, "capability", lambda device: capability)
            empty = functools.partial(torch.empty, dtype=self.dtype, device="meta")
            members = empty(self.members, self.rows, *([self.classes] if self.classes else []))
            if self.transposed:
                members = empty(self.rows, self.members, *members.shape[2:]).transpose(0, 1)
            if self.far:
                members = torch.empty_strided(members.shape, (1 << 40, 1 << 30, 1), dtype=self.dtype, device="meta")
            results = op.fwd(members) if self.classes else op.fwd(members, members if self.given[4] else None)
            forward = len(recorded)
            grads = [r if given else r.new_empty(0) for r, given in zip(results, self.given)]
            needs = () if self.classes else (True, self.given[4])
            found = op.bwd(members, results[0], *grads, *needs)
        for grad, needed in zip(found, needs) if needs else [(found, True)]:
            assert grad.shape == (members.shape if needed else (0,))
            assert grad.is_contiguous()
            assert grad.dtype == self.dtype
        return recorded[:forward], recorded[forward:]


# ------------------------------------------------------------------------------------------------ tests

# Each reaches another row of the table of tiles in at least one kernel; the odd ones load element by element.
HUGE, LARGE, MEDIUM, SMALL = (4, 4096, 4096, 4096), (1, 2048, 2048, 2048), (1, 1024, 1024, 1024), (4, 256, 256, 256)
FEW_OUTPUTS, FEW_INPUTS, FEW_ROWS, TINY = (
    (64, 1024, 1024, 16),
    (64, 1024, 16, 1024),
    (64, 8, 1024, 1024),
    (3, 8, 16, 16),
)
ODD, ODD_SMALL, ODD_FEW_OUTPUTS = (1, 1025, 1023, 1021), (4, 255, 257, 259), (64, 1001, 1023, 5)
SHARED = Call(20, 4096, 512, 80, shared=True)
FLOAT, HALF = torch.float32, torch.float16


ALL_BUT_X, ALL_BUT_BIAS, ONLY_X = (False, *[True] * 4), (*[True] * 4, False), (True, *[False] * 4)  # of rank1_linear


def calls(capability: int, *sizes: tuple[int, int, int, int], **options: Any) -> list[tuple[int, Call]]:
    return [(capability, Call(*size, **options)) for size in sizes]


def numbered_calls(kind: type[Call], large: tuple[int, int, int, int], **groups: int) -> list[tuple[int, Call]]:
    """Of indexed_linear or ragged_linear."""
    members, batch, inputs, outputs = large
    odd = members, batch - 3, inputs - 1, outputs - 3
    small, tiny = {**groups, "activation": "relu"}, dict.fromkeys(groups, 1)
    return [
        *((capability, kind(*large, **groups)) for capability in (80, 90, 100)),
        *((capability, kind(*large, **groups, activation=None)) for capability in (80, 90)),
        (90, kind(*odd, **groups, activation="tanh", index=torch.int32)),
        (90, kind(*large, **groups, activation="relu", dtype=FLOAT)),
        (90, kind(*large, **groups, activation="relu", dtype=FLOAT, tf32=True)),
        (90, kind(4, 1024, 256, 256, **small, far=True, index=torch.int32)),
        (90, kind(64, 1024, 1024, 16, **small, dtype=HALF, weight_inner=True, need=(True, False, True))),
        (90, kind(1, 1, 1, 1, **tiny, activation="silu")),
        (90, kind(3, 5, 1, 7, **groups, activation="tanh", bias=False, need=(True, True, False))),
        (86, kind(*large, **groups, activation="relu")),
    ]


def rank1_calls(capability: int, *sizes: tuple[int, int, int, int], **options: Any) -> list[tuple[int, Call]]:
    return [(capability, Rank1Call(*size, **options)) for size in sizes]


CALLS = [
    *calls(90, LARGE, MEDIUM, SMALL, ODD),  # gelu: takes the most registers, and the most time to compile
    *calls(90, FEW_INPUTS, TINY, ODD_SMALL, activation="relu"),
    *calls(90, FEW_OUTPUTS, ODD_FEW_OUTPUTS, activation="relu", need=(False, True, True)),
    *calls(90, FEW_ROWS, activation="relu", need=(True, False, False)),
    *calls(90, HUGE, activation=None),
    *calls(90, LARGE, MEDIUM, ODD, dtype=FLOAT),
    *calls(90, SMALL, ODD_SMALL, dtype=FLOAT, activation="relu"),
    *calls(90, FEW_OUTPUTS, FEW_ROWS, TINY, dtype=FLOAT, activation="relu", need=(False, False, True)),
    *calls(90, LARGE, ODD, dtype=FLOAT, tf32=True),
    *calls(90, MEDIUM, dtype=HALF, activation="relu"),
    *calls(90, SMALL, activation="tanh", need=(True, False, False)),
    *calls(90, LARGE, weight_inner=True, need=(True, False, False)),
    *calls(90, SMALL, far=True, activation="relu"),
    *calls(90, (1, 1, 1, 1), activation="silu"),  # Triton turns every argument that is 1 into a constant
    *calls(90, (3, 5, 1, 7), activation="tanh", bias=False, need=(True, True, False)),
    (90, SHARED),
    (90, replace(SHARED, outputs=10, bias=False, need=(True, True, False))),
    *(pair for c in (80, 100) for pair in calls(c, LARGE, MEDIUM, ODD)),
    *(pair for c in (80, 100) for pair in calls(c, HUGE, activation=None)),
    *calls(80, LARGE, dtype=FLOAT),
    *(pair for c in (80, 100) for pair in calls(c, LARGE, dtype=FLOAT, tf32=True, activation="relu")),
    *(pair for c in (86, 120) for pair in calls(c, LARGE, activation="relu")),  # less shared memory
    (80, SHARED),
    *rank1_calls(90, (32, 1024, 1024, 1024)),
    *rank1_calls(90, (32, 1024, 1024, 1024), activation=None, shared=True, need=ALL_BUT_BIAS),
    *rank1_calls(90, (96, 100, 1024, 1024), activation="relu", need=ONLY_X),  # few rows: all members make one product
    *rank1_calls(90, (31, 101, 1023, 1021), activation="tanh"),
    *rank1_calls(90, (32, 1024, 512, 512), dtype=FLOAT, activation="relu", shared=True),
    *rank1_calls(90, (32, 1024, 512, 512), dtype=FLOAT, tf32=True, activation="relu", need=ALL_BUT_X),
    *rank1_calls(90, (3, 5, 1, 7), dtype=HALF, activation="silu", bias=False, weight_inner=True, need=ALL_BUT_BIAS),
    *(pair for c in (80, 100) for pair in rank1_calls(c, (32, 1024, 1024, 1024))),
    *rank1_calls(80, (96, 100, 1024, 1024), activation=None, shared=True, need=ONLY_X),
    *numbered_calls(IndexedCall, (8, 1024, 1024, 1024), sources=8, groups=32),
    *numbered_calls(RaggedCall, (8, 16384, 1024, 1024)),
    *((90, MixCall(*sizes)) for sizes in ((1, 1, 1), (4, 4, 1 << 20), (16, 16, 1 << 20), (64, 64, 1 << 20))),
    *((90, MixCall(*sizes)) for sizes in ((33, 17, (1 << 20) - 1), (17, 33, (1 << 20) - 1))),
    *((90, MixCall(*sizes, dtype=FLOAT)) for sizes in ((4, 4, 1 << 20), (64, 64, 1 << 20), (33, 17, (1 << 20) - 1))),
    *((90, MixCall(*sizes, dtype=FLOAT, tf32=True)) for sizes in ((16, 16, 1 << 20), (33, 17, (1 << 20) - 1))),
    (90, MixCall(64, 64, 1 << 20, far=True)),
    (90, MixCall(32, 32, 1 << 20, dtype=FLOAT, far=True)),
    *((c, MixCall(*sizes)) for c in (80, 100) for sizes in ((16, 16, 1 << 20), (64, 64, 1 << 20))),
    *((c, MixCall(32, 16, 1 << 20, dtype=FLOAT, tf32=tf32)) for c in (80, 100) for tf32 in (False, True)),
    *((90, PredictCall(8, 65536, classes)) for classes in (1, 10, 100, 1024, 2048)),
    *((90, PredictCall(8, 4096, classes, dtype=FLOAT)) for classes in (17, 1023)),
    (90, PredictCall(5, 300, 1000, dtype=HALF, transposed=True, given=(True, False, False, False, False))),
    (90, PredictCall(1, 1, 3, far=True, given=(False, True, False, True, False))),
    *((c, PredictCall(8, 4096, 1000, dtype=FLOAT)) for c in (80, 100)),
    *((c, PredictCall(8, 64, 50257)) for c in (80, 90, 100)),
    *((c, PredictCall(8, 1 << 20, dtype=FLOAT)) for c in (80, 90, 100)),
    (90, PredictCall(1, 1001, transposed=True, given=(True, False, True, True, False))),
]


class TestCompiled:
    __test__ = not INTERPRETING

    @pytest.mark.parametrize(("capability", "call"), CALLS, ids=[f"sm_{c}-{call}" for c, call in CALLS])
    def test_budgets(self, capability: int, call: Call | MixCall | PredictCall) -> None:
        problems = [
            problem
            for launches in call.launches(capability)
            for launch in launches
            for problem in excesses(launch, capability)
        ]
        assert not problems, "\n".join(problems)

    def test_a_kernel_that_spills_is_caught(self) -> None:
        (launch,), _ = Call(1, 1024, 1024, 1024, dtype=torch.float32, activation="relu").launches(90)
        crowded = launch.changed(num_warps=1)
        assert any("spills" in problem and " 0 in loops" not in problem for problem in excesses(crowded, 90))

    def test_float32_uses_tensor_cores_only_with_tf32(self) -> None:
        for tf32 in (False, True):
            (launch,), _ = Call(1, 1024, 1024, 1024, dtype=torch.float32, tf32=tf32).launches(90)
            assert bool(compile_for(launch, 90).instructions["wgmma"]) == tf32

    @pytest.mark.parametrize("kind", [IndexedCall, RaggedCall])
    def test_one_kernel_for_any_number_of_groups_and_rows(self, kind: type[Call]) -> None:
        """What Triton compiles depends on these only by the choice of a tile, whatever divides them."""
        seen = {}
        for count in (1, 2, 15, 16, 17, 48, 1000, 1024, 4096):
            sizes = {"batch": 64, "sources": count, "groups": 3 * count} if kind is IndexedCall else {"batch": count}
            for launch in itertools.chain(*kind(members=5, inputs=96, outputs=80, **sizes).launches(90)):
                switches = tuple(launch.plan.switches.items())
                seen.setdefault((launch.name, switches), set()).add(specialize(launch).hash())
        assert all(len(hashes) == 1 for hashes in seen.values())


@pytest.mark.skipif(not INTERPRETING, reason="the tests of TestCompiled run in this process")
def test_compiled_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", __file__, "-k", "TestCompiled"]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    print(run.stdout, run.stderr)
    assert run.returncode == 0
    assert f"{len(CALLS) + 4} passed" in run.stdout


@pytest.mark.parametrize("kind", list(engine.TILES))
def test_every_tile_of_the_table_is_compiled(kind: str) -> None:
    dtype = torch.bfloat16 if kind == "tensor" else torch.float32
    launched = {
        (launch.tile.BLOCK_M, launch.tile.BLOCK_N)
        for capability, call in CALLS
        if capability == 90 and isinstance(call, Call) and call.dtype == dtype and not call.tf32
        for launches in call.launches(capability)
        for launch in launches
        if "BLOCK_M" in launch.plan.switches
    }
    assert launched == {(tile.BLOCK_M, tile.BLOCK_N) for tile in engine.TWICE[kind] + engine.TILES[kind]}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_launches(shared: bool, activation: str | None) -> None:
    """One launch forward and two backward, at most, and x reaches them as it came: not expanded, not copied."""
    for need in [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)]:
        forward, backward = Call(7, 33, 20, 10, shared=shared, activation=activation, need=need).launches(90)
        assert [launch.name for launch in forward] == ["grouped_linear_fwd"]
        assert len(backward) == need[0] + (need[1] or need[2])
        largest = max(7 * 33 * 10, 7 * 33 * 20 * (not shared), 7 * 20 * 10)
        for launch in forward + backward:
            assert max(a.numel() for a in launch.tensors if a is not None) <= largest


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_launches_of_rank1_linear(shared: bool, activation: str | None) -> None:
    """One launch forward and three backward, at most; x comes as it is and no G_e is written."""
    members, batch, inputs, outputs = 7, 65, 200, 100
    for need in itertools.product((True, False), repeat=5):
        call = Rank1Call(members, batch, inputs, outputs, shared=shared, activation=activation, need=need)
        forward, backward = call.launches(90)
        assert [launch.name for launch in forward] == ["rank1_linear_fwd"]
        sums = any(need[1:]) + any(need[1:4])  # db alone has no parts
        assert len(backward) == need[0] + sums
        for launch in forward + backward:
            for tensor in launch.tensors:
                assert tensor is None or tensor.numel() < members * outputs * inputs
                assert tensor is None or tensor.shape != (members, batch, inputs) or not shared


@pytest.mark.parametrize("kind", [IndexedCall, RaggedCall])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_launches_of_indexed_and_ragged_linear(activation: str | None, kind: type[Call]) -> None:
    """One launch forward and two backward, at most; x and W come as they are, whatever groups and rows name them."""
    groups = {"sources": 5, "groups": 60} if kind is IndexedCall else {}
    name = kind.op.__name__.split(".")[-2]
    for need in itertools.product((True, False), repeat=3):
        forward, backward = kind(7, 33, 20, 10, activation=activation, need=need, **groups).launches(90)
        assert [launch.name for launch in forward] == [f"{name}_fwd"]
        dgrad, wgrad = [f"{name}_dgrad"] * need[0], [f"{name}_wgrad"] * (need[1] or need[2])
        assert [launch.name for launch in backward] == dgrad + wgrad
        largest = 60 * 33 * 10 if groups else 7 * 20 * 10  # y, or W
        for launch in forward + backward:
            assert max(a.numel() for a in launch.tensors if a is not None) <= largest


def test_rows_and_groups_that_32_bits_cannot_count_are_refused() -> None:
    with pytest.raises(ValueError, match="ragged_linear: 2147483640 rows of 5 members are more"):
        RaggedCall(5, 2**31 - 8, 1, 1).launches(90)
    with pytest.raises(ValueError, match="indexed_linear: a sum over 524288 groups of 131072 terms has"):
        IndexedCall(1, 1 << 17, 1, 1, groups=1 << 19, sources=1).launches(90)


def test_launches_of_mix_templates() -> None:
    """One launch forward; backward one for both gradients, where one tile has all rows, and one that adds parts."""
    main, add, mix = "mix_templates_bwd", "mix_templates_add", "mix_templates_fwd"
    for rows, need, expected in (
        (9, (True, True), [main, add]),
        (9, (True, False), [main, add]),
        (9, (False, True), [mix]),
        (9, (False, False), []),
        (65, (True, True), [mix, main, add]),
    ):
        forward, backward = MixCall(rows, 5, 1000, need=need).launches(90)
        assert [launch.name for launch in forward] == [mix]
        assert [launch.name for launch in backward] == expected


def test_launches_of_ensemble_predict() -> None:
    """One each way, or three forward where rows are long, which write nothing of all members' classes."""
    main, backward = "ensemble_predict_fwd", "ensemble_predict_bwd"
    for classes, forward, expected in (
        (1, [main], [backward]),
        (2048, [main], [backward]),
        (2049, ["ensemble_predict_stats", main, "ensemble_predict_add"], ["ensemble_predict_bwd_long"]),
    ):
        launched = PredictCall(5, 3000, classes).launches(90)
        assert [[launch.name for launch in launches] for launches in launched] == [forward, expected]
        logits, parts = 5 * 3000 * classes, 4 * 2 * 3000
        for launch in launched[0]:
            sizes = [tensor.numel() for tensor in launch.tensors if tensor is not None]
            assert all(size in (logits, 3000 * classes, 5 * 3000, 3000, parts) for size in sizes)
            assert sizes.count(logits) == (launch.name != "ensemble_predict_add")
        assert PredictCall(5, 0, classes).launches(90) == ([], [])
    names = [[launch.name for launch in launches] for launches in PredictCall(5, 3000).launches(90)]
    assert names == [["ensemble_predict_regression_fwd"], ["ensemble_predict_regression_bwd"]]
    assert PredictCall(5, 0).launches(90) == ([], [])


def test_parts_of_mix_templates_are_bounded() -> None:
    for rows, count, columns in ((4, 4, 10**8), (64, 64, 10**6), (300, 300, 10**5), (2, 2, 100)):
        for dtype in (FLOAT, HALF):
            _, backward = MixCall(rows, count, columns, dtype=dtype).launches(90)
            parts = backward[-1].tensors[0]
            tiles = -(-rows // 64) * -(-count // 64)
            assert parts.shape[0] <= max(1, 4 * engine.fill(90) // tiles)
            assert parts.numel() * 4 <= max(rows, count) * columns * dtype.itemsize


def test_parts_are_bounded() -> None:
    """Groups of members are as few as fill the GPU, so that the parts of dW are no larger than its tiles together."""
    for members, width in ((512, 64), (512, 1024), (3, 1024), (64, 8192)):
        _, (_, wgrad, _) = Rank1Call(members, 128, width, width).launches(90)
        tile, (dw, dr, ds) = wgrad.tile, wgrad.tensors[6:9]
        assert dw.numel() <= max(width * width, 2 * engine.fill(90) * tile.BLOCK_M * tile.BLOCK_N)
        assert dr.numel() <= members * width * -(-width // tile.BLOCK_M)
        assert ds.numel() <= members * width * -(-width // tile.BLOCK_N)


def test_no_empty_grid_of_mix_templates() -> None:
    for sizes in ((0, 4, 3), (4, 3, 0), (0, 1, 0)):
        assert MixCall(*sizes).launches(90) == ([], [])


@pytest.mark.parametrize("kind", [Call, Rank1Call, IndexedCall, RaggedCall])
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_no_empty_grid(capability: int, kind: type[Call]) -> None:
    for sizes in ((0, 4, 3, 2), (2, 0, 3, 2), (2, 4, 0, 3), (2, 4, 3, 0), (0, 0, 0, 0)):
        for shared in (False, True):
            for launches in kind(*sizes, shared=shared).launches(capability):
                assert all(launch.plan.programs > 0 for launch in launches)


def test_wide_offsets() -> None:
    """Strides that could overflow 32 bits within a tile are noticed; large members alone are not such."""
    assert not engine.Layout.of(8192, 8192, (8192 * 8192, 8192, 1)).wide
    assert engine.Layout.of(64, 64, (64, 1 << 22, 1)).wide
    assert engine.Layout.of(64, 64, (64, 1, 1 << 22)).wide
    assert engine.Layout.of(64, 64, (128, 64, 1), (0, 1, 64)).aligned
    assert not engine.Layout.of(64, 64, (128, 65, 1)).aligned
    assert not engine.Layout.of(64, 10, (128, 64, 1)).aligned
