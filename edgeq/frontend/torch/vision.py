"""Run the part of exporting an image model that needs torch; `edgeq.frontend.torch.convert` does it for texts."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.data import image_preprocessing
from edgeq.data.batches import PIXELS, PixelFeeds
from edgeq.data.image_preprocessing import Preprocessing
from edgeq.errors import ConfigError, Unsupported
from edgeq.frontend import locate
from edgeq.frontend.locate import Located
from edgeq.frontend.torch import sentence_transformers
from edgeq.records import Source

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

# Pillow and the processor's own arithmetic may round a pixel another way.
_PIXEL_TOLERANCE = 1.01


def source_of_images(located: Located, model: SentenceTransformer) -> Source:
    """Say what a loaded image model is made of."""
    names = [type(module).__name__ for module in model]
    names = [
        f"{name}:{'+'.join(sentence_transformers.modes(module))}" if name == "Pooling" else name
        for name, module in zip(names, model, strict=True)
    ]
    (vector,) = embeddings(model, probes(prepared_as(model, located.name), (1,)))
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
    )


def processor(model: SentenceTransformer, name: str) -> Any:
    """Give the image processor of a loaded model.

    Raises:
        ConfigError: it has none.
    """
    whole = getattr(model[0], "processor", None)
    found = getattr(whole, "image_processor", whole)
    if not hasattr(found, "image_mean"):
        raise ConfigError(f"{name}: has no image processor; restore preprocessor_config.json from the model's origin")
    return found


def prepared_as(model: SentenceTransformer, name: str, folder: Path | None = None) -> Preprocessing:
    """Give the preprocessing of a loaded model, and write it to a folder.

    Raises:
        Unsupported: it does more than edgeq does, or its pixels differ from edgeq's by more than their rounding.
    """
    own = processor(model, name)
    with tempfile.TemporaryDirectory() as scratch:
        place = folder or Path(scratch)
        own.save_pretrained(place)
        how = image_preprocessing.read(place / image_preprocessing.CONFIG, f"{name}/{image_preprocessing.CONFIG}")
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
    """Make batches of images that tell graphs apart, in the range that the preprocessing gives."""
    rng = np.random.default_rng(0)
    sizes = [(count, 3, how.height, how.width) for count in counts]
    return tuple(PixelFeeds(how.pixel_values(rng.integers(0, 256, size).astype(np.uint8))) for size in sizes)


def pooled(module: torch.nn.Module, features: dict[str, Any]) -> dict[str, Any]:
    """Pool as a Pooling module does, without the mask of ones that it makes for images: they have no padding.

    Raises:
        Unsupported: a mode that has no meaning for images.
    """
    import torch

    tokens = features["token_embeddings"]
    forms = {
        "cls": lambda: tokens[:, 0],
        "mean": lambda: tokens.mean(dim=1),
        "max": lambda: tokens.amax(dim=1),
        "mean_sqrt_len_tokens": lambda: tokens.sum(dim=1) / tokens.shape[1] ** 0.5,
        "lasttoken": lambda: tokens[:, -1],
    }
    modes = sentence_transformers.modes(module)
    unknown = [mode for mode in modes if mode not in forms]
    if unknown:
        raise Unsupported(f"pooling {unknown[0]}: an image's patches have no such order; choose {' or '.join(forms)}")
    return {**features, "sentence_embedding": torch.cat([forms[mode]() for mode in modes], dim=1)}


def assembled(body: Any, pooling: str | None) -> list[Any]:
    """Put the pooling behind the body of a plain directory; its width is found by running it.

    Raises:
        ValueError: the body gives patches or maps, and no pooling was asked for, or it pools by itself.
    """
    import torch
    from sentence_transformers.sentence_transformer import modules

    if body.module_output_name == "sentence_embedding":
        if pooling is not None:
            raise ValueError(f"it pools by itself; drop --pooling {pooling}")
        return [body]
    if pooling is None:
        raise ValueError(f"it does not pool by itself; give --pooling with one of {', '.join(locate.POOLING_MODES)}")
    with tempfile.TemporaryDirectory() as scratch:
        body.processor.save_pretrained(scratch)
        where = f"{body.model.name_or_path}/{image_preprocessing.CONFIG}"
        (feed,) = probes(image_preprocessing.read(Path(scratch) / image_preprocessing.CONFIG, where), (1,))
    with torch.no_grad():
        tokens = body({PIXELS: torch.from_numpy(feed.pixel_values), "modality": "image"})["token_embeddings"]
    return [body, modules.Pooling(tokens.shape[-1], pooling_mode=pooling)]


def graph(model: SentenceTransformer, hidden_state: bool) -> torch.nn.Module:
    """Give every module of the model as one that takes pixels."""
    import torch

    class Graph(torch.nn.Module):
        """Run every module of the model on bare pixels."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
            features: dict[str, Any] = {PIXELS: pixel_values, "modality": "image"}
            for module in self.model:
                is_pooling = type(module).__name__ == "Pooling"
                features = pooled(module, features) if is_pooling else module(features)
            embedding: torch.Tensor = features["sentence_embedding"]
            hidden: torch.Tensor | None = features.get("token_embeddings")
            return (embedding, hidden) if hidden_state and hidden is not None else (embedding,)

    return Graph().eval()


def embeddings(model: SentenceTransformer, feeds: tuple[PixelFeeds, ...]) -> list[NDArray[np.float32]]:
    """Run a loaded model on each feed, and give its vectors, float32[batch, dim] each."""
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
