"""Full-size InstructBLIP on a CPU: compared with transformers, one answer, one training step.

python -m benchmarks.full_size --folder HF_FOLDER --checkpoint CONVERTED --photo FILE [--out FILE]

CONVERTED is the output of `jax-instructblip convert` for HF_FOLDER, whose weights may be random.
Each stage runs in its own process, so that its peak memory can be measured; `flags` are those of
the command:

    theirs   transformers' float32 logits of one sample, with one tower in memory at a time
    ours     our float32 logits in the same way, and their relative error
    answer   load() with bfloat16 weights, and a question about the photograph
    train    two training steps with bfloat16 frozen weights
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_instructblip
from jax_instructblip import checkpoint
from jax_instructblip.checkpoint import trees
from jax_instructblip.data.batch import collate
from jax_instructblip.data.images import decode, resize_squash
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.inference.loading import read_params, read_source
from jax_instructblip.models.variants import Variant
from jax_instructblip.models.vlm import VisionLanguageModel
from jax_instructblip.training.objective import LanguageObjective
from jax_instructblip.training.optimizer import adamw, warmup_cosine
from jax_instructblip.training.state import create_state, partition
from jax_instructblip.training.step import compile_step

QUESTION, ANSWER = "What is unusual about this picture?", "a man is ironing on the back of a taxi"
STAGES = ("theirs", "ours", "answer", "train")
LOGITS = "theirs.npy"
# Without this, XLA on CPU converts a whole stacked bfloat16 tower to float32 before its loop.
XLA_FLAGS = "--xla_disable_hlo_passes=while-loop-invariant-code-motion"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def make_batch(folder: pathlib.Path, variant: Variant, photo: pathlib.Path) -> dict[str, Any]:
    """Returns a training batch with one sample: the photo, `QUESTION` and `ANSWER`."""
    example = TextProcessor.load(folder, variant).example(QUESTION, ANSWER)
    pixels = resize_squash(decode(photo), variant.vision.image_size)
    examples = [{**example, "images": pixels[None]}]
    batch = collate(examples, visual_tokens=variant.visual_tokens)
    del batch["truncated"]
    return batch


def theirs(flags: argparse.Namespace) -> dict[str, Any]:
    """Stage `theirs`: writes transformers' logits; returns their shape and largest value.

    Each tower is deleted before the next one is read.
    """
    import torch
    import transformers
    from safetensors import safe_open

    def read(prefix: str) -> dict[str, torch.Tensor]:
        """Returns the tensors whose names start with `prefix`, in float32, without the prefix."""
        state = {}
        for shard in sorted(flags.folder.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                for key in file.keys():
                    if key.startswith(prefix):
                        state[key.removeprefix(prefix)] = file.get_tensor(key).float()
        return state

    def fill(module: torch.nn.Module, prefix: str) -> None:
        missing, unexpected = module.load_state_dict(read(prefix), strict=False, assign=True)
        assert not unexpected and all("embed_tokens" in key for key in missing), missing

    config = transformers.InstructBlipConfig.from_pretrained(
        flags.folder, attn_implementation="eager"
    )
    with torch.device("meta"):
        model = transformers.InstructBlipForConditionalGeneration(config).eval()
    source = read_source(flags.checkpoint)
    batch = make_batch(flags.folder, source.variant, flags.photo)
    pixels = (batch["images"][:, 0] / 255 - np.array(MEAN)) / np.array(STD)
    skip = source.variant.visual_tokens  # the image stands first
    text = {
        "qformer_tokens": batch["qformer_tokens"][:, 0],
        "qformer_mask": batch["qformer_mask"][:, 0],
        "tokens": batch["tokens"][:, skip:],
        "mask": batch["segments"][:, skip:] > 0,
        "decoder_tokens": batch["decoder_tokens"],
    }
    text = {key: torch.tensor(leaf, dtype=torch.long) for key, leaf in text.items()}
    with torch.inference_mode():
        fill(model.vision_model, "vision_model.")
        pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
        features = model.vision_model(pixels)[0]
        del model.vision_model
        fill(model.qformer, "qformer.")
        embeddings = model.qformer.embeddings
        embeddings.position_ids = torch.arange(embeddings.position_ids.shape[1])[None]
        fill(model.language_projection, "language_projection.")
        (queries,) = read("query_tokens").values()
        ones = torch.ones(queries.shape[:2], dtype=torch.long)
        seen = model.qformer(
            input_ids=text["qformer_tokens"],
            attention_mask=torch.cat([ones, text["qformer_mask"]], dim=1),
            query_embeds=queries,
            encoder_hidden_states=features,
        )[0][:, : queries.shape[1]]
        prompt = model.language_projection(seen)
        del model.qformer
        language = model.language_model
        fill(language, "language_model.")
        language.decoder.embed_tokens.weight = language.shared.weight
        logits = language(
            inputs_embeds=torch.cat([prompt, language.shared(text["tokens"])], dim=1),
            attention_mask=torch.cat([ones, text["mask"]], dim=1),
            decoder_input_ids=text["decoder_tokens"],
        ).logits
    np.save(flags.work / LOGITS, logits.numpy())
    return {"shape": list(logits.shape), "largest": float(logits.abs().max())}


def ours(flags: argparse.Namespace) -> dict[str, Any]:
    """Stage `ours`: computes our float32 logits; returns their error against transformers'."""
    variant = read_source(flags.checkpoint).variant
    batch = make_batch(flags.checkpoint, variant, flags.photo)
    model = VisionLanguageModel(variant)

    def run(tower: str, stage, *values):
        """Returns the output of the model method `stage`, with only `tower`'s weights in memory."""
        leaves = [path for path in paths if path.startswith(f"{tower}/")]
        params = trees.unflatten(
            {
                path: jnp.asarray(array, jnp.float32)
                for path, array in checkpoint.read_leaves(flags.checkpoint, leaves)
            }
        )
        apply = jax.jit(
            lambda params, *values: model.apply({"params": params}, *values, method=stage)
        )
        return jax.block_until_ready(apply(params, *values))

    paths = list(checkpoint.read_manifest(flags.checkpoint))
    features = run("vision", VisionLanguageModel.encode_image, batch["images"])
    text = batch["qformer_tokens"][:, 0], batch["qformer_mask"][:, 0]
    seen = run("qformer", lambda model, *values: model.bridge(*values), features, *text)

    def read(model, seen, batch):
        tokens = model.llm.embed(batch["tokens"][:, seen.shape[1] :])  # the image stands first
        inputs = jnp.concatenate([seen, tokens], axis=1)
        names = ("segments", "positions", "asked", "decoder_tokens", "decoder_segments")
        return model.llm(inputs, *(batch[name] for name in names))

    found = np.asarray(run("llm", read, seen, batch), np.float64)
    expected = np.load(flags.work / LOGITS).astype(np.float64)
    difference = np.abs(found - expected)
    return {
        "relative_error": float(difference.max() / np.abs(expected).max()),
        "relative_error_norm": float(np.linalg.norm(difference) / np.linalg.norm(expected)),
    }


