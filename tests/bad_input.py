"""What the tests of bad input share: tensors that need no values, calls that must be refused before any computation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


def f(*shape, **options):
    return torch.zeros(shape, **options)


def forbid(monkeypatch: pytest.MonkeyPatch, *functions: tuple[object, str]) -> None:
    """Fail where one of these functions, each an attribute of an owner, is reached."""

    def never(*args, **kwargs):
        pytest.fail("something was computed from bad input")

    for owner, function in functions:
        monkeypatch.setattr(owner, function, never)


def assert_refused(call: Callable[[], object], op: str, error: type[Exception], argument: str, words: str) -> None:
    """An error of exactly this type, that names op and argument, what was expected and what came."""
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert message.startswith(f"{op}: {argument} should be "), message
    assert ", got " in message, message
    assert words in message, message
    assert type(raised.value) is error
