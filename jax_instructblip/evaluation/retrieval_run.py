"""Retrieval benchmarks with a first stage of BLIP-2: R@1, R@5, R@10, image to text and back.

    images, captions --features--> similarities [N, M] --k nearest of each query--> pairs
    pairs --match--> logits --plus the similarity--> each query's candidates, best first

If there are several processes, each computes the features of a share of images and captions, which
are gathered once, and the logits of a share of the pairs; process 0 puts these together. Logits are
kept on the disk, so that an interrupted run goes on.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_instructblip.evaluation import scoring, suite
from jax_instructblip.evaluation.gallery import Gallery, Pictures, Queries, read_gallery
from jax_instructblip.evaluation.match_store import (
    Candidates,
    MatchStore,
    read_candidates,
    write_candidates,
)
from jax_instructblip.evaluation.metrics import metric
from jax_instructblip.evaluation.metrics.retrieval import BACK, FORTH, hits_at, mean_recall
from jax_instructblip.evaluation.predictions import Prediction, Store
from jax_instructblip.evaluation.protocol import paper_model
from jax_instructblip.evaluation.suite import Finished, Say
from jax_instructblip.evaluation.task import Task
from jax_instructblip.inference import matching
from jax_instructblip.inference.retrieval import Retriever
from jax_instructblip.parallel.cluster import gather_rows, own_rows

SHOWN = 10  # candidates that a row names


def run(
    blip: Retriever,
    tasks: Sequence[Task],
    out: Path,
    *,
    model: Mapping[str, Any],
    size: int,
    limit: int = 0,
    say: Say = print,
) -> list[Finished]:
    """Answers and scores every task; returns the results ([] on processes other than 0).

    The arguments are those of `suite.run`; `size` is the number of pairs at once on each device.

    Raises:
      MetricError: a record has no caption, or not exactly one image.
      ValueError: an image cannot be opened, or `out` has results of another model or task.
    """
    finished = []
    first = jax.process_index() == 0
    say = say if first else lambda line: None
    for task in tasks:
        with suite.agreed():
            gallery = read_gallery(task)
        facts = {**task.facts(), "batch_size": size, "limit": limit}
        stands = {
            "weights": model["weights"],
            "dtype": model["dtype"],
            "questions": gallery.digest,
        }
        folder = out / suite.PREDICTIONS
        store = Store(folder, task.name, {**facts, **stands}, jax.process_index())
        suite.begin_store(store, first)
        say(_describe(task, gallery))
        blip.silent = not first
        both = _candidates(blip, task, gallery, store, size)
        if both is not None:
            finished.append(_finish(blip, task, gallery, store, facts, *both))
            say(suite.describe_result(finished[-1]))
    return finished


def _describe(task: Task, gallery: Gallery) -> str:
    k, itm_only = task.settings["k"], task.settings["itm_only"]
    scored = "the match alone" if itm_only else "the match plus the similarity"
    return (
        f"{task.name} ({task.split}): {len(gallery.records)} images, {len(gallery.captions)} "
        f"captions\n  the {k} nearest are re-ranked by {scored}"
    )


def _candidates(
    blip: Retriever, task: Task, gallery: Gallery, store: Store, size: int
) -> tuple[Candidates, Candidates] | None:
    """The candidates of images and of captions; None in all processes but the first."""
    saved = store.path.with_suffix(".npz")
    first = jax.process_index() == 0
    if store.path.is_file() and (both := read_candidates(saved)):
        return both if first else None
    store.partial.mkdir(parents=True, exist_ok=True)
    images = Pictures(task, blip.variant.vision.image_size)
    near = _similarities(blip, task, gallery)
    with suite.agreed():
        k = task.settings["k"]
        of_images, of_texts = matching.nearest(near, k), matching.nearest(near.T, k)
        chosen = matching.pairs(of_images, of_texts)
        matches = MatchStore(store.partial, jax.process_index())
        done = matches.done(chosen)
    with suite.agreed():
        left = [number for number in range(len(images)) if number not in done]
        take = lambda number, logits: matches.add(number, chosen[number], logits)
        blip.match(
            *(images, gallery.captions, chosen, take),
            numbers=left[jax.process_index() :: jax.process_count()],
            batch_size=size,
            done=sum(map(len, done.values())),
        )
        matches.flush()
    if not first:
        return None
    done = matches.done(chosen)
    logits = np.full(near.shape, matching.ABSENT, np.float32)
    for number, row in enumerate(chosen):
        logits[number, row] = done[number]
    of = lambda columns, *both: Candidates(
        columns, *(np.take_along_axis(each, columns, axis=1) for each in both)
    )
    forth, back = of(of_images, near, logits), of(of_texts, near.T, logits.T)
    write_candidates(saved, forth, back)
    return forth, back


def _similarities(blip: Retriever, task: Task, gallery: Gallery) -> np.ndarray:
    """Similarities `[N, M]` of all images and captions, the same in all processes."""
    count, captions = len(gallery.records), gallery.captions
    with suite.agreed():
        texts = blip.text_features([captions[number] for number in own_rows(len(captions))])
        own = Pictures(task, blip.variant.vision.image_size, own_rows(count))
        images = blip.image_features(own)
    return blip.similarities(gather_rows(images, count), gather_rows(texts, len(captions)))


def _finish(
    blip: Retriever,
    task: Task,
    gallery: Gallery,
    store: Store,
    facts: Mapping[str, Any],
    forth: Candidates,
    back: Candidates,
) -> Finished:
    """The result of one task; its rows are written to the store."""
    itm_only = task.settings["itm_only"]
    owner, numbers = gallery.owner, np.arange(len(gallery.records))[:, None]
    right = {
        FORTH: lambda columns: owner[columns] == numbers,
        BACK: lambda columns: columns == owner[:, None],
    }
    ranked = {FORTH: matching.rerank(*forth, itm_only), BACK: matching.rerank(*back, itm_only)}
    samples = {
        f"{prefix}{way}/{name}": tuple(hits.tolist())
        for prefix, columns in (
            ("", {way: each.columns for way, each in ranked.items()}),
            ("itc/", {FORTH: forth.columns, BACK: back.columns}),
        )
        for way, of_queries in columns.items()
        for name, hits in hits_at(right[way](of_queries)).items()
    }
    scores = metric.summarise(samples)
    values = {**scores.values, "recall": mean_recall(scores.values)}
    scores = dataclasses.replace(scores, values=values)
    rows = _rows(gallery, ranked, samples)
    store.finish(rows)
    paper = paper_model(blip.variant)
    result = scoring.summarise(task, rows, scores, "", facts, cut=0, model=paper)
    result |= {"count": len(gallery.records), "captions": len(gallery.captions)}
    queries = Queries(task.records, gallery.owner)
    return Finished(dataclasses.replace(task, records=queries), rows, result)


def _rows(
    gallery: Gallery,
    ranked: Mapping[str, matching.Ranked],
    samples: Mapping[str, Sequence[float]],
) -> list[Prediction]:
    """One row for each image as a query for captions, then one for each caption as a query."""
    ids = [record.id for record in gallery.records]
    prompts = {FORTH: [""] * len(ids), BACK: gallery.captions}
    names = {FORTH: gallery.names, BACK: ids}
    texts = {FORTH: gallery.captions, BACK: ids}
    answers = {
        FORTH: [record.answers for record in gallery.records],
        BACK: [(ids[number],) for number in gallery.owner],
    }
    return [
        Prediction(
            id=name,
            prompt=prompts[way][number],
            text=texts[way][ranked[way].columns[number][0]],
            score=samples[f"{way}/r1"][number],
            answers=answers[way][number],
            candidates=tuple(names[way][each] for each in ranked[way].columns[number][:SHOWN]),
            scores=tuple(float(f"{x:.9g}") for x in ranked[way].scores[number][:SHOWN]),
            task=way,
        )
        for way, own in ((FORTH, ids), (BACK, gallery.names))
        for number, name in enumerate(own)
    ]
