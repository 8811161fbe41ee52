"""List the settings of sentence-transformers' and transformers' files: each is honoured, unused or refused, and why.

`docs/reference/model-settings.md` shows these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["honoured", "unused", "refused"]
ENCODER, MODEL, MODULES = "sentence_bert_config.json", "config_sentence_transformers.json", "modules.json"
PROCESSING = f"{ENCODER}: processing_kwargs.text, .common"
TOKENIZER_CONFIG, IMAGES = "tokenizer_config.json", "preprocessor_config.json"


@dataclass(frozen=True)
class Setting:
    """Say what becomes of a setting, and why."""

    verdict: Verdict
    why: str
    says_nothing: tuple[object, ...] = ()  # with one of these values an unused or refused setting is not mentioned


def _all(verdict: Verdict, why: str, *names: str) -> dict[str, Setting]:
    return {name: Setting(verdict, why, (None,)) for name in names}


_LOADED = "sentence-transformers applies it when it loads the model"
_TOKENIZER = "transformers applies it when it loads the tokenizer, which is written to tokenizer.json"
_ANY = (None, True, False)

TABLES: Mapping[str, Mapping[str, Setting]] = {
    ENCODER: {
        "max_seq_length": Setting("honoured", "texts are cut there"),
        "do_lower_case": Setting("honoured", "goes into tokenizer.json"),
        "processing_kwargs": Setting("honoured", "see its own table; `image`, `audio`, `video` are unused for texts"),
        "query_length": Setting("honoured", "`encode_query` cuts there; refused above `max_seq_length`"),
        "document_length": Setting("honoured", "`encode_document` cuts there; refused above `max_seq_length`"),
        "query_expansion": Setting(
            "refused",
            "fills queries with mask tokens for models that keep a vector for each token. Take it out if the model "
            "gives one vector for a text and was trained without",
            (None,),
        ),
        "modality_config": Setting("honoured", f"{_LOADED}; a message modality is refused"),
        "module_output_name": Setting("honoured", _LOADED),
        "transformer_task": Setting(
            "refused",
            "loads a head that gives no vectors; feature-extraction alone is honoured. Save the encoder without it",
            (None, "feature-extraction"),
        ),
        "unpad_inputs": Setting("unused", "how flash attention packs a batch", (None,)),
        "tokenizer_name_or_path": Setting(
            "refused", "names files outside of the directory. Save the tokenizer in it", (None,)
        ),
        "cache_dir": Setting("unused", "where downloads lie", (None,)),
        "backend": Setting("unused", "sentence-transformers' own choice of a runtime", (None,)),
        **_all("honoured", f"{_LOADED}; type and attention alone are always FP32 and eager", "model_args",
               "model_kwargs", "config_args", "config_kwargs"),
        **_all("honoured", _TOKENIZER, "tokenizer_args", "processor_kwargs"),
    },
    PROCESSING: {
        "max_length": Setting("honoured", "all three methods cut there"),
        "truncation": Setting(
            "refused",
            "texts are always cut at the model's limit; true alone is honoured. Take it out",
            (None, True, "longest_first", "only_first"),
        ),
        "padding": Setting("unused", "padding is masked out", _ANY),
        "pad_to_multiple_of": Setting("unused", "padding is masked out", (None,)),
        "padding_side": Setting("unused", "a token has the position that it has in the text alone", (None,)),
        "return_tensors": Setting("unused", "the kind of arrays", (None, "pt")),
        "return_attention_mask": Setting("refused", "a mask is needed. Take it out", (None, True)),
        "return_token_type_ids": Setting("unused", "they are zeros for single texts", (None,)),
        "logits_to_keep": Setting("unused", "for models that write texts", (None,)),
        "verbose": Setting("unused", "how much is printed", (None,)),
    },
    MODEL: {
        "model_type": Setting("honoured", "says what kind of model it is"),
        "prompts": Setting("honoured", "go before each text"),
        "default_prompt_name": Setting("honoured", "the prompt of `encode`"),
        "truncate_dim": Setting("honoured", "the vectors are cut in the graph"),
        "similarity_fn_name": Setting("honoured", "is written into the bundle for sentence-transformers"),
        "requirements": Setting("honoured", "sentence-transformers checks them when it loads the model"),
        "__version__": Setting("unused", "which releases saved the model", _ANY),
    },
    MODULES: {
        **_all("honoured", "say which modules follow each other, and where their files lie", "idx", "name", "path",
               "type"),
        "kwargs": Setting("unused", "names of further arguments of `encode`, which a bundle's does not take", (None,)),
    },
    "Pooling/config.json": {
        **_all("honoured", "the width of token vectors", "embedding_dimension", "word_embedding_dimension"),
        **_all("honoured", "the modes, inside the graph", "pooling_mode", "pooling_mode_cls_token",
               "pooling_mode_mean_tokens", "pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens",
               "pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken"),
        "include_prompt": Setting("honoured", "false is refused where the model has prompts"),
    },
    "Dense/config.json": _all("honoured", "inside the graph", "in_features", "out_features", "bias",
                              "activation_function", "module_input_name", "module_output_name", "use_residual"),
    "LayerNorm/config.json": _all("honoured", "inside the graph", "dimension"),
    "Normalize/config.json": _all("honoured", "inside the graph", "module_input_name", "module_output_name"),
    "Dropout/config.json": _all("unused", "for training", "dropout"),
    TOKENIZER_CONFIG: {
        **_all("honoured", _TOKENIZER, "add_bos_token", "add_cls_token", "add_eos_token", "add_prefix_space",
               "add_sep_token", "added_tokens_decoder", "additional_special_tokens", "auto_map", "backend",
               "bos_token", "bos_token_id", "cls_token", "do_basic_tokenize", "do_lower_case", "do_lowercase",
               "eos_token", "eos_token_id", "errors", "extra_ids", "extra_special_tokens", "force_download",
               "fix_mistral_regex", "from_slow", "is_local", "keep_accents", "lang_codes", "legacy", "local_files_only",
               "mask_token", "model_specific_special_tokens", "never_split", "offset", "pad_token", "pad_token_id",
               "pad_token_type_id", "remove_space", "sep_token", "sp_model_kwargs", "special_tokens_map_file",
               "split_special_tokens", "src_lang", "strip_accents", "tgt_lang", "tokenize_chinese_chars",
               "tokenizer_class", "tokenizer_file", "tokenizer_type", "trim_offsets", "truncation_side", "unk_token",
               "use_default_system_prompt", "use_fast", "vocab_file", "vocab_type", "merges_file",
               "word_delimiter_token", "spaces_between_special_tokens"),
        "model_max_length": Setting("honoured", "the limit, where no other file states one"),
        "padding": Setting("honoured", "counts as text where the model is given no mask, else it is masked out"),
        "max_length": Setting("honoured", "with `padding` of a model without mask; else `model_max_length` counts"),
        "model_input_names": Setting("honoured", "whether the model is given a mask and token types"),
        **_all("unused", "padding is masked out", "padding_side", "pad_to_multiple_of", "pad_to_max_length"),
        **_all("unused", "single texts have one way to be cut", "stride", "truncation_strategy", "truncation",
               "max_len", "max_len_single_sentence", "max_len_sentences_pair"),
        **_all("unused", "for turning ids back into text", "clean_up_tokenization_spaces",
               "wordpieces_prefix", "skip_special_tokens"),
        **_all("unused", "for chats", "chat_template"),
        **_all("unused", "where the files came from", "name_or_path", "processor_class", "transformers_version",
               "return_token_type_ids", "_commit_hash", "revision", "language", "task"),
    },
    IMAGES: {
        **_all("honoured", "images are resized, cropped, rescaled and normalised so", "do_resize", "size", "resample",
               "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std",
               "do_convert_rgb"),
        **_all("honoured", "transformers chooses its processor by it, whose pixels edgeq's must equal",
               "image_processor_type", "feature_extractor_type", "processor_class", "use_fast"),
        **{name: Setting("refused", "is a step that edgeq lacks. Turn it off if the model does without", (None, False))
           for name in ("do_pad", "crop_pct", "rescale_offset", "include_top")},
        **_all("unused", "the form of the arrays, and how the processor computes them", "data_format",
               "input_data_format", "return_tensors", "device", "disable_grouping", "default_to_square", "pad_size",
               "image_seq_length"),
    },
    "special_tokens_map.json": _all("honoured", _TOKENIZER, "additional_special_tokens", "bos_token", "cls_token",
                                    "eos_token", "extra_special_tokens", "mask_token", "pad_token", "sep_token",
                                    "unk_token"),
}  # fmt: skip
