"""Fetching a file from a public archive."""

from __future__ import annotations

import hashlib
import io
import zipfile

import pytest
import requests
from events import IN_ORDER, histories, lines

from recsys_ssm.data.download import fetch_member
from recsys_ssm.data.interactions import Interactions
from recsys_ssm.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECSYS_SSM_CACHE", str(tmp_path / "cache"))


def answer(content: bytes, status: int = 200) -> requests.Response:
    """What a server answers."""
    response = requests.Response()
    response.status_code, response.reason = status, "Not Found" if status == 404 else "OK"
    response.raw = io.BytesIO(content)
    response.headers["content-length"] = str(len(content))
    return response


@pytest.fixture
def archive(monkeypatch):
    """A server that has one zip; every request it gets."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as pack:
        pack.writestr("ml/ratings.dat", lines(separator="::"))
        pack.writestr("ml/ratings.dat.old", "another file whose name begins alike")
        pack.writestr("../outside", "what must not be written")
    asked = []

    def get(url, **_):
        asked.append(url)
        return answer(content.getvalue()) if "example" in url else answer(b"", 404)

    monkeypatch.setattr(requests, "get", get)
    md5 = hashlib.md5(content.getvalue()).hexdigest()
    return {"url": "https://example.org/ml.zip", "md5": md5, "member": "ml/ratings.dat"}, asked


def test_a_file_is_fetched_once_and_checked(tmp_path, archive):
    option, asked = archive
    for _ in range(2):
        data = Interactions(interactions="ratings.dat", root=tmp_path / "no", download=option)
        assert histories(data.splits) == IN_ORDER
    assert asked == ["https://example.org/ml.zip"]
    kept = [path for path in (tmp_path / "cache" / "downloads").rglob("*") if path.is_file()]
    assert [path.name for path in kept] == ["ratings.dat"], "neither archive nor scratch is left"
    assert list(data.sources) == [str(kept[0])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"md5": "0" * 32}, "does not have the published md5 0000.*dataset.download=null"),
        ({"md5": "../x"}, "dataset.download.md5=../x: expected 32 hexadecimal digits"),
        ({"member": "ml/other"}, "there is no ml/other in it"),
        ({"member": "ml"}, "there is no ml in it"),
        ({"url": "http://example.org/x"}, "begins with https"),
        ({"url": "https://else.org/x.zip"}, "could not be fetched .*404"),
        *(
            ({"member": member}, "leads out of the archive; give the path of a file inside it")
            for member in ("../outside", "ml/../../outside", "/etc/passwd", r"..\x", "C:x", "")
        ),
    ],
)
def test_what_is_fetched_wrongly_is_not_kept(tmp_path, archive, change, message):
    option, _ = archive
    data = Interactions(interactions="ratings.dat", root=tmp_path, download={**option, **change})
    with pytest.raises(UserError, match=message) as caught:
        _ = data.splits
    assert "\n" not in str(caught.value)
    kept = tmp_path / "cache" / "downloads"
    assert not kept.exists() or not [path for path in kept.rglob("*") if path.is_file()]
    assert not (tmp_path / "outside").exists() and not (tmp_path / "cache" / "outside").exists()


def test_a_file_that_is_no_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(requests, "get", lambda url, **_: answer(b"hello"))
    md5 = hashlib.md5(b"hello").hexdigest()
    with pytest.raises(UserError, match=r"could not be fetched .*not a zip file"):
        fetch_member("https://example.org/x.zip", md5, "a.csv", tmp_path)


def test_without_network_one_line_says_what_to_put_where(tmp_path, monkeypatch):
    def get(url, **_):
        raise requests.ConnectionError("no route")

    monkeypatch.setattr(requests, "get", get)
    option = {"url": "https://example.org/x.zip", "md5": "0" * 32, "member": "m/ratings.dat"}
    data = Interactions(interactions="m/ratings.dat", root=tmp_path, download=option)
    with pytest.raises(UserError) as caught:
        _ = data.splits
    text = str(caught.value)
    assert "put ratings.dat there" in text and "could not be fetched (no route)" in text
    assert "\n" not in text
