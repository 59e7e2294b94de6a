"""Build of the compiled extension; everything declarative is in pyproject.toml.

One file, effens_kernels/_C.abi3.so, serves every Python >= 3.10 and every torch >= 2.10, CPU and CUDA builds alike:
it uses libtorch's stable ABI alone, and no Python API at all (torch.ops.load_library loads it).
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import NoReturn

from setuptools import setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "_build_backend"))

from toolchain import (  # noqa: E402
    MIN_TORCH,
    compile_cuda,
    cuda_library_flags,
    find_cxx,
    find_nvcc,
    gencode_flags,
    nvcc_archs,
)

# Metadata and source distributions need neither torch nor a compiler.
BUILDING = not {"bdist_wheel", "editable_wheel", "build", "build_ext", "develop", "install"}.isdisjoint(sys.argv)

DEFINES = [f"-DTORCH_TARGET_VERSION=0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000ULL"]
# GCC 12 finds uninitialized values in its own AVX-512 intrinsics (GCC bug 105593).
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized"]
NVCC_FLAGS = ["-std=c++20", "-O3", "-DUSE_CUDA", "--compiler-options=-fPIC,-fvisibility=hidden", "--threads=1"]
# Machine code as well, not PTX alone: the extension has 13.6 MB in place of 29.6 (nvcc 13.0).  The driver unpacks it.
NVCC_FLAGS += ["-Xfatbin=-compress-all"]


def fail(message: str) -> NoReturn:
    raise SystemExit(f"effens_kernels: {message}")


def environment(name: str) -> str:
    """A variable of the one table, read without importing the package (which imports torch)."""
    spec = importlib.util.spec_from_file_location("_effens_env", ROOT / "effens_kernels" / "_env.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get(name)
    except ValueError as error:
        fail(str(error))


def sources(folder: str, suffix: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in (ROOT / "csrc" / folder).glob(f"*{suffix}"))


def cuda_link_arguments(cxx: str) -> list[str]:
    """Compile csrc/cuda/*.cu where EFFENS_CUDA says so; what the link of the extension then needs.

    nvcc is called here and not through CUDAExtension, which refuses to run where the installed torch is a CPU build.
    """
    from torch.utils.cpp_extension import include_paths

    mode, nvcc, files = environment("EFFENS_CUDA"), find_nvcc(), sources("cuda", ".cu")
    known = nvcc_archs(nvcc) if nvcc else None
    if mode == "1" and nvcc is None:
        fail(
            "EFFENS_CUDA=1 needs a CUDA toolkit; looked for nvcc in $CUDA_HOME/bin, $CUDA_PATH/bin, on PATH and in "
            "/usr/local/cuda/bin"
        )
    if mode == "1" and known is None:
        fail(f"EFFENS_CUDA=1 needs nvcc of CUDA 12 or later; {nvcc} is older or does not run")
    if mode == "1" and not files:
        fail("EFFENS_CUDA=1, but there are no sources in csrc/cuda")
    if mode == "0" or known is None or not files:
        return []
    # What is asked for by name should fail where nvcc cannot do it; the default takes what it can.
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    archs = gencode_flags(environment("TORCH_CUDA_ARCH_LIST"), None if asked else known)
    if not archs and mode == "1":
        fail("EFFENS_CUDA=1, but no architecture is left to compile for")
    if not archs:
        return []
    headers = [path for path in ROOT.glob("csrc/**/*") if path.suffix in (".h", ".cuh", ".inl")]
    includes = [f"-I{path}" for path in ("csrc", *include_paths())]
    flags = [*NVCC_FLAGS, f"-ccbin={cxx.split()[-1]}", *DEFINES, *includes, *archs]
    objects = compile_cuda(nvcc, flags, files, headers, ROOT / "build" / "cuda")
    toolkit = [*cuda_library_flags(nvcc), "-lcudart_static", "-lrt", "-lpthread", "-ldl"]
    # No symbol of libtorch.so itself is used: in CUDA builds of torch it brings libtorch_cuda.so.
    return [*objects, *toolkit, "-Wl,--no-as-needed", "-ltorch"]


def extensions() -> tuple[list, dict]:
    """(ext_modules, cmdclass); both empty where there is no compiler, which makes a pure-Python install."""
    if not BUILDING:
        return [], {}
    cxx = find_cxx()
    if cxx is None or not sys.platform.startswith("linux"):
        reason = "no C++ compiler (looked for $CXX, c++, g++, clang++)" if cxx is None else f"platform {sys.platform}"
        if environment("EFFENS_CUDA") == "1":
            fail(f"EFFENS_CUDA=1, but: {reason}")
        print(f"\neffens_kernels: WARNING: {reason}: installing without the compiled extension.\n", file=sys.stderr)
        return [], {}
    os.environ["CXX"] = cxx
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        fail(
            f"building the compiled extension needs torch >= {MIN_TORCH[0]}.{MIN_TORCH[1]} ({error}); "
            "install torch first, or leave out --no-build-isolation"
        )
    extension = CppExtension(
        "effens_kernels._C",
        [str(path) for path in [*sources("cpu", ".cpp"), *sources("common", ".cpp")]],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=[*CXX_FLAGS, *DEFINES],
        extra_link_args=cuda_link_arguments(cxx),
        # Names the file .abi3.so, leaves libtorch_python out of the link, and defines Py_LIMITED_API.
        py_limited_api=True,
    )
    return [extension], {"build_ext": BuildExtension}


ext_modules, cmdclass = extensions()
setup(
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if ext_modules else {},
)
