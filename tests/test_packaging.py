"""What a user installs: version, import without anything optional, configuration, and what the binary depends on."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import effens_kernels
from effens_kernels import _config, _env, _native

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTION = "effens-kernels"


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python on `arguments` with none of the package's variables set but those given."""
    inherited = {name: value for name, value in os.environ.items() if name not in _env.VARIABLES}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env={**inherited, **environment}, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def distribution() -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("runs from a source tree that is not installed")


def test_version_is_the_installed_one(distribution):
    assert effens_kernels.__version__ == distribution.version


def test_build_asks_for_the_torch_that_is_declared(distribution):
    backend = (ROOT / "_build_backend" / "toolchain.py").read_text()
    major, minor = re.search(r"MIN_TORCH = \((\d+), (\d+)\)", backend).groups()
    assert f"torch>={major}.{minor}" in distribution.requires


def test_import_without_the_compiled_extension():
    code = (
        "import effens_kernels; from effens_kernels import _native; "
        "assert not _native.available and _native.ops is None and not _native.has_cuda_kernels(); "
        "print(_native.why_not())"
    )
    result = run_python("-c", code, EFFENS_NATIVE="0")
    assert result.returncode == 0, result.stderr
    assert "EFFENS_NATIVE=0" in result.stdout


def test_import_pulls_in_nothing_slow_or_optional():
    code = (
        "import sys, torch; before = set(sys.modules); import effens_kernels; "
        "print(*sorted({name for name in set(sys.modules) - before if not name.startswith('effens_kernels')}))"
    )
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    slow = {"triton", "sympy", "networkx", "torch._dynamo", "torch._inductor", "torch._functorch", "torch.onnx"}
    assert slow.isdisjoint(result.stdout.split())


@pytest.mark.parametrize("name", ["EFFENS_BACKEND", "EFFENS_NATIVE", "EFFENS_CPU_ISA"])
def test_bad_variable_is_an_error_that_lists_the_choices(name):
    result = run_python("-c", "import effens_kernels", **{name: "nonsense"})
    assert result.returncode != 0
    assert "ValueError" in result.stderr
    assert f"{name} should be one of {', '.join(_env.VARIABLES[name].choices)}; got 'nonsense'" in result.stderr


def test_empty_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("EFFENS_CUDA", "")
    assert _env.get("EFFENS_CUDA") == "auto"
    assert not _env.is_set("EFFENS_CUDA")


def test_readme_has_the_table_of_variables():
    assert _env.markdown_table() in (ROOT / "README.md").read_text()


def test_module_prints_the_configuration():
    result = run_python("-m", "effens_kernels", EFFENS_NATIVE="0")
    assert result.returncode == 0, result.stderr
    for expected in (effens_kernels.__version__, "reference", "available", "switched off by EFFENS_NATIVE=0"):
        assert expected in result.stdout


def test_config_gives_a_reason_for_each_backend():
    backends = _config.config()["backends"]
    assert set(backends) == set(_env.VARIABLES["EFFENS_BACKEND"].choices)
    assert backends["reference"] == "available"
    assert all(backends.values())


@pytest.fixture(scope="module")
def undefined_symbols() -> list[str]:
    """What the extension takes from other libraries."""
    if not _native.LIBRARY.exists():
        pytest.skip(f"{_native.LIBRARY} was not built")
    if shutil.which("nm") is None:
        pytest.skip("there is no nm here")
    command = ["nm", "-D", "--undefined-only", "-P", str(_native.LIBRARY)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[0].split("@")[0] for line in lines]


def test_binary_depends_on_no_python_version(undefined_symbols):
    assert _native.LIBRARY.name == "_C.abi3.so"
    assert not [name for name in undefined_symbols if name.startswith(("Py", "_Py"))]


def test_binary_depends_on_no_torch_version(undefined_symbols):
    # C++ names of torch change between releases; its C functions are the stable ABI.
    assert not [name for name in undefined_symbols if re.match(r"_Z(T[VIS])?NK?(2at|3c10|5torch|6caffe2)", name)]
