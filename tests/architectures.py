"""Build one small model of each text architecture that transformers ships, from its config and a fixed seed.

`ARCHITECTURES` says how; `write` makes a model directory, as an engineer would bring it. Random weights hardly have
what makes quantisation hard, so a few rows of each second feed-forward matrix are made 60 to 100 times as large.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_source

DIM, LAYERS, HEADS, HIDDEN, LONGEST = 64, 2, 4, 256, 64
OUTLIERS = 3  # rows of each second feed-forward matrix
SEED = 7
SPARE = 6  # rows of the table for tokens that a family's own tokenizer adds

_ENCODER = {
    "hidden_size": DIM, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": HIDDEN,
    "max_position_embeddings": LONGEST, "initializer_range": 0.1,
}  # fmt: skip
_PADDED_FIRST = _ENCODER | {"max_position_embeddings": LONGEST + 2}  # positions begin behind the padding's
_DECODER = _ENCODER | {"num_key_value_heads": 2, "head_dim": 16}
_T5 = {
    "d_model": DIM, "d_kv": 16, "d_ff": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS, "initializer_factor": 1.0,
    "relative_attention_num_buckets": 16, "relative_attention_max_distance": 40,
}  # fmt: skip
_VISION = {
    "hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": HEADS, "intermediate_size": DIM,
    "image_size": 32, "patch_size": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Say how a model is built.

    Attributes:
        config: the name of its configuration in transformers.
        arguments: of the configuration, besides vocabulary and special tokens.
        model: the name of its model in transformers.
        pooling: a mode of sentence-transformers' Pooling.
        second: ends the names of its second feed-forward matrices.
        pad_id: of the padding token: 0 or 1.
        has_segments: whether its tokenizer gives `token_type_ids`.
        reads_padding: whether texts are padded to the longest, and its tokenizer gives no mask.
        tower: which tower is meant, of a model of two.
    """

    config: str
    model: str
    arguments: Mapping[str, Any]
    second: tuple[str, ...]
    pooling: str = "mean"
    pad_id: int = 0
    has_segments: bool = False
    reads_padding: bool = False
    tower: str | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture("BertConfig", "BertModel", _ENCODER, ("output.dense",), has_segments=True),
    "minilm": Architecture(
        "BertConfig", "BertModel", _ENCODER | {"hidden_size": 48, "num_attention_heads": 12, "intermediate_size": 192},
        ("output.dense",), has_segments=True,
    ),
    "roberta": Architecture("RobertaConfig", "RobertaModel", _PADDED_FIRST, ("output.dense",), pad_id=1),
    "xlm-roberta": Architecture(
        "XLMRobertaConfig", "XLMRobertaModel", _PADDED_FIRST, ("output.dense",), "cls", pad_id=1
    ),
    "mpnet": Architecture("MPNetConfig", "MPNetModel", _PADDED_FIRST, ("output.dense",), pad_id=1),
    "distilbert": Architecture(
        "DistilBertConfig", "DistilBertModel",
        {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": HIDDEN, "initializer_range": 0.1,
         "max_position_embeddings": LONGEST},
        ("ffn.lin2",),
    ),
    "albert": Architecture(
        "AlbertConfig", "AlbertModel", _ENCODER | {"embedding_size": 32, "hidden_act": "gelu_new"}, ("ffn_output",),
        has_segments=True,
    ),
    "electra": Architecture(
        "ElectraConfig", "ElectraModel", _ENCODER | {"embedding_size": 32}, ("output.dense",), has_segments=True
    ),
    "deberta-v3": Architecture(
        "DebertaV2Config", "DebertaV2Model",
        _ENCODER | {"relative_attention": True, "position_buckets": 16, "pos_att_type": ["p2c", "c2p"],
                    "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False,
                    "type_vocab_size": 0, "max_relative_positions": -1},
        ("output.dense",),
    ),
    "bert-mish": Architecture(
        "BertConfig", "BertModel", _ENCODER | {"hidden_act": "mish"}, ("output.dense",), has_segments=True
    ),
    "megatron-bert": Architecture(
        "MegatronBertConfig", "MegatronBertModel", _ENCODER, ("output.dense",), has_segments=True
    ),
    "ernie": Architecture("ErnieConfig", "ErnieModel", _ENCODER, ("output.dense",), has_segments=True),
    "modernbert": Architecture(
        "ModernBertConfig", "ModernBertModel",
        _ENCODER | {"global_attn_every_n_layers": 2, "local_attention": 16, "intermediate_size": 192,
                    "initializer_cutoff_factor": 2.0},
        ("mlp.Wo",), fixed={"cls_token_id": 2, "sep_token_id": 3},
    ),
    "nomic-bert": Architecture(
        "NomicBertConfig", "NomicBertModel", _ENCODER, ("mlp.down_proj",), has_segments=True
    ),
    "gte": Architecture("GteConfig", "GteModel", _ENCODER, ("mlp.down_proj",), "cls", pad_id=1),
    "jina-v3": Architecture("JinaEmbeddingsV3Config", "JinaEmbeddingsV3Model", _PADDED_FIRST, ("mlp.fc2",), pad_id=1),
    "eurobert": Architecture("EuroBertConfig", "EuroBertModel", _DECODER, ("mlp.down_proj",)),
    "t5": Architecture("T5Config", "T5EncoderModel", _T5, ("DenseReluDense.wo",)),
    "t5-gated": Architecture(
        "T5Config", "T5EncoderModel", _T5 | {"feed_forward_proj": "gated-gelu"}, ("DenseReluDense.wo",)
    ),
    "qwen3": Architecture("Qwen3Config", "Qwen3Model", _DECODER, ("mlp.down_proj",), "lasttoken"),
    "qwen2": Architecture("Qwen2Config", "Qwen2Model", _DECODER, ("mlp.down_proj",), "lasttoken"),
    "gemma": Architecture(
        "Gemma3TextConfig", "Gemma3TextModel",
        _DECODER | {"use_bidirectional_attention": True, "query_pre_attn_scalar": 16, "sliding_window": 16,
                    "layer_types": ["sliding_attention", "full_attention"]},
        ("mlp.down_proj",),
    ),
    "llama": Architecture("LlamaConfig", "LlamaModel", _DECODER, ("mlp.down_proj",)),
    "mistral": Architecture(
        "MistralConfig", "MistralModel", _DECODER | {"sliding_window": 16}, ("mlp.down_proj",), "lasttoken"
    ),
    "clip-text": Architecture("CLIPTextConfig", "CLIPTextModel", _ENCODER, ("mlp.fc2",)),
    "clip-tower": Architecture(
        "CLIPConfig", "CLIPModel",
        {"text_config": _ENCODER, "vision_config": _VISION, "projection_dim": 48, "initializer_range": 0.1},
        ("mlp.fc2",), tower="text",
    ),
    "siglip-tower": Architecture(
        "SiglipConfig", "SiglipModel", {"text_config": _ENCODER, "vision_config": _VISION, "initializer_range": 0.1},
        ("mlp.fc2",), pad_id=1, reads_padding=True, tower="text",
    ),
}  # fmt: skip


