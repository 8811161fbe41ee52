"""Define what all records are made of: their base class, and the types of hashes, counts and files."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[int, Field(ge=1, le=1 << 31)]  # dimensions and lengths: runtimes and tokenizers take no others


class Record(BaseModel):
    """Make a record of its fields: frozen, without unknown keys, NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileRef(Record):
    """Name a file by its path, sha256 and size.

    `path` is absolute between stages (in the cache or a work folder). In a manifest it is relative to the bundle, in
    POSIX notation; a file that is not in the bundle has a bare name.
    """

    path: str
    sha256: Sha256
    size_bytes: int
