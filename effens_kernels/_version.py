"""The one version string: pyproject.toml and `effens_kernels.__version__` both read it."""

__version__ = "0.1.0"
