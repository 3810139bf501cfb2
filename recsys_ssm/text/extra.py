"""Import the packages of the extra ``text`` when they are used."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from recsys_ssm.errors import UserError


def require(package: str, use: str) -> Any:
    """Import a package of the extra ``text``.

    Args:
        package: Its name.
        use: Option or model that needs it, for the message.

    Raises:
        UserError: It is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{use} needs the package {package}; pip install 'recsys-ssm[text]'")
    return importlib.import_module(package)
