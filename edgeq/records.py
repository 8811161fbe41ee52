"""Hold the frozen records that pass between stages.

Records hold no arrays: big things are files, named by path and sha256. Each record turns into JSON and back without
loss, refuses unknown or missing keys, and refuses NaN and infinity.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[int, Field(ge=1, le=1 << 31)]  # dimensions and lengths: runtimes and tokenizers take no others
Place = Literal["device", "host-kernels", "emulator", "simulator", "not-run"]
Status = Literal["passed", "failed", "not-run"]
RangeMethod = Literal["minmax", "percentile", "mse", "entropy"]


class Record(BaseModel):
    """Freeze the fields and refuse unknown keys, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FileRef(Record):
    """Name a file by its path, its content and its size.

    `path` is absolute while stages pass it on (in the cache or a work folder), and relative to the bundle, in POSIX
    form, in a manifest; a file that is not shipped is there by its bare name.
    """

    path: str
    sha256: Sha256
    size_bytes: int


class Source(Record):
    """Describe what was given: a model of sentence-transformers or transformers, an ONNX file, or a torch module."""

    name: str
    kind: Literal["sentence-transformers", "transformers", "onnx", "module"]
    sha256: Sha256  # over the names and contents of all files that decide the vectors
    modules: tuple[str, ...]  # e.g. ("Transformer", "Pooling:mean", "Normalize")
    inputs: tuple[str, ...]  # graph inputs: "input_ids", "attention_mask" [, "token_type_ids"]; or "pixel_values"
    dim: Positive
    max_sequence: Positive  # tokens, special tokens included; 1 for images
    prompts: dict[str, str]
    default_prompt_name: str | None


class PassReport(Record):
    """Say what one rewrite did: how many, how far FP32 moved, and why near misses did not match."""

    name: str
    rewrites: int
    max_abs_error: float
    near_misses: tuple[str, ...]


class FloatModel(Record):
    """Describe an FP32 ONNX file in the dialect, with pooling and normalisation inside."""

    file: FileRef
    source_sha256: Sha256
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]  # "sentence_embedding" [, "last_hidden_state"]
    dim: Positive
    max_sequence: Positive
    max_abs_error: float  # against torch, or the ONNX file that was given; against its parent for an equalised one
    passes: tuple[PassReport, ...]


class TextSet(Record):
    """Describe a set of texts by content: no text is held here."""

    origin: str  # what the user named, or "default"
    sha256: Sha256  # over the texts in order
    count: int
    tokens: int
    truncated: int  # texts cut at the model's limit


class ImageSet(Record):
    """Describe a set of images by content: no image is held here."""

    origin: str  # the folder that the user named
    sha256: Sha256  # over the pixels in order, resized and cropped
    count: int
    height: int
    width: int


class Migration(Record):
    """Give the strength of the scale migration per kind of tensor, and what the search measured."""

    strengths: dict[str, float]  # kind ("norm", "context", "activation") -> alpha in [0, 1]
    cosine_mean: float  # of the simulated scheme on calibration texts that were not observed
    candidates: int


class Calibration(Record):
    """Describe what was observed once on an equalised float model: `file` is the .npz with the statistics."""

    file: FileRef
    float_model_sha256: Sha256
    texts: TextSet | ImageSet
    seed: int
    migration: Migration


class MixedSpec(Record):
    """Quantise the weight products and the embedding tables; every other tensor stays float."""

    kind: Literal["mixed"] = "mixed"


