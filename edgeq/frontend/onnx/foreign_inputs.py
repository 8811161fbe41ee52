"""Refuse ONNX inputs that are no [batch, sequence] of token ids and masks, each by what it is and with what to give."""

from __future__ import annotations

import onnx_ir as ir

from edgeq.errors import Unsupported
from edgeq.graph.edit import dims

IDS, MASK, SEGMENTS, POSITIONS = "input_ids", "attention_mask", "token_type_ids", "position_ids"
# Part of an input's name -> the input's role; the one input without such a part is the token ids.
HINTS = (("mask", MASK), ("type", SEGMENTS), ("segment", SEGMENTS), ("position", POSITIONS))
WHOLE = (ir.DataType.INT64, ir.DataType.INT32)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
_CACHE = ("past", "cache")  # parts of the names of a decoder's keys and values


def refuse_foreign(model: ir.Model, name: str) -> None:
    """Refuse inputs other than [batch, sequence] with both axes free, of whole numbers, floats or truth values.

    Args:
        model: the graph.
        name: for messages.

    Raises:
        Unsupported: there is such an input.
    """
    refuse_bag(model, name)
    for value in model.graph.inputs:
        _require_tokens(value, name)
    decoder = next((value.name for value in model.graph.inputs if "decoder" in str(value.name).lower()), None)
    if decoder is not None:
        raise Unsupported(
            f"{name}: its input {decoder} is a decoder's, which writes texts and embeds none. Export the model's "
            f"encoder alone, with {IDS} and {MASK}."
        )


def refuse_bag(model: ir.Model, name: str) -> None:
    """Refuse an EmbeddingBag, and an encoder of packed texts: their tokens lie in one row, [all tokens].

    Raises:
        Unsupported: the inputs are such.
    """
    rows = [value for value in model.graph.inputs if len(dims(value) or []) == 1]
    tokens = [value for value in rows if value.dtype in WHOLE and not _hint(value)]
    others = [value for value in rows if value not in tokens and value.dtype in _FLOATS]
    if not tokens:
        return
    if len(tokens) == 1:
        raise Unsupported(
            f"{name}: its input {_shown(tokens[0])} is one text without a batch axis; [batch, sequence], both free, is "
            f"needed. Export the model again on tokens of [batch, sequence], with {MASK} as an input."
        )
    named = (
        f"its inputs {' and '.join(map(_shown, tokens))} hold the tokens of all texts in one row, and where each begins"
    )
    if any(node.op_type in ("Softmax", "Attention", "MultiHeadAttention") for node in model.graph):
        raise Unsupported(
            f"{name}: {named}; [batch, sequence], both free, is needed. Export the model again on padded texts, with "
            f"{IDS} and {MASK} of [batch, sequence]."
        )
    weighed = "" if not others else (
        f" What {' and '.join(map(_shown, others))} gives by token id, multiply into the rows of its table; weights by "
        "position have no form there."
    )  # fmt: skip
    raise Unsupported(
        f"{name}: is an embedding bag (EmbeddingBag, as StaticEmbedding and model2vec export it): {named}. Tokens of "
        "[batch, sequence] are needed, and no option of the exporter gives a bag those. Give the sentence-transformers "
        "directory instead of the ONNX file: modules.json with StaticEmbedding, its model.safetensors and "
        "tokenizer.json. Of a model2vec model "
        "SentenceTransformer(modules=[StaticEmbedding.from_model2vec(NAME)]).save(DIRECTORY) writes one."
        f"{weighed}"
    )


def _require_tokens(value: ir.Value, name: str) -> None:
    shape, lowered = dims(value), str(value.name).lower()
    if value.dtype == ir.DataType.STRING:
        raise Unsupported(
            f"{name}: its input {value.name} takes texts, so that the file holds its tokenizer; tokens are needed. "
            "Export the encoder alone, and give its tokenizer.json with --tokenizer."
        )
    if shape is not None and value.dtype in _FLOATS and any(part in lowered for part in _CACHE):
        raise Unsupported(
            f"{name}: its input {_shown(value)} holds the keys and values of tokens before, of a decoder that writes "
            f"texts. Export the model without its cache (use_cache=False), with {IDS} and {MASK} as inputs."
        )
    if shape is not None and value.dtype in _FLOATS and len(shape) == 4:
        raise Unsupported(
            f"{name}: its input {value.name}, {list(shape)}, is of images; ONNX files come in for texts only. Give the "
            "directory that it was exported from, with its preprocessor_config.json, and --images."
        )
    if shape is not None and value.dtype in _FLOATS and not _hint(value) and isinstance(shape[-1] if shape else 0, int):
        raise Unsupported(
            f"{name}: its input {_shown(value)} holds vectors (inputs_embeds), not tokens. Export the model with {IDS} "
            "as an input, its table of embeddings inside."
        )
    if value.dtype not in (*WHOLE, ir.DataType.FLOAT, ir.DataType.BOOL):
        raise Unsupported(f"{name}: its input {value.name} is of type {value.dtype}; tokens are whole numbers")
    if shape is None or len(shape) != 2:
        found = "states no shape" if shape is None else f"has the shape {list(shape)}"
        raise Unsupported(
            f"{name}: its input {value.name} {found}; [batch, sequence], both free, is needed. Export the model again "
            "on tokens of [batch, sequence], or cut that input off."
        )
    if any(isinstance(dim, int) for dim in shape):
        raise Unsupported(
            f"{name}: its input {value.name} has the shape {shape}; [batch, sequence], both free, is needed. "
            "Export the model again with dynamic axes."
        )


def _hint(value: ir.Value) -> bool:
    return any(part in str(value.name).lower() for part, _ in HINTS)


def _shown(value: ir.Value) -> str:
    """Name an input with its shape."""
    return f"{value.name} {list(dims(value) or [])}"
