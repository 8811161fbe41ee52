"""Let sentence-transformers' own exporter quantise the model: `python sentence_transformers_exporter.py JOB`.

A script of an environment of its own: nothing of edgeq is imported. JOB is JSON: {"source", "texts", "out", "form"};
form is "onnx-dynamic" or "openvino-static".
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # everything it needs lies on the disk

from optimum.intel import OVQuantizationConfig
from sentence_transformers import (
    SentenceTransformer,
    export_dynamic_quantized_onnx_model,
    export_static_quantized_openvino_model,
)


def main() -> None:
    """Make what the job says: a folder that SentenceTransformer opens."""
    job = json.loads(sys.argv[1])
    backend = job["form"].partition("-")[0]
    model = SentenceTransformer(job["source"], backend=backend, device="cpu", model_kwargs={"export": True})
    model.save_pretrained(job["out"])
    if backend == "onnx":
        export_dynamic_quantized_onnx_model(model, "avx512_vnni", job["out"])
        return
    texts = json.loads(Path(job["texts"]).read_text(encoding="utf-8"))
    dataset = Path(job["out"]).parent / f"{Path(job['out']).name}-texts"
    dataset.mkdir(exist_ok=True)
    lines = [json.dumps({"text": text}) for text in texts]
    (dataset / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    export_static_quantized_openvino_model(
        model, OVQuantizationConfig(num_samples=len(texts)), job["out"],
        dataset_name=str(dataset), dataset_config_name="default", dataset_split="train", column_name="text",
    )  # fmt: skip


if __name__ == "__main__":
    main()
