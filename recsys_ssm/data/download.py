"""Fetch a file from a public archive."""

from __future__ import annotations

import logging
import re
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import pooch

from recsys_ssm.errors import UserError

log = logging.getLogger(__name__)

_TIMEOUT = 20.0  # seconds without a byte


def fetch_member(url: str, md5: str, member: str, folder: Path) -> Path:
    """Fetch the file ``member`` of the zip archive at ``url``, once, and return its path.

    Args:
        url: Address of the archive: ``https://…``.
        md5: Checksum of the archive, as its publisher gives it.
        member: Path of the file in the archive.
        folder: Folder to keep the file in, in a subfolder called by the checksum.

    Raises:
        UserError: An argument is not possible, there is no network or no such file, or the checksum differs.
    """
    _check_arguments(url, md5, member)
    kept = folder / md5 / member
    if kept.is_file():
        return kept
    pooch.get_logger().setLevel(logging.WARNING)  # one line about the download is enough
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            log.info("fetching %s", url)
            pooch.retrieve(
                url,
                known_hash=f"md5:{md5}",
                fname="archive.zip",
                path=scratch,
                processor=pooch.Unzip(members=[member], extract_dir="."),
                downloader=pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=_TIMEOUT),
            )
            unpacked = Path(scratch) / member
            if not unpacked.is_file():
                raise UserError(
                    f"{url}: there is no {member} in it; correct dataset.download.member"
                )
            unpacked.replace(kept)
    except UserError:
        raise
    except (OSError, zipfile.BadZipFile) as error:  # errors of the network are OSErrors
        raise UserError(f"{url}: could not be fetched ({_reason(error)})") from error
    except ValueError as error:  # the checksum differs
        raise UserError(
            f"{url}: the file there does not have the published md5 {md5}; fetch and check it by "
            "hand, or set dataset.download=null"
        ) from error
    return kept


def _check_arguments(url: str, md5: str, member: str) -> None:
    if not url.startswith("https://"):
        raise UserError(
            f"dataset.download.url={url}: expected an address that begins with https://"
        )
    if not re.fullmatch(r"[0-9a-f]{32}", md5):
        raise UserError(f"dataset.download.md5={md5}: expected 32 hexadecimal digits")
    parts = PurePosixPath(member)
    if not member or parts.is_absolute() or ".." in parts.parts or re.search(r"[\\:]", member):
        raise UserError(
            f"dataset.download.member={member}: leads out of the archive; give the path of a file "
            "inside it"
        )


def _reason(error: BaseException) -> str:
    """Return the innermost cause of a failed download, in one line."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return text.splitlines()[0]
