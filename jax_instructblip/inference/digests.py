"""The digest of a model's weights, which ties results and features to the model."""

import hashlib

from jax_instructblip import checkpoint
from jax_instructblip.inference.loading import Source

SAMPLES, SAMPLE_BYTES = 256, 16_384  # read of each weight file for a digest within a second


def weights_digest(source: Source) -> str:
    """A sha256, in hex, that stands for all weights of a model.

    Of a Hugging Face folder it covers names, sizes and samples of the weight files alone.
    """
    if source.leaves is not None:
        digest = hashlib.sha256()
        for path in sorted([*source.folder.glob("*.safetensors"), *source.folder.glob("*.bin")]):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            with path.open("rb") as file:
                for offset in range(0, size, max(size // SAMPLES, SAMPLE_BYTES)):
                    file.seek(offset)
                    digest.update(file.read(SAMPLE_BYTES))
        return digest.hexdigest()
    base = checkpoint.manifest_digest(source.folder)
    if source.step is None:
        return base
    trained = checkpoint.manifest_digest(source.step / "trainable")
    return hashlib.sha256(f"{base} {trained}".encode()).hexdigest()
