"""A pytest plugin: `--shard 2/3` runs the second third of what is selected, so that a long suite fits in short runs."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="1/1", help="run this part of the selected tests, e.g. 2/3")


@pytest.hookimpl(trylast=True)  # after -k has selected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    shard, count = map(int, config.getoption("shard").split("/"))
    # Neighbors stay together: they share what is expensive to prepare.
    first, last = len(items) * (shard - 1) // count, len(items) * shard // count
    config.hook.pytest_deselected(items=items[:first] + items[last:])
    items[:] = items[first:last]
