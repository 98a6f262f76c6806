"""The methods by name, and what a method from outside has to be."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest

from bigain_kernels import methods
from bigain_kernels.methods import CompressionConfig, LGTMConfig, MergeConfig, option
from bigain_kernels.methods.options import Count


@pytest.mark.parametrize("name", methods.names())
def test_a_method_is_found_by_the_name_of_its_config(name: str) -> None:
    config = methods.config_class(name)
    assert config.method == name
    assert config().method == name


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(ValueError, match=re.escape(f"method: got 'magic', expected one of {list(methods.names())}")):
        methods.config_class("magic")
    with pytest.raises(ValueError, match="method: got 'magic'"):
        methods.unregister("magic")


def test_a_method_can_be_forgotten() -> None:
    @methods.register
    @dataclass(frozen=True, kw_only=True)
    class Passing(LGTMConfig):
        method: ClassVar[str] = "passing"

    try:
        assert methods.names()[-1] == "passing"
        assert methods.config_class("passing") is Passing
        methods.register(Passing)  # Once more is no other method.
    finally:
        methods.unregister("passing")
    assert "passing" not in methods.names()


@dataclass(frozen=True, kw_only=True)
class Taken(LGTMConfig):
    method: ClassVar[str] = "tome"


@dataclass(frozen=True, kw_only=True)
class Loud(LGTMConfig):
    method: ClassVar[str] = "LOUD"


@dataclass(frozen=True, kw_only=True)
class Reserved(LGTMConfig):
    method: ClassVar[str] = "none"


@dataclass(frozen=True, kw_only=True)
class Plain(MergeConfig):
    method: ClassVar[str] = "plain"
    strength: float = 1.0


class Undecorated(LGTMConfig):
    method: ClassVar[str] = "undecorated"
    depth: int = option(1, Count())


@dataclass(frozen=True, kw_only=True)
class Rootless(CompressionConfig):
    method: ClassVar[str] = "rootless"


WRONG = [
    (Taken, ValueError, "method: got 'tome' from Taken, ToMeConfig has that name"),
    (Loud, ValueError, "method: got 'LOUD' from Loud"),
    (Reserved, ValueError, "method: got 'none' from Reserved"),
    (MergeConfig, ValueError, "method: got '' from MergeConfig"),
    (Plain, TypeError, r"config_class: got Plain with plain fields \['strength'\]"),
    (Undecorated, TypeError, "config_class: got Undecorated, expected a dataclass"),
    (Rootless, TypeError, "config_class: got <class .*Rootless'>, expected a class derived from MergeConfig or"),
    (LGTMConfig(), TypeError, "config_class: got LGTMConfig"),
]


@pytest.mark.parametrize(("config", "error", "message"), WRONG)
def test_what_is_no_config_of_a_method_is_refused(config, error, message) -> None:
    before = methods.names()
    with pytest.raises(error, match=message):
        methods.register(config)
    assert methods.names() == before
