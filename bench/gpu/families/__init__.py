"""One file a family.  A new family adds its FAMILY here: parts, tables, goals and the dispatch table follow."""

from collections.abc import Iterator

from . import mixed, mixture, mlp, shared, stacked
from .base import Column, Family

FAMILIES: dict[str, Family] = {
    family.name: family for family in (stacked.FAMILY, shared.FAMILY, mixed.FAMILY, mixture.FAMILY, mlp.FAMILY)
}


def each_column() -> Iterator[tuple[Family, Column]]:
    return ((family, column) for family in FAMILIES.values() for column in family.columns)


__all__ = ["FAMILIES", "Column", "Family", "each_column"]
