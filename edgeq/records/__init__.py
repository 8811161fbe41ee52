"""Define the frozen records that stages pass on and that a bundle's manifest holds.

A record holds no arrays: large data is in files, named by path and sha256. Each record converts to JSON and back
without loss, and refuses unknown keys, missing keys, NaN and infinity.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from edgeq.records.parity import Exactness as Exactness
from edgeq.records.parity import Gate as Gate
from edgeq.records.parity import Measures as Measures
from edgeq.records.parity import ParityReport as ParityReport
from edgeq.records.parity import Promotion as Promotion
from edgeq.records.parity import RunKind as RunKind
from edgeq.records.parity import SettingReport as SettingReport
from edgeq.records.parity import Status as Status
from edgeq.records.record import FileRef as FileRef
from edgeq.records.record import Positive as Positive
from edgeq.records.record import Record as Record
from edgeq.records.record import Sha256 as Sha256
from edgeq.records.samples import ImageSet as ImageSet
from edgeq.records.samples import TextSet as TextSet
from edgeq.records.source import EndToEnd as EndToEnd
from edgeq.records.source import Source as Source

RangeMethod = Literal["minmax", "percentile", "mse", "entropy"]


class PassReport(Record):
    """Hold the result of one pass: the number of rewrites, the FP32 error, and the reasons of near misses."""

    name: str
    rewrites: int
    max_abs_error: float  # of the largest value of each output
    near_misses: tuple[str, ...]


class Island(Record):
    """Count the nodes of one operator outside the dialect that stay float: a float island."""

    operator: str  # of ONNX's own
    count: Positive
    origin: str  # module and line of Python of the first of them; else its node's name

    @property
    def place(self) -> str:
        """Say where the nodes come from: the line of the first, and how many more there are."""
        return f"{self.origin}, and {self.count - 1} more" if self.count > 1 else self.origin


class FloatModel(Record):
    """Describe an FP32 ONNX file in the dialect, with pooling and L2 normalisation in the graph."""

    file: FileRef
    source_sha256: Sha256
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]  # "sentence_embedding" [, "last_hidden_state"]
    dim: Positive
    max_sequence: Positive
    max_abs_error: float  # against torch or the source ONNX file; of an equalised model against the float model
    passes: tuple[PassReport, ...]
    islands: tuple[Island, ...] = ()  # what only targets that keep floats can take


class Smoothing(Record):
    """Hold SmoothQuant's alpha per kind of smoothed tensor, and the search's result."""

    alphas: dict[str, float]  # kind ("norm", "context", "activation") -> alpha in [0, 1]
    cosine_mean: float  # of a QDQ model at these alphas, on calibration texts that were not observed
    candidates: int  # sets of alphas that were tried


class Calibration(Record):
    """Describe the statistics of an equalised float model's tensors, observed once; `file` is the .npz with them."""

    file: FileRef
    float_model_sha256: Sha256
    texts: TextSet | ImageSet
    seed: int
    smoothing: Smoothing


class MixedSpec(Record):
    """Quantise the weight products and the embedding tables; every other tensor stays float."""

    kind: Literal["mixed"] = "mixed"


class DynamicSpec(Record):
    """Quantise the same as `MixedSpec`, but each token's activations by a scale of its own, found while it runs."""

    kind: Literal["dynamic"] = "dynamic"


class WeightsSpec(Record):
    """Quantise weights in blocks of input channels; activations stay float, or the runtime makes integers of them."""

    kind: Literal["weights"] = "weights"
    block: int = 32  # input channels that share a scale and a zero point


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


SchemeKind = Literal["mixed", "dynamic", "weights", "integer", "htp", "vendor"]


class Scheme(Record):
    """Decide dtypes. Weights are symmetric per output channel, activations asymmetric per tensor."""

    name: str
    weight_bits: int = 8
    activation_bits: int = 8
    activations_signed: bool = True
    embedding_bits: int = 8
    range_method: RangeMethod = "minmax"
    spec: Annotated[
        MixedSpec | DynamicSpec | WeightsSpec | IntegerSpec | HtpSpec | VendorSpec, Field(discriminator="kind")
    ] = MixedSpec()
    feeds: int = 0  # how many calibration texts, of evenly spread lengths, the compiler observes itself
    promoted: tuple[str, ...] = ()  # weight products that read 16 bits; beside float tensors as two 8-bit products
    floats: tuple[str, ...] = Field(default=(), exclude_if=lambda names: not names)  # weight products without any codes

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
    """Hold a target's demands on the machine: the instruction set, and CPU flags (all of them, any one of them)."""

    machine: str  # as platform.machine() spells it
    cpu_flags_all: tuple[str, ...]
    cpu_flags_any: tuple[str, ...]
    elsewhere: Literal["host-kernels", "emulator", "simulator"] = "host-kernels"  # the kind of run on any other machine


class Target(Record):
    """Describe one piece of hardware with its runtime: one complete file in targets/."""

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
    """Name an operator that a compiler leaves to the CPU beside an accelerator."""

    file: str  # relative to the bundle
    operator: str
    output: str  # name of its output tensor
    reason: str  # as the compiler states it


class Estimate(Record):
    """Hold a compiler's estimate of time and memory for a file, with the assumed clock; nothing was measured."""

    file: str
    accelerator: str
    system_config: str
    memory_mode: str
    clock_hz: int
    arena_bytes: int
    cycles: int
    estimated_ms: float  # of the accelerator alone, without host operators
    sram_bytes: int
    dram_bytes: int
    flash_bytes: int
    moved_bytes: int  # to and from all memories, in one inference


class Placement(Record):
    """Hold which weight products are integer and which float, read from what the runtime executes."""

    integer_matmuls: int
    float_by_scheme: tuple[str, ...]
    float_fallbacks: tuple[str, ...]
    operators: dict[str, int]
    host_operators: tuple[HostOperator, ...] = ()
    estimates: tuple[Estimate, ...] = ()  # one for each compiled file
    surprises: tuple[str, ...] = ()  # operators that the compiler places otherwise than edgeq's rules expect


class Artifact(Record):
    """Describe the files of one runtime; it loads `files[0]`, and paths are relative to the bundle."""

    backend: str
    target: str
    files: Annotated[tuple[FileRef, ...], Field(min_length=1)]
    qdq_sha256: Sha256
    placement: Placement
    tools: dict[str, str]


class Golden(Record):
    """Hold the number of golden samples, and their files."""

    count: int
    vectors: FileRef  # golden.npz
    texts: FileRef  # golden.jsonl


class Manifest(Record):
    """Hold all records of a bundle; each names its parents by sha256."""

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
    codecs: FileRef | None = Field(default=None, exclude_if=lambda file: file is None)  # statistics that codes need
    tools: dict[str, str]
