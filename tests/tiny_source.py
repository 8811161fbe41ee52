"""Build a two-layer BERT with random weights as a model directory, through transformers and sentence-transformers."""

from __future__ import annotations

import string
from pathlib import Path

DIM = 64
WORDS = (
    "the a of to and in is it for on with as was at by from be this that are or an not have has had but what all can "
    "we you they he she one two three when where who which how time year day work water house tree bird river stone "
    "red green blue old new small large good first last long little own other public same able"
).split()


def body(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """Write a plain Hugging Face directory."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    pieces = [*string.ascii_lowercase, *string.digits, *(f"##{c}" for c in string.ascii_lowercase + string.digits)]
    tokens = dict.fromkeys(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *WORDS])
    vocabulary = {token: row for row, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=DIM, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=256, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).eval().save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=64,
    )  # fmt: skip
    fast.save_pretrained(folder)
    return folder


def sentence_transformer(
    folder: Path,
    pooling: str = "mean",
    dense: bool = False,
    normalize: bool = True,
    prompts: dict[str, str] | None = None,
) -> Path:
    """Write a sentence-transformers directory."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    plain = body(folder.with_name(f"{folder.name}-body"))
    torch.manual_seed(1)
    made = [modules.Transformer(str(plain), max_seq_length=64), modules.Pooling(DIM, pooling_mode=pooling)]
    if dense:
        made.append(modules.Dense(DIM, 32, activation_function=torch.nn.Tanh()))
    if normalize:
        made.append(modules.Normalize())
    SentenceTransformer(modules=made, device="cpu", prompts=prompts).save(str(folder), create_model_card=False)
    return folder


def texts(count: int, seed: int = 0) -> list[str]:
    """Draw texts of 3 to 40 words, all different."""
    import numpy as np

    rng = np.random.default_rng(seed)
    return [f"{' '.join(rng.choice(WORDS, rng.integers(3, 40)))} {seed} {row}" for row in range(count)]