def answer(flags: argparse.Namespace) -> dict[str, Any]:
    """Stage `answer`: returns the seconds of loading, of a first and of a second answer."""
    start = time.perf_counter()
    blip = jax_instructblip.load(flags.checkpoint, dtype=jnp.bfloat16)
    loaded = time.perf_counter()
    settings = {"max_new_tokens": 8, "min_new_tokens": 8}
    made = blip.generate([flags.photo], [QUESTION], **settings)
    first = time.perf_counter()
    again = blip.generate([flags.photo], [QUESTION], **settings)
    assert again == made and np.isfinite(made[0].logprob)
    return {
        "load_seconds": loaded - start,
        "first_seconds": first - loaded,
        "again_seconds": time.perf_counter() - first,
        "tokens": len(made[0].tokens),
        "logprob": made[0].logprob,
    }


def train(flags: argparse.Namespace) -> dict[str, Any]:
    """Stage `train`: returns seconds and metrics of two steps in bfloat16."""
    source = read_source(flags.checkpoint)
    batch = make_batch(flags.checkpoint, source.variant, flags.photo)
    params = read_params(source, lambda _, array: jnp.asarray(array, jnp.bfloat16))
    trainable, frozen = partition(params, ("qformer",))
    del params
    schedule = warmup_cosine(start=1e-5, peak=1e-5, end=0.0, warmup_steps=1, total_steps=10)
    optimizer = adamw(schedule)
    state = create_state(trainable, optimizer)
    del trainable
    step = compile_step(
        objective=LanguageObjective(VisionLanguageModel(source.variant, jnp.bfloat16)),
        optimizer=optimizer,
        schedule=schedule,
    )
    results = []
    for _ in range(2):
        start = time.perf_counter()
        state, metrics = step(state, frozen, batch, jax.random.key(0))
        metrics = {name: float(value) for name, value in metrics.items()}
        results.append({"seconds": time.perf_counter() - start, **metrics})
        assert np.isfinite(metrics["loss"]) and metrics["gradient_norm"] > 0
    return {"steps": results}


def run_stage(name: str, flags: argparse.Namespace, work: pathlib.Path) -> dict[str, Any]:
    """Runs the stage `name` in a new process; returns its result, seconds and peak memory.

    Raises:
        RuntimeError: the process failed; the message has the end of its stderr.
    """
    command = [sys.executable, "-m", "benchmarks.full_size", "--stage", name, "--work", str(work)]
    for option in ("folder", "checkpoint", "photo"):
        command += [f"--{option}", str(getattr(flags, option).resolve())]
    print(f"-- {name}", flush=True)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
    root = pathlib.Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    if done.returncode:
        raise RuntimeError(f"stage {name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    print(json.dumps(result), flush=True)
    return result


def main() -> None:
    """Runs the stages and writes one JSON file; with `--stage`, runs only this one, in-process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--photo", type=pathlib.Path, required=True)
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES)
    parser.add_argument("--out", type=pathlib.Path, default=None)
    parser.add_argument("--stage", choices=STAGES, help="this stage, in this process")
    parser.add_argument("--work", type=pathlib.Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.stage:
        start = time.perf_counter()
        result = globals()[flags.stage](flags)
        result["seconds"] = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({**result, "peak_gigabytes": peak / 1e9}))
        return
    with tempfile.TemporaryDirectory() as work:
        results = {name: run_stage(name, flags, pathlib.Path(work)) for name in flags.stages}
    document = {
        "command": "python -m benchmarks.full_size "
        + " ".join(map(os.path.basename, sys.argv[1:])),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
        "results": results,
    }
    if flags.out is not None:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        flags.out.write_text(json.dumps(document, indent=1) + "\n")
        print(f"written to {flags.out}")


if __name__ == "__main__":
    main()
