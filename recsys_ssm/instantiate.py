"""Make objects from specs: ``{"_target_": "package.module.Class", **arguments}``.

The convention is Hydra's, so a config node is a spec. A spec is also what a checkpoint stores, and a checkpoint must
load without Hydra and without running code that a stranger's file names. So there are two verbs:

- :func:`instantiate` makes the object that a user's own config names, from any module that can be imported.
- :func:`build` makes an object from a spec of unknown origin: it must name a class of the expected kind, which is
  defined in a module of :data:`TRUSTED`, in ``torch.optim``, or in the user's own code.

Both check every argument against the signature first. The signature is the home of an option's default: configs name
only what deviates from it, and :func:`with_defaults` fills in the rest.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf

from recsys_ssm.errors import UserError

T = TypeVar("T")
Spec = Mapping[str, Any]

TRUSTED = frozenset(
    {
        "recsys_ssm.data.hm",
        "recsys_ssm.data.interactions",
        "recsys_ssm.data.shop",
        "recsys_ssm.data.spotify",
        "recsys_ssm.data.table",
        "recsys_ssm.data.vaccine",
        "recsys_ssm.models.backbones.filter_mamba2",
        "recsys_ssm.models.backbones.hstu",
        "recsys_ssm.models.backbones.hydra",
        "recsys_ssm.models.backbones.identity",
        "recsys_ssm.models.backbones.ligr",
        "recsys_ssm.models.backbones.mamba",
        "recsys_ssm.models.backbones.mamba2",
        "recsys_ssm.models.backbones.mamba3",
        "recsys_ssm.models.backbones.transformer",
        "recsys_ssm.models.gpt4rec",
        "recsys_ssm.models.heads",
        "recsys_ssm.models.llamarec",
        "recsys_ssm.models.losses",
        "recsys_ssm.models.mamrec",
        "recsys_ssm.models.next_item",
        "recsys_ssm.models.optim",
        "recsys_ssm.models.tokenizers",
        "recsys_ssm.models.backbones.matrrec",
        "recsys_ssm.models.backbones.sigma",
        "recsys_ssm.models.backbones.wearec",
        "recsys_ssm.models.two_tower",
        "recsys_ssm.text.weights",
    }
)
"""Modules of this package whose classes a checkpoint or a run's folder may name."""

_vouched: set[Any] = set()
"""Modules (by name) and classes that the user named in this process."""


class Configurable:
    """Record the arguments an object is made with, so that a checkpoint can store it as plain data."""

    _arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> typing.Self:
        instance = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        try:
            bound = signature.bind_partial(None, *args, **kwargs).arguments
        except TypeError:  # __init__ raises the same
            bound = {}
        arguments: dict[str, Any] = {}
        for name, value in list(bound.items())[1:]:
            kind = signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= value
            elif kind is not inspect.Parameter.VAR_POSITIONAL:
                arguments[name] = value
        # Objects made at run time (tensors, schemas) are passed again by whoever builds from the spec.
        instance.__dict__["_arguments"] = {k: v for k, v in arguments.items() if _is_plain(v)}
        return instance

    @property
    def spec(self) -> dict[str, Any]:
        """The spec that makes another object with the same arguments (not with the same weights)."""
        return {"_target_": _path_of(type(self)), **self._arguments}


Part = Spec | Configurable | type | functools.partial
"""Forms in which a part of a model is given: a spec, an object, a class, or a ``functools.partial`` of a class."""


