"""Define the requests of the stages that targets share: each holds all that decides the stage's result."""

from __future__ import annotations

from edgeq.frontend.locate import Located
from edgeq.records import Calibration, FileRef, FloatModel, Scheme
from edgeq.system.stage import InputFile, Request


class FloatModelRequest(Request):
    """Ask for the float model of a source."""

    located: Located  # named as the bundle shows it: how the user spelled its path decides nothing
    hidden_state: bool


class SamplesRequest(Request):
    """Name a float model and the samples that it is to embed: texts or images, with all that prepares them."""

    float_model: FloatModel
    config: tuple[InputFile, ...]  # the tokenizer or the preprocessing, with all that lies beside it
    texts: tuple[str, ...]
    images: tuple[InputFile, ...]
    limit: int  # tokens, at which longer texts are cut


class CalibrationRequest(SamplesRequest):
    """Ask for the equalised model, and the statistics of its tensors on samples."""

    origin: str  # of the samples, for their record
    seed: int


class QdqRequest(Request):
    """Ask for the QDQ model of an equalised model."""

    equalized: FloatModel
    calibration: Calibration
    tokens: FileRef | None  # ids of the calibration texts; None for images
    scheme: Scheme


class ReferenceRequest(SamplesRequest):
    """Ask for FP32's vectors of validation samples."""
