"""RandAugment, as the released training of the FlanT5 models adds it after crop and mirroring.

N = 2 operations of the ten, each drawn anew and left out half of the time, of strength M = 5 of 10.
At that strength the factors of brightness and sharpness are 1.0: both leave an image as it is.
Geometry is Pillow's bilinear; the released code's is OpenCV's, some grey levels apart.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

OPERATIONS = 2  # N
PROBABILITY = 0.5  # of each that is drawn
FACTOR = 1.0  # of an enhancement: 5 / 10 x 1.8 + 0.1
SHEAR = 0.15  # 5 / 10 x 0.3
TRANSLATION = 5.0  # pixels: 5 / 10 x 10
ROTATION = 15.0  # degrees: 5 / 10 x 30
FILL = (128, 128, 128)

Operation = Callable[[Image.Image, float], Image.Image]


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL
    )


# Each takes the image and the sign of its strength, where it has a direction.
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
    """Pixels [H, W, 3] uint8 after N = 2 operations that `rng` chooses, signs too."""
    image = Image.fromarray(pixels)
    names = list(TABLE)
    for _ in range(OPERATIONS):
        name = names[int(rng.integers(len(names)))]
        applied, sign = rng.random() < PROBABILITY, 1.0 if rng.random() < 0.5 else -1.0
        if applied:
            image = TABLE[name](image, sign)
    return np.asarray(image)
