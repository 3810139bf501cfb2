"""Fetching a file of a public archive: checked, written beside and then renamed."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

from recsys_ssm.errors import UserError

log = logging.getLogger(__name__)

_TIMEOUT = 20.0  # seconds without a byte
_CHUNK = 1 << 18


def fetch_member(url: str, md5: str, member: str, folder: Path) -> Path:
    """The file ``member`` of the zip archive at ``url``; kept below ``folder``, fetched once.

    Args:
        url: ``https://…``.
        md5: The checksum its publisher gives for the archive.
        member: Its path in the archive.
        folder: Where it is kept, in a folder called after the checksum.

    Raises:
        UserError: No network, no such file there, or a checksum that differs.
    """
    if not url.startswith("https://"):
        raise UserError(
            f"dataset.download.url={url}: expected an address that begins with https://"
        )
    kept = folder / md5 / member
    if kept.is_file():
        return kept
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            archive = Path(scratch) / "archive.zip"
            log.info("fetching %s", url)
            found = _fetch(url, archive)
            if found != md5:
                raise UserError(
                    f"{url}: its md5 is {found}, not the published {md5}; fetch and check it by "
                    "hand, or set dataset.download=null"
                )
            with zipfile.ZipFile(archive) as pack:
                if member not in pack.namelist():
                    raise UserError(f"{url}: there is no {member} in it")
                beside = Path(scratch) / "member"
                with pack.open(member) as source, beside.open("wb") as target:
                    shutil.copyfileobj(source, target)
            beside.replace(kept)
    except (OSError, zipfile.BadZipFile) as error:  # URLError is an OSError
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise UserError(f"{url}: could not be fetched ({reason})") from error
    return kept


def _fetch(url: str, path: Path) -> str:
    """Write what is at ``url`` to ``path``; returns its md5."""
    digest = hashlib.md5(usedforsecurity=False)
    with (
        urllib.request.urlopen(url, timeout=_TIMEOUT) as answer,  # noqa: S310 (https, seen to above)
        path.open("wb") as file,
        tqdm(
            total=int(answer.headers.get("Content-Length") or 0) or None,
            unit="B",
            unit_scale=True,
            desc=path.name,
            disable=None,  # only on a terminal
            leave=False,
        ) as bar,
    ):
        while chunk := answer.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
