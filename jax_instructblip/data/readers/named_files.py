"""Files whose ending the annotations do not tell, or tell otherwise than the disk.

An annotation names a picture or a video by its stem; which program wrote the file, and in which
container, is seen in the folder alone: `KEY.jpg` may lie there as `KEY.GIF`, `video7.mp4` as
`video7.webm`.
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
    """Looks files up below a folder, whatever their ending; each folder is listed once.

    Stems are compared to the letter (the ids of videos are), endings are not.
    """

    def __init__(self, raw: pathlib.Path, endings: frozenset[str]):
        """`endings` are those that a file found instead may have, in small letters."""
        self._raw, self._endings = raw, endings
        self._names: dict[str, frozenset[str]] = {}
        self._stems: dict[str, dict[str, list[str]]] = {}

    def find(self, *parts: str, usual: str = "", where: str = "") -> str:
        """The path of the file of that name below the folder, or of the one with another ending.

        A name without a known ending gets the `usual` one. Of several files the usual one comes
        first, then the order of the alphabet. Where none is there, the name as it was asked for.

        Raises:
            AnnotationError: the name leads out of the folder.
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
