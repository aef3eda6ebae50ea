"""Batches of questions: checks images and prompts, and pads them to arrays of few shapes.

Few shapes mean few compiled programs: the texts of a batch are padded to one of `LENGTHS`, a batch
to a power of two, or to `batch_size` if there are more questions than that.
"""

import itertools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from PIL import Image

from jax_instructblip.data.batch import collate, compact
from jax_instructblip.data.chat_text import ChatTextProcessor, Prompt, prompt_problem
from jax_instructblip.data.conversation import IMAGE, Conversation
from jax_instructblip.data.images import CROPS, decode
from jax_instructblip.data.spec import IGNORE, Batch
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.fields import check, text_problem, whole
from jax_instructblip.files import FileSlice
from jax_instructblip.models.variants import Variant

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)  # tokens of a padded text

MOST_FRAMES = 1_024  # of a video; the memory of attention grows with their square

Frame = str | os.PathLike | bytes | FileSlice | Image.Image | np.ndarray
Picture = Frame | Sequence[Frame]  # several frames, in order of time, are a video
Example = dict[str, np.ndarray]


class Question(NamedTuple):
    """A prompt and the frames or images that it is about; a still image has one frame.

    Prepared inputs are used as they are: `frames` may be the array that `pixels` returns, `example`
    the tokens that `TextProcessor.prompt` returns.
    """

    frames: tuple[Frame, ...] | np.ndarray
    prompt: Prompt
    example: Example | None = None


class QuestionBatch(NamedTuple):
    """One batch of questions, filled up to its size with copies of the last question.

    A copy ends with its original, so copies never prolong decoding.
    """

    rows: np.ndarray  # [B] index of each question in the call
    count: int  # number of real rows, which come first
    batch: Batch


def pair_inputs(images: Any, prompts: Any, *, chat: bool = False) -> list[Question]:
    """Pairs images with prompts in order; a single image or prompt goes with all of the others.

    `images` are `Picture`s, each a `Frame` or a list of frames, and `prompts` are strings. A single
    image or prompt need not be in a list. With `chat` a prompt may be a `Conversation`, a list of
    frames is several images, their number may differ between prompts, and None is no image.

    Raises:
        ValueError: lists are empty, counts do not match, prompts are no text (or conversation), or
            videos have different lengths.
    """
    images = [images] if isinstance(images, Frame) or (chat and images is None) else images
    prompts = [prompts] if isinstance(prompts, str | Conversation) else prompts
    for name, inputs in (("images", images), ("prompts", prompts)):
        if not isinstance(inputs, list | tuple):
            kind = type(inputs).__name__
            raise ValueError(f"{name} is a {kind}, expected a list of them, or a single one")
        if not inputs:
            raise ValueError(f"{name} is empty: there is nothing to answer")
    if chat:
        problems = [(i, prompt_problem(prompt)) for i, prompt in enumerate(prompts)]
    elif wrong := [i for i, prompt in enumerate(prompts) if not isinstance(prompt, str)]:
        raise ValueError(f"prompts must be strings; those at {wrong} are not")
    else:
        problems = [
            (i, text_problem(prompt) or _place_problem(prompt)) for i, prompt in enumerate(prompts)
        ]
    if wrong := [f"prompt {i} {problem}" for i, problem in problems if problem]:
        raise ValueError("; ".join(wrong))
    if len(images) != len(prompts) and 1 not in (len(images), len(prompts)):
        raise ValueError(
            f"{len(images)} images and {len(prompts)} prompts do not match: give as many of both, "
            "or one of either for all of the other"
        )
    pictures = [_frames(each, chat) for each in images]
    lengths = [len(frames) for frames in pictures]
    if not chat and (len(set(lengths)) > 1 or 0 in lengths):
        raise ValueError(
            "all images of a call need the same number of frames (a still image is one), at least "
            f"one; found, in order, {lengths}"
        )
    if max(lengths) > MOST_FRAMES:
        raise ValueError(f"a video has {max(lengths)} frames, at most {MOST_FRAMES} are read")
    count = max(len(pictures), len(prompts))
    if len(pictures) == 1:
        pictures = pictures * count
    return [Question(*each) for each in zip(pictures, itertools.cycle(prompts), strict=False)]


