"""The examples of the tour do what they say."""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from sentence_transformers import SentenceTransformer

from slq_embed.toy import COLOURS, SHAPES, Scene, Thing, render
from tests.scripts import EXAMPLES

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
PROBE = """<script>addEventListener("load", () => {
for (const image of document.images) image.dataset.width = image.naturalWidth;
document.body.dataset.scripts = document.scripts.length; document.body.dataset.bold = document.querySelectorAll("i").length;
document.body.dataset.overflow = document.documentElement.scrollWidth > innerWidth; })</script>"""


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for colour in ("red", "green", "blue", "yellow"):
        for shape in SHAPES:
            render(Scene("single", Thing(colour, shape), detail="big")).save(folder / f"{colour} {shape}.png")
    (folder / "trip <i>&amp").mkdir()
    (folder / "yellow star.png").rename(folder / "trip <i>&amp" / "yellow star #1?.png")
    (folder / "broken.jpg").write_bytes(b"no photo")
    return folder


def hits(output: str) -> list[str]:
    rows = re.findall(r"^ +(-?\d\.\d\d)  (.+)$", output, re.MULTILINE)
    scores = [float(score) for score, _ in rows]
    assert scores == sorted(scores, reverse=True)
    return [name for _, name in rows]


def test_searching_photos(run_example, photos, tmp_path):
    page = tmp_path / "deep" / "gallery.html"
    page.parent.mkdir()
    output = run_example("search_photos", photos, "a big <i>yellow</i> star", "--html", page, "-k", 6)
    assert "Skipped: " in output
    assert "broken.jpg" in output
    assert "40 photos: 40 added, 0 removed, 1 skipped" in output
    assert f"Gallery: {page.resolve()}" in output
    star = "trip <i>&amp/yellow star #1?.png"
    assert len(hits(output)) == 6
    assert star in hits(output)[:2]
    html = page.read_text("utf8")
    assert "<script" not in html
    assert "http" not in html
    assert "trip &lt;i&gt;&amp;amp/yellow star #1?.png" in html
    assert "a big &lt;i&gt;yellow&lt;/i&gt; star" in html
    links = re.findall(r'href="([^"]+)"', html)
    assert any(link.endswith("/trip%20%3Ci%3E%26amp/yellow%20star%20%231%3F.png") for link in links)

    # By a picture, and by both; the folder has changed meanwhile.
    (photos / "red circle.png").unlink()
    os.utime(photos / "red heart.png", (1, 1))
    render(Scene("count", Thing("green", "arrow"), count=2)).save(photos / "new.png")
    query = tmp_path / "query.png"
    render(Scene("single", Thing("blue", "ring"), detail="big"), seed=9).save(query)
    again = run_example("search_photos", photos, "--image", query, "--html", page)
    assert "40 photos: 2 added, 2 removed, 1 skipped" in again
    assert hits(again)[0] == "blue ring.png"
    assert len(hits(again)) == 12
    assert 'alt="the picture of the query"' in page.read_text("utf8")
    both = run_example("search_photos", photos, "now in green", "--image", query, "--html", page)
    assert "40 photos: 0 added, 0 removed, 1 skipped" in both
    assert hits(both) != hits(again)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the gallery with")
def test_the_gallery_opens_in_a_browser(run_example, photos, tmp_path):
    with Image.open(photos / "red heart.png") as small:
        small.resize((900, 600)).save(photos / "scan.tiff")  # which no such browser shows
    page = tmp_path / "gallery.html"
    image = ["--image", photos / "scan.tiff"]
    run_example("search_photos", photos, "as <i>this</i>", *image, "--html", page, "-k", 50)
    count = page.read_text("utf8").count("<figure>") + 1
    assert count > 30
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text("utf8") + PROBE, "utf8")
    options = [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=420,900", "--virtual-time-budget=5000"]
    command = [str(CHROMIUM), *FLAGS, *options, "--dump-dom", probed.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    widths = [int(width) for width in re.findall(r'data-width="(\d+)"', dom)]
    assert len(widths) == count, "every image is in the page"
    assert min(widths) >= 64, "and was loaded"
    assert max(widths) == 480, "large ones as small copies"
    for text in ('data-scripts="1"', 'data-bold="0"', 'data-overflow="false"'):
        assert text in dom


def test_photos_are_made_where_there_are_none(run_example, tmp_path):
    output = run_example("search_photos")
    assert "20 photos: 20 added, 0 removed, 0 skipped" in output
    assert len(hits(output)) == 12
    assert (tmp_path / "gallery.html").is_file()
    assert (tmp_path / "scenes" / ".slq-index").is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "nope.png"], "there is no picture nope.png"),
        (["-k", 0], "-k is 0, but at least 1 photo"),
        (["--model", "./nofolder"], "--model cannot be loaded: "),
    ],
)
def test_photos_cannot_be_searched_so(run_example, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        run_example("search_photos", *options)
    assert f"error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--labelled", "--asked"])
