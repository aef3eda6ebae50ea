"""RandAugment as in LAVIS's training of the FlanT5 models, applied after crop and mirroring.

Two (N) operations are drawn from the ten in `TABLE`; each is applied with probability 0.5, at
strength 5 (M) of 10. At that strength brightness and sharpness have the factor 1.0, so both leave
the image as it is. Shear, shift and rotation use Pillow's bilinear filter; LAVIS uses OpenCV's,
whose pixels differ by a few gray levels.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

OPERATIONS = 2  # N
PROBABILITY = 0.5  # that a drawn operation is applied
FACTOR = 1.0  # of brightness and sharpness: 5 / 10 x 1.8 + 0.1
SHEAR = 0.15  # 5 / 10 x 0.3
TRANSLATION = 5.0  # pixels: 5 / 10 x 10
ROTATION = 15.0  # degrees: 5 / 10 x 30
FILL = (128, 128, 128)

Operation = Callable[[Image.Image, float], Image.Image]


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL
    )


# Functions of (image, sign); the sign is the direction of a shear, shift or rotation.
TABLE: dict[str, Operation] = {
    "Identity": lambda image, sign: image,
    "AutoContrast": lambda image, sign: ImageOps.autocontrast(image),
    "Brightness": lambda image, sign: ImageEnhance.Brightness(image).enhance(FACTOR),
    "Sharpness": lambda image, sign: ImageEnhance.Sharpness(image).enhance(FACTOR),
    "Equalize": lambda image, sign: ImageOps.equalize(image),
    "ShearX": lambda image, sign: _affine(image, 1, -sign * SHEAR, 0, 0, 1, 0),
    "ShearY": lambda image, sign: _affine(image, 1, 0, 0, -sign * SHEAR, 1, 0),
    "TranslateX": lambda image, sign: _affine(image, 1, 0, -sign * TRANSLATION, 0, 1, 0),
    "TranslateY": lambda image, sign: _affine(image, 1, 0, 0, 0, 1, -sign * TRANSLATION),
    "Rotate": lambda image, sign: image.rotate(
        sign * ROTATION, Image.Resampling.BILINEAR, fillcolor=FILL
    ),
}


def rand_augment(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns pixels [H, W, 3] uint8 after `OPERATIONS` random operations with random signs."""
    image = Image.fromarray(pixels)
    names = list(TABLE)
    for _ in range(OPERATIONS):
        name = names[int(rng.integers(len(names)))]
        applied, sign = rng.random() < PROBABILITY, 1.0 if rng.random() < 0.5 else -1.0
        if applied:
            image = TABLE[name](image, sign)
    return np.asarray(image)
