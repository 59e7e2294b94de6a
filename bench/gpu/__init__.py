"""python -m bench.gpu: everything that only a machine with a GPU can say, in parts that can be resumed.

    python -m bench.gpu                      all parts that have not passed yet; a report and a plot at the end
    python -m bench.gpu --list               what has passed for these sources, this device and this torch
    python -m bench.gpu --part memcheck --again
    python -m bench.gpu --budget 540         start no part that would not fit

Exit status 0: every chosen part passed.
"""
