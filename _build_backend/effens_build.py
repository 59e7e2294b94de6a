"""PEP 517 hooks around setuptools: build against the torch that the user already has.

pip builds in an isolated environment.  Listing torch in `build-system.requires` would install a second torch there:
gigabytes, and rarely the one the user runs.  These hooks look for torch in the interpreter that runs pip and append
its import path to the build's.  torch is requested only when there is none to find and there is a compiler to use it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys

from setuptools import build_meta
from toolchain import MIN_TORCH, find_cxx

get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
build_sdist = build_meta.build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable

_HERE = os.path.dirname(os.path.abspath(__file__))

# The requirement of pyproject.toml: pip then picks one torch for the build and the user, and downloads it once.
TORCH_REQUIREMENT = f"torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"

_DESCRIBE_HOST = """
import importlib.metadata, json, sys
print(json.dumps([importlib.metadata.version("torch"), sys.version_info[:2], sys.path]))
"""


def _host_interpreters() -> list[str]:
    """Interpreters that may be the user's: the build's own under pip, the active environment under other front ends."""
    active = [os.environ[name] for name in ("VIRTUAL_ENV", "CONDA_PREFIX") if os.environ.get(name)]
    return [sys.executable, *(os.path.join(prefix, "bin", "python") for prefix in active)]


def _host_torch() -> tuple[str, list[str]] | None:
    """(version, import path) of the user's torch; None if there is none that is recent enough."""
    # pip cuts the build off from its interpreter's packages by these two variables: without them the same
    # interpreter sees what the user sees (virtual environment, user site and system site alike).
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    for python in filter(os.path.exists, _host_interpreters()):
        probe = subprocess.run([python, "-c", _DESCRIBE_HOST], capture_output=True, text=True, env=env, cwd=_HERE)
        if probe.returncode == 0:
            version, python_version, path = json.loads(probe.stdout)
            if tuple(python_version) == sys.version_info[:2] and _release(version) >= MIN_TORCH:
                return version, path
    return None


def _release(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def _use_host_torch() -> None:
    """Make the user's torch importable here, behind everything the build environment has of its own."""
    host = None if find_cxx() is None or importlib.util.find_spec("torch") else _host_torch()
    if host is not None:
        print(f"effens_kernels: building against the installed torch {host[0]}", flush=True)
        sys.path.extend(path for path in host[1] if path and path not in sys.path)


def _torch_requirement() -> list[str]:
    if find_cxx() is None or importlib.util.find_spec("torch") or _host_torch():
        return []
    return [TORCH_REQUIREMENT]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_requirement()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_requirement()


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    _use_host_torch()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None) -> str:
    _use_host_torch()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
