"""Image-caption pairs of BLIP-2's stages 1 and 2: Visual Genome, CC3M, CC12M, SBU, LAION.

Visual Genome is released as files. The others are lists of URLs and captions, whose images
img2dataset downloads into tars (`data/webdataset.py`). COCO captions are in `captioning.py`.
"""

import functools
import pathlib
from collections.abc import Iterator

from jax_instructblip.data.readers.annotations import (
    field,
    inside,
    pick_layout,
    read_json,
    require,
    text_of,
)
from jax_instructblip.data.readers.dataset import PAIRS, Dataset
from jax_instructblip.data.records import Record
from jax_instructblip.data.webdataset import TARS, open_tars

VISUAL_GENOME = {"train": ("vg_caption.json",)}
VISUAL_GENOME_OFFICIAL = {"train": ("region_descriptions.json",)}
WEB = {"train": (TARS,)}
_FOLDERS = ("VG_100K", "VG_100K_2")  # the two archives of Visual Genome's images


def read_visual_genome(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields Visual Genome's descriptions of regions, each as a caption of the whole image.

    LAVIS's file is `[{"image": path below the folder, "caption"}]`, the official one
    `[{"id", "regions": [{"region_id", "phrase"}]}]` with images `VG_100K/1.jpg`, `VG_100K_2/2.jpg`.
    Regions whose phrase is blank are skipped; the official file has such regions. `raw` is the
    folder of the original files; the only `split` is train.
    """
    layout, (path,) = pick_layout(raw, split, VISUAL_GENOME, VISUAL_GENOME_OFFICIAL)
    record = functools.partial(Record, prompt="", task="visual_genome", split=split)
    for number, row in enumerate(read_json(path, list)):
        where = f"{path}: row {number}"
        require(row, dict, where)
        if layout == 0:
            image = inside(raw, text_of(row, "image", where), where=where)
            caption = text_of(row, "caption", where)
            yield record(id=str(number), images=(image,), answers=(caption,))
            continue
        name = f"{field(row, 'id', int, where)}.jpg"
        image = next(
            (str(raw / folder / name) for folder in _FOLDERS if (raw / folder / name).is_file()),
            str(raw / _FOLDERS[0] / name),
        )
        for index, region in enumerate(field(row, "regions", list, where)):
            at = f"{where}: regions[{index}]"
            phrase = field(require(region, dict, at), "phrase", str, at).strip()
            if phrase:
                region_id = field(region, "region_id", int, at)
                yield record(id=f"{row['id']}:{region_id}", images=(image,), answers=(phrase,))


def _read_tars(name: str, raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields the pairs in the tars of a dataset."""
    pick_layout(raw, split, WEB)
    records = open_tars(raw, task=name, split=split)
    for number in range(len(records)):
        yield records[number]


def _web(name: str, source: str, notes: str = "") -> Dataset:
    """Returns the row of a dataset that is a list of URLs, downloaded by img2dataset."""
    return Dataset(
        name=name,
        family=PAIRS,
        held_in=None,
        read=functools.partial(_read_tars, name),
        files=WEB,
        counts={},
        templates="",
        licence="list: as its source states; images belong to the owners of the web pages",
        source=source,
        notes=f"{_FETCH} {notes}".strip(),
    )


_FETCH = (
    "Download the images with `img2dataset --output_format webdataset --caption_col caption`; all "
    "tars of the folder are read. Many URLs are dead, so that no count is expected. BLIP has a "
    "list with filtered web captions and lists with synthetic ones."
)
_BLIP = "https://github.com/salesforce/BLIP (Pre-training datasets download)"
_JOINT = "BLIP's lists hold CC3M, CC12M and SBU together: prepare them as one of the three."

DATASETS = (
    Dataset(
        name="visual_genome",
        family=PAIRS,
        held_in=None,
        read=read_visual_genome,
        files=VISUAL_GENOME,
        rerelease=VISUAL_GENOME_OFFICIAL,
        counts={"train": 821_774},
        templates="",
        licence="CC BY 4.0",
        source="vg_caption.json: https://storage.googleapis.com/sfr-vision-language-research/LAVIS/"
        "datasets/visual_genome; region_descriptions.json and images: "
        "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html",
        notes="Paths in vg_caption.json are relative to the folder. The official file has all "
        "regions, several times the count above.",
    ),
    _web("cc3m", f"https://ai.google.com/research/ConceptualCaptions/download; {_BLIP}", _JOINT),
    _web("cc12m", f"https://github.com/google-research-datasets/conceptual-12m; {_BLIP}", _JOINT),
    _web("sbu", f"https://www.cs.rice.edu/~vo9/sbucaptions; {_BLIP}", _JOINT),
    _web("laion", _BLIP, "115 million of LAION-400M are in BLIP's lists."),
)