def images_by_place(images: Sequence[Frame], prompts: Sequence[str]) -> list[Picture]:
    """Returns the pictures of a chat's prompts as `pair_inputs` takes them: a list for each prompt.

    Each prompt takes as many images, in order, as it has `<image>`, and one without takes one:

        a.jpg b.jpg c.jpg   "Is <image> like <image>?" "What is it?"   [[a, b], [c]]

    If all prompts have n places and there are n images, one list, `[images]`, serves them all. If
    no prompt has two places, `images` is returned as it is.

    Raises:
        ValueError: the numbers of images and of places do not match.
    """
    counts = [prompt.count(IMAGE) for prompt in prompts]
    if max(counts, default=0) < 2:
        return list(images)
    if len(images) == counts[0] and len(set(counts)) == 1:
        return [list(images)]
    sizes = [max(count, 1) for count in counts]
    if len(images) != sum(sizes):
        of_each = ", ".join(map(str, counts))
        raise ValueError(
            f"{len(images)} images and {sum(counts)} {IMAGE} in the prompts do not match (in each: "
            f"{of_each}): give an image for each place, and one for a prompt without a place"
        )
    rest = iter(images)
    return [list(itertools.islice(rest, size)) for size in sizes]


def _place_problem(prompt: str) -> str:
    """Returns the reason why a prompt is of no use to a model without a chat template."""
    if IMAGE not in prompt:
        return ""
    return (
        f"has an {IMAGE}, but this model has no chat template: it reads its images before the "
        "prompt. Leave the mark out"
    )


def _frames(picture: Any, chat: bool) -> tuple[Frame, ...]:
    if chat and picture is None:
        return ()
    return tuple(picture) if isinstance(picture, list | tuple) else (cast(Frame, picture),)


def check_batch_size(batch_size: int) -> None:
    """Raises a ValueError if `batch_size` is not a whole number from 1 to 65,536."""
    check({"batch_size": batch_size}, {"batch_size": whole(1, 65_536, unit="questions")})


def check_images_listed(images: Any) -> None:
    """Raises a ValueError if `images` is no list (tuple, array `[N, H, W, C]`) or an empty one.

    One image alone is refused: the rows of an array and the letters of a path would pass for many.
    """
    several = hasattr(images, "__len__") and hasattr(images, "__getitem__")
    if isinstance(images, np.ndarray):
        several = images.ndim == 4 or images.dtype == object
    if not several or isinstance(images, str | bytes | Mapping):
        raise ValueError(f"images is a {type(images).__name__}, expected a list of them")
    if not len(images):
        raise ValueError("there are no images: give at least one")


def make_batches(
    text: TextProcessor,
    questions: Sequence[Question],
    batch_size: int,
    multiple: int = 1,
    reserve: int = 0,
) -> Iterator[QuestionBatch]:
    """Yields the questions, in order, in batches that are padded to few shapes.

    If all questions are about one picture and `multiple` is 1, each batch has this picture once.
    Everything but the images is checked before the first batch; they are opened batch by batch.

    Args:
        text: the tokenizers, and how images are prepared.
        questions: at least one.
        batch_size: the most questions in a batch.
        multiple: a batch's number of rows is rounded up to a multiple of this, the number of
            shards into which devices split a batch.
        reserve: number of new tokens that must fit after each prompt.

    Raises:
        ValueError: `batch_size` is out of range, a prompt is too long or cannot be used.
        ImageError: an image cannot be used.
    """
    check_batch_size(batch_size)
    prompt: Any = text.prompt  # that of a chat takes conversations, too
    examples = [each.example or prompt(each.prompt, len(each.frames)) for each in questions]
    _check_lengths(text, questions, examples, reserve)
    side, crop = text.variant.vision.image_size, text.input_format.image_crop
    one_picture = multiple == 1 and all(each.frames is questions[0].frames for each in questions)
    image, frames = np.zeros(0, np.uint8), None
    for start in range(0, len(questions), batch_size):
        rows = range(start, min(start + batch_size, len(questions)))
        padded = []
        for row in rows:
            if questions[row].frames is not frames:  # one image of many prompts is opened once
                frames = questions[row].frames
                image = pixels(frames, side, crop)
            padded.append({"images": image, **examples[row]})
        few = 1 << (len(rows) - 1).bit_length()
        size = batch_size if len(questions) > batch_size else min(few, batch_size)
        size += -size % multiple
        padded += padded[-1:] * (size - len(rows))
        batch = collate(
            padded,
            visual_tokens=text.variant.visual_tokens,
            lengths=_common_length(text, padded),
            pad_id=text.variant.llm.pad_id,
        )
        del batch["truncated"]
        if one_picture:
            batch["images"] = batch["images"][:1]  # the model then encodes the picture once
        numbers = np.pad(np.array(rows, np.int32), (0, size - len(rows)), mode="edge")
        yield QuestionBatch(numbers, len(rows), batch)


