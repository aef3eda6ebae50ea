"""Loaded models say what they have, where something is asked of them that another kind has."""

from typing import TYPE_CHECKING, Any


class NamedMethods:
    """A class whose missing attributes are told together with its methods.

    Attributes:
      elsewhere: a sentence about what has other methods.
    """

    elsewhere = ""

    if not TYPE_CHECKING:  # unknown attributes stay errors of the type checker

        def __getattr__(self, name: str) -> Any:
            kind = type(self)
            message = f"{kind.__name__} has no {name!r}"
            if not name.startswith("_"):
                known = [each for each in dir(kind) if callable(getattr(kind, each))]
                methods = ", ".join(each for each in known if not each.startswith("_"))
                message += f": it has {methods}. {self.elsewhere}"
            raise AttributeError(message)
