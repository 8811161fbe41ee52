"""Write vectors in the layouts of vector stores: which of our codes each holds, and in which bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.codecs.codec import Codec
from edgeq.codecs.packing import Codes
from edgeq.codecs.quantizers import FloatArray
from edgeq.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """Describe how a store holds the codes of a codec.

    Attributes:
        store: its name.
        codec: whose codes it holds.
        column: the type of its column or index.
        tried: the package and version with which a test stores and finds codes; "" where none was tried.
        convert: turns uint8[n, bytes], as `Codec.encode_bytes` gives them, into what the store takes.
    """

    store: str
    codec: str
    column: str
    tried: str
    convert: Callable[[Codes], NDArray[np.generic]]


def _same(codes: Codes) -> NDArray[np.generic]:
    return codes


def _int8(codes: Codes) -> NDArray[np.generic]:
    return np.ascontiguousarray(codes).view(np.int8)


def _float16(codes: Codes) -> NDArray[np.generic]:
    return np.ascontiguousarray(codes).view("<f2")


def _reversed_bits(codes: Codes) -> NDArray[np.generic]:
    """Put the first dimension into the lowest bit of a byte, as sqlite-vec's own `vec_quantize_binary` does."""
    return np.packbits(np.unpackbits(codes, axis=1), axis=1, bitorder="little")


def _offset(codes: Codes) -> NDArray[np.generic]:
    """Subtract 128, as sentence-transformers' precision "binary" does."""
    return (codes.astype(np.int16) - 128).astype(np.int8)


LAYOUTS = (
    Layout("sentence-transformers", "binary", 'precision "ubinary", uint8', "sentence-transformers 6.2.0", _same),
    Layout("sentence-transformers", "binary", 'precision "binary", int8', "sentence-transformers 6.2.0", _offset),
    Layout("faiss", "binary", "IndexBinaryFlat, IndexBinaryHNSW", "faiss-cpu 1.15.1", _same),
    Layout("faiss", "int8", "QT_8bit_direct_signed (added as numbers)", "faiss-cpu 1.15.1", _int8),
    Layout("usearch", "binary", 'dtype "b1", metric "hamming"', "usearch 2.26.6", _same),
    Layout("usearch", "int8", 'dtype "i8", metric "ip"', "usearch 2.26.6", _int8),
    Layout("usearch", "float16", 'dtype "f16", metric "ip"', "usearch 2.26.6", _float16),
    Layout("sqlite-vec", "binary", "bit[N], vec_bit(?)", "sqlite-vec 0.1.9", _reversed_bits),
    Layout("sqlite-vec", "int8", "int8[N], vec_int8(?)", "sqlite-vec 0.1.9", _int8),
    Layout("pgvector", "binary", "bit(N), <~>", "", _same),
    Layout("pgvector", "float16", "halfvec(N), <#>", "", _float16),
    Layout("Milvus", "binary", "BINARY_VECTOR, HAMMING", "", _same),
    Layout("Milvus", "int8", "INT8_VECTOR", "", _int8),
)


def for_store(store: str, codec: Codec, vectors: FloatArray) -> NDArray[np.generic]:
    """Encode float32[n, dim] in the layout of a store; the first of several layouts is taken.

    Raises:
        ConfigError: no layout of this store holds the codec's codes.
    """
    found = next((each for each in LAYOUTS if (each.store, each.codec) == (store, codec.name.text)), None)
    if found is None:
        held = [each.codec for each in LAYOUTS if each.store == store]
        known = ", ".join(dict.fromkeys(each.store for each in LAYOUTS))
        hint = f"holds {', '.join(held)}" if held else f"is none of {known}"
        raise ConfigError(f"store {store}: {hint}; codec {codec.name.text} is asked for. Choose another.")
    return found.convert(codec.encode_bytes(vectors))
