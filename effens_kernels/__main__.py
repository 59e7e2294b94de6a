"""`python -m effens_kernels`: what is built, what runs here, and why not."""

from ._config import show_config

if __name__ == "__main__":
    show_config()
