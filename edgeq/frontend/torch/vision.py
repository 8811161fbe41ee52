"""Prepare, run and pool image models in torch, for `edgeq.frontend.torch.convert`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.data import image_preprocessing
from edgeq.data.batches import PIXELS, PixelFeeds
from edgeq.data.image_preprocessing import Preprocessing
from edgeq.errors import ConfigError, Unsupported
from edgeq.frontend import locate, settings
from edgeq.frontend.locate import Located
from edgeq.frontend.torch import sentence_transformers
from edgeq.frontend.torch.supported_modules import kind_of
from edgeq.records import Source
from edgeq.system.files import work_dir

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

# In steps of a pixel's 8 bits: Pillow and the processor's own arithmetic may round differently.
_PIXEL_TOLERANCE = 1.01


def source_of_images(located: Located, model: SentenceTransformer) -> Source:
    """Describe a loaded model of images as a source record.

    Raises:
        ConfigError: it has no image processor.
        Unsupported: its preprocessing is not supported.
    """
    names = [kind_of(module) for module in model]
    names = [
        f"{name}:{'+'.join(sentence_transformers.modes(module))}" if name == "Pooling" else name
        for name, module in zip(names, model, strict=True)
    ]
    (vector,) = embeddings(model, probes(preprocessing_of(model, located.name), (1,)))
    return Source(
        name=located.name if not Path(located.name).exists() else located.directory.name,
        kind="sentence-transformers" if located.is_sentence_transformers else "transformers",
        sha256=located.sha256,
        modules=tuple(names),
        inputs=(PIXELS,),
        dim=vector.shape[1],
        max_sequence=1,
        prompts={},
        default_prompt_name=None,
        code=dict(located.code),
        unused_settings=settings.read(located.directory, takes_images=True).unused,
    )


def processor(model: SentenceTransformer, name: str) -> Any:
    """Give the image processor of a loaded model.

    Raises:
        ConfigError: the model has none.
    """
    whole = getattr(model[0], "processor", None)
    found = getattr(whole, "image_processor", whole)
    if not hasattr(found, "image_mean"):
        raise ConfigError(f"{name}: has no image processor; restore preprocessor_config.json from the model's origin")
    return found


def preprocessing_of(model: SentenceTransformer, name: str, folder: Path | None = None) -> Preprocessing:
    """Give the preprocessing of a loaded model, and write its configuration to a folder.

    Raises:
        ConfigError: the model has no image processor.
        Unsupported: the processor has steps that edgeq lacks, or its pixels differ from edgeq's by more than rounding.
    """
    own = processor(model, name)
    with work_dir() as scratch:
        to = folder or scratch
        own.save_pretrained(to)
        how = image_preprocessing.read(to / image_preprocessing.CONFIG, f"{name}/{image_preprocessing.CONFIG}")
    card = image_preprocessing.test_card()
    found = how.pixel_values(how.pixels(card)[None])
    expected = np.asarray(own(images=[card], return_tensors="np")[PIXELS], np.float32)
    step = how.rescale_factor / np.array(how.std, np.float32)[:, None, None]
    if expected.shape != found.shape or not float(np.abs((found - expected) / step).max()) <= _PIXEL_TOLERANCE:
        raise Unsupported(
            f"{name}: its image processor {type(own).__name__} gives other pixels than edgeq's preprocessing, which "
            "resizes, crops, rescales and normalises with Pillow. Report the model."
        )
    return how


def probes(how: Preprocessing, counts: tuple[int, ...] = (1, 3, 2)) -> tuple[PixelFeeds, ...]:
    """Make batches of random images on which different graphs give different vectors, preprocessed."""
    rng = np.random.default_rng(0)
    sizes = [(count, 3, how.height, how.width) for count in counts]
    return tuple(PixelFeeds(how.pixel_values(rng.integers(0, 256, size).astype(np.uint8))) for size in sizes)


def pooled(module: torch.nn.Module, features: dict[str, Any]) -> dict[str, Any]:
    """Pool as a Pooling module does, without the attention mask of ones that it makes for images.

    Raises:
        Unsupported: the mode depends on the order of tokens, which patches do not have.
    """
    import torch

    tokens = features["token_embeddings"]
    poolings = {
        "cls": lambda: tokens[:, 0],
        "mean": lambda: tokens.mean(dim=1),
        "max": lambda: tokens.amax(dim=1),
        "mean_sqrt_len_tokens": lambda: tokens.sum(dim=1) / tokens.shape[1] ** 0.5,
        "lasttoken": lambda: tokens[:, -1],
    }
    modes = sentence_transformers.modes(module)
    unknown = [mode for mode in modes if mode not in poolings]
    if unknown:
        raise Unsupported(
            f"pooling {unknown[0]}: an image's patches have no such order; choose {' or '.join(poolings)}"
        )
    return {**features, "sentence_embedding": torch.cat([poolings[mode]() for mode in modes], dim=1)}


def with_pooling(body: Any, pooling: str | None) -> list[Any]:
    """Append a Pooling to the body of a plain directory; running the body gives the width.

    Raises:
        ValueError: the body does not pool and no mode is given, or it pools by itself and one is.
    """
    import torch
    from sentence_transformers.sentence_transformer import modules

    if body.module_output_name == "sentence_embedding":
        if pooling is not None:
            raise ValueError(f"it pools by itself; drop --pooling {pooling}")
        return [body]
    if pooling is None:
        raise ValueError(f"it does not pool by itself; give --pooling with one of {', '.join(locate.POOLING_MODES)}")
    with work_dir() as scratch:
        body.processor.save_pretrained(scratch)
        where = f"{body.model.name_or_path}/{image_preprocessing.CONFIG}"
        (feed,) = probes(image_preprocessing.read(scratch / image_preprocessing.CONFIG, where), (1,))
    with torch.no_grad():
        tokens = body({PIXELS: torch.from_numpy(feed.pixel_values), "modality": "image"})["token_embeddings"]
    return [body, modules.Pooling(tokens.shape[-1], pooling_mode=pooling)]


def graph(model: SentenceTransformer, hidden_state: bool) -> torch.nn.Module:
    """Join all modules of the model to one whose input is pixels."""
    import torch

    class Graph(torch.nn.Module):
        """Run all modules of a model on pixels."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            features: dict[str, Any] = {PIXELS: pixel_values, "modality": "image"}
            for module in self.model:
                is_pooling = kind_of(module) == "Pooling"
                features = pooled(module, features) if is_pooling else module(features)
            embedding: torch.Tensor = features["sentence_embedding"]
            hidden: torch.Tensor | None = features.get("token_embeddings")
            return (embedding, hidden) if hidden_state and hidden is not None else (embedding,)

    return Graph().eval()


def embeddings(model: SentenceTransformer, feeds: tuple[PixelFeeds, ...]) -> list[NDArray[np.float32]]:
    """Run a loaded model on each batch of images; give the vectors, float32[batch, dim] each."""
    import torch

    made = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for feed in feeds:
            features: dict[str, Any] = {PIXELS: torch.from_numpy(feed.pixel_values), "modality": "image"}
            for module in model:
                features = module(features)
            made.append(features["sentence_embedding"].numpy())
    return made
