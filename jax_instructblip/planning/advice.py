"""Advice on a plan: whether a step fits, what would make it fit, which meshes to try."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jax_instructblip.models.variants import QFormerConfig, T5Config
from jax_instructblip.models.vlm import param_shapes
from jax_instructblip.parallel import rules
from jax_instructblip.parallel.mesh import make_mesh
from jax_instructblip.planning import plan
from jax_instructblip.planning.chips import GIB, LARGEST_SHARE, PER_MACHINE, Chip
from jax_instructblip.planning.job import Job
from jax_instructblip.planning.plan import Report
from jax_instructblip.planning.topology import Topology
from jax_instructblip.training.state import partition

_SHARE = f"XLA_PYTHON_CLIENT_MEM_FRACTION={LARGEST_SHARE} in the environment"
SPARE = 0.02  # share of a chip's memory that a proposed change must leave free, by estimate


@dataclasses.dataclass(frozen=True)
class Change:
    """A change to a planned step.

    `what` are its flags, `need` the bytes of each chip that the step then needs, by estimate.
    """

    what: str
    need: float


def verdict(job: Job, mesh: Mesh, topology: Topology, report: Report) -> tuple[bool, str]:
    """Returns (fits, sentence): whether a step fits into a chip's memory, and why.

    If the step does not fit, the sentence says what to change. The memory of CPUs is not known, so
    there everything fits.
    """
    need = f"needs {report.need / GIB:.2f} GiB"
    if topology.chip is None:
        return True, f"each device {need}; how much memory there is, is not known of a CPU"
    has = topology.chip.memory
    if not report.refusal and report.need <= has:
        return True, f"fits: each chip {need} of {has / GIB:.2f}"
    why = f"does not fit: each chip {need}, a program may use {has / GIB:.2f}"
    if report.arguments > has:
        why += f" (weights, moments and batch alone {report.arguments / GIB:.2f})"
    change = smallest_change(job, mesh, topology, report)
    if change is None:
        return False, f"{why}; no mesh of these chips would do: take more chips, or larger ones"
    return False, f"{why}; smallest change: {change.what} (then about {change.need / GIB:.2f} GiB)"


def smallest_change(job: Job, mesh: Mesh, topology: Topology, report: Report) -> Change | None:
    """The first change that should make the step fit, in order of invasiveness; None if none does.

    `report` is that of `compile_job` for `mesh`; `topology` has chips, not CPUs. The estimate:
    weights, moments and batch follow from the mesh; what is kept for the backward pass follows from
    the rows on a device and from remat; all else stays the same.
    """
    assert topology.chip is not None
    chip = topology.chip
    if not report.refusal and report.need <= chip.most:
        return Change(_SHARE, report.need)
    rest = max(report.need - report.arguments - report.residuals, 0)
    for what, other, others in _changes(job, mesh, topology):
        arguments = report.arguments
        if others is not mesh:
            arguments = plan.bytes_per_device(plan.job_arguments(other, others))
        rows = others.shape["data"] * others.shape["fsdp"]
        kept = _residuals(other, others) // rows if job.step == "train" else 0
        need = arguments + kept + rest
        if need <= chip.memory * (1 - SPARE):
            return Change(what, need)
        if need <= chip.most * (1 - SPARE):
            return Change(f"{what}, with {_SHARE}", need)
    return None


def _changes(job: Job, mesh: Mesh, topology: Topology) -> Iterator[tuple[str, Job, Mesh]]:
    """Yields (flags, job, mesh) for possible changes to a step, in the order to try them."""
    sizes = dict(mesh.shape)
    rows = job.batch // (sizes["data"] * sizes["fsdp"])
    if job.step == "train":
        dots, kept = "", job
        # The larger ones first; a projector has no layers.
        for tower in (*_language(job), *_trained_vision(job), *_qformer(job)):
            if getattr(job.scans, tower).remat == "none":
                dots += f" --config.model.remat.{tower}=dots"
                kept = kept.with_remat(**{tower: "dots"})
                yield dots.strip(), kept, mesh
        for parts in (2, 4, 8, 16):
            # The first stage compares all pairs of a batch, which cannot be divided.
            if _language(job) and rows % parts == 0 and parts > job.accumulate:
                changed = dataclasses.replace(kept, accumulate=parts)
                yield f"--config.train.accumulate={parts}{dots}", changed, mesh
        if _trained_vision(job) and job.scans.vision.remat != "full":
            yield "--config.model.remat.vision=full", job.with_remat(vision="full"), mesh
        if not _language(job) and job.scans.qformer.remat != "full":
            yield "--config.model.remat.qformer=full", job.with_remat(qformer="full"), mesh
        if _language(job) and job.scans.llm.remat != "full":
            yield "--config.model.remat.llm=full", job.with_remat(llm="full"), mesh
    for data, fsdp, tensor in meshes(job, topology):
        if fsdp * tensor <= sizes["fsdp"] * sizes["tensor"]:
            continue
        other = make_mesh(data, fsdp, tensor, topology.devices)
        yield f"--mesh {data},{fsdp},{tensor}", job, other
        if _language(job) and job.step == "train" and job.scans.llm.remat != "dots":
            what = f"--mesh {data},{fsdp},{tensor} --config.model.remat.llm=dots"
            yield what, job.with_remat(llm="dots"), other


def _language(job: Job) -> tuple[str, ...]:
    """Returns the language model's name; BLIP-2's first stage has none."""
    return () if job.variant.llm is None else ("llm",)


def _qformer(job: Job) -> tuple[str, ...]:
    """Returns the Q-Former's name; LLaVA has none."""
    return ("qformer",) if isinstance(job.variant.bridge, QFormerConfig) else ()


