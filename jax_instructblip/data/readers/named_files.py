"""Finds image and video files whose ending differs from the one that the annotations tell.

Annotations name a picture or a video, often without an ending, and the file that was downloaded may
have another one: `KEY.jpg` may be `KEY.GIF` on the disk, `video7.mp4` may be `video7.webm`.
"""

import os
import pathlib

from jax_instructblip.data.readers.annotations import inside

PICTURES = frozenset(
    ".avif .bmp .dib .gif .j2k .jfif .jp2 .jpe .jpeg .jpg .jpx .pgm .png .ppm .tif .tiff "
    ".webp".split()
)
VIDEOS = frozenset(
    ".3g2 .3gp .asf .avi .divx .f4v .flv .gif .m1v .m2ts .m2v .m4v .mj2 .mkv .mov .mp4 .mpe .mpeg "
    ".mpg .mts .ogg .ogv .qt .ts .vob .webm .wmv .xvid".split()
)


class NamedFiles:
    """Finds files below a folder, whatever their ending; lists each subfolder only once.

    The name without ending must match exactly, the ending in any case.
    """

    def __init__(self, raw: pathlib.Path, endings: frozenset[str]):
        """Looks below the folder `raw`; `endings` are those that a file may have, in lower case."""
        self._raw, self._endings = raw, endings
        self._names: dict[str, frozenset[str]] = {}
        self._stems: dict[str, dict[str, list[str]]] = {}

    def find(self, *parts: str, usual: str = "", where: str = "") -> str:
        """Returns the path of a file below the folder; `parts` are subfolders and name.

        A name without a known ending gets the ending `usual`. If there is no such file, a file of
        that name with another ending is taken, `usual` first, then in alphabetical order. If there
        is none either, the path as asked for is returned. `where` names the row in errors.

        Raises:
            AnnotationError: the path leads out of the folder.
        """
        stem, ending = self._split(parts[-1])
        name = f"{stem}{ending or usual}"
        path = inside(self._raw, *parts[:-1], name, where=where)
        folder, name = os.path.split(path)
        if name in self._listed(folder):
            return path
        stem = self._split(name)[0]
        others = self._by_stem(folder).get(stem, [])
        usual_first = sorted(others, key=lambda each: (each[len(stem) :].lower() != usual, each))
        return os.path.join(folder, usual_first[0]) if others else path

    def _split(self, name: str) -> tuple[str, str]:
        stem, ending = os.path.splitext(name)
        return (stem, ending) if ending.lower() in self._endings else (name, "")

    def _listed(self, folder: str) -> frozenset[str]:
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))
            except OSError:
                self._names[folder] = frozenset()
        return self._names[folder]

    def _by_stem(self, folder: str) -> dict[str, list[str]]:
        if folder not in self._stems:
            stems: dict[str, list[str]] = {}
            for name in self._listed(folder):
                stem, ending = self._split(name)
                if ending:
                    stems.setdefault(stem, []).append(name)
            self._stems[folder] = stems
        return self._stems[folder]
