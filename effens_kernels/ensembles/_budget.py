"""How many templates each group of layers gets out of a budget of parameters: pure arithmetic on sizes.

A budget is of everything that the ensemble has: templates, layers that members share, and what each member has of its
own.  Templates are whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..ops._checks import reject

TEMPLATES_PER_LAYER = 5


class Size(NamedTuple):
    """A group of layers of one type and shape."""

    weight: int  # parameters of one layer's weight
    layers: int
    biases: int  # of all its layers together


class Rule(NamedTuple):
    members: int
    per_layer: int  # templates that a layer of a member combines
    disjoint: bool
    bank_single_layers: bool
    others: int  # parameters outside the groups, all members' together

    def slots(self, layers: int) -> int:
        """How many weights take templates in turn."""
        return layers * self.members if self.disjoint else layers

    def most(self, size: Size) -> int:
        """Templates that a group may have: as many as a plain ensemble has weights."""
        return self.members * size.layers

    def combined(self, templates: int, layers: int) -> int:
        """Templates per weight: no more than there are, and enough that none is left unused."""
        return max(min(self.per_layer, templates), -(-templates // self.slots(layers)))

    def cost(self, size: Size, templates: int) -> int:
        """Parameters of a group with a bank of so many templates; with none, of one layer shared by all."""
        if not templates:
            return size.weight + size.biases
        coefficients = size.layers * self.combined(templates, size.layers)
        return templates * size.weight + self.members * (coefficients + size.biases)

    def total(self, sizes: Sequence[Size], templates: Sequence[int]) -> int:
        return self.others + sum(map(self.cost, sizes, templates))


def parameters(budget: int | float | str, plain: int) -> int:
    """A budget as a number of parameters: 36_500_000, 36.5e6, "36.5M"; "2x" or 2.0 is a multiple of the plain model."""
    expected = 'a number of parameters (36_500_000, "36.5M") or a multiple of the plain model ("2x", 2.0)'
    if isinstance(budget, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([xkMG]?)\s*", budget)
        if not match:
            reject("convert", "budget", expected, repr(budget))
        unit = {"x": plain, "k": 10**3, "M": 10**6, "G": 10**9, "": 1}[match[2]]
        count = float(match[1]) * unit
    elif isinstance(budget, bool) or not isinstance(budget, (int, float)):
        reject("convert", "budget", expected, repr(budget), TypeError)
    else:  # nobody wants a thousand times the model; 36.5e6 is a count
        count = budget * plain if isinstance(budget, float) and budget < 1000 else budget
    if not 0 < count < float("inf"):
        reject("convert", "budget", expected, repr(budget))
    return round(count)


def plan(sizes: Sequence[Size], budget: int, rule: Rule) -> list[int]:
    """Templates of each group; 0 makes it one plain layer shared by all members.

    A group's share of the budget is its share of the plain model's parameters, of what is left after everything that
    has a fixed cost.  Whole templates in it are given first.  What the remainders add up to goes, one template at a
    time, to the group that is furthest below its share among those it is enough for.
    """
    found = _plan(sizes, budget, rule)
    if found is not None:
        return found
    least = smallest(lambda budget: _plan(sizes, budget, rule) is not None, budget)
    if least is None:
        expected = "with two layers of one type and shape, to share templates (bank_single_layers=True does without)"
        reject("convert", "model", expected, "one of which no two are alike")
    reject("convert", "budget", f"at least {least:,} parameters, to hold a template of a group", f"{budget:,}")


def _plan(sizes: Sequence[Size], budget: int, rule: Rule) -> list[int] | None:
    banked = [g for g, size in enumerate(sizes) if size.layers > 1 or rule.bank_single_layers]
    while banked:
        templates = _shares(sizes, budget, rule, banked)
        small = [g for g in banked if templates[g] < 1]
        if not small:
            return _with_remainders(sizes, budget, rule, banked, templates)
        banked = [g for g in banked if g not in small]
    return None


def _shares(sizes: Sequence[Size], budget: int, rule: Rule, banked: list[int]) -> list[int]:
    """Whole templates in each banked group's share."""
    fixed = rule.others + sum(rule.cost(size, 0) for g, size in enumerate(sizes) if g not in banked)
    fixed += sum(rule.members * sizes[g].biases for g in banked)
    weights = sum(sizes[g].weight * sizes[g].layers for g in banked)

    def templates(spare: int) -> list[int]:
        return [
            min(spare * size.layers // weights, rule.most(size)) if g in banked else 0 for g, size in enumerate(sizes)
        ]

    def coefficients(spare: int) -> int:
        return rule.members * sum(sizes[g].layers * rule.combined(templates(spare)[g], sizes[g].layers) for g in banked)

    return templates(_largest(coefficients, budget - fixed))


def _largest(extra: Callable[[int], int], room: int) -> int:
    """The largest number that fits into `room` with its `extra`, which grows with it; 0 if none does.

    More templates may be combined by more coefficients, which leave less room for templates.
    """
    low, high = 0, max(room, 0) + 1  # low fits, or is 0; high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if middle + extra(middle) <= room else (low, middle)
    return low


def _with_remainders(
    sizes: Sequence[Size], budget: int, rule: Rule, banked: list[int], templates: list[int]
) -> list[int]:
    weights = sum(sizes[g].weight * sizes[g].layers for g in banked)
    shares = {g: budget * sizes[g].layers / weights for g in banked}  # up to a factor that all have
    # Lest the smallest groups swell with what is too little for one template of the others.
    most = {g: min(2 * templates[g] + 1, rule.most(sizes[g])) for g in banked}
    left = budget - rule.total(sizes, templates)
    while True:
        fitting = []
        for g in banked:
            more = rule.cost(sizes[g], templates[g] + 1) - rule.cost(sizes[g], templates[g])
            if more <= left and templates[g] < most[g]:
                fitting.append((templates[g] / shares[g], -sizes[g].weight, g, more))
        if not fitting:
            return templates
        *_, g, more = min(fitting)
        templates[g] += 1
        left -= more


def blob(sizes: Sequence[Size], budget: int, rule: Rule) -> tuple[int, list[int]]:
    """Size of one flat blob for all layers, and how many templates the layers of each group take of it."""
    found = _blob(sizes, budget, rule)
    if found is not None:
        return found
    least = smallest(lambda budget: _blob(sizes, budget, rule) is not None, budget)
    largest = max(size.weight for size in sizes)
    reject("convert", "budget", f"at least {least:,} parameters, to hold a weight of {largest:,}", f"{budget:,}")


def _blob(sizes: Sequence[Size], budget: int, rule: Rule) -> tuple[int, list[int]] | None:
    room = budget - rule.others - rule.members * sum(size.biases for size in sizes)
    weights = sum(size.weight * rule.slots(size.layers) for size in sizes)

    def combined(numbers: int) -> list[int]:
        most = max(rule.per_layer, -(-numbers // weights))
        return [min(most, numbers // size.weight) for size in sizes]

    def coefficients(numbers: int) -> int:
        return rule.members * sum(size.layers * count for size, count in zip(sizes, combined(numbers)))

    numbers = min(_largest(coefficients, room), sum(size.weight * rule.most(size) for size in sizes))
    found = combined(numbers)
    return (numbers, found) if all(found) else None


def smallest(works: Callable[[int], bool], too_small: int) -> int | None:
    """The least budget above one that does not work; None if there is none."""
    high = max(too_small, 1)
    while not works(high):
        high *= 2
        if high > 2**62:
            return None
    low = too_small  # does not work
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high
