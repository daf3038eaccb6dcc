"""What people pass in: texts, images, and both together, in every form in which callers name them."""

from slq_embed.inputs.images import read_image
from slq_embed.inputs.pdf import PdfPage, read_pdf
from slq_embed.inputs.rows import Skipped, report
from slq_embed.inputs.sources import open_image

__all__ = ["PdfPage", "Skipped", "open_image", "read_image", "read_pdf", "report"]
