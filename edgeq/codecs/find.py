"""Find the codec that a user names: by its name, from the statistics of a bundle, or by the path of its file."""

from __future__ import annotations

from pathlib import Path

from edgeq.codecs.codec import Codec, read_codec
from edgeq.codecs.fit import codec_from_statistics
from edgeq.codecs.names import parse
from edgeq.codecs.statistics import read_statistics
from edgeq.errors import ConfigError

_SUFFIX = ".npz"


def find_codec(asked: str | Path, statistics: Path | None, dim: int) -> Codec:
    """Give a codec for vectors of `dim` dimensions.

    Args:
        asked: a codec's name, or the path of an .npz that holds one.
        statistics: of the bundle whose vectors they are; None where it has none.
        dim: of the vectors.

    Raises:
        ConfigError: there is no such codec, it must be trained, the bundle has no statistics, or the dimension differs.
        BundleCorrupt: the file is damaged or of another version.
    """
    if isinstance(asked, Path) or asked.endswith(_SUFFIX):
        found = read_codec(Path(asked))
    else:
        parse(asked)
        if statistics is None:
            raise ConfigError(
                f"codec {asked}: the bundle holds no statistics of its vectors (an older edgeq wrote it). "
                "Export it again, or give the codec.npz of an index."
            )
        found = codec_from_statistics(asked, read_statistics(statistics))
    if found.dim != dim:
        raise ConfigError(
            f"codec {asked}: takes vectors of {found.dim} dimensions, and the model gives {dim}. "
            "Give the codec of the same model."
        )
    return found
