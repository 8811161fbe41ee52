"""Build sentence-transformers directories of every shape of module chain around small models with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny_source

DIM = tiny_source.DIM


def save(folder: Path, *following: Any, encoder: Path | None = None, **options: Any) -> Path:
    """Write a directory: an encoder, then the modules; `options` are SentenceTransformer's."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    plain = encoder or tiny_source.body(folder.with_name(f"{folder.name}-body"))
    body = modules.Transformer(str(plain), **options.pop("transformer", {}))
    model = SentenceTransformer(modules=[body, *following], device="cpu", **options)
    model.save(str(folder), create_model_card=False)
    return folder


def decoder(folder: Path, padding_side: str = "left") -> Path:
    """Write a causal decoder with rotary positions and grouped queries, whose tokenizer pads and cuts on one side."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

    vocabulary = {token: row for row, token in enumerate(["<pad>", "<unk>", "<eos>", *tiny_source.WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(3)
    config = Qwen3Config(
        vocab_size=len(vocabulary), hidden_size=DIM, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=128, max_position_embeddings=64, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    Qwen3Model(config).eval().save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>", model_max_length=64,
        padding_side=padding_side, truncation_side=padding_side, model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def static(folder: Path, *following: Any, dim: int = DIM, longest: int | None = None) -> Path:
    """Write a static embedding model, whose tokenizer would add special tokens where it is asked to."""
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocabulary = {token: row for row, token in enumerate(["[PAD]", "[UNK]", "[CLS]", *tiny_source.WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    if longest is not None:
        tokenizer.enable_truncation(longest)
    rng = np.random.default_rng(0)
    table = (rng.standard_normal((len(vocabulary), dim)) * rng.lognormal(0, 1, (len(vocabulary), 1))).astype(np.float32)
    model = SentenceTransformer(modules=[modules.StaticEmbedding(tokenizer, table), *following], device="cpu")
    model.save(str(folder), create_model_card=False)
    return folder