class IntegerSpec(Record):
    """Give the bits of a scheme that quantises every tensor to signed integers; what is not named here has 16."""

    kind: Literal["integer"] = "integer"
    gemm_bits: int = 8  # input and output of weight products
    attention_bits: int = 8  # scores, probabilities, values
    output_bits: int = 8  # the vectors
    sum_bits: int = 32  # 32: the residual stream's sums and products are exact and rounded once; 16: each is rounded
    softmax: Literal["normalized", "deferred"] = "deferred"  # divide in front of the product with values, or behind it
    scaled_output_quantile: float = 0.5  # output channels above this quantile of magnitudes shrink in the weights
    has_16bit_matmul: bool = True  # whether two 16-bit tensors may be multiplied as matrices; else element by element
    has_16bit_gelu: bool = True  # whether GELU may have 16 bits; else the outlier branch takes it from a sigmoid
    has_16bit_tables: bool = True  # whether a function may look up all 16-bit values; else roots are interpolated


class HtpSpec(Record):
    """Give the unsigned bits of a scheme for Hexagon's tensor unit; what is not named here has 16."""

    kind: Literal["htp"] = "htp"
    gemm_bits: int = 8  # what weight products read and give, and activations between them
    attention_bits: int = 8  # queries, keys, values, scores, probabilities
    scaled_output_quantile: float = 0.5  # as in IntegerSpec; only 8-bit products need it


class VendorSpec(Record):
    """Leave quantising to a vendor's compiler, which takes the equalised float model and the calibration's feeds."""

    kind: Literal["vendor"] = "vendor"
    opset: int  # the newest that it reads
    dtype: Literal["float16", "int8"]  # of weight products
    output_ratio_max: float  # a product stays float whose largest output channel is more times the median one than this


SchemeKind = Literal["mixed", "integer", "htp", "vendor"]


class Scheme(Record):
    """Decide dtypes. Weights are symmetric per output channel, activations asymmetric per tensor."""

    name: str
    weight_bits: int = 8
    activation_bits: int = 8
    activations_signed: bool = True
    embedding_bits: int = 8
    range_method: RangeMethod = "minmax"
    spec: Annotated[MixedSpec | IntegerSpec | HtpSpec | VendorSpec, Field(discriminator="kind")] = MixedSpec()
    feeds: int = 0  # how many calibration texts, of evenly spread lengths, the compiler observes itself
    promoted: tuple[str, ...] = ()  # weight products of higher precision: 16 bits, or float where other tensors are

    @property
    def kind(self) -> SchemeKind:
        """Give the key of what quantises by it: see `edgeq.quantization.quantize.QUANTIZERS`."""
        return self.spec.kind


class QdqModel(Record):
    """Describe a QDQ ONNX file: which weight products are integer and which stay float by the scheme.

    Of a scheme that leaves the codes to a vendor's compiler the file holds no codes: it is the equalised model in the
    form that the compiler reads, and `feeds` are the token ids of the calibration texts that it observes itself.
    """

    file: FileRef
    float_model_sha256: Sha256
    calibration_sha256: Sha256
    scheme: Scheme
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dim: Positive
    max_sequence: Positive
    integer_matmuls: tuple[str, ...]
    float_matmuls: tuple[str, ...]  # weight MatMuls that the scheme leaves in float, by name
    feeds: FileRef | None = Field(default=None, exclude_if=lambda file: file is None)  # for a vendor's own calibration


class RunsOn(Record):
    """Say what a machine must be: ISA, and CPU flags of which at least one, or all, must be there."""

    machine: str  # as platform.machine() spells it
    cpu_flags_all: tuple[str, ...]
    cpu_flags_any: tuple[str, ...]
    elsewhere: Literal["host-kernels", "emulator", "simulator"] = "host-kernels"  # where it ran on any other machine


class Gate(Record):
    """Give the limits a parity report is judged against."""

    cosine_mean_min: float
    cosine_min_min: float
    top10_overlap_min: float
    spearman_min: float  # of pairwise similarities, artifact against FP32
    invariance_min: float  # cosine of one text at other paddings and batches
    norm_error_max: float  # relative to FP32's norm, for models that normalise
    norm_error_unnormalized_max: float  # the same for models that do not: there a norm drifts as the vector does
    float_fallbacks_max: int
    host_operators_max: int  # operators that an accelerator's compiler leaves to the CPU beside it, in one file
    export_places: tuple[Place, ...]
    release_places: tuple[Place, ...]
    parity_texts: int | None = None  # the most validation texts that run, where a run takes seconds; None: all


