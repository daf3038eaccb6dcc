from __future__ import annotations

import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slq_embed.index import EmbeddingIndex
from slq_embed.inputs import PdfPage, read_image, read_pdf
from slq_embed.inputs.rows import read_row

pytest.importorskip("pypdfium2")

COLOURS = ["red", "lime", "blue"]


@pytest.fixture
def file(tmp_path) -> Path:
    pages = [Image.new("RGB", (720, 360), colour) for colour in COLOURS]
    pages[0].save(tmp_path / "file.pdf", save_all=True, append_images=pages[1:], resolution=72)
    return tmp_path / "file.pdf"


def test_pages_are_images_that_are_rendered_late(file):
    pages = read_pdf(file, dpi=36)
    assert [str(page) for page in pages] == [f"{file}#page={number}" for number in (1, 2, 3)]
    tracemalloc.start()
    pages = read_pdf(file, dpi=100)
    assert tracemalloc.get_traced_memory()[1] < 200_000, "less than one page of pixels"
    tracemalloc.stop()
    for page, colour in zip(read_pdf(file, dpi=36), COLOURS, strict=True):
        image = page.render()
        assert (image.mode, image.size) == ("RGB", (360, 180))
        close = np.abs(np.asarray(image, int) - np.asarray(Image.new("RGB", (1, 1), colour), int)).max()
        assert close < 10
        assert read_image(page).size == read_row({"image": page}).pictures[0].image.size == (360, 180)
    assert [page.number for page in read_pdf(file, pages=[3, 1])] == [3, 1]


def test_a_large_page_is_rendered_smaller(file, monkeypatch):
    monkeypatch.setattr("slq_embed.inputs.pdf.MAX_PAGE_PIXELS", 50 * 100)
    assert PdfPage(file, 1, 600).render().size == (100, 50)


def test_what_was_filled_into_a_form_is_on_the_page(tmp_path):
    # A page with one field, whose appearance is a red square. PDFium needs no table of where the objects are.
    objects = [
        "<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [4 0 R] >> >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 100 50] /Annots [4 0 R] >>",
        "<< /Type /Annot /Subtype /Widget /FT /Tx /T (name) /F 4 /Rect [0 0 50 50] /AP << /N 5 0 R >> /P 3 0 R >>",
        "<< /Type /XObject /Subtype /Form /BBox [0 0 50 50] /Length 24 >> stream\n1 0 0 rg 0 0 50 50 re f \nendstream",
    ]
    body = "".join(f"{number} 0 obj {content} endobj\n" for number, content in enumerate(objects, start=1))
    (tmp_path / "form.pdf").write_text(f"%PDF-1.7\n{body}trailer << /Root 1 0 R >>\n%%EOF")
    (page,) = read_pdf(tmp_path / "form.pdf", dpi=72)
    assert page.render().getpixel((25, 25)) == (255, 0, 0)
    assert page.render().getpixel((75, 25)) == (255, 255, 255)


def test_a_strip_is_padded_like_any_image(tmp_path):
    Image.new("RGB", (2000, 4)).save(tmp_path / "strip.pdf", resolution=72)
    assert read_image(read_pdf(tmp_path / "strip.pdf", dpi=72)[0]).size == (2000, 20)


def test_pages_are_searched_by_their_names(encoder, file):
    encoder.prefix_store = None
    index = EmbeddingIndex(encoder)
    index.add(read_pdf(file, dpi=9))
    (hit,) = index.search(PdfPage(file, 2, 9), k=1)
    assert (hit.id, hit.metadata) == (f"{file}#page=2", {"path": str(file), "page": 2})
    one = encoder.encode(PdfPage(file, 2, 9))
    assert np.abs(one - encoder.encode(PdfPage(file, 2, 9).render())).max() < 1e-6


def test_what_cannot_be_read_is_named(encoder, file, tmp_path):
    with pytest.raises(ValueError, match=r"no PDF file '.*gone\.pdf'"):
        read_pdf(tmp_path / "gone.pdf")
    (tmp_path / "bad.pdf").write_bytes(b"no pages")
    with pytest.raises(ValueError, match=r"bad\.pdf' is not a PDF file that can be read"):
        read_pdf(tmp_path / "bad.pdf")
    for number in (0, 4, "1"):
        with pytest.raises(ValueError, match=r"file\.pdf' has pages 1 to 3, and not"):
            read_pdf(file, pages=[number])
    with pytest.raises(ValueError, match="dpi is 0"):
        read_pdf(file, dpi=0)
    # A page that its file does not have any more, among others: it is skipped and named.
    batches = list(encoder.encode_stream([*read_pdf(file, dpi=9), PdfPage(file, 9)]))
    assert sum(len(batch.indices) for batch in batches) == 3
    (skipped,) = [row for batch in batches for row in batch.skipped]
    assert skipped.name == f"input 3 ({file}#page=9)"
    assert "Page 9 of" in skipped.reason


def test_an_encrypted_file_is_refused(file):
    # A password of PDF's oldest encryption: the dictionary alone makes PDFium ask for it.
    content = file.read_bytes()
    locked = b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <" + b"00" * 32 + b"> /U <" + b"00" * 32 + b"> >>"
    trailer = content.rindex(b"trailer")
    start = content.index(b"<<", trailer) + 2
    identity = b" /ID [<00> <00>] /Encrypt " + locked
    file.write_bytes(content[:start] + identity + content[start:])
    with pytest.raises(ValueError, match=r"file\.pdf' is encrypted"):
        read_pdf(file)


def test_without_the_package_the_error_says_what_to_install(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(ImportError, match=r"pip install 'slq-embed\[pdf\]'"):
        read_pdf(file)
