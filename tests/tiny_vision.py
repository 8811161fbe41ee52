"""Build small image models with random weights as model directories, through transformers, and draw images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIZE, PATCH, DIM, HIDDEN = 32, 8, 64, 128
_BODY = {
    "hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": HIDDEN,
    "patch_size": PATCH, "image_size": SIZE,
}  # fmt: skip


def _processor(**changed: object) -> object:
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}, **changed)


def _cropping() -> object:
    from transformers import CLIPImageProcessorPil

    size, crop = {"shortest_edge": SIZE + 4}, {"height": SIZE, "width": SIZE}
    return CLIPImageProcessorPil(size=size, crop_size=crop)


def vit(folder: Path) -> Path:
    from transformers import ViTConfig, ViTModel

    return _save(ViTModel(ViTConfig(**_BODY), add_pooling_layer=False), _processor(), folder)


def dinov2(folder: Path) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    return _save(Dinov2Model(Dinov2Config(**_BODY, mlp_ratio=2)), _cropping(), folder)


def clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    text = {**{key: value for key, value in _BODY.items() if "size" not in key}, "hidden_size": DIM, "vocab_size": 99}
    text |= {"intermediate_size": 128, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 98}
    config = CLIPConfig(text_config=text, vision_config=_BODY, projection_dim=32)
    _tokenizer(folder)
    return _save(CLIPModel(config), _cropping(), folder)


def siglip(folder: Path) -> Path:
    from transformers import SiglipConfig, SiglipModel

    text = {"hidden_size": DIM, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 128}
    config = SiglipConfig(text_config={**text, "vocab_size": 99, "max_position_embeddings": 16}, vision_config=_BODY)
    _tokenizer(folder)
    return _save(SiglipModel(config), _processor(resample=3), folder)


def resnet(folder: Path) -> Path:
    from transformers import ResNetConfig, ResNetModel

    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, DIM], depths=[1, 1], layer_type="basic")
    return _save(ResNetModel(config), _cropping(), folder)


def mobilenet_v2(folder: Path) -> Path:
    """Inverted bottlenecks: depthwise convolutions behind a Clip at 6, and no activation behind the narrow ones."""
    from transformers import MobileNetV2Config, MobileNetV2Model

    config = MobileNetV2Config(depth_multiplier=0.35, image_size=SIZE, output_stride=16, depth_divisible_by=8)
    return _save(MobileNetV2Model(config), _cropping(), folder)


def _tokenizer(folder: Path) -> None:
    """Write a tokenizer of 99 words: a directory of two towers holds one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: row for row, word in enumerate(["<pad>", "<unk>", *(f"w{row}" for row in range(2, 98)), "<end>"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<end>", "model_max_length": 16}
    PreTrainedTokenizerFast(tokenizer_object=made, **named).save_pretrained(folder)


def _save(model: object, processor: object, folder: Path) -> Path:
    """Save with weights of some spread: fresh ones hardly react to the image."""
    import torch

    torch.manual_seed(0)
    for name, weight in model.state_dict().items():  # type: ignore[attr-defined]
        if "normalization" in name and name.endswith("bias"):
            weight.copy_(1.0 + 0.1 * torch.randn_like(weight))  # most values pass a Relu, as in a trained model
        elif weight.ndim == 1 and "running" not in name:
            weight.add_(0.1 * torch.randn_like(weight))
        elif weight.is_floating_point() and weight.ndim > 1:
            fan_in = weight[0].numel() if weight.ndim in (2, 4) else weight.shape[-1]
            weight.copy_(torch.randn_like(weight) * fan_in**-0.5)
        if weight.shape == (DIM, HIDDEN):  # the way back from a feed-forward layer: channels as large as real models'
            weight[[3, 40]] *= 60.0
    if any(name.endswith("running_var") for name in model.state_dict()):  # type: ignore[attr-defined]
        seen = processor(images=[picture(seed) for seed in range(900, 964)], return_tensors="pt")  # type: ignore[operator]
        with torch.no_grad():
            for _ in range(40):  # batch normalisation learns what it divides by
                model.train()(seen["pixel_values"])  # type: ignore[attr-defined,operator]
    model.eval().save_pretrained(folder)  # type: ignore[attr-defined]
    processor.save_pretrained(folder)  # type: ignore[attr-defined]
    return folder


def picture(seed: int, width: int = 60, height: int = 48) -> Image.Image:
    """Draw shapes of a few colours on a shaded ground."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width] / max(width, height)
    ground = [rows * rng.uniform(-200, 200) + columns * rng.uniform(-200, 200) + rng.uniform(0, 255) for _ in range(3)]
    image = Image.fromarray(np.clip(np.stack(ground, axis=-1), 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 6))):
        left, top = int(rng.integers(0, width - 8)), int(rng.integers(0, height - 8))
        box = (left, top, left + int(rng.integers(6, 32)), top + int(rng.integers(6, 32)))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def folder_of_pictures(folder: Path, count: int, seed: int = 0) -> Path:
    """Write pictures of various sizes as PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in range(count):
        size = np.random.default_rng(seed + row).integers(40, 90, 2)
        picture(seed + row, int(size[0]), int(size[1])).save(folder / f"{row:03}.png")
    return folder


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    return np.asarray(image.convert("RGB"), np.uint8)


MODELS = {"vit": vit, "dinov2": dinov2, "clip": clip, "siglip": siglip, "resnet": resnet}
