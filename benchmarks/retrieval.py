"""Two-step retrieval side by side with transformers, on a CPU in float32.

python -m benchmarks.retrieval [--rounds 3] [--out FILE]

Both sides have the same random weights. `ours` is `Retriever.rank`: features of all images and
captions, similarities, and the match of each query's `k` nearest both ways. `theirs` scores pairs
with the forward pass of `Blip2ForImageTextRetrieval`, one pair a call; `theirs_batched` with
several pairs a call, each with the number of threads that is faster. They are timed on fewer pairs
(`timed_pairs`), and their seconds are multiplied by the ratio of pairs; what they would spend to
find the nearest is left out. Each round times both sides one after the other, because other
processes share the machine; `ratio` is the median of the rounds', and `processor_ratio` that of
processor seconds. The first round of ours also compiles.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from benchmarks.theirs import quiet
from benchmarks.workload import THREADS, Measured, facts, measure
from jax_instructblip.backbones.tokenizers import make_bert
from jax_instructblip.conversion.hf_folder import read_hf
from jax_instructblip.data.captions import RETRIEVAL_LIMIT, CaptionTokenizer
from jax_instructblip.inference import matching
from jax_instructblip.inference.retrieval import Retriever
from jax_instructblip.models.vision import IMAGE_MEAN, IMAGE_STD

COLORS = ("red", "green", "blue", "white", "black", "yellow")
THINGS = ("dog", "cat", "car", "house", "tree", "boat", "ball", "chair")
WAYS = ("left of", "right of", "above", "below", "in front of", "behind")
TRIED = 64  # pairs that numbers of threads are tried with
BATCH = 32  # pairs of a call of `theirs_batched`
# Vision: width, layers, image size; Q-Former: width, layers, queries; images, captions, k, pairs
# that transformers scores.
SIZES = {
    "tiny": (88, 4, 56, 48, 4, 8, 1000, 5000, 16, 256),
    "middle": (384, 6, 112, 256, 4, 32, 100, 500, 16, 64),
}


def make_models(
    name: str,
) -> tuple[transformers.Blip2ForImageTextRetrieval, Retriever]:
    """Returns a model with random weights, in transformers and as a Retriever.

    `name` is a key of `SIZES`, as below.
    """
    width, layers, side, qwidth, qlayers, queries, *_ = SIZES[name]
    config = transformers.Blip2Config(
        vision_config=dict(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            image_size=side,
        ),
        qformer_config=dict(
            hidden_size=qwidth,
            intermediate_size=4 * qwidth,
            num_hidden_layers=qlayers,
            num_attention_heads=4,
            encoder_hidden_size=width,
            use_qformer_text_input=True,
            vocab_size=30523,
        ),
        num_query_tokens=queries,
        image_text_hidden_size=64,
    )
    torch.manual_seed(0)
    with quiet():
        theirs = transformers.Blip2ForImageTextRetrieval(config).eval()
    with torch.no_grad():
        for leaf in theirs.parameters():
            if leaf.ndim > 1:
                leaf.normal_(0, 0.7 / leaf[0].numel() ** 0.5)
    with tempfile.TemporaryDirectory() as folder, quiet():
        theirs.save_pretrained(folder)
        variant, params = read_hf(folder)
    bert = make_bert([" ".join((*COLORS, *THINGS, *WAYS, "the a number", "0123456789"))])
    text = CaptionTokenizer(variant, bert, RETRIEVAL_LIMIT)
    params = jax.tree.map(jnp.asarray, params)
    return theirs, Retriever(variant, params, text, silent=True)


def draw(name: str) -> tuple[list[np.ndarray], list[str]]:
    """Returns random images and captions, as many as the row of `SIZES` says."""
    side, images, captions = SIZES[name][2], *SIZES[name][6:8]
    rng = np.random.default_rng(0)
    shown = list(rng.integers(0, 256, (images, side, side, 3), dtype=np.uint8))
    pick = lambda words: words[int(rng.integers(len(words)))]
    said = [
        f"the {pick(COLORS)} {pick(THINGS)} {pick(WAYS)} a {pick(COLORS)} {pick(THINGS)} "
        f"number {number}"
        for number in range(captions)
    ]
    return shown, said


@torch.inference_mode()
def their_scores(
    model: transformers.Blip2ForImageTextRetrieval,
    inputs: dict[str, torch.Tensor],
    batch: int,
    threads: int,
) -> np.ndarray:
    """Returns the logits `[P, 2]` of the pairs (not matching, matching), `batch` pairs a call.

    `inputs` are those of `pair_inputs`.
    """
    torch.set_num_threads(threads)
    count = len(inputs["input_ids"])
    parts = [
        model(
            **{name: leaf[start : start + batch] for name, leaf in inputs.items()},
            use_image_text_matching_head=True,
        ).logits_per_image
        for start in range(0, count, batch)
    ]
    return torch.cat(parts).numpy()


def pair_inputs(
    blip: Retriever, images: Sequence[np.ndarray], texts: Sequence[str], pairs: np.ndarray
) -> dict[str, torch.Tensor]:
    """Returns the inputs of transformers for the pairs `[P, 2]` of image and caption numbers.

    `blip` has the tokenizer; `images` are `[S, S, 3]` uint8.
    """
    ids, valid, _ = blip.text.encode([texts[number] for number in pairs[:, 1]])
    pixels = np.stack([images[number] for number in pairs[:, 0]]) / 255
    pixels = ((pixels - IMAGE_MEAN) / IMAGE_STD).astype(np.float32)
    return {
        "pixel_values": torch.tensor(pixels).permute(0, 3, 1, 2).contiguous(),
        "input_ids": torch.tensor(ids).long(),
        "attention_mask": torch.tensor(valid).long(),
    }


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Returns the seconds of both sides, their ratios, and how far their logits are apart."""
    *_, k, timed = SIZES[name]
    theirs, blip = make_models(name)
    images, texts = draw(name)
    near = blip.itc(images, texts)
    of_images, of_texts = matching.nearest(near, k), matching.nearest(near.T, k)
    total = sum(map(len, matching.pairs(of_images, of_texts)))
    numbers = np.linspace(0, of_images.size - 1, timed).astype(int)
    pairs = np.stack([numbers // k, of_images.reshape(-1)[numbers]], axis=1)
    inputs = pair_inputs(blip, images, texts, pairs)
    some = {name: leaf[:TRIED] for name, leaf in inputs.items()}
    tried = lambda batch, n: measure(lambda: their_scores(theirs, some, batch, n)).wall
    threads = {batch: min(THREADS, key=lambda n, b=batch: tried(b, n)) for batch in (1, BATCH)}
    results: dict[Any, np.ndarray] = {}
    measured: dict[Any, list[Measured]] = {1: [], BATCH: [], "ours": []}

    def rank() -> None:
        results["ours"] = blip.rank(images, texts, k=k, itm_only=True).image_to_text

    def score(batch: int) -> None:
        results[batch] = their_scores(theirs, inputs, batch, threads[batch])

    for _ in range(rounds):
        for batch in threads:
            measured[batch].append(measure(lambda batch=batch: score(batch)))
        measured["ours"].append(measure(rank))
    expected, scores = results[1][:, 1], results["ours"][pairs[:, 0], pairs[:, 1]]
    whole = lambda each, field: getattr(each, field) * total / timed
    row: dict[str, Any] = {
        "images": len(images),
        "captions": len(texts),
        "k": k,
        "pairs": total,
        "timed_pairs": timed,
        "ours": [round(each.wall, 2) for each in measured["ours"]],
    }
    for batch, key in ((1, "theirs"), (BATCH, "theirs_batched")):
        both = list(zip(measured[batch], measured["ours"], strict=True))
        ratios = [round(whole(each, "wall") / ours.wall, 2) for each, ours in both]
        own = [whole(each, "own") / ours.own for each, ours in both]
        row[key] = {
            "pairs_a_call": batch,
            "threads": threads[batch],
            "seconds": [round(whole(each, "wall"), 1) for each in measured[batch]],
            "ratios": ratios,
            "ratio": statistics.median(ratios),
            "processor_ratio": round(statistics.median(own), 2),
        }
    return row | {
        "ratio": row["theirs"]["ratio"],
        "largest_difference": float(np.abs(scores - expected).max()),
        "largest_logit": float(np.abs(expected).max()),
    }


def main() -> None:
    """Prints the figures and writes them as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="*", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, help="JSON file")
    flags = parser.parse_args()
    document = facts("retrieval", sys.argv[1:]) | {"dtype": "float32", "results": {}}
    for name in flags.sizes:
        row = document["results"][name] = compare(name, flags.rounds)
        for key, value in row.items():
            print(f"{name} {key}: {value}", flush=True)
        if flags.out:
            flags.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