def prompt_limit(text: TextProcessor, frames: int, reserve: int) -> int:
    """The most tokens of a prompt's text, without the visual vectors of its `frames` frames.

    `reserve` new tokens must fit after the prompt.
    """
    visual, positions = frames * text.variant.visual_tokens, text.variant.llm.longest_sample
    limit = LENGTHS[-1]
    if text.input_format.template:
        limit = min(limit, text.input_format.limit - visual)
    return limit if positions is None else min(limit, positions - visual - reserve)


def padded_length(tokens: int) -> int:
    """The size to which a text is padded: the first in `LENGTHS` that holds so many tokens."""
    return next(size for size in LENGTHS if size >= tokens)


def padded_width(text: TextProcessor, tokens: int, frames: int) -> int:
    """The slots of a padded row: the visual vectors of its frames, and its padded text."""
    return frames * text.variant.visual_tokens + padded_length(tokens)


def check_reserve(variant: Variant, frames: int, reserve: int) -> None:
    """Raises a ValueError if `reserve` new tokens do not fit after `frames` images and a token."""
    visual_tokens = frames * variant.visual_tokens
    if (positions := variant.llm.longest_sample) is not None:
        most, why = (
            positions - visual_tokens - 1,
            f"the model has {positions} positions, {visual_tokens} of the image",
        )
    else:
        most, why = LENGTHS[-1], "the cache holds no more"
    if reserve > most:
        raise ValueError(
            f"{reserve} new tokens are asked for (max_new_tokens, or those of the longest "
            f"candidate), expected at most {most}: {why}"
        )


def compacted(batch: Batch) -> Batch:
    """A copy of `batch` with the padding of every sequence moved to its end; the order is kept.

    For batches that are padded on the left or between tokens, as other programs may make them.
    """
    batch = dict(batch)
    decoding = "decoder_segments" in batch
    moved = _move_padding(batch, "segments", ("tokens", "slots", "positions"))
    indices = ["places"] if decoding else ["places", "asked"]
    for name in (name for name in indices if name in batch):
        batch[name] = _follow(batch[name], moved)
    if decoding:
        moved = _move_padding(batch, "decoder_segments", ("decoder_tokens",))
        batch["asked"] = _follow(batch["asked"], moved)
    if "qformer_mask" in batch:
        tokens, mask = (batch[name].reshape(-1, batch[name].shape[-1]) for name in _INSTRUCTION)
        for name, leaf in zip(_INSTRUCTION, compact(tokens, mask), strict=True):
            batch[name] = leaf.reshape(batch[name].shape)
    return batch


def ask_every_slot(variant: Variant, batch: Batch) -> Batch:
    """Returns `batch`; one without targets gets keys that ask a decoder-only model for every slot.

    The added keys are `asked`, all slots of a row, and `targets`, which are ignored.
    """
    if {"asked", "targets"} & batch.keys() or variant.llm.encoder_decoder:
        return batch
    slots = np.zeros_like(batch["slots"]) + np.arange(batch["slots"].shape[1], dtype=np.int32)
    return batch | {"asked": slots, "targets": np.full_like(slots, IGNORE)}


_INSTRUCTION = ("qformer_tokens", "qformer_mask")


