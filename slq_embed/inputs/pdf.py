"""Pages of PDF files, as images that are rendered where pixels are needed."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

MAX_PAGE_PIXELS = 16_000_000
"""Larger pages are rendered smaller; no vision tower reads more."""

_POINTS_PER_INCH = 72
_PDFIUM = threading.Lock()  # PDFium works in one thread at a time


@dataclass(frozen=True)
class PdfPage:
    """One page: an input like any other image. Its text is ``file.pdf#page=3``, which an index takes as its id.

    Args:
        path: The file.
        number: The number of the page, from 1.
        dpi: Pixels an inch.
    """

    path: Path
    number: int
    dpi: float = 150.0

    def __str__(self) -> str:
        return f"{self.path}#page={self.number}"

    @property
    def pixels(self) -> int:
        """About width times height: of A4, since the file is not opened."""
        return int(8.27 * 11.69 * self.dpi**2)

    def render(self) -> Image.Image:
        """The page as an RGB image.

        Raises:
            ImportError: If pypdfium2 is not installed.
            ValueError: If the page cannot be rendered.
        """
        pdfium = _pdfium()
        with _PDFIUM, _opened(pdfium, self.path) as document:
            try:
                document.init_forms()  # before the page: else what was filled into a form is not drawn
                page = document[self.number - 1]
                width, height = page.get_size()
                scale = self.dpi / _POINTS_PER_INCH
                scale = min(scale, (MAX_PAGE_PIXELS / max(1.0, width * height)) ** 0.5)
                image: Image.Image = page.render(scale=scale).to_pil().convert("RGB")
            except Exception as error:  # a damaged page makes a renderer raise any error
                raise ValueError(f"Page {self.number} of {str(self.path)!r} cannot be rendered: {error}") from error
        return image


def read_pdf(path: str | Path, *, dpi: float = 150.0, pages: Iterable[int] | None = None) -> list[PdfPage]:
    """The pages of a PDF file, each an input for ``encode``. Nothing is rendered yet, so a long file takes no memory.

    Args:
        path: The file.
        dpi: Pixels an inch.
        pages: Numbers of the pages that are wanted, from 1; by default all.

    Returns:
        The pages, in order.

    Raises:
        ImportError: If pypdfium2 is not installed.
        ValueError: If the file cannot be read, is encrypted, or has no such page.
    """
    if not 0 < dpi < float("inf"):
        raise ValueError(f"dpi is {dpi!r}, but a positive number is needed.")
    path = Path(path)
    pdfium = _pdfium()
    with _PDFIUM, _opened(pdfium, path) as document:
        count = len(document)
    numbers = list(range(1, count + 1) if pages is None else pages)
    if wrong := [number for number in numbers if number not in range(1, count + 1)]:
        raise ValueError(f"{str(path)!r} has pages 1 to {count}, and not {wrong[0]!r}.")
    return [PdfPage(path, int(number), float(dpi)) for number in numbers]


def _pdfium() -> Any:
    try:
        import pypdfium2
    except ImportError as error:
        raise ImportError("PDF files need pypdfium2. Install it: pip install 'slq-embed[pdf]'.") from error
    return pypdfium2


def _opened(pdfium: Any, path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"There is no PDF file {str(path)!r}. Check the path (URLs are not fetched).")
    try:
        return pdfium.PdfDocument(path)
    except Exception as error:
        if "password" in str(error).lower():
            raise ValueError(f"The PDF file {str(path)!r} is encrypted. Save it without a password first.") from error
        raise ValueError(f"{str(path)!r} is not a PDF file that can be read: {error}") from error
