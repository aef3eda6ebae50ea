"""Compares int8 and int4 weights with float ones: answers on the drawn world, and bytes.

python -m benchmarks.quantise [--checkpoint NAME_OR_FOLDER ...] [--questions 200] [--dtype float32]

For each checkpoint (default: the embedded ones) and each form of weights (`models/quantise.py`),
compared with the same model not quantised, on the same questions of `shapes` (split `test`):

    top1        share of positions of the right answers, given all tokens before, at which the most
                likely token is the same
    tokens      share of positions of greedy answers with the same token
    empty       greedy answers without text
    exact       share of right greedy answers, and `exact_float` of the model not quantised
    bytes       of the weights by their shapes, as a share of those in bfloat16: of all, and of the
                kernels that are quantised
    held        with `--dtype bfloat16`, bytes on the devices as a share of the other model's

and `bytes` of the released models (`released`). Writes `results/quantise.json`.
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_instructblip
from benchmarks.workload import facts
from jax_instructblip.atomic import write_file
from jax_instructblip.data.batch import IGNORE, collate
from jax_instructblip.data.images import decode, resize_squash
from jax_instructblip.data.sources import open_records
from jax_instructblip.models import quantise
from jax_instructblip.models.released import VARIANTS
from jax_instructblip.models.variants import QUANTISED
from jax_instructblip.models.vlm import param_shapes

RESULT = pathlib.Path(__file__).parent / "results" / "quantise.json"
CHECKPOINTS = ("shapes_llama", "shapes_t5")
SPLIT, NEW_TOKENS, ROWS = "test", 12, 50


def pick(count: int) -> list[Any]:
    """Returns `count` records of the split, evenly spaced, so that all kinds of question occur."""
    records, _ = open_records("shapes", SPLIT)
    return [records[int(n)] for n in np.linspace(0, len(records) - 1, count)]


def likely(blip: Any, records: list[Any]) -> np.ndarray:
    """Returns the most likely ids `[N]` at all positions of the right answers, joined.

    `blip` is an `InstructBlipPipeline`, as below; `records` are those of `pick`.
    """
    variant, found = blip.variant, []
    for first in range(0, len(records), ROWS):
        examples = []
        for record in records[first : first + ROWS]:
            example = blip.text.example(record.prompt, record.answers[0])
            pixels = [resize_squash(decode(i), variant.vision.image_size) for i in record.images]
            examples.append(example | {"images": np.stack(pixels)})
        batch = collate(examples, visual_tokens=variant.visual_tokens, pad_id=variant.llm.pad_id)
        batch.pop("truncated", None)
        logits = blip.logits(batch)
        found.append(logits.argmax(axis=-1)[batch["targets"] != IGNORE])
    return np.concatenate(found)


def greedy(blip: Any, records: list[Any]) -> list[Any]:
    """Returns the greedy answers to the records' questions."""
    images, prompts = [r.images[0] for r in records], [r.prompt for r in records]
    return blip.generate(images, prompts, max_new_tokens=NEW_TOKENS)


def agreement(ours: list[Any], others: list[Any]) -> float:
    """Returns the share of positions, counted on the longer answer, with the same token.

    Both lists are results of `greedy`.
    """
    same = total = 0
    for one, other in zip(ours, others, strict=True):
        pairs = zip(one.tokens, other.tokens, strict=False)
        same += sum(a == b for a, b in pairs)
        total += max(len(one.tokens), len(other.tokens))
    return same / total


def exact(answers: list[Any], records: list[Any]) -> float:
    """Returns the share of answers that are one of the right ones."""
    pairs = zip(answers, records, strict=True)
    return float(np.mean([answer.text in record.answers for answer, record in pairs]))


def size(tree: Any, prefix: str = "") -> int:
    """Returns the bytes of the leaves whose paths begin with `prefix`."""
    leaves = (leaf for path, leaf in _leaves(tree) if path.startswith(prefix))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    found = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [("/".join(str(key.key) for key in path), leaf) for path, leaf in found]


def shares(variant: Any, form: str) -> dict[str, float]:
    """Returns the bytes of a model's weights in `form`, as shares of those in bfloat16.

    `form` is "int8" or "int4". The shares are those of `all` weights and of the `kernels`.
    """
    half = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16)
    plain = jax.tree.map(half, param_shapes(variant))
    small = quantise.shapes(plain, form)
    chosen = [path for path, _ in _leaves(plain) if quantise.is_quantised(path)]
    kernels = lambda tree: sum(size(tree, path) for path in chosen)
    return {
        "all": round(size(small) / size(plain), 4),
        "kernels": round(kernels(small) / kernels(plain), 4),
    }


def held(blip: Any) -> int:
    """Returns the bytes of all weights that a pipeline holds on its devices."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(blip.params))


def measure(checkpoint: str, questions: int, dtype: str) -> dict[str, Any]:
    """Returns the figures of one checkpoint, by form of weights, on that many questions.

    `dtype` is that of the weights which are not quantised.
    """
    records = pick(questions)
    blip = jax_instructblip.load(checkpoint, dtype=dtype)
    tokens, answers = likely(blip, records), greedy(blip, records)
    found: dict[str, Any] = {"questions": questions, "dtype": dtype, "positions": len(tokens)}
    found["exact_float"] = exact(answers, records)
    for form in QUANTISED:
        other = jax_instructblip.load(checkpoint, dtype=dtype, quantise=form)
        own = greedy(other, records)
        found[form] = {
            "top1": round(float((likely(other, records) == tokens).mean()), 4),
            "tokens": round(agreement(own, answers), 4),
            "empty": sum(not answer.text.strip() for answer in own),
            "exact": exact(own, records),
            "bytes": shares(blip.variant, form),
        }
        if dtype == "bfloat16":
            found[form]["held"] = round(held(other) / held(blip), 4)
    return found


def main() -> None:
    """Measures the checkpoints and writes the results file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", nargs="+", default=CHECKPOINTS, help="models to measure")
    parser.add_argument("--questions", type=int, default=200, help="number (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="of computation (default: %(default)s)")
    flags = parser.parse_args()
    words = [] if flags.questions == 200 else ["--questions", str(flags.questions)]
    found = facts("quantise", words)
    for checkpoint in flags.checkpoint:
        name = pathlib.Path(checkpoint).name
        found[name] = measure(checkpoint, flags.questions, flags.dtype)
        print(json.dumps({name: found[name]}, indent=1), flush=True)
    names = [name for name in VARIANTS if name.startswith("instructblip")]
    found["released"] = {
        name: {form: shares(VARIANTS[name], form) for form in QUANTISED} for name in names
    }
    write_file(RESULT, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