def _move_padding(batch: Batch, segments: str, names: Sequence[str]) -> np.ndarray:
    """Moves padding to the end of each row in the arrays `segments` and `names`, in place.

    Returns the new index of each old one; an added last column stands for indices out of range.
    """
    order = np.argsort(batch[segments] == 0, axis=1, kind="stable")
    for name in (segments, *names):
        batch[name] = np.take_along_axis(np.asarray(batch[name]), order, axis=1)
    nowhere = np.full((len(order), 1), order.shape[1])
    return np.concatenate([np.argsort(order, axis=1), nowhere], axis=1).astype(np.int32)


def _follow(index: np.ndarray, moved: np.ndarray) -> np.ndarray:
    nowhere = moved.shape[1] - 1
    index = np.where((index < 0) | (index > nowhere), nowhere, index)
    return np.take_along_axis(moved, index, axis=1)


def pixels(
    frames: Sequence[Frame] | np.ndarray, size: int, crop: str = "squash", upright: bool = True
) -> np.ndarray:
    """The pixels `[F, size, size, 3]` uint8 that the model sees; an array is returned unchanged.

    `crop` is a name in `images.CROPS`; `upright` applies EXIF orientation, as in `images.decode`.
    """
    if isinstance(frames, np.ndarray):
        return frames
    if not frames:
        return np.zeros((0, size, size, 3), np.uint8)
    return np.stack([CROPS[crop](decode(frame, upright=upright), size) for frame in frames])


def _common_length(text: TextProcessor, examples: Sequence[Example]) -> dict[str, tuple[int, ...]]:
    """The lengths to pad slots and instructions to, both from one text length in `LENGTHS`.

    If each text had a length of its own, every pair of lengths would need its own program. The
    slots of a row also include the visual vectors.
    """
    both = ("tokens", "qformer_tokens")
    longest = max(len(each[name]) for each in examples for name in both if name in each)
    length = padded_length(longest)
    most = max(len(each["images"]) for each in examples)
    return {
        "images": (max(most, 1),),  # a batch of texts alone has an unused image
        "slots": (padded_width(text, longest, most),),
        "qformer_tokens": (min(length, text.qformer_limit),),
    }


def _check_lengths(
    text: TextProcessor, questions: Sequence[Question], examples: Sequence[Example], reserve: int
) -> None:
    """Raises a ValueError for prompts that are too long; warns of texts that are not read."""
    wrong = []
    counts = [len(question.frames) for question in questions]
    lengths = [len(example["tokens"]) for example in examples]
    for frames in sorted(set(counts)):
        visual = frames * text.variant.visual_tokens
        chat = text.input_format
        if chat.template and visual >= chat.limit:
            wrong.append(
                f"{frames} images take {visual} slots, and a prompt has at most {chat.limit} in "
                "all: ask about fewer images"
            )
            continue
        check_reserve(text.variant, frames, reserve)
        limit = prompt_limit(text, frames, reserve)
        asked = [i for i, count in enumerate(counts) if count == frames]
        if long := [f"prompt {i} has {lengths[i]}" for i in asked if lengths[i] > limit]:
            wrong.append(
                f"a prompt may have {limit} tokens (beside {visual} of the image and {reserve} of "
                f"the answer): {', '.join(long)}; shorten it"
            )
    if wrong:
        raise ValueError("; ".join(wrong))
    warn_of_unread(text, questions, examples)


def warn_of_unread(
    text: TextProcessor, questions: Sequence[Question], examples: Sequence[Example]
) -> None:
    """Logs a warning if the Q-Former or the chat template leaves out parts of prompts.

    `examples` are the results of `TextProcessor.prompt` for the questions.
    """
    log = logging.getLogger(__name__)
    if cut := sum(int(example["truncated"][0]) for example in examples):
        log.warning(
            "%d of %d prompts have more than %d tokens: the Q-Former reads their ends alone",
            *(cut, len(examples), text.qformer_limit),
        )
    if isinstance(text, ChatTextProcessor) and not text.chat.template.reads_questions:
        if unread := sum(1 for each in questions if each.prompt and each.example is None):
            log.warning(
                "%d of %d prompts have a text, which the chat template %s leaves out",
                *(unread, len(examples), text.input_format.template),
            )
