"""Questions about videos: MSVD-QA, MSRVTT-QA and iVQA; `images` of a record is the video's path.

`split` is train, val or test; `raw` is the folder of the original files.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from jax_instructblip.data.readers.annotations import (
    AnnotationError,
    annotated,
    field,
    pick_layout,
    read_csv,
    read_json,
    read_lines,
    require,
    text_of,
    unique,
)
from jax_instructblip.data.readers.dataset import Dataset
from jax_instructblip.data.readers.named_files import VIDEOS, NamedFiles
from jax_instructblip.data.records import Record

_SPLITS = ("train", "val", "test")
LAVIS = {split: (f"qa_{split}.json",) for split in _SPLITS}
MSVD = {split: (f"{split}_qa.json", "youtube_mapping.txt") for split in _SPLITS}
MSRVTT = {split: (f"{split}_qa.json",) for split in _SPLITS}
IVQA = {split: (f"{split}.csv",) for split in _SPLITS}

CANDIDATES = ("qa_ans2label.json", "train_ans2label.json")  # one of them is enough
_IVQA_CLIP = ("video_id", "start", "end")
_IVQA_ANSWERS = tuple(f"answer{number}" for number in range(1, 6))


def read_msvd_qa(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields MSVD-QA from LAVIS's files, or from the original ones, where videos are numbers.

    Videos below `raw`: `videos/-4wsuPCjDBc_5_15.avi`.
    """
    layout, paths = pick_layout(raw, split, LAVIS, MSVD)
    names = _mapping(paths[1]) if layout == 1 else {}
    return unique(_records(raw, split, "msvd_qa", paths[0], ".avi", names))