def _trained_vision(job: Job) -> tuple[str, ...]:
    """Returns the vision tower's name if it is trained: a frozen one keeps nothing to recompute."""
    return ("vision",) if "vision" in job.trainable else ()


def _residuals(job: Job, mesh: Mesh) -> int:
    """The bytes, on all devices together, that are kept for the backward pass.

    Computed from shapes by tracing the step, without compiling it.
    """
    arguments = plan.job_arguments(job, mesh)
    with jax.set_mesh(mesh):
        traced = plan.job_function(job, mesh, arguments).trace(*arguments)
    return plan.residuals(traced.jaxpr.jaxpr)


def meshes(job: Job, topology: Topology) -> list[tuple[int, int, int]]:
    """Mesh sizes (data, fsdp, tensor) on which the step is possible.

    Those that split the weights into the fewest parts come first. Each mesh uses all devices; the
    batch must divide, and a chip must hold weights, moments and batch.
    """
    count, candidates = len(topology.devices), []
    for tensor in _divisors(count):
        for fsdp in _divisors(count // tensor):
            data = count // (tensor * fsdp)
            parts = data * fsdp * (job.accumulate if job.step == "train" else 1)
            if job.batch % parts == 0:
                candidates.append((data, fsdp, tensor))
    return sorted(
        (sizes for sizes in candidates if _allowed(job, sizes, topology)),
        key=lambda sizes: (sizes[1] * sizes[2], sizes[2]),
    )


def feasible_meshes(job: Job, topology: Topology) -> list[tuple[int, int, int]]:
    """The mesh sizes of `meshes` whose chips can also hold what is kept for the backward pass."""
    candidates = meshes(job, topology)
    if topology.chip is None or job.step != "train" or not candidates:
        return candidates
    mesh_of = {sizes: make_mesh(*sizes, topology.devices) for sizes in candidates}
    waiting, room = _residuals(job, mesh_of[candidates[-1]]), topology.chip.most

    def need(sizes: tuple[int, int, int]) -> float:
        arguments = plan.bytes_per_device(plan.job_arguments(job, mesh_of[sizes]))
        return arguments + waiting / (sizes[0] * sizes[1])

    return [sizes for sizes in candidates if need(sizes) < room]


def _allowed(job: Job, sizes: tuple[int, int, int], topology: Topology) -> bool:
    mesh = make_mesh(*sizes, topology.devices)
    try:
        arguments = plan.bytes_per_device(plan.job_arguments(job, mesh))
    except ValueError:
        return False
    return topology.chip is None or arguments < topology.chip.most


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


def estimate(report: Mapping[str, Any], chip: Chip) -> dict[str, float]:
    """Lower bounds of a step's time in seconds, as {"compute": ..., "links": ...}.

    `report` is the dict of `make_report`. The first bound is for all products at the chip's peak
    speed, the second for all traffic at the full speed of its links. A real step takes longer than
    the larger of the two.
    """
    return {
        "compute": report["flops"]["per_chip"] / chip.flops,
        "links": report["moved_bytes"] / chip.links,
    }


def best(reports: Sequence[Mapping[str, Any]], batch: int) -> Mapping[str, Any] | None:
    """The plan that fits and processes the most samples per second; None if none fits.

    `reports` are dicts of `make_report`. Among equals, a plan with the batch size `batch` of the
    config comes first, because another batch size trains differently; then the plan that moves the
    fewest bytes per sample. The speed of CPUs is not known, so all their plans count as equally
    fast.
    """

    def rate(each: Mapping[str, Any]) -> tuple[float, bool, float]:
        bounds = each.get("bounds")
        seconds = max(bounds["compute"], bounds["links"]) if bounds else each["batch"]
        moved = each["moved_bytes"] / each["batch"]
        return round(each["batch"] / seconds, 3), each["batch"] == batch, -moved

    return max((each for each in reports if each["fits"]), key=rate, default=None)


def remarks(job: Job, mesh: Mesh, topology: Topology) -> list[str]:
    """Sentences about a plan: each sharding rule whose fallback this mesh needs, with the reason.

    For GPUs, what the compiler cannot know without them is added.
    """
    found = rules.remarks(param_shapes(job.variant), mesh)
    if topology.chip is None or topology.chip.gpu is None:
        return found
    found.append(
        "compiled without a GPU to time products on: they are cuBLAS calls, a run may choose others"
    )
    if mesh.size > PER_MACHINE:
        found.append(
            f"there are {PER_MACHINE} GPUs a machine: the time of links is NVLink's, and longer "
            "between machines"
        )
    return found


def estimated_traffic(job: Job, batch: int, sizes: tuple[int, int, int]) -> float:
    """A rough estimate of the bytes that each device receives in a step, for sorting meshes.

    The step has `batch` samples, whatever the job says; `sizes` are those of data, fsdp and tensor.
    The terms:

        fsdp     every weight in bfloat16 twice, forward and backward
        tensor   four all-reduces of the activations per layer, two of them in the backward pass
        data     the float32 gradients of trained weights, all-reduced over data and fsdp
    """
    data, fsdp, tensor = sizes
    shapes, variant = param_shapes(job.variant), job.variant
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    weights = count(shapes)
    trained = count(partition(shapes, job.trainable)[0]) if job.step == "train" else 0
    tokens = variant.visual_tokens + 256
    largest: Any = variant.llm or variant.vision
    layers = getattr(largest, "layers", 0)
    if isinstance(largest, T5Config):
        layers = largest.encoder_layers + largest.decoder_layers
    rows = batch / (data * fsdp)
    fetched = 2 * 2 * weights / tensor * (fsdp - 1) / fsdp
    summed = 8 * 2 * rows * tokens * layers * largest.width * (tensor - 1) / tensor
    gradients = 2 * 4 * trained / tensor * (data * fsdp - 1) / (data * fsdp)
    return fetched + summed + gradients
