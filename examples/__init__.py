"""Programs to run (`python examples/forum_ensembles.py`); a package so that the benchmarks can use their models."""
