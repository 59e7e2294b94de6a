"""The one table of parts: what each does, how long it may take, and which sources its result depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from .families import each_column

LIMIT = 480.0  # seconds of any part
PACKAGE = ("effens_kernels", "csrc", "setup.py", "_build_backend")
TRITON_SHARDS = 3


@dataclass(frozen=True)
class Part:
    name: str
    what: str
    function: str  # "module:function", imported in the part's own process
    arguments: tuple[str, ...] = ()
    seconds: float = 240.0  # that it usually takes: less left, and it is not begun
    sources: tuple[str, ...] = PACKAGE
    needs_extension: bool = True
    resumes: bool = False  # what an interrupted run has measured is kept

    def run(self) -> Callable[..., None]:
        module, function = self.function.split(":")
        return getattr(import_module(f"bench.gpu.{module}"), function)


TESTS = (*PACKAGE, "tests")
BENCH = (*PACKAGE, "bench")

PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part("build", "the extension, for this GPU alone", "build:run", seconds=200, needs_extension=False),
        Part("tests-cuda", "the tests of backend cuda", "suite:run", ("cuda",), 120, TESTS),
        *(
            Part(
                f"tests-triton-{n}",
                f"the tests of backend triton, {n} of {TRITON_SHARDS}",
                "suite:run",
                ("triton", f"{n}/{TRITON_SHARDS}"),
                240,
                TESTS,
            )
            for n in range(1, TRITON_SHARDS + 1)
        ),
        Part("memcheck", "every kernel, accesses watched", "sanitizer:run", ("memcheck",), 120, BENCH),
        Part("racecheck", "every kernel, shared memory watched", "sanitizer:run", ("racecheck",), 240, BENCH),
        Part("ceilings", "copy bandwidth, GEMM rates", "ceilings:run", (), 30, ("bench",), needs_extension=False),
        *(
            Part(family.part(column), column.title, "bench:run", (family.name, column.name), 90, BENCH, resumes=True)
            for family, column in each_column()
        ),
    )
}
