"""Turn a user's mistake into one line: what is wrong, then what to do."""

from __future__ import annotations

import errno
import re
import sys
import traceback
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from recsys_ssm.errors import UserError
from recsys_ssm.instantiate import suggest
from recsys_ssm.paths import CONF_DIR

USERS = (
    UserError,
    HydraException,
    OmegaConfBaseException,
    MisconfigurationException,
)
"""Exceptions that a user's mistake raises, in this package and in its dependencies."""

_FULL = (errno.ENOSPC, errno.EDQUOT)
_DENIED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)
"""Errors of the system that no code of ours can cause or prevent."""


def is_users(error: BaseException) -> bool:
    """Return True if an error is a mistake of the user, and not a defect of this package."""
    if isinstance(error, USERS) or launcher_of(error) is not None:
        return True
    if isinstance(error, OSError) and error.errno in (*_FULL, *_DENIED):
        return True
    return isinstance(error, OSError | ValueError | TypeError) and _is_hydras(error)


def _is_hydras(error: BaseException) -> bool:
    """Return True if an error comes from Hydra, which reads the options, with none of our code in between."""
    files = [Path(frame.filename).parts for frame in traceback.extract_tb(error.__traceback__)]
    last = max((at for at, parts in enumerate(files) if "hydra" in parts), default=None)
    return last is not None and not any("recsys_ssm" in parts for parts in files[last + 1 :])


def explain(error: BaseException, config_name: str | None = None) -> str:
    """Return an error as one line for people; for an option that does not exist, name similar ones."""
    # Hydra's "no such config" is an OSError without strerror.
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        full = (
            "free some space there"
            if error.errno in _FULL
            else "check the path and its permissions"
        )
        return f"{where}{error.strerror}; {full}, or choose another folder with output_root="
    text = str(error).strip()
    if launcher := launcher_of(error):
        return f"the launcher {launcher} cannot start jobs: {text.partition(chr(10))[0]}"
    if plugin := re.search(r"Could not find 'hydra/\w+/((joblib|submitit|ray)\w*)'", text):
        return f'{plugin[1]}: not installed; pip install "recsys-ssm[{plugin[2]}]"'
    if missing := re.match(r"Missing mandatory value: (\S+)", text):
        return f"{missing[1]}: not given, and it has no default; add {missing[1]}=…"
    if unread := re.match(r"LexerNoViableAltException: ([^=\s]+)=(.*)", text):
        option, value = unread.groups()
        return f"{option}={value}: cannot be read; put it in quotes twice: {option}=\"'{value}'\""
    if unread := re.match(r"(?:mismatched|extraneous|token|no viable).*", text):
        given = next((arg for arg in sys.argv[1:] if _is_unread(arg)), None)
        if given is not None:
            option, _, value = given.lstrip("+").partition("=")
            return f"{option}={value}: cannot be read; check its brackets and quotes"
    if unknown := re.search(r"Could not (?:override|append to config\..*?) '([^']+)'", text):
        path = unknown[1].partition("@")[0]
        parent, _, name = path.rpartition(".")
        known = _known(config_name, parent) if config_name else []
        return f"{path}: no such option; {suggest(name, known)}"
    if isinstance(error, InterpolationResolutionError):  # one of our own resolvers' messages
        text = re.sub(r"^\w+ raised while resolving interpolation: ", "", text.partition("\n")[0])
    text = re.sub(r"^In '[^']*': ", "", text.partition("Config search path:")[0])
    return "; ".join(line.strip() for line in text.splitlines() if line.strip()).replace(":;", ":")


def _is_unread(argument: str) -> bool:
    """Return True if Hydra cannot read an argument as ``option=value``."""
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return not argument.startswith("-")
    return False


def _known(config_name: str, parent: str) -> list[str]:
    """Return the options below ``parent`` in the config that the command line's group choices compose."""
    groups = {path.name for path in CONF_DIR.iterdir() if path.is_dir()}
    choices = [arg for arg in sys.argv[1:] if arg.partition("=")[0] in groups and "," not in arg]
    try:
        with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            cfg = hydra.compose(config_name, choices)
        node = OmegaConf.select(cfg, parent) if parent else cfg
    except Exception:  # the names only improve a message
        return []
    return (
        sorted({*map(str, node), *(() if parent else groups)})
        if isinstance(node, DictConfig)
        else []
    )


def launcher_of(error: BaseException) -> str | None:
    """Return the launcher that could not start its jobs; None if the error is another one.

    Such an error comes from Hydra's plugin or from code that the plugin calls, with none of our code in between.
    """
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    plugins = [re.search(r"hydra_plugins.hydra_(\w+)_launcher\b", file) for file in files]
    last = max((at for at, found in enumerate(plugins) if found), default=None)
    if last is None or error.__cause__ is not None:  # with a cause it is the error of a job
        return None
    if any(Path(__file__).parents[1] in Path(file).parents for file in files[last + 1 :]):
        return None
    found = plugins[last]
    return found[1] if found else None
