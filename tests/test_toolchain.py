"""What the build makes of the machine's compilers (`_build_backend/toolchain.py`)."""

from __future__ import annotations

import sys

import pytest
from common import ROOT

sys.path.insert(0, str(ROOT / "_build_backend"))

import toolchain


def codes(flags: list[str]) -> list[str]:
    return [flag.rsplit("code=", 1)[1] for flag in flags]


def test_architectures_become_flags():
    flags = toolchain.gencode_flags("8.0+PTX;9.0a 10.0a")
    assert flags[0] == "-gencode=arch=compute_80,code=sm_80"
    assert codes(flags) == ["sm_80", "compute_80", "sm_90a", "sm_100a"]
    assert codes(toolchain.gencode_flags("Hopper")) == ["sm_90", "compute_90"]


def test_architectures_that_the_kernels_or_nvcc_lack_are_left_out(capsys):
    assert codes(toolchain.gencode_flags("7.5;8.6+PTX")) == ["sm_86", "compute_86"]
    assert "no CUDA kernels for 7.5: they need 8.0 or later" in capsys.readouterr().out
    assert codes(toolchain.gencode_flags("8.0;9.0a;10.0a", {"80", "90"})) == ["sm_80", "sm_90a"]
    assert "no CUDA kernels for 10.0a: this nvcc does not compile for it" in capsys.readouterr().out
    assert toolchain.gencode_flags("Turing") == []


@pytest.mark.parametrize("text", ["sm_90", "9", "Hoper", ""])
def test_misspelt_architectures_are_an_error(text):
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST"):
        toolchain.gencode_flags(text)


def test_nvcc_is_asked(tmp_path):
    for version, expected in (("13.0", {"80", "90"}), ("11.8", None)):
        nvcc = tmp_path / f"nvcc-{version}"
        nvcc.write_text(
            f"#!/bin/sh\nif [ $1 = --version ]; then echo 'Cuda compilation tools, release {version}, V1'; "
            "else echo sm_80; echo sm_90; fi\n"
        )
        nvcc.chmod(0o755)
        assert toolchain.nvcc_archs(str(nvcc)) == expected
    assert toolchain.nvcc_archs(str(tmp_path / "missing")) is None