class Target(Record):
    """Describe one piece of hardware with its runtime: one file in targets/, complete."""

    name: str
    summary: str
    source: str
    backend: str
    scheme: str
    buckets_tokens: tuple[Positive, ...]  # empty: dynamic shapes
    runtime: dict[str, str | int | bool]
    runs_on: RunsOn
    gate: Gate


class HostOperator(Record):
    """Name an operator that runs on the CPU beside an accelerator."""

    file: str  # that it stands in, relative to the bundle
    operator: str
    output: str  # the tensor it makes
    reason: str  # the compiler's own sentence


class Estimate(Record):
    """Repeat what a compiler expects of a file, with the clock and memories it assumes. Nothing was measured."""

    file: str
    accelerator: str
    system_config: str
    memory_mode: str
    clock_hz: int
    arena_bytes: int
    cycles: int
    estimated_ms: float  # of the accelerator alone: operators on the host are not in it
    sram_bytes: int
    dram_bytes: int
    flash_bytes: int
    moved_bytes: int  # over all memories, in one inference


class Placement(Record):
    """Say where the weight products really run, read from what the runtime will execute."""

    integer_matmuls: int
    float_by_scheme: tuple[str, ...]
    float_fallbacks: tuple[str, ...]
    operators: dict[str, int]
    host_operators: tuple[HostOperator, ...] = ()
    estimates: tuple[Estimate, ...] = ()  # one for each compiled file
    surprises: tuple[str, ...] = ()  # where the compiler placed an operator otherwise than edgeq's rules expect


class Artifact(Record):
    """Describe the files one runtime loads. `files[0]` is the one to load; paths are relative to the bundle."""

    backend: str
    target: str
    files: Annotated[tuple[FileRef, ...], Field(min_length=1)]
    qdq_sha256: Sha256
    placement: Placement
    tools: dict[str, str]


class Measures(Record):
    """Hold what was measured between an artifact's vectors and FP32's."""

    texts: int
    cosine_mean: float
    cosine_min: float
    max_abs_error: float
    top10_overlap: float
    spearman: float
    invariance_min: float
    norm_error_max: float  # relative to FP32's norm
    is_normalized: bool  # whether all of FP32's vectors have length 1
    worst_text: str


class SettingReport(Record):
    """Hold what the same artifact measures run in another way, or why that was not measured."""

    name: str  # e.g. "inference_precision_hint=bf16"
    ran_on: Place
    measures: Measures | None  # None when not measured
    reason: str | None  # why not


class ParityReport(Record):
    """Measure first, judge after: `failures` has one sentence for each limit of the gate that is missed.

    `other_settings` must meet the gate, too, but cannot stand in for a run: a report without `measures` is `not-run`
    or `failed`, never `passed`. Their invariance is measured and not judged.
    """

    target: str
    ran_on: Place
    machine: str
    status: Status
    measures: Measures | None  # None when not run
    gate: Gate
    failures: tuple[str, ...]
    texts: TextSet | ImageSet
    reason: str | None = None  # why it was not run; such a bundle is not fit for a release
    other_settings: tuple[SettingReport, ...] = ()


class Golden(Record):
    """Count the golden texts and name their files."""

    count: int
    vectors: FileRef  # golden.npz
    texts: FileRef  # golden.jsonl


class Manifest(Record):
    """Chain all records of a bundle; each names its parents by sha256."""

    format: Literal[1]
    edgeq: str
    command: tuple[str, ...]
    status: Status
    target: Target
    source: Source
    float_model: FloatModel
    equalized_model: FloatModel
    calibration: Calibration
    qdq_model: QdqModel
    artifact: Artifact
    parity: FileRef
    golden: Golden
    tools: dict[str, str]