def to_spec(part: Part | None, option: str, default: type | None = None) -> dict[str, Any]:
    """Return the spec of a part, however it is given.

    Args:
        part: The part.
        option: Its name, for messages.
        default: Class of a part that is None, or a mapping without ``_target_``.

    Raises:
        UserError: The part has no spec.
    """
    if default is not None and (
        part is None or (isinstance(part, Mapping) and "_target_" not in part)
    ):
        return {"_target_": _path_of(default), **(part or {})}
    if isinstance(part, Configurable):
        return part.spec
    if isinstance(part, functools.partial) and not part.args:
        return {"_target_": _path_of(part.func), **part.keywords}
    if isinstance(part, type):
        return {"_target_": _path_of(part)}
    if isinstance(part, Mapping):
        return dict(part)
    raise UserError(
        f"{option}: {type(part).__name__} has no spec; give an object of this package's classes, a class, "
        "a functools.partial with keyword arguments, or a mapping with _target_"
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return isinstance(value, _PLAIN)


def _path_of(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


# Untrusted: checkpoints and run folders


def build(spec: Spec, kind: type[T], option: str, **given: Any) -> T:
    """Make an object of the class ``kind`` from a spec of unknown origin.

    Args:
        spec: ``_target_`` and the arguments.
        kind: Class that the target must be, or be a subclass of.
        option: Config option the spec comes from, for messages.
        given: Arguments passed by the program.

    Raises:
        UserError: The target is unknown, not trusted or of another kind; an argument is unknown, missing or of the
            wrong type.
    """
    if "_target_" not in spec:
        raise UserError(f"{option}: no _target_ in {dict(spec)}; name the class to build")
    target = find(spec["_target_"], option, kind)
    if not issubclass(target, kind):
        raise UserError(
            f"{option}._target_={spec['_target_']}: not a {kind.__name__}; name a subclass of it"
        )
    arguments = {name: value for name, value in spec.items() if name != "_target_"}
    check_arguments(target, arguments, option, given)
    try:
        made: T = target(**{**arguments, **given})
    except UserError:
        raise
    except ValueError as error:  # values that do not go together: constructors say which
        raise UserError(f"{option}: {error}") from error
    return made


def find(path: Any, option: str, kind: type | None = None) -> Any:
    """Return the class at a dotted path of unknown origin. Neither call nor import anything that is not trusted.

    Args:
        path: The dotted path, from a checkpoint or a run's folder.
        option: Its name, for messages.
        kind: Class that the caller expects a subclass of. A subclass of this package's own abstract classes is the
            user's if its module is imported; for other kinds the module must be trusted or the user's own.

    Raises:
        UserError: There is no such class, or its module is not trusted.
    """
    module_name = path.rpartition(".")[0] if isinstance(path, str) else ""
    if not module_name:
        raise UserError(
            f"{option}._target_={str(path)[:100]}: give the full dotted path, package.module.Class"
        )
    found = _look_up(path)
    if found is None and module_name not in {*sys.modules, *TRUSTED}:
        raise UserError(
            f"{option}._target_={path[:100]}: {module_name[:80]} is not imported, and a checkpoint never imports code "
            f"by itself; import the module first (commands: import={module_name.partition('.')[0][:80]})"
        )
    if found is None:
        raise UserError(f"{option}._target_={path[:100]}: no such class; check the path")
    is_kind = (
        kind is not None and _is_subclass(found, kind) and kind.__module__.startswith("recsys_ssm.")
    )
    if not isinstance(found, type) or not (is_kind or _is_trusted(found)):
        raise UserError(
            f"{option}._target_={path[:100]}: not a class that a checkpoint or a run's folder may name; "
            f"if it is your own, name its module: import={module_name.partition('.')[0][:80]}"
        )
    return found


def _look_up(path: str) -> Any:
    """Return the object at a dotted path, without importing any module but the trusted ones; None if there is none."""
    module_name, _, name = path.rpartition(".")
    if module_name == "recsys_ssm" or module_name in TRUSTED:
        return getattr(importlib.import_module(module_name), name, None)
    return vars(sys.modules[module_name]).get(name) if module_name in sys.modules else None


def _is_subclass(found: Any, kind: type) -> bool:
    return isinstance(found, type) and issubclass(found, kind)


def _is_trusted(found: Any) -> bool:
    """Return True if a class is defined in a trusted module, or in code that the user imported."""
    module = getattr(found, "__module__", None) or ""
    if found in _vouched or module in _vouched or module in TRUSTED:
        return True
    package = module.partition(".")[0]
    if package in ("recsys_ssm", "torch"):
        return module.startswith("torch.optim.")
    return module in sys.modules and _is_own(sys.modules[module])


def _is_own(module: types.ModuleType) -> bool:
    """Return True if a module is a file of the user, and not one of Python's or of an installed package."""
    if module.__name__.partition(".")[0] in sys.stdlib_module_names:
        return module.__name__ == "__main__"
    file = getattr(module, "__file__", None)
    if file is None:  # built in, or a namespace package
        return False
    return not {"site-packages", "dist-packages"} & set(Path(file).parts)


def import_modules(names: Iterable[str]) -> None:
    """Import the user's own modules, so that a run's folder may name their classes.

    Args:
        names: Names of modules, ``my_package.my_gru``, or files, ``models/my_gru.py``; from the current folder too.

    Raises:
        UserError: A module does not exist or cannot be imported.
    """
    for name in names:
        path = Path(name)
        is_file = path.suffix == ".py"
        folder = str((path.parent if is_file else Path()).resolve())
        if folder not in sys.path:
            sys.path.insert(0, folder)
        module_name = path.stem if is_file else name
        try:
            if is_file and not path.is_file():
                raise UserError(f"import={name}: no such file; give a module's name, or its file")
            module = importlib.import_module(module_name)
        except UserError:
            raise
        except Exception as error:  # whatever the module raises
            raise UserError(
                f"import={name}: cannot be imported ({type(error).__name__}: {str(error)[:200]}); correct the name or "
                "the module"
            ) from error
        if is_file and Path(getattr(module, "__file__", None) or "").resolve() != path.resolve():
            raise UserError(
                f"import={name}: another module is called {module_name} already; rename the file"
            )
        _vouched.add(module.__name__)


# Trusted: a user's own config


def import_target(path: str, option: str) -> Any:
    """Return the object at a dotted path that a user's own config names, from any module that can be imported.

    Raises:
        UserError: There is no such object.
    """
    module_name, _, name = str(path).rpartition(".")
    if not module_name:
        raise UserError(
            f"{option}._target_={path}: give the full dotted path, package.module.Class"
        )
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{option}._target_={path}: {error}; check the path") from error
    if isinstance(found, type):
        _vouched.add(found)
    return found


def instantiate(node: Any, option: str, **given: Any) -> Any:
    """Make the object that a node of a user's own config describes; None if the node names none.

    Args:
        node: The config node.
        option: Its name, for messages.
        given: Arguments passed by the program. The node's own win, unless they are the defaults.

    Raises:
        UserError: An argument is unknown, missing or of the wrong type.
    """
    values = spec(node, option)
    if values is None:
        return None
    target = import_target(values.pop("_target_"), option)
    check_arguments(target, values, option, given)
    # A value that is only the class's default does not override what the program passes.
    defaults = defaults_of(target)
    explicit = {k: v for k, v in values.items() if k not in given or v != defaults.get(k, given)}
    return target(**{**values, **given, **explicit})


def instantiate_all(nodes: Mapping[str, Any] | None, option: str, **given: Any) -> list[Any]:
    """Make the objects of a mapping of nodes; leave out those set to null."""
    made = [
        instantiate(node, f"{option}.{name}", **given)
        for name, node in (nodes or {}).items()
        if node is not None
    ]
    return [each for each in made if each is not None]


def spec(node: Any, option: str) -> dict[str, Any] | None:
    """Return a config node as a spec, with its class imported; None if the node names none.

    Raises:
        UserError: The node has arguments and no ``_target_``.
    """
    values = plain(node)
    if not values or values.get("_target_") is None:
        if rest := [name for name in values or {} if name != "_target_"]:
            raise UserError(
                f"{option}.{rest[0]}: {option} is not configured, so it has no options; "
                f"choose one first, or remove {option}.{rest[0]}"
            )
        return None
    import_target(values["_target_"], option)
    return dict(values)


def check(cfg: DictConfig, *options: str) -> None:
    """Check config nodes against the signatures of the classes they name, before any time is spent.

    Raises:
        UserError: An argument is unknown or of the wrong type.
    """
    for option in options:
        if values := spec(OmegaConf.select(cfg, option), option):
            target = import_target(values.pop("_target_"), option)
            check_arguments(target, values, option, given=None)


def plain(node: Any) -> Any:
    """Return a config node as plain containers with interpolations resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node


def with_defaults(config: Any, *, trusted: bool = True) -> Any:
    """Return a copy of a plain config in which every spec names all options of its class, defaults included.

    Args:
        config: Plain containers; interpolations may stay as text. Options of a class that are called as a part of the
            whole config (a model's ``tokenizer``, a trainer's ``logger``) are left to that part.
        trusted: True for a user's own config; False for one of unknown origin, as in :func:`find`.
    """
    parts = frozenset(config) if isinstance(config, Mapping) else frozenset()
    return _filled(config, trusted, parts)


def _filled(node: Any, trusted: bool, parts: frozenset[str]) -> Any:
    if isinstance(node, list):
        return [_filled(each, trusted, parts) for each in node]
    if not isinstance(node, Mapping):
        return node
    filled = {name: _filled(value, trusted, parts) for name, value in node.items()}
    if isinstance(path := node.get("_target_"), str):
        try:
            target = import_target(path, "config") if trusted else _look_up(path)
            defaults = {} if target is None else defaults_of(target)
        except (UserError, TypeError, ValueError):  # reported where the object is made
            return filled
        for name, value in defaults.items():
            if name not in parts:
                filled.setdefault(name, value)
    return filled


def defaults_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the options of a class or function that have a default a config can hold."""
    parameters, hints = _parameters(target)
    defaults: dict[str, Any] = {}
    for name, parameter in parameters.items():
        value = parameter.default
        if name == "**" or value is inspect.Parameter.empty or not _holds(hints.get(name, Any)):
            continue
        if isinstance(value, tuple | list) and all(isinstance(each, _PLAIN) for each in value):
            defaults[name] = list(value)
        elif isinstance(value, _PLAIN):
            defaults[name] = value
    return defaults


def _holds(hint: Any) -> bool:
    """Return True if a config can hold a value of an annotated type other than None."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_holds(arg) for arg in args if arg not in (None, type(None)))
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return all(_holds(arg) for arg in args if arg is not Ellipsis)
    return hint in (Any, bool, int, float, str) or origin is Literal


_PLAIN = (bool, int, float, str, type(None))


def check_arguments(
    target: Callable[..., Any],
    arguments: Mapping[str, Any],
    option: str,
    given: Iterable[str] | None = (),
) -> None:
    """Check arguments against ``target``'s signature, and those of its base classes through ``**kwargs``.

    Args:
        target: A class or function.
        arguments: Arguments that a user gives.
        option: Config option they come from.
        given: Names of arguments passed by the program. None: skip the check for missing arguments.

    Raises:
        UserError: An argument is unknown (the message lists the known ones), missing, or of another type than its
            annotation.
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
                f"{option}.{name}={value!r}: expected {_type_name(hint)}, got {type(value).__name__}"
            )
    if given is None:
        return
    required = [
        name
        for name, parameter in parameters.items()
        if name != "**" and parameter.default is inspect.Parameter.empty
    ]
    if absent := [name for name in required if name not in arguments and name not in given]:
        raise UserError(f"{option}.{absent[0]}: needs a value; add {option}.{absent[0]}=…")


def takes(target: Callable[..., Any], name: str) -> bool:
    """Return True if a class or function has a parameter of this name."""
    return name in _parameters(target)[0]


def hints_of(target: Callable[..., Any]) -> dict[str, Any]:
    """Return the annotations of a class's or function's parameters by name."""
    return _parameters(target)[1]


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean X?`` where a name is near, and all known names."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(known) or "none"
    if len(shown) > _LONGEST_LIST:  # Lightning's Trainer has fifty
        others = difflib.get_close_matches(name, known, n=8, cutoff=0.3) or known[:8]
        shown = f"{', '.join(others)}, … ({len(known)} in all)"
    return f"{hint}known: {shown}"


_LONGEST_LIST = 250

_SCALARS = (bool, int, float, str, None, type(None))


def fits(value: Any, hint: Any) -> bool:
    """Return True if a config value (number, text, list, mapping) is a value of an annotated type.

    Annotations other than those that a config can hold are not checked.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        # For `float | Tensor` still reject strings.
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
    if hint is Path:
        return isinstance(value, str | Path)
    if origin is Sequence:  # one word stands for a list of one
        return isinstance(value, str) or (
            isinstance(value, list | tuple) and all(fits(each, args[0]) for each in value)
        )
    if origin is Mapping:
        return isinstance(value, Mapping) and all(fits(each, args[1]) for each in value.values())
    return True


_NO_OPTIONS = (("builtins", "object"), ("torch.nn.modules.module", "Module"))
"""Base classes whose constructor has no options, whatever its signature says."""


def _parameters(target: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], dict[str, Any]]:
    """Return parameters and hints by name; follow ``**kwargs`` up a class's bases (``**`` stands for any name)."""
    functions = (
        [
            vars(cls)["__init__"]
            for cls in target.__mro__
            if "__init__" in vars(cls) and (cls.__module__, cls.__name__) not in _NO_OPTIONS
        ]
        if isinstance(target, type)
        else [target]
    )
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    takes_more: inspect.Parameter | None = None
    for function in functions:
        takes_more = None
        # A decorated __init__ (Lightning's Trainer) has its signature in __wrapped__, which both follow.
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
    except Exception:  # annotations that cannot be resolved are skipped
        return {}


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in get_args(hint))
    if get_origin(hint) is Sequence:
        return f"a list of {_type_name(get_args(hint)[0])}"
    return "none" if hint in (None, type(None)) else getattr(hint, "__name__", str(hint))
