"""Run an IR in OpenVINO: with dynamic shapes, or each text in the smallest bucket that holds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgeq.backends.openvino.lowering import refusals
from edgeq.data.batches import PIXELS, AnyFeeds
from edgeq.data.sessions import Embeddings
from edgeq.data.tokens import Feeds, fitted, rows_by_bucket, token_feeds
from edgeq.errors import ConfigError
from edgeq.records import Target

_OUTPUT = "sentence_embedding"
_AGAIN = "Fetch or export the bundle again."


def properties(target: Target, threads: int = 0) -> dict[str, str | int | bool]:
    """Give OpenVINO's properties: the keys of the target's [runtime] in capitals, without edgeq's own keys."""
    own = {"device", "also_inference_precision_hint"}
    found = {key.upper(): value for key, value in target.runtime.items() if key not in own}
    return found | ({"INFERENCE_NUM_THREADS": threads} if threads else {})


def compiled(xml: Path, weights: Path, device: str, told: Mapping[str, str | int | bool]) -> Any:
    """Read an IR and compile it for a device.

    Raises:
        ConfigError: the files are no IR, do not fit together, or have other inputs and outputs than an encoder.
    """
    import openvino as ov

    for path in (xml, weights):
        if not path.is_file():
            raise ConfigError(f"{path}: is not there; an IR is an .xml and its .bin. {_AGAIN}")
    core = ov.Core()
    with refusals(str(xml), ConfigError, _AGAIN):
        model = core.read_model(xml, weights)
        _require_ports(xml, model)
        return core.compile_model(model, device, dict(told))


def _require_ports(xml: Path, model: Any) -> None:
    """Refuse a model with other inputs and outputs than a text or image encoder's."""
    names = {name for port in model.inputs for name in port.get_names()}
    ranks = {port.get_partial_shape().rank.get_length() for port in model.inputs}
    takes_images = names == {PIXELS} and ranks == {4}
    unknown = names - {"input_ids", "attention_mask", "token_type_ids"}
    outputs = {name for port in model.outputs for name in port.get_names()}
    if takes_images and _OUTPUT in outputs:
        return
    if unknown or not {"input_ids", "attention_mask"} <= names or ranks != {2} or _OUTPUT not in outputs:
        raise ConfigError(
            f"{xml}: inputs are {', '.join(sorted(names))} of {sorted(ranks)} axes, outputs "
            f"{', '.join(sorted(outputs))}; input_ids and attention_mask of 2 axes, or {PIXELS} of 4, and {_OUTPUT} "
            f"are needed. {_AGAIN}"
        )


class OpenvinoSession:
    """Run a compiled model on a whole batch."""

    def __init__(self, xml: Path, compiled_model: Any) -> None:
        """Take a model from `compiled`."""
        self._xml = xml
        self._request = compiled_model.create_infer_request()
        self._inputs = [port.get_any_name() for port in compiled_model.inputs]
        self._output = compiled_model.output(_OUTPUT)

    def __call__(self, feeds: AnyFeeds) -> Embeddings:
        """Give the sentence embeddings, float32[batch, dim].

        Raises:
            ConfigError: OpenVINO cannot run the file on these tokens.
        """
        with refusals(str(self._xml), ConfigError, _AGAIN):
            self._request.infer(feeds.named(self._inputs), share_inputs=True)
        return np.array(self._request.get_tensor(self._output).data, np.float32)


class BucketSession:
    """Run each text alone in the compiled model of the smallest bucket that holds it."""

    def __init__(self, sessions: Mapping[int, OpenvinoSession]) -> None:
        """Take a session for each bucket's number of tokens."""
        self._sessions = sessions

    def __call__(self, feeds: AnyFeeds) -> Embeddings:
        """Give the sentence embeddings, float32[batch, dim].

        A text alone runs at its padded length; in a batch each text is cut back to its own tokens first.

        Raises:
            ConfigError: a text is longer than the largest bucket, or OpenVINO cannot run the file.
        """
        vectors: dict[int, Embeddings] = {}
        tokens = token_feeds(feeds)
        for bucket, rows in rows_by_bucket(tokens, sorted(self._sessions)).items():
            for row in rows:
                one = Feeds(*(fitted(array[[row]], bucket) for array in (tokens.input_ids, tokens.attention_mask)))
                vectors[row] = self._sessions[bucket](one)[0]
        return np.stack([vectors[row] for row in range(len(vectors))])