def read_msrvtt_qa(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields MSRVTT-QA from LAVIS's files, or from the original ones, where videos are numbers.

    Videos below `raw`: `videos/video6513.mp4`.
    """
    _, (path,) = pick_layout(raw, split, LAVIS, MSRVTT)
    return unique(_records(raw, split, "msrvtt_qa", path, ".mp4", {}))


def read_ivqa(raw: pathlib.Path, split: str) -> Iterator[Record]:
    """Yields iVQA: a question about each clip of an instruction video, with five answers.

    The clips must be cut out of the videos beforehand. A clip below `raw` is the file
    `videos/VIDEO_START_END.mp4`, with the video's id and the seconds that the row states.
    """
    _, (path,) = pick_layout(raw, split, IVQA)
    return unique(_ivqa(raw, split, path))


def read_candidates(raw: pathlib.Path) -> tuple[str, ...]:
    """Returns the answers over which MSVD-QA and MSRVTT-QA are ranked, in label order.

    They are read from `qa_ans2label.json` or `train_ans2label.json` (LAVIS's name for it). There
    are thousands, the same for every question, so no record has them as `choices`.
    """
    paths = [raw / name for name in CANDIDATES]
    path = next(filter(pathlib.Path.is_file, paths), paths[0])
    labels = read_json(path, dict)
    answers = {require(label, int, f"{path}: {each!r}"): each for each, label in labels.items()}
    if sorted(answers) != list(range(len(labels))):
        raise AnnotationError(
            f"{path}: the labels of {len(labels)} answers are not 0 to {len(labels) - 1}, each "
            "once: the file is not whole, get it again"
        )
    return tuple(answers[label] for label in range(len(answers)))


def _records(
    raw: pathlib.Path,
    split: str,
    task: str,
    path: pathlib.Path,
    container: str,
    names: dict[str, str],
) -> Iterator[Record]:
    """Yields the records of LAVIS's files (`video`, `question_id`) or the original ones.

    The original files have `video_id` (a number) and `id`. `names` gives the video file of a
    number, `container` the ending of a video file whose name has none.
    """
    document = require(read_json(path), (list, dict), str(path))
    videos = NamedFiles(raw, VIDEOS)
    rows = document.items() if isinstance(document, dict) else enumerate(document)
    for key, row in rows:
        where = f"{path}: [{key!r}]"
        if "video_id" in require(row, dict, where):
            number, video = "id", _numbered(row, names, where)
        else:
            number, video = "question_id", text_of(row, "video", where)
        yield Record(
            id=str(field(row, number, (int, str), where)),
            images=(videos.find("videos", video, usual=container, where=where),),
            prompt=text_of(row, "question", where),
            answers=(text_of(row, "answer", where),),
            task=task,
            split=split,
        )


def _numbered(row: dict[str, Any], names: dict[str, str], where: str) -> str:
    """Returns the name of the video with the number `row["video_id"]`.

    MSVD lists the `names`; without names (MSRVTT) number 7 is `video7`.
    """
    number = field(row, "video_id", int, where)
    if not names:
        return f"video{number}"
    if f"vid{number}" not in names:
        raise AnnotationError(
            f"{where}: youtube_mapping.txt has no vid{number}: get both files of one release"
        )
    return names[f"vid{number}"]


def _mapping(path: pathlib.Path) -> dict[str, str]:
    """Returns {"vid1": "-4wsuPCjDBc_5_15"} from lines such as `-4wsuPCjDBc_5_15 vid1`."""
    names = {}
    for number, line in enumerate(read_lines(path), start=1):
        words = line.split()
        if not words:
            continue
        if len(words) != 2:
            raise AnnotationError(f"{path}:{number}: found {line!r}, expected NAME vidNUMBER")
        names[words[1]] = words[0]
    return names


def _ivqa(raw: pathlib.Path, split: str, path: pathlib.Path) -> Iterator[Record]:
    videos = NamedFiles(raw, VIDEOS)
    for where, row in read_csv(path, (*_IVQA_CLIP, "question", *_IVQA_ANSWERS)):
        clip = "_".join(text_of(row, part, where) for part in _IVQA_CLIP)
        answers = [field(row, column, str, where).strip() for column in _IVQA_ANSWERS]
        yield Record(
            id=clip,
            images=(videos.find("videos", f"{clip}.mp4", where=where),),
            prompt=text_of(row, "question", where),
            task="ivqa",
            split=split,
            **annotated({"answers": answers}, "answers", where),
        )


_FAMILY = "video QA"
_SERVED = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/datasets"
_XU = "https://github.com/xudejing/video-question-answering"
_RANKED = (
    "Ranked over the answers of qa_ans2label.json; the released code generates. UNVERIFIED that "
    "those are the paper's candidates. The other release is the original one."
)

DATASETS: tuple[Dataset, ...] = (
    Dataset(
        name="msvd_qa",
        family=_FAMILY,
        held_in=False,
        read=read_msvd_qa,
        files=LAVIS,
        rerelease=MSVD,
        counts={"test": 13_157},
        templates="question",
        shared_candidates=read_candidates,
        candidate_files=CANDIDATES,
        licence="questions MIT; videos from YouTube, not included",
        source=f"{_SERVED}/msvd/qa_test.json and train_ans2label.json, or {_XU}; videos: "
        "https://www.cs.utexas.edu/~ml/clamp/videoDescription",
        notes=f"Videos in videos/, .avi if the file does not say. {_RANKED}",
    ),
    Dataset(
        name="msrvtt_qa",
        family=_FAMILY,
        held_in=False,
        read=read_msrvtt_qa,
        files=LAVIS,
        rerelease=MSRVTT,
        counts={"val": 12_278},
        templates="question",
        shared_candidates=read_candidates,
        candidate_files=CANDIDATES,
        licence="questions MIT; videos from YouTube, not included",
        source=f"{_SERVED}/msrvtt/qa_test.json and train_ans2label.json, or {_XU}; videos: MSR-VTT",
        notes="Videos in videos/, .mp4 if the file does not say. About 72,821 questions in test. "
        f"{_RANKED}",
    ),
    Dataset(
        name="ivqa",
        family=_FAMILY,
        held_in=False,
        read=read_ivqa,
        files=IVQA,
        counts={},
        templates="question",
        licence="not stated for the questions; videos of HowTo100M, not included",
        source="https://github.com/antoyang/just-ask (train.csv, val.csv, test.csv)",
        notes="Clips in videos/, VIDEO_START_END.mp4: cut them out of the videos first. About "
        "2,000 questions in test. UNVERIFIED: how answers are normalised before they are compared.",
    ),
)
