"""What the build needs to know of the machine: the oldest torch, the C++ compiler, the CUDA toolkit."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# The oldest torch whose stable ABI the extension is built for; any later torch loads the same file.
MIN_TORCH = (2, 10)


def find_cxx() -> str | None:
    """The C++ compiler: $CXX if it is set, else the first usual name on PATH; None if there is none."""
    wanted = os.environ.get("CXX")
    if wanted:
        # $CXX may be "ccache g++": only its first word is a program.
        if shutil.which(wanted.split()[0]) is None:
            raise SystemExit(f"effens_kernels: CXX={wanted!r} names a C++ compiler that is not on PATH")
        return wanted
    return next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def find_nvcc() -> str | None:
    """nvcc under $CUDA_HOME or $CUDA_PATH, on PATH, in /usr/local/cuda, or from PyPI (requirements-cuda.txt).

    Whether a GPU is visible plays no part.
    """
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [os.path.join(root, "bin", "nvcc") for root in roots]
    pypi = os.path.join(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "nvcc")
    return next(filter(shutil.which, [*candidates, "nvcc", "/usr/local/cuda/bin/nvcc", pypi]), None)


def max_jobs() -> int:
    """Parallel compilations: $MAX_JOBS, else one per core."""
    value = os.environ.get("MAX_JOBS") or os.cpu_count() or 1
    try:
        return max(1, int(value))
    except ValueError:
        raise SystemExit(f"effens_kernels: MAX_JOBS should be a whole number, got {value!r}") from None


# What TORCH_CUDA_ARCH_LIST may name instead of numbers.
NAMED_ARCHS = {
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0;10.3;12.0+PTX",
}
OLDEST_ARCH = (8, 0)  # cp.async


def nvcc_archs(nvcc: str) -> set[str] | None:
    """What `nvcc` compiles for, as "80"; None if it cannot compile the kernels (C++20 came with CUDA 12)."""
    try:
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    release = re.search(r"release (\d+)", version)
    return set(re.findall(r"sm_(\d+)", listed)) if release and int(release[1]) >= 12 else None


def gencode_flags(archs: str, known: set[str] | None = None) -> list[str]:
    """nvcc flags for "8.0;9.0a;10.0a+PTX", the notation of TORCH_CUDA_ARCH_LIST; empty if none is left.

    Architectures that the kernels do not support are left out with a line that says so, and so are those that are not
    among `known`, if that is given.
    """
    flags = []
    listed = [name for arch in re.split(r"[;, ]+", archs.strip()) for name in NAMED_ARCHS.get(arch, arch).split(";")]
    for arch in listed:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if match is None:
            raise SystemExit(f"effens_kernels: TORCH_CUDA_ARCH_LIST has {arch!r}; expected e.g. '8.0;9.0a+PTX'")
        major, minor, suffix, ptx = match.groups()
        number = major + minor + suffix
        if (int(major), int(minor)) < OLDEST_ARCH:
            print(f"effens_kernels: no CUDA kernels for {arch}: they need 8.0 or later", flush=True)
            continue
        if known is not None and major + minor not in known:
            print(f"effens_kernels: no CUDA kernels for {arch}: this nvcc does not compile for it", flush=True)
            continue
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def cuda_library_flags(nvcc: str) -> list[str]:
    """-L flags of the toolkit, from nvcc itself: nvcc may be a wrapper script, and layouts differ."""
    trace = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    match = re.search(r"^#\$ LIBRARIES=(.*)$", trace, re.MULTILINE)
    beside = Path(nvcc).resolve().parent.parent / "lib"  # PyPI's nvcc looks in a lib64 that its packages do not have
    return [*(shlex.split(match.group(1)) if match else []), *([f"-L{beside}"] if beside.is_dir() else [])]


def compile_cuda(nvcc: str, flags: list[str], sources: list[Path], headers: list[Path], out: Path) -> list[str]:
    """The objects of `sources`; one is compiled again if it is older than its inputs or its command has changed."""
    out.mkdir(parents=True, exist_ok=True)
    newest_header = max((path.stat().st_mtime for path in headers), default=0.0)

    def compile_one(source: Path) -> str:
        target, record = out / f"{source.stem}.o", out / f"{source.stem}.command"
        command = [nvcc, *flags, "-c", str(source), "-o", str(target)]
        known = record.exists() and record.read_text() == shlex.join(command)
        if not known or record.stat().st_mtime < max(source.stat().st_mtime, newest_header):
            print(shlex.join(command), flush=True)
            record.unlink(missing_ok=True)
            subprocess.run(command, check=True)
            record.write_text(shlex.join(command))
        return str(target)

    with ThreadPoolExecutor(max_jobs()) as pool:
        return list(pool.map(compile_one, sources))
