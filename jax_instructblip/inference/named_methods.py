"""Errors for a method that a loaded model lacks, since another kind of model may have it."""

from typing import TYPE_CHECKING, Any


class NamedMethods:
    """Base class whose error for a missing attribute lists the public methods that there are.

    Attributes:
      elsewhere: the last sentence of that error, on which class has other methods.
    """

    elsewhere = ""

    if not TYPE_CHECKING:  # unknown attributes stay errors of the type checker

        def __getattr__(self, name: str) -> Any:
            kind = type(self)
            if hasattr(kind, name):  # a property that raised an AttributeError
                return object.__getattribute__(self, name)
            message = f"{kind.__name__} has no {name!r}"
            if not name.startswith("_"):
                known = [each for each in dir(kind) if callable(getattr(kind, each))]
                methods = ", ".join(each for each in known if not each.startswith("_"))
                message += f": it has {methods}. {self.elsewhere}"
            raise AttributeError(message)
