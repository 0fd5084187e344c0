"""Results that need not be computed again: shards found whole, hashes of weights, records of object stores, tokenizers' fingerprints.

The last lie in each experiment, the others next to the caches. A damaged memo is ignored and rebuilt; one that a
newer prefcache wrote is ignored and kept.
"""

import contextlib
from pathlib import Path
from typing import Self

from pydantic import Field

from prefcache.pipeline.errors import IntegrityError, PrefcacheError
from prefcache.pipeline.safetensors_files import Digests, Tensor
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.records import BareName, Checksum, Fingerprint, NewerError, Sha256, StoredRecord

_MAX_TOKENIZERS = 64


class _Memo(StoredRecord):
    @classmethod
    def recall(cls, path: Path) -> Self | None:
        """Read the memo; None if there is no valid one."""
        try:
            return cls.read(path)
        except IntegrityError:
            return None

    @classmethod
    def damage(cls, path: Path) -> str | None:
        """Why an existing memo cannot be used; None if it can."""
        if path.exists():
            try:
                cls.read(path, "It is ignored, and built anew when it is next needed.")
            except IntegrityError as error:
                return str(error)
        return None

    def remember(self, path: Path) -> None:
        """Write the memo, unless a newer prefcache has written one here."""
        try:
            self.refuse_newer(artifact.unseal(path), path)
        except NewerError:
            return
        except IntegrityError:
            pass  # damaged or absent
        # A read-only folder only costs the time of finding out again.
        with contextlib.suppress(OSError, PrefcacheError):
            self.commit(path, durable=False)


class VerifiedMemo(_Memo):
    """Shards that were found whole, with their size, times, inode and checksum then."""

    known: dict[BareName, tuple[int, int, int, int, Checksum]]
    suspects: list[BareName] = Field(default_factory=list)  # shards of an object store in which reading found damage


class ListingMemo(_Memo):
    """The ETags of the records of a reference that were read from an object store."""

    etags: dict[BareName, str | None]


class WeightsMemo(_Memo):
    """Hashes of weight files by their stamps: by tensor and, for ids of earlier versions, of whole files."""

    tensors: dict[str, dict[str, tuple[str, tuple[int, ...], Sha256]]] = Field(default_factory=dict)
    files: dict[str, Sha256] = Field(default_factory=dict)

    @staticmethod
    def path(caches: Path) -> Path:
        return caches / ".weights.json"

    @classmethod
    def make_from(cls, digests: Digests) -> Self:
        known = {
            stamp: {name: (tensor.dtype, tensor.shape, tensor.sha256) for name, tensor in tensors.items()}
            for stamp, tensors in digests.tensors.items()
        }
        return cls(tensors=known, files=dict(digests.files))

    def digests(self) -> Digests:
        known = {
            stamp: {name: Tensor(*facts) for name, facts in tensors.items()} for stamp, tensors in self.tensors.items()
        }
        return Digests(known, dict(self.files))


class TokenizersMemo(_Memo):
    """Fingerprints of tokenizers, by the stamps of the files that each was loaded from."""

    encoded: dict[str, Fingerprint] = Field(default_factory=dict)
    processors: dict[str, Checksum] = Field(default_factory=dict)  # ids of image processors

    @staticmethod
    def path(experiment: Path) -> Path:
        return experiment / ".tokenizers.json"

    def with_another(self, stamp: str, encoded: Fingerprint) -> "TokenizersMemo":
        recent = list(self.encoded.items())[-_MAX_TOKENIZERS:]
        return self.model_copy(update={"encoded": dict(recent) | {stamp: encoded}})

    def with_another_processor(self, stamp: str, processor_id: str) -> "TokenizersMemo":
        recent = list(self.processors.items())[-_MAX_TOKENIZERS:]
        return self.model_copy(update={"processors": dict(recent) | {stamp: processor_id}})
