from typing import Literal

import lightning
import pytest

from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import build, check_arguments, find, fits, import_target


class Base:
    def __init__(self, *, size: int, rate: float = 0.1) -> None:
        self.size, self.rate = size, rate


class Child(Base):
    def __init__(self, *, kind: Literal["a", "b"] = "a", **base: object) -> None:
        super().__init__(**base)  # type: ignore[arg-type]
        self.kind = kind


def spec(**arguments: object) -> dict[str, object]:
    return {"_target_": f"{__name__}.Child", **arguments}


def test_build_follows_keyword_arguments_to_the_base() -> None:
    made = build(spec(kind="b", rate=1), Base, "thing", size=3)
    assert isinstance(made, Child) and (made.kind, made.rate, made.size) == ("b", 1, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "3"}, "thing.size='3': expected int, got str"),
        ({"size": True}, "thing.size=True: expected int, got bool"),
        ({"size": 1, "kind": "c"}, "thing.kind='c': expected one of a, b, got str"),
        (
            {"size": 1, "sice": 2},
            "thing.sice: no such option; did you mean 'size'? known: kind, rate, size",
        ),
        ({}, "thing.size: needs a value; add thing.size=…"),
    ],
)
def test_mistakes(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build(spec(**arguments), Base, "thing")
    assert str(caught.value) == message


def test_not_yet_known_arguments_are_not_missed() -> None:
    check_arguments(Child, {"kind": "a"}, "thing", given=None)


def test_only_the_expected_kind_and_nothing_that_is_not_imported() -> None:
    with pytest.raises(UserError, match="not a int"):
        build(spec(size=1), int, "thing")
    with pytest.raises(UserError, match="import the module first"):
        find("antigravity.fly", "thing")
    with pytest.raises(UserError, match="full dotted path"):
        find("Child", "thing")
    with pytest.raises(UserError, match="no such class"):
        find(f"{__name__}.Nothing", "thing")
    assert import_target("colorsys.rgb_to_hls", "thing").__name__ == "rgb_to_hls"


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, float, True),
        (3.5, int, False),
        (None, int | None, True),
        (None, int, False),
        ("x", str | int, True),
        ([1], str | int, False),
        (False, bool, True),
        (1, bool, False),
        (object(), Base, True),  # not a config's business
    ],
)
def test_fits(value: object, hint: object, expected: bool) -> None:
    assert fits(value, hint) is expected


def test_lightnings_trainer_is_checked_too() -> None:
    with pytest.raises(UserError, match=r"trainer\.max_steps='abc': expected int"):
        check_arguments(lightning.Trainer, {"max_steps": "abc"}, "trainer")
    with pytest.raises(UserError, match="did you mean 'max_steps'"):
        check_arguments(lightning.Trainer, {"max_step": 3}, "trainer")
    check_arguments(
        lightning.Trainer, {"max_steps": 3, "precision": "bf16-mixed", "devices": "auto"}, "trainer"
    )
