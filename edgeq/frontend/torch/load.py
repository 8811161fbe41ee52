"""Load a located model through sentence-transformers, in FP32 on the CPU."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from edgeq.errors import ConfigError, EdgeqError, ToolMissing, Unsupported
from edgeq.frontend import settings
from edgeq.frontend.locate import Located
from edgeq.frontend.model_code import EXPORT_EXTRA
from edgeq.frontend.torch import sentence_transformers, text_towers
from edgeq.frontend.torch.supported_modules import refuse_decoder, require_listed, require_supported
from edgeq.records import Source

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer


def load_model(located: Located) -> SentenceTransformer:
    """Load the model in FP32 on the CPU, in evaluation mode, in the form that one graph can hold.

    Raises:
        ToolMissing: torch or sentence-transformers is not installed.
        ConfigError: sentence-transformers cannot load the directory, or the vectors have fewer dimensions than --dim.
        Unsupported: a graph cannot hold one of its modules or settings.
    """
    model = open_model(located)
    if not located.takes_images:
        make_traceable(model, located)
    return model


def make_traceable(model: SentenceTransformer, located: Located) -> None:
    """Rewrite a model of texts, as `open_model` gives it, in place.

    Raises:
        ConfigError: the vectors have fewer dimensions than --dim.
        Unsupported: a graph cannot hold one of its modules or settings.
    """
    length = settings.read(located.directory).max_length
    if length is not None:
        model.max_seq_length = length
    sentence_transformers.make_traceable(model, located.name, located.dim)
    model.eval()


def open_model(located: Located) -> SentenceTransformer:
    """Load the model in FP32 on the CPU, in evaluation mode, as sentence-transformers itself does.

    The model's own code runs if `located.code` lists it, and else none does. Nothing is downloaded.

    Raises:
        ToolMissing: torch or sentence-transformers is not installed.
        ConfigError: sentence-transformers cannot load the directory.
        Unsupported: its modules are not those of modules.json, no graph can hold one of them, or its text tower depends
            on padding.
    """
    try:
        import torch
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import modules
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise ToolMissing(
            f"exporting needs torch and sentence-transformers ({error}); install: {EXPORT_EXTRA}"
        ) from error
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    options = {"attn_implementation": "eager", "dtype": torch.float32}
    where, may_run = str(located.directory), bool(located.code)
    try:
        if located.is_sentence_transformers:
            model = SentenceTransformer(
                where, device="cpu", model_kwargs=options, local_files_only=True, trust_remote_code=may_run
            )
        else:
            given = {"local_files_only": True, "trust_remote_code": may_run}
            body = modules.Transformer(
                where, model_kwargs=options | given, processor_kwargs=dict(given), config_kwargs=dict(given)
            )
            if located.takes_images:
                from edgeq.frontend.torch import vision

                model = SentenceTransformer(modules=vision.with_pooling(body, located.pooling), device="cpu")
            elif located.tower is not None and body.module_output_name == "sentence_embedding":
                model = SentenceTransformer(modules=text_towers.split_tower(body, located.name), device="cpu")
            else:
                pooling = modules.Pooling(
                    body.get_embedding_dimension(), pooling_mode=(located.pooling or "").split("+")
                )
                model = SentenceTransformer(modules=[body, pooling], device="cpu")
    except EdgeqError:
        raise
    except Exception as error:  # the boundary to sentence-transformers, which may raise anything
        if not may_run and "trust_remote_code" in str(error):
            raise Unsupported(
                f"{where}: transformers has no class of its own that could take the place of the model's code. Read "
                "that code, and give --trust-remote-code (in Python trust_remote_code=True)."
            ) from error
        raise ConfigError(f"{where}: sentence-transformers cannot load this model: {_first_line(error)}") from error
    if located.is_sentence_transformers:
        require_listed(model, located.directory)
    if not located.takes_images:
        require_supported(model, located.directory, located.name)
        refuse_decoder(model, located.name)
    return model.eval()


def source_of(located: Located, model: SentenceTransformer) -> Source:
    """Describe a loaded model of texts as a source record.

    Raises:
        Unsupported: it states neither its dimension nor its longest sequence.
    """
    dim = model.get_embedding_dimension()
    limit = model.max_seq_length
    if dim is None or limit is None:
        raise Unsupported(f"{located.name}: the model states neither its dimension nor its longest sequence")
    found = settings.read(located.directory)
    found.require_within(int(limit), located.name)
    return Source(
        name=located.display_name,
        kind="sentence-transformers" if located.is_sentence_transformers else "transformers",
        sha256=located.sha256,
        modules=sentence_transformers.names(model),
        inputs=("input_ids", "attention_mask"),
        dim=int(dim),
        max_sequence=int(limit),
        prompts=dict(model.prompts) if any(model.prompts.values()) else {},
        default_prompt_name=model.default_prompt_name,
        code=dict(located.code),
        query_length=found.query_length,
        document_length=found.document_length,
        unused_settings=found.unused,
    )


def pooling_width(module: object) -> int:
    """Give the width of the token vectors that a Pooling module reads.

    Raises:
        Unsupported: it states none.
    """
    for name in ("embedding_dimension", "word_embedding_dimension"):
        width = getattr(module, name, None)
        if isinstance(width, int):
            return width
    raise Unsupported("the Pooling module states no width; sentence-transformers 6 is needed")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
