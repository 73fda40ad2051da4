"""Reads files that are not on this machine: s3://, gs://, hf://, https:// and every other address that fsspec knows."""

import atexit
import logging
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from conf.errors import DataError, Problem, first_line

log = logging.getLogger(__name__)

TIMEOUT_S = 60
"""Seconds without an answer of a web server."""


def is_remote(path: str) -> bool:
    return "://" in path


def is_web(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def is_hidden_hub(path: str) -> bool:
    """Whether an address is on the Hub, and the Hub's client may not use the network."""
    from huggingface_hub.constants import HF_HUB_OFFLINE

    return path.startswith("hf://") and bool(HF_HUB_OFFLINE)


def web_name(url: str) -> str:
    """The file name in a web address."""
    return PurePosixPath(unquote(urlsplit(url).path)).name


@lru_cache
def download(url: str) -> str:
    """The path of a temporary file with the content of a web address. It is deleted when this process ends.

    Downloaded as a whole, because many servers cannot send a part of a file, which Parquet needs.
    """
    descriptor, path = tempfile.mkstemp(prefix="muster-")
    atexit.register(Path(path).unlink, missing_ok=True)
    with os.fdopen(descriptor, "wb") as copy:
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:  # noqa: S310 - the scheme is http or https
                shutil.copyfileobj(answer, copy, 2**20)
                expected = answer.headers.get("Content-Length")
        except (OSError, ValueError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            raise DataError(Problem("data.path", url, f"cannot be downloaded: {first_line(error)}")) from error
        size = copy.tell()
    if expected is not None and size != int(expected):
        message = f"the download ended after {size:,} of {int(expected):,} bytes: start again"
        raise DataError(Problem("data.path", url, message))
    log.info(f"download  {url}: {size:,} bytes")
    return path


def file_system(path: str) -> tuple[Any, str]:
    """fsspec's file system for an address, and the path in it. Raises DataError naming the package that it needs."""
    import fsspec

    try:
        filesystem, inner = fsspec.core.url_to_fs(path)
    except ImportError as error:
        scheme = path.partition("://")[0]
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}.get(
            scheme
        )
        remedy = f"pip install {package}" if package else "install it"
        message = f"a package that reads {scheme}:// is missing ({first_line(error)}): {remedy}"
        raise DataError(Problem("data.path", path, message)) from error
    except Exception as error:  # an unknown scheme, or what the client of a file system raises when it starts
        raise DataError(Problem("data.path", path, f"cannot be opened: {first_line(error)}")) from error
    return filesystem, str(inner)
