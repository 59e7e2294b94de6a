"""What the documentation shows runs: the examples of docstrings, and the Python of its pages."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest
import torch
from common import ROOT

import effens_kernels

PACKAGES = (
    effens_kernels.distributed,
    effens_kernels.ops,
    effens_kernels.nn,
    effens_kernels.ensembles,
    effens_kernels.exchange.tabm,
    effens_kernels.exchange.torch_uncertainty,
    effens_kernels.losses,
    effens_kernels.metrics,
    effens_kernels.optim,
)
PUBLIC = [
    (package, name) for package in PACKAGES for name in package.__all__ if not inspect.ismodule(getattr(package, name))
]
GUIDES = (
    "choosing",
    "exchange",
    "hyperparameter-ensembles",
    "layer-ensembles",
    "mixture-ensembles",
    "sharding",
    "training-ensembles",
    "your-model",
)
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in GUIDES)]


def modules() -> list[str]:
    """Every module of the package but those that import Triton, or are no Python."""
    found = pkgutil.walk_packages(effens_kernels.__path__, "effens_kernels.")
    return [m.name for m in found if "triton" not in m.name and m.name.split(".")[-1] not in ("__main__", "_C")]


def run(test: doctest.DocTest) -> None:
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    runner.run(test, out=said.append, clear_globs=False)
    assert runner.failures == 0, "".join(said)


@pytest.mark.parametrize("name", modules())
def test_examples_of_module(name):
    module = importlib.import_module(name)
    for test in doctest.DocTestFinder().find(module):
        run(test)


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=[f"{package.__name__}.{name}" for package, name in PUBLIC])
def test_every_public_name_is_documented_by_an_example(package, name):
    documented = getattr(package, name)
    text = inspect.getdoc(documented)
    assert text, f"{name} has no docstring"
    assert doctest.DocTestParser().get_examples(text), f"{name} has no example"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page(page):
    """A page's Python blocks run in order, as one program."""
    text = page.read_text() if page.exists() else ""
    names: dict[str, object] = {"__name__": page.stem}
    torch.manual_seed(0)
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        line = text[: block.start(1)].count("\n")
        if ">>>" in block[1]:
            test = doctest.DocTestParser().get_doctest(block[1], names, f"{page.name} line {line}", str(page), line)
            run(test)
            names.update(test.globs)
        else:
            exec(compile("\n" * line + block[1], str(page), "exec"), names)
