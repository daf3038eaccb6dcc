"""Let another virtual environment use the packages of this one, behind its own: python lend_packages.py FOLDER."""

import site
import sys
from pathlib import Path

(target,) = Path(sys.argv[1]).glob("lib/python*/site-packages")
# addsitedir, and not the path alone, so that editable packages come along.
lines = [f"import site; site.addsitedir({folder!r})" for folder in site.getsitepackages()]
(target / "lent_packages.pth").write_text("\n".join(lines) + "\n")
