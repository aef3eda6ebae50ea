"""The input format of a model (chat template, image crop), stored with checkpoints and runs.

    "input_format": {"template": "v1", "system": null, "image_marks": null,
                     "image_crop": "pad", "limit": 2048}

It is a part of `config.json` of a checkpoint folder, and of `meta.json` of each step of a run.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jax_instructblip.data.chat_templates import CHAT_TEMPLATES, LIMIT
from jax_instructblip.data.images import CROPS
from jax_instructblip.fields import find_problems, one_of, several, text, whole

KEY = "input_format"  # in config.json and meta.json

FIELDS = {
    "template": one_of("", *CHAT_TEMPLATES),
    "system": text(optional=True),
    "image_marks": several(text(), optional=True),
    "image_crop": one_of(*CROPS),
    "limit": whole(1, unit="text tokens and visual vectors"),
}


@dataclasses.dataclass(frozen=True)
class InputFormat:
    """The form of a model's prompts and images; the defaults are InstructBLIP's and BLIP-2's.

    Attributes:
      template: the chat template, a key of `CHAT_TEMPLATES`; "" for a model that reads the images
        and then the prompt as it is.
      system: the system message; None means the template's.
      image_marks: the control tokens before and after each image, such as `<im_start>` and
        `<im_end>`; None means that there are none.
      image_crop: how an image becomes a square, a name in `images.CROPS`.
      limit: with a template, most slots of a prompt, text tokens and visual vectors together.
    """

    template: str = ""
    system: str | None = None
    image_marks: tuple[str, str] | None = None
    image_crop: str = "squash"
    limit: int = LIMIT

    def __post_init__(self):
        if isinstance(self.image_marks, list):  # as JSON has it
            object.__setattr__(self, "image_marks", tuple(self.image_marks))
        problems = find_problems(self, FIELDS)
        if isinstance(self.image_marks, tuple) and len(self.image_marks) != 2:
            problems.append(
                f"image_marks has {len(self.image_marks)} tokens, expected one before and one "
                "behind an image"
            )
        if problems:
            raise ValueError("; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict of JSON values, from which `from_dict` makes an equal format."""
        fields = dataclasses.asdict(self)
        return fields | {"image_marks": self.image_marks and list(self.image_marks)}

    @classmethod
    def from_dict(cls, fields: Any) -> "InputFormat":
        """Returns the format of a dict that `to_dict` made; absent fields have their defaults.

        Raises:
            ValueError: lists unknown fields; or, if there are none, values that are not allowed.
        """
        if not isinstance(fields, Mapping):
            raise ValueError(f"{KEY} is {fields!r:.60}, expected an object")
        if unknown := sorted(map(str, fields.keys() - FIELDS.keys())):
            raise ValueError(
                f"{KEY}: unknown fields {', '.join(unknown)}; known: {', '.join(FIELDS)}"
            )
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{KEY}: {error}") from error

    def with_template(self, template: str | None) -> "InputFormat":
        """Returns a copy with another chat template, and its system message; None changes nothing.

        Raises:
            ValueError: there is no such template.
        """
        if template is None or template == self.template:
            return self
        return dataclasses.replace(self, template=template, system=None)
