"""Building blocks of self-contained HTML pages; each function returns HTML unless it says so."""

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from jax_instructblip.atomic import write_file
from jax_instructblip.data.images import ImageError, decode
from jax_instructblip.data.records import ImageSource

PICTURE = 224  # pixels a side
Table = tuple[list[str], list[list[str]]]  # head and rows
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64em; margin: 2em auto; padding: 0 1em;
       color: #222; background: #fff }
h1, h2 { font-weight: 600 } h2 { margin-top: 2em }
table { border-collapse: collapse } th, td { padding: .25em .8em; text-align: right }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #888 }
tbody tr:last-child { border-top: 1px solid #888; font-weight: 600 }
.bar { display: inline-block; height: .7em; background: #4c78a8; vertical-align: baseline }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(14em, 1fr)); gap: 1em }
.card { border: 1px solid #ccc; border-radius: 6px; padding: .6em; font-size: 13px }
.card img { width: 100%; image-rendering: pixelated; border-radius: 4px }
.right { border-left: 6px solid #54a24b } .wrong { border-left: 6px solid #e45756 }
table.plain { margin: .8em 0 }
table.plain tbody tr:last-child { border-top: none; font-weight: inherit }
.left { text-align: left; vertical-align: top } .wide { overflow-x: auto }
td:not(.left) { white-space: nowrap }
.note { color: #666; font-size: 13px } img.curve { max-width: 100% }
"""


def write(path: str | os.PathLike, title: str, parts: Iterable[str]) -> None:
    """Writes an HTML file with the title and `parts`, which are strings of HTML."""
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )
    write_file(Path(path), page)


def heading(text: str) -> str:
    """Returns a section heading as HTML."""
    return f"<h2>{html.escape(text)}</h2>"


def note(text: str, items: Sequence[str] = ()) -> str:
    """Returns a remark in small print as HTML, followed by a list if there are `items`."""
    listed = "".join(f"<li>{html.escape(each)}</li>" for each in items)
    return f"<p class='note'>{html.escape(text)}</p>" + (
        listed and f"<ul class='note'>{listed}</ul>"
    )


def pairs(facts: Iterable[tuple[str, Any]]) -> str:
    """Returns an HTML table of names and values, a row for each pair of `facts`."""
    rows = "".join(
        f"<tr><td>{html.escape(str(name))}</td><td class='left'>{html.escape(str(value))}</td></tr>"
        for name, value in facts
    )
    return f"<table class='plain note'>{rows}</table>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns an HTML table with a head; cells are plain text."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    head_row = f"<thead><tr>{cells('th', head)}</tr></thead>"
    return f"<div class='wide'><table class='plain'>{head_row}<tbody>{body}</tbody></table></div>"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Returns the lines of a table in Markdown (no HTML)."""
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in each) + " |" for each in lines]


def grid(cards: Iterable[str]) -> str:
    """Returns an HTML grid of `cards`, which are strings of HTML."""
    return f"<div class='grid'>{''.join(cards)}</div>"


def card(
    images: Sequence[ImageSource],
    title: str,
    lines: Iterable[str],
    notes: Iterable[str] = (),
    kind: str = "",
) -> str:
    """Returns an HTML card: the first image of a sample, with texts below it.

    `kind` is "right", "wrong" or "", and colours the card. `lines` are plain text, or HTML from
    `marked`; `notes` are in small print.
    """
    pictures = "".join(picture(image) for image in images[:1])
    frames = f" <i>({len(images)} frames)</i>" if len(images) > 1 else ""
    parts = [f"<div><b>{html.escape(title)}</b></div>"] if title else []
    parts += [
        f"<div>{each if isinstance(each, Html) else html.escape(each)}</div>" for each in lines
    ]
    parts += [f"<div class='note'>{html.escape(each)}</div>" for each in notes]
    return f"<div class='card {kind}'>{pictures}{frames}{''.join(parts)}</div>"


class Html(str):
    """A string that is HTML already and must not be escaped."""


def marked(name: str, pieces: Iterable[tuple[str, bool]]) -> Html:
    """Returns HTML: `name` in bold, then the texts of `pieces`, each a (text, highlighted) pair."""
    shown = (
        f"<mark>{html.escape(piece)}</mark>" if mark else html.escape(piece)
        for piece, mark in pieces
    )
    return Html(f"<b>{html.escape(name)}</b>: {' '.join(shown)}")


def truth(answers: Iterable[str]) -> str:
    """Formats the distinct right answers as plain text (no HTML)."""
    return f"truth: {' / '.join(dict.fromkeys(answers)) or '(not public)'}"


def picture(source: ImageSource) -> str:
    """Returns an image as an HTML thumbnail; the error text if it cannot be decoded."""
    try:
        image = decode(source)
    except ImageError as error:
        return f"<p class='note'>{html.escape(str(error))}</p>"
    image.thumbnail((PICTURE, PICTURE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small = image.width * image.height <= 64 * 64  # drawn pictures are smaller as PNG, and sharp
    image.save(buffer, "PNG" if small else "JPEG")
    kind = "png" if small else "jpeg"
    return f"<img alt='' src='{inline(buffer.getvalue(), kind)}'>"


def inline(data: bytes, kind: str = "png") -> str:
    """Returns a data URL with the encoded bytes of an image; `kind` is "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