def test_no_texts_cannot_be_classified(run_example, capsys, option):
    with pytest.raises(SystemExit):
        run_example("classify_texts", option, 0)
    assert "both must be at least 1" in capsys.readouterr().err


class Built(Exception):  # noqa: N818
    """Ends an example once its options are known."""


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_help_says_what_each_option_is_and_what_it_is_by_default(run_example, monkeypatch, name):
    """Also where a package is missing that the example needs."""

    def stop(parser, argv):
        raise Built(parser)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Built) as caught:
        run_example(name)
    (parser,) = caught.value.args
    parser.format_help()
    for action in parser._actions:
        assert action.help, f"{action.dest} has no help"
        if action.default not in (None, False, "", [], argparse.SUPPRESS):
            assert "default" in action.help, f"{action.dest} does not say its default, {action.default}"


def test_fine_tuning_by_fit(run_example, tmp_path):
    output = run_example("fine_tune", "--output", tmp_path / "out")
    assert "1,536 numbers fitted on 64 pairs" in output
    rows = re.findall(r"^ +(\w+@?\d*): +([\d.]+)% -> +([\d.]+)%$", output, re.MULTILINE)
    assert len(rows) == 11
    assert any(before != after for _, before, after in rows)
    assert "Loaded again as SentenceTransformer" in output
    assert len(re.findall(r"      -> an?|      -> \w+ .* \(-?\d\.\d\d\)", output)) == 3
    loaded = SentenceTransformer(str(tmp_path / "out" / "model"), device="cpu")
    assert loaded.encode("a").shape == (192,)


def test_classifying_products(run_example):
    output = run_example("classify_products")
    rows = re.findall(r"2 texts, (\d) pictures +(.+?) +([\d.]+)% +([\d.]+)%$", output, re.MULTILINE)
    assert [(pictures, who) for pictures, who, _, _ in rows] == [
        (pictures, who) for pictures in "02" for who in ("18 kinds", "2 new among 20", "all 20 kinds")
    ]
    for _, who, right, chance in rows:
        assert float(right) > (40 if "new" in who else 75)
        assert float(chance) == pytest.approx(100 / (18 if who == "18 kinds" else 20), abs=0.06)


def test_classifying_texts(run_example):
    output = run_example("classify_texts", "--labelled", 200, "--asked", 60)
    (majority,) = re.findall(rf"Always (?:{'|'.join(COLOURS)}), the commonest: ([\d.]+)%", output)
    rows = re.findall(r"^ +(\d+) +(\d+)% +([\d.]+)% +([\d.]+)%$", output, re.MULTILINE)
    assert [row[:2] for row in rows] == [("10", "0"), ("50", "0"), ("200", "0"), ("200", "20"), ("200", "40")]
    literal, implicit = ([float(row[n]) for row in rows] for n in (2, 3))
    assert min(literal[2:] + implicit[2:]) > 2 * float(majority)
    assert literal[2] > 70
    assert implicit[2] > 50
    assert literal[0] < literal[2], "few labels tell less"
    assert re.search(r"^   is \w+, for it is like\n   \d\.\d\d  \w+ +\w+", output, re.MULTILINE)


def test_a_chat_remembers_over_sessions(run_example):
    output = run_example("chat_memory")
    first, second = output.split("A session with 4 memories\n")
    assert first.count("I keep that as") == 4
    lines = second.splitlines()
    answers = dict(zip(lines[:8:2], lines[1:8:2], strict=True))
    assert "In that picture I see: three (1," in answers["you: how many red hearts are there?"]
    assert "In that picture I see: yellow (2," in answers["you: which colour has what twinkles at night?"]
    assert "my tent is a green triangle (3," in answers["you: what is my tent like?"]
    assert "two brown diamonds are in the safe (4," in answers["you: what is like chocolate and a gem?"]
    assert "Forgotten." in lines[9]
    assert "diamonds" not in lines[11]


@pytest.fixture
def talk(run_example, monkeypatch) -> Callable[..., list[str]]:
    """A session: the example starts anew, reads lines and answers each."""

    def session(*lines: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
        return [line.strip() for line in run_example("chat_memory", "--chat", "memory").splitlines()]

    return session


def test_a_chat_of_ones_own_survives_a_restart(talk, tmp_path):
    render(Scene("count", Thing("blue", "arrow"), count=2)).save(tmp_path / "sign.png")
    first = talk("three red hearts were on the door", "picture sign.png", "picture gone.png")
    assert first[:2] == ["I keep that as 1.", "I keep that as 2."]
    assert "no image file" in first[2]
    later = talk("which shape is blue?", "how many red hearts?", "forget 2", "forget 2", "which shape is blue?")
    assert later[0].startswith("In that picture I see: arrow (2,")
    assert later[1].startswith("You said: three red hearts were on the door (1,")
    assert later[2:4] == ["Forgotten.", "I remember nothing as 2."]
    assert "(2," not in later[4]
    assert not list((tmp_path / "memory").rglob("*.png"))
