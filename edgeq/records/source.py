"""Define the records of the source model, and of how a bundle's tokens and vectors compare with the source's own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from edgeq.records.record import Positive, Record, Sha256


class Source(Record):
    """Describe the source model: of sentence-transformers or transformers, an ONNX file, or a torch module."""

    name: str
    kind: Literal["sentence-transformers", "transformers", "onnx", "module"]
    sha256: Sha256  # over names and contents of all files that the vectors depend on
    modules: tuple[str, ...]  # e.g. ("Transformer", "Pooling:mean", "Normalize")
    inputs: tuple[str, ...]  # graph inputs: "input_ids", "attention_mask" [, "token_type_ids"]; or "pixel_values"
    dim: Positive
    max_sequence: Positive  # tokens, special tokens included; 1 for images
    prompts: dict[str, str]
    default_prompt_name: str | None
    code: dict[str, Sha256] = Field(default={}, exclude_if=lambda it: not it)  # trusted files: "[OWNER/NAME--]FILE.py"
    query_length: Positive | None = Field(default=None, exclude_if=lambda value: value is None)  # of encode_query
    document_length: Positive | None = Field(default=None, exclude_if=lambda value: value is None)
    unused_settings: tuple[str, ...] = Field(default=(), exclude_if=lambda value: not value)  # "FILE: KEY", not read


class EndToEnd(Record):
    """Tell whether a bundle gives the token ids of the source's own path, and FP32 its vectors.

    The path is sentence-transformers' `encode`, `encode_query` and `encode_document`, or transformers' tokenizer, which
    gives ids alone. `compared` texts of a fixed list have passed through it.
    """

    status: Literal["passed", "failed", "not compared"]
    against: str | None = None  # e.g. "sentence-transformers 6.2.0"; None when not compared
    compared: int = 0  # texts whose ids were compared
    vectors: int = 0  # vectors that were compared, of all three methods
    cosine_min: float | None = None  # FP32 against the source's own vectors; None without vectors
    error_max: float | None = None  # the largest distance of two vectors, relative to the source's vector
    reason: str | None = None  # why it was not compared, or why only in part
    failures: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """Say in one sentence what was compared, and what came of it."""
        if self.status == "not compared":
            return f"not compared with the source's own path: {self.reason}"
        said = f"{self.status}: the token ids of {self.compared} texts"
        if self.cosine_min is not None and self.error_max is not None:
            said += f" and {self.vectors} FP32 vectors (cosine {self.cosine_min:.7f}, error {self.error_max:.1e})"
        return f"{said} against {self.against}{f'; {self.reason}' if self.reason else ''}"
