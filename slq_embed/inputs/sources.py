"""What callers of a search service hand over for an image: paths, URIs, URLs, bytes, files; brought into one form."""

from __future__ import annotations

import base64
import binascii
import http.client
import re
import time
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urlsplit
from urllib.request import url2pathname

MAX_FETCHED_BYTES = 64 << 20
FETCH_SECONDS = 20.0

_DATA_URI = re.compile(r"data:(?:image/[\w.+-]+)?(?:;[\w-]+=[^;,]*)*(;base64)?,", re.I)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://|file:|data:", re.I)  # a file's name may hold a colon


def open_image(source: Any, *, fetch: bool = False) -> Any:
    """Bring an image into a form that :func:`slq_embed.inputs.rows.read_row` takes, without decoding it.

    Args:
        source: A path, a ``file:``, ``data:`` or (if ``fetch``) ``http(s):`` URI, bytes of an image file, a binary file
            such as ``io.BytesIO``, or a PIL image; the dict with ``"bytes"`` and ``"path"`` that ``datasets`` gives for
            an undecoded image; or an input dict whose ``"image"`` is one of these.
        fetch: Whether to fetch URLs. Off by default: a text that names an address must not make a server call it.

    Returns:
        A ``pathlib.Path``, an input dict with bytes, or the PIL image as it came.

    Raises:
        ValueError: If it is none of these, or cannot be fetched.
    """
    if isinstance(source, Mapping):
        if "image" not in source or isinstance(source["image"], Mapping):
            return source
        opened = open_image(source["image"], fetch=fetch)
        return {**source, **(opened if isinstance(opened, dict) else {"image": opened})}
    if isinstance(source, bytes | bytearray):
        return {"image": bytes(source)}
    if hasattr(source, "read"):
        return {"image": _read(source)}
    if not isinstance(source, str):
        return source
    if (match := _DATA_URI.match(source)) is not None:
        return {"image": _decode(source[match.end() :], bool(match[1]))}
    if not _SCHEME.match(source):
        return Path(source)
    parts = urlsplit(source)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    if parts.scheme not in ("http", "https"):
        raise ValueError(f"{source[:80]!r} is neither a path nor a file:, data:, http: or https: URI.")
    if not fetch:
        raise ValueError(f"{source[:200]!r} is a URL, and URLs are not fetched unless asked: pass fetch_urls=True.")
    return {"image": _fetch(source)}


def _read(file: Any) -> bytes:
    with suppress(OSError, ValueError):  # it cannot seek: what is left is all there is
        file.seek(0)
    content = file.read()
    if not isinstance(content, bytes):
        raise ValueError(f"A file gives {type(content).__name__}, but an image's bytes are needed: open it with 'rb'.")
    return content


def _decode(payload: str, base_64: bool) -> bytes:
    raw = unquote_to_bytes(payload)
    if not base_64:
        return raw
    try:
        return base64.b64decode(b"".join(raw.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"A data URI of {len(payload)} characters does not hold base64: {error}.") from error


def _fetch(url: str) -> bytes:
    request = urllib.request.Request(quote(url, safe="%/:?#[]@!$&'()*+,;="), headers={"User-Agent": "slq-embed"})
    content, until = bytearray(), time.monotonic() + FETCH_SECONDS
    try:
        with urllib.request.urlopen(request, timeout=FETCH_SECONDS) as answer:
            while part := answer.read1(1 << 20):
                content += part
                if len(content) > MAX_FETCHED_BYTES:
                    raise ValueError(f"it is larger than {MAX_FETCHED_BYTES >> 20} MiB. Download it, and pass the file")
                if time.monotonic() > until:  # the timeout above is for a single read
                    raise ValueError(f"it took more than {FETCH_SECONDS:g} s")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"{url!r} cannot be fetched: {error}") from error
    return bytes(content)
