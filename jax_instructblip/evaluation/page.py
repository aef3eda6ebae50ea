"""HTML pages that hold their pictures, so that they can be sent around."""

import base64
import html
import io
import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from jax_instructblip.data.images import ImageError, decode
from jax_instructblip.data.records import ImageSource
from jax_instructblip.folders import write_file

PICTURE = 224  # pixels a side
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
td.left { text-align: left } .wide { overflow-x: auto }
.note { color: #666; font-size: 13px } img.curve { max-width: 100% }
"""


def write(path: str | os.PathLike, title: str, parts: Iterable[str]) -> None:
    """Writes the page: the title, then the parts, which are HTML."""
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )
    write_file(Path(path), page)


def picture(source: ImageSource) -> str:
    """An image inside the page; the reason where it cannot be decoded."""
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
    """Encoded bytes of an image as the address of themselves."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
