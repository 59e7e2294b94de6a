"""How fast: every op against what else a user could pick, and against the products that cannot be avoided.

python -m bench.report             # a few minutes: tables, a plot and a result file in bench/results/local
python -m bench.report --full      # more layers, float32 and bfloat16, 1 and 2 threads
pytest bench --benchmark-only      # the same contestants through pytest-benchmark
"""
