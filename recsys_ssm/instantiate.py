"""Objects from plain specs: ``{"_target_": "package.module.Class", **arguments}``.

The convention is Hydra's, so a config node is a spec; but a spec also lives in a checkpoint, which must be loadable
without Hydra and without running whatever code a stranger's file names. So :func:`build` only takes classes of the
expected kind, from packages it is told to trust or from modules the program has imported already, and checks every
argument against the class's signature before calling it.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf

from recsys_ssm.errors import UserError

T = TypeVar("T")
Spec = Mapping[str, Any]

TRUSTED = ("recsys_ssm.", "torch.optim.")


def build(spec: Spec, kind: type[T], option: str, **given: Any) -> T:
    """Make the ``kind`` that ``spec`` describes.

    Args:
        spec: ``_target_`` and the arguments.
        kind: Class the target must be (a subclass of).
        option: What messages call the spec: the config option it comes from.
        given: Further arguments, not the user's.

    Raises:
        UserError: The target is unknown or of another kind; an argument is unknown, absent or of the wrong type.
    """
    if "_target_" not in spec:
        raise UserError(f"{option}: no _target_ in {dict(spec)}; name the class to build")
    target = find(spec["_target_"], option)
    if not (isinstance(target, type) and issubclass(target, kind)):
        raise UserError(f"{option}._target_={spec['_target_']}: not a {kind.__name__}")
    arguments = {name: value for name, value in spec.items() if name != "_target_"}
    check_arguments(target, arguments, option, given)
    try:
        return target(**arguments, **given)
    except ValueError as error:  # values that do not go together: constructors say which
        raise UserError(f"{option}: {error}") from error


def find(path: str, option: str, *, trust: Iterable[str] = TRUSTED) -> Any:
    """The object at a dotted path, importing only what is trusted.

    Raises:
        UserError: There is none, or its module is neither trusted nor imported.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise UserError(
            f"{option}._target_={path}: give the full dotted path, package.module.Class"
        )
    if module_name not in sys.modules and not path.startswith(tuple(trust)):
        raise UserError(
            f"{option}._target_={path}: import {module_name} first (a checkpoint is never let import code by itself)"
        )
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{option}._target_={path}: {error}") from error


def import_target(path: str, option: str) -> Any:
    """The object at a dotted path a user's own config names: any importable module.

    Raises:
        UserError: There is none.
    """
    return find(path, option, trust=("",))


def check_arguments(
    target: Callable[..., Any],
    arguments: Mapping[str, Any],
    option: str,
    given: Iterable[str] | None = (),
) -> None:
    """Hold arguments against ``target``'s signature (those of its base classes too, through ``**kwargs``).

    Args:
        target: A class or function.
        arguments: What a user gives it.
        option: The config option they come from.
        given: Names of what it is given beside them; None: not known yet, so none is missed.

    Raises:
        UserError: One is unknown (the message says what exists), absent, or no value of its annotated type.
    """
    parameters, hints = _parameters(target)
    for name, value in arguments.items():
        if name not in parameters:
            if "**" in parameters:
                continue
            raise UserError(f"{option}.{name}: no such option; {suggest(name, sorted(parameters))}")
        hint = hints.get(name, Any)
        if not fits(value, hint):
            raise UserError(
                f"{option}.{name}={value!r}: expected {_spell(hint)}, got {type(value).__name__}"
            )
    if given is None:
        return
    required = [
        name
        for name, parameter in parameters.items()
        if name != "**" and parameter.default is inspect.Parameter.empty
    ]
    if absent := [name for name in required if name not in arguments and name not in given]:
        raise UserError(f"{option}.{absent[0]}: needs a value")


def suggest(name: str, known: Iterable[str]) -> str:
    """``did you mean X?`` and all there is."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return (
        (f"did you mean {near[0]!r}? " if near else "") + "known: " + (", ".join(known) or "none")
    )


_SCALARS = (bool, int, float, str, None, type(None))


def fits(value: Any, hint: Any) -> bool:
    """Whether a config value (numbers, text, lists, mappings) is a value of an annotated type.

    Annotations other than those a config can hold are not judged.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        # Beside a float, a Tensor is no reason to let a text pass.
        known = [arg for arg in args if arg in _SCALARS or get_origin(arg) is Literal]
        judged = known if known and isinstance(value, str | int | float | None) else args
        return any(fits(value, arg) for arg in judged)
    if origin is Literal:
        return value in args
    if hint is None or hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    return True


def _parameters(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Parameters by name, following ``**kwargs`` up a class's bases; ``**`` stands for any further name."""
    functions = (
        [
            vars(cls)["__init__"]
            for cls in target.__mro__
            if "__init__" in vars(cls) and cls is not object
        ]
        if isinstance(target, type)
        else [target]
    )
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    takes_more: inspect.Parameter | None = None
    for function in functions:
        takes_more = None
        # A decorated __init__ (Lightning's Trainer) says what it takes through __wrapped__, which both follow.
        known = _hints(inspect.unwrap(function))
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                takes_more = parameter
            elif name != "self" and parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
                parameters.setdefault(name, parameter)
                hints.setdefault(name, known.get(name, Any))
        if takes_more is None:
            break
    if takes_more is not None:
        parameters["**"] = takes_more
    return parameters, hints


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (
        Exception
    ):  # an annotation that cannot be resolved at run time only means less is checked
        return {}


def _spell(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_spell(arg) for arg in get_args(hint))
    return "none" if hint in (None, type(None)) else getattr(hint, "__name__", str(hint))


def plain(node: Any) -> Any:
    """A config node as plain containers, interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def spec(node: Any, option: str) -> dict[str, Any] | None:
    """Return a config node as a checked spec, with its class imported; None if it names none."""
    values = plain(node)
    if not values or values.get("_target_") is None:
        return None
    import_target(values["_target_"], option)
    return dict(values)


def check(cfg: DictConfig, *options: str) -> None:
    """Hold config nodes against what they describe, before any time is spent.

    Raises:
        UserError: An argument is unknown or of the wrong type.
    """
    for option in options:
        if values := spec(OmegaConf.select(cfg, option), option):
            check_arguments(
                import_target(values.pop("_target_"), option), values, option, given=None
            )


def make(node: Any, option: str, **given: Any) -> Any:
    """The object a config node describes, its arguments checked first; None if it names none.

    Raises:
        UserError: An argument is unknown, absent or of the wrong type.
    """
    values = spec(node, option)
    if values is None:
        return None
    target = import_target(values.pop("_target_"), option)
    check_arguments(target, values, option, given)
    return target(**{**given, **values})


def make_all(nodes: Mapping[str, Any] | None, option: str) -> list[Any]:
    """The objects of a folder of nodes, those set to null left out."""
    made = [
        make(node, f"{option}.{name}") for name, node in (nodes or {}).items() if node is not None
    ]
    return [each for each in made if each is not None]
