"""A stand-in for an object store behind `gs://`: in memory, through etils and fsspec."""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry


class Bucket(MemoryFileSystem):
    """Puts files whole, and cannot rename; calls `before(path)` ahead of each file that it puts."""

    protocol = ("gs", "gcs")
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    before: ClassVar[Any] = None
    cachable = False

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).partition("://")[2].strip("/") if "://" in str(path) else str(path)

    def _open(self, path, mode="rb", **more):
        if "w" in mode and Bucket.before is not None:
            Bucket.before(path)
        self.makedirs(self._parent(path), exist_ok=True)  # folders are but parts of names
        return super()._open(path, mode, **more)

    def rename(self, *_, **__):
        raise NotImplementedError("an object store has no renaming of folders")

    mv = rename


@contextlib.contextmanager
def bucket() -> Iterator[type[Bucket]]:
    """The store while `gs://` means it; empty at first."""
    Bucket.store.clear()
    Bucket.pseudo_dirs[:] = [""]
    Bucket.before = None
    before = {name: _registry.get(name) for name in Bucket.protocol}
    for name in Bucket.protocol:
        fsspec.register_implementation(name, Bucket, clobber=True)
    try:
        yield Bucket
    finally:
        for name, old in before.items():
            _registry.pop(name)
            if old is not None:
                fsspec.register_implementation(name, old, clobber=True)