def write(
    name: str, folder: Path, longest: int = LONGEST, outliers: bool = True, changed: Mapping[str, Any] | None = None
) -> Path:
    """Write a sentence-transformers directory of one architecture, its vectors of unit length.

    A model of two towers is a plain directory, as its origin gives it. `changed` replaces arguments of the
    configuration.
    """
    import torch
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    made = ARCHITECTURES[name]
    body = folder.with_name(f"{folder.name}-body")
    size = _tokenizer(body, made, longest)
    ids = {"vocab_size": size, "pad_token_id": made.pad_id, "bos_token_id": 2, "eos_token_id": 3}
    arguments = {**made.arguments, **made.fixed, **(changed or {})}
    if made.tower is None:
        arguments |= ids
    else:
        arguments["text_config"] = {**arguments["text_config"], **ids}
    config = getattr(transformers, made.config)(**arguments)
    torch.manual_seed(SEED)
    model = getattr(transformers, made.model)(config).eval()
    if outliers:
        _plant(model, made.second)
    model.save_pretrained(body)
    if made.tower is not None:
        transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        ).save_pretrained(body)
        return body.rename(folder)
    transformer = modules.Transformer(str(body), max_seq_length=longest)
    width = transformer.get_embedding_dimension()
    parts = [transformer, modules.Pooling(width, pooling_mode=made.pooling), modules.Normalize()]
    SentenceTransformer(modules=parts, device="cpu").save(str(folder), create_model_card=False)
    return folder


def _plant(model: Any, second: tuple[str, ...]) -> None:
    """Make a few neurons of each feed-forward layer count 60 to 100 times as much."""
    import torch

    planted = 0
    for name, module in model.named_modules():
        if not name.endswith(second) or "attention" in name:
            continue
        with torch.no_grad():
            rows = torch.randperm(module.weight.shape[1])[:OUTLIERS]
            module.weight[:, rows] *= torch.linspace(60.0, 100.0, OUTLIERS)
        planted += 1
    if not planted:
        raise ValueError(f"no module's name ends with {second}: {[name for name, _ in model.named_modules()]}")


def _tokenizer(folder: Path, made: Architecture, longest: int) -> int:
    """Write a word-piece tokenizer; give the number of its tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]"] if made.pad_id == 0 else ["[UNK]", "[PAD]"]
    pieces = [*string.ascii_lowercase, *string.digits, *(f"##{c}" for c in string.ascii_lowercase + string.digits)]
    tokens = dict.fromkeys([*special, "[CLS]", "[SEP]", "[MASK]", *pieces, *tiny_source.WORDS])
    tokenizer = Tokenizer(models.WordPiece({token: row for row, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", *(["token_type_ids"] if made.has_segments else [])]
    names += [] if made.reads_padding else ["attention_mask"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=longest, model_input_names=names, padding_side="right",
    )  # fmt: skip
    fast.save_pretrained(folder)
    return len(tokens) + SPARE
