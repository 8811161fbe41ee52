"""Child processes: arrays cross with their bits, and every way to die is a message that says what happened."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgeq.errors import LoweringFailed, TimedOut, ToolMissing
from edgeq.system.child_server import pack
from edgeq.system.worker import Worker, child_command, unpack_reply

TFLITE_CHILD = Path(__file__).resolve().parent.parent / "edgeq" / "backends" / "tflite" / "child.py"
needs_litert = pytest.mark.skipif(importlib.util.find_spec("ai_edge_litert") is None, reason="no ai_edge_litert")

SCRIPT = """
import json, os, signal, sys, time

def put(message):
    sys.stdout.write(json.dumps(message) + chr(10))
    sys.stdout.flush()

if sys.argv[1:] == ["gone"]:
    sys.exit("no such thing")
if sys.argv[1:] == ["deaf"]:
    time.sleep(600)
for line in sys.stdin:
    request = json.loads(line)
    do = request["do"]
    if do == "echo":
        put(request)
    elif do == "pid":
        put({"pid": os.getpid(), "variable": os.environ.get("EDGEQ_TEST_VARIABLE")})
    elif do == "error":
        put({"announce": "failing"})
        put({"error": "no kernel for ADD"})
    elif do == "hang":
        put({"announce": "hanging"})
        time.sleep(600)
    elif do == "chat":
        sys.stderr.write(("x" * 99 + chr(10)) * 20000)
        put({"announce": "one"})
        put({"announce": "two"})
        put({"done": True})
    elif do == "rubbish":
        print(request["text"], flush=True)
    elif do == "half":
        sys.stdout.write('{"done": tr')
        sys.stdout.flush()
        os._exit(0)
    else:
        put({"announce": "adding two tensors"})
        for number in range(8):
            print("line", number, file=sys.stderr)
        sys.stderr.flush()
        if do == "abort":
            os.abort()
        elif do == "exit":
            sys.exit(3)
        else:
            os.kill(os.getpid(), request["signal"])
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    return [sys.executable, "-I", str(script)]


@pytest.fixture
def worker(command: list[str]) -> Iterator[Worker]:
    with Worker(command, "the tool") as worker:
        yield worker


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "float32", "float64", "bool", ">i4"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_an_array_keeps_its_bits(worker: Worker, dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(3).integers(0, 100, shape).astype(dtype)
    back = unpack_reply(worker.call(do="echo", array=pack(array))["array"])
    assert back.dtype == array.dtype and back.shape == array.shape and back.tobytes() == array.tobytes()
    back[...] = 0  # what comes back belongs to the caller


def test_an_array_in_another_order_of_memory_keeps_its_values() -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert np.array_equal(unpack_reply(pack(array.T)), array.T) and np.array_equal(
        unpack_reply(pack(array[::2])), array[::2]
    )


@pytest.mark.parametrize(
    "change", [{"data": "AAA"}, {"data": "!!!!"}, {"data": "AAAA"}, {"dtype": "no"}, {"shape": [7]}]
)
def test_an_array_that_is_none_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(LoweringFailed, match="cannot be read"):
        unpack_reply({**pack(np.zeros(2, np.int32)), **change})
    with pytest.raises(LoweringFailed, match="cannot be read"):
        unpack_reply({"shape": [1]})


def test_a_child_stays_between_calls_and_sees_the_environment_it_is_given(command: list[str]) -> None:
    with Worker(command, "the tool", env={"EDGEQ_TEST_VARIABLE": "seen"}) as worker:
        first, second = worker.call(do="pid"), worker.call(do="pid")
    assert first == second and first["variable"] == "seen"


def test_requests_and_replies_larger_than_a_pipe_pass(worker: Worker) -> None:
    array = np.random.default_rng(0).integers(-128, 128, 3_000_000).astype(np.int8)
    assert np.array_equal(unpack_reply(worker.call(do="echo", array=pack(array))["array"]), array)


def test_a_chatty_child_never_blocks(worker: Worker) -> None:
    assert worker.call(do="chat") == {"done": True}
    assert worker.call(do="echo", n=1) == {"do": "echo", "n": 1}


def test_an_error_is_raised_and_the_child_stays(worker: Worker) -> None:
    pid = worker.call(do="pid")["pid"]
    with pytest.raises(LoweringFailed, match="^the tool: no kernel for ADD$"):
        worker.call(do="error")
    assert worker.call(do="pid")["pid"] == pid


@pytest.mark.parametrize(
    ("request_", "fate"),
    [
        ({"do": "abort"}, "died of SIGABRT"),
        ({"do": "signal", "signal": int(signal.SIGSEGV)}, "died of SIGSEGV"),
        ({"do": "signal", "signal": int(signal.SIGRTMIN) + 5}, f"died of signal {int(signal.SIGRTMIN) + 5}"),
        ({"do": "exit"}, "exited with status 3"),
    ],
)
def test_a_death_says_how_during_what_and_after_which_lines(
    worker: Worker, request_: dict[str, object], fate: str
) -> None:
    with pytest.raises(LoweringFailed) as caught:
        worker.call(**request_)
    expected = f"the tool: the child process {fate} while adding two tensors; its last lines:\n" + "\n".join(
        f"line {number}" for number in range(3, 8)
    )
    assert str(caught.value).startswith(expected) and "line 2" not in str(caught.value)
    with pytest.raises(LoweringFailed, match="the tool: its child process has ended"):
        worker.call(do="pid")


def test_what_was_announced_in_an_earlier_call_is_not_blamed(worker: Worker) -> None:
    worker.call(do="chat")
    with pytest.raises(LoweringFailed, match="exited with status 0; its last lines") as caught:
        worker.call(do="half")
    assert "while" not in str(caught.value)


def test_a_child_that_is_gone_before_it_reads_is_a_death(command: list[str]) -> None:
    with Worker([*command, "gone"], "the tool") as worker:
        with pytest.raises(LoweringFailed, match="exited with status 1; its last lines:\nno such thing"):
            worker.call(do="echo", text="x" * 1_000_000)


def test_a_silent_death_says_so(command: list[str]) -> None:
    with Worker([sys.executable, "-I", "-c", "raise SystemExit(4)"], "the tool") as worker:
        with pytest.raises(LoweringFailed, match="exited with status 4; it logged nothing"):
            worker.call(do="echo")


@pytest.mark.parametrize("text", ["INFO: created", "[1, 2]", "7"])
def test_a_line_that_is_no_reply_ends_the_child(worker: Worker, text: str) -> None:
    pid = worker.call(do="pid")["pid"]
    with pytest.raises(LoweringFailed, match="which is not a JSON object"):
        worker.call(do="rubbish", text=text)
    assert not is_alive(pid)


def test_a_hanging_child_meets_the_time_limit(command: list[str]) -> None:
    with Worker(command, "the tool", time_limit_s=1.5) as worker:
        pid = worker.call(do="pid")["pid"]
        with pytest.raises(TimedOut, match=r"the tool: no reply within 1.5 s while hanging; it logged nothing"):
            worker.call(do="hang")
        assert not is_alive(pid)


def test_a_child_that_does_not_even_read_meets_the_time_limit(command: list[str]) -> None:
    with Worker([*command, "deaf"], "the tool", time_limit_s=0.5) as worker:
        with pytest.raises(TimedOut, match="no reply within 0.5 s"):
            worker.call(do="echo", text="x" * 1_000_000)


# In a process of its own, where nothing else takes the signal or can be hurt by it.
INTERRUPTED = """
import os, signal, sys, threading
from edgeq.system.worker import Worker

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits it ignored
with Worker(sys.argv[1:], "the tool") as worker:
    pid = worker.call(do="pid")["pid"]
    threading.Timer(0.5, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT)).start()
    try:
        worker.call(do="hang")
    except KeyboardInterrupt:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            print("gone")
"""


def test_ctrl_c_leaves_no_child_behind(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *command], capture_output=True, text=True, check=False, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "gone\n"), done.stderr


def test_a_child_goes_with_its_worker(command: list[str]) -> None:
    worker = Worker(command, "the tool")
    pid = worker.call(do="pid")["pid"]
    assert is_alive(pid)
    del worker
    gc.collect()
    assert not is_alive(pid)


def test_close_may_come_twice_and_ends_calls(command: list[str]) -> None:
    worker = Worker(command, "the tool")
    worker.close()
    worker.close()
    with pytest.raises(LoweringFailed, match="has ended"):
        worker.call(do="pid")


def test_a_request_that_is_no_json_harms_nobody(worker: Worker) -> None:
    with pytest.raises(TypeError):
        worker.call(do="echo", path=Path("x"))
    assert worker.call(do="echo") == {"do": "echo"}


def test_an_interpreter_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ToolMissing, match=r"the tool: .*nowhere cannot be started \(No such file"):
        Worker([str(tmp_path / "nowhere")], "the tool")


# --- the child of the tflite runtimes ---------------------------------------------------------------------------------


def write_adder(path: Path, sequences: tuple[int, ...], output_scale: float = 1.0, is_signed: bool = True) -> Path:
    """Write a file whose signatures seq_N add int16[1, N] `left` and `right`, codes at scale 0.5, to `total`.

    Without `is_signed` it has no signatures. An output scale below 2 * 0.5 / 2**15 makes the kernel abort.
    """
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    def tensor(name: str, sequence: int, scale: float) -> schema.TensorT:
        made = schema.TensorT()
        made.name, made.type, made.hasRank, made.buffer = name.encode(), schema.TensorType.INT16, True, 0
        made.shape = np.array([1, sequence], np.int32)
        made.quantization = schema.QuantizationParametersT()
        made.quantization.scale, made.quantization.zeroPoint = np.array([scale], np.float32), np.zeros(1, np.int64)
        return made

    def port(name: str, index: int) -> schema.TensorMapT:
        made = schema.TensorMapT()
        made.name, made.tensorIndex = name.encode(), index
        return made

    model = schema.ModelT()
    model.version, model.buffers, model.subgraphs, model.signatureDefs = 3, [schema.BufferT()], [], []
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.ADD
    code.version = 2
    model.operatorCodes = [code]
    for index, sequence in enumerate(sequences):
        graph = schema.SubGraphT()
        scales = {"left": 0.5, "right": 0.5, "total": output_scale}
        graph.tensors = [tensor(name, sequence, scale) for name, scale in scales.items()]
        graph.inputs, graph.outputs = np.array([0, 1], np.int32), np.array([2], np.int32)
        add = schema.OperatorT()
        add.opcodeIndex, add.inputs, add.outputs = 0, graph.inputs, graph.outputs
        add.builtinOptionsType, add.builtinOptions = schema.BuiltinOptions.AddOptions, schema.AddOptionsT()
        add.builtinOptions.potScaleInt16 = False  # any scale, not powers of two alone
        graph.operators, graph.name = [add], f"seq_{sequence}".encode()
        model.subgraphs.append(graph)
        signature = schema.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = graph.name, index
        signature.inputs, signature.outputs = [port("left", 0), port("right", 1)], [port("total", 2)]
        model.signatureDefs += [signature] * is_signed
    builder = flatbuffers.Builder(4096)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    path.write_bytes(builder.Output())
    return path


def tflite_worker(python: Path | str, runtime: str) -> Worker:
    return Worker(child_command(python, TFLITE_CHILD, runtime), runtime, time_limit_s=300)


def make_inputs(*shape: int) -> dict[str, dict[str, object]]:
    random = np.random.default_rng(1)
    return {name: pack(random.integers(-9000, 9000, shape).astype(np.int16)) for name in ("left", "right")}


def sum_of(inputs: dict[str, dict[str, object]]) -> np.ndarray:
    """Add as real numbers: scales 0.5 and 0.5 to 1."""
    return (unpack_reply(inputs["left"]).astype(np.float64) + unpack_reply(inputs["right"])) / 2


LITERTS = ["litert", "litert-builtin", "litert-reference"]


@pytest.fixture
def adder(tmp_path: Path) -> Path:
    return write_adder(tmp_path / "adder.tflite", (8, 4))


@pytest.fixture
def litert() -> Iterator[Worker]:
    with tflite_worker(sys.executable, "litert") as worker:
        yield worker


@needs_litert
@pytest.mark.tflite
@pytest.mark.parametrize("runtime", LITERTS)
def test_a_real_file_runs(adder: Path, runtime: str) -> None:
    one, many = make_inputs(1, 4), make_inputs(3, 1, 8)
    with tflite_worker(sys.executable, runtime) as worker:
        assert set(worker.call(do="load", path=str(adder), threads=1)["signatures"]) == {"seq_4", "seq_8"}
        total = unpack_reply(worker.call(do="run", signature="seq_4", inputs=one)["outputs"]["total"])
        assert total.dtype == np.int16 and total.shape == (1, 4) and np.abs(total - sum_of(one)).max() <= 1
        totals = unpack_reply(worker.call(do="run_many", signature="seq_8", inputs=many)["outputs"]["total"])
        assert totals.shape == (3, 1, 8) and np.abs(totals - sum_of(many)).max() <= 1
        for i in range(3):
            single = {name: pack(unpack_reply(packed)[i]) for name, packed in many.items()}
            again = unpack_reply(worker.call(do="run", signature="seq_8", inputs=single)["outputs"]["total"])
            assert np.array_equal(again, totals[i])


@needs_litert
@pytest.mark.tflite
def test_a_real_file_without_signatures_runs(litert: Worker, tmp_path: Path) -> None:
    path, inputs = write_adder(tmp_path / "bare.tflite", (4,), is_signed=False), make_inputs(1, 4)
    assert litert.call(do="load", path=str(path), threads=0) == {"signatures": []}
    total = unpack_reply(litert.call(do="run", signature=None, inputs=inputs)["outputs"]["total"])
    assert np.abs(total - sum_of(inputs)).max() <= 1
    many = make_inputs(2, 1, 4)
    totals = unpack_reply(litert.call(do="run_many", signature=None, inputs=many)["outputs"]["total"])
    assert np.abs(totals - sum_of(many)).max() <= 1


@needs_litert
@pytest.mark.tflite
def test_time_memory_and_version_are_measured(litert: Worker, adder: Path) -> None:
    litert.call(do="load", path=str(adder), threads=1)
    timed = litert.call(do="time", signature="seq_8", inputs=make_inputs(1, 8), runs=5, warmup=2)["milliseconds"]
    assert len(timed) == 5 and all(0 < each < 1000 for each in timed)
    assert 10e6 < litert.call(do="memory")["resident_bytes"] < 2e9
    version = litert.call(do="version")
    assert version["runtime"] == "litert" and version["version"] and version["numpy"] == np.__version__


@needs_litert
@pytest.mark.tflite
def test_what_a_file_does_not_take_is_refused_and_the_child_stays(litert: Worker, adder: Path) -> None:
    right = make_inputs(1, 8)
    with pytest.raises(LoweringFailed, match="no file is loaded"):
        litert.call(do="run", signature="seq_8", inputs=right)
    litert.call(do="load", path=str(adder), threads=1)
    wrong_type = {**right, "left": pack(np.zeros((1, 8), np.int32))}
    renamed = {"left": right["left"], "rihgt": right["right"]}
    uneven = {**make_inputs(2, 1, 8), "left": make_inputs(3, 1, 8)["left"]}
    refused = {
        r"input left is int16\[1, 4\]; int16\[1, 8\] is needed": ("run", "seq_8", make_inputs(1, 4)),
        r"input left is int16\[8\]; ": ("run", "seq_8", make_inputs(8)),
        r"input left is int32\[1, 8\]; ": ("run", "seq_8", wrong_type),
        r"inputs are \['left', 'rihgt'\]; \['left', 'right'\] are needed": ("run", "seq_8", renamed),
        r"inputs are \['left'\]; ": ("run", "seq_8", {"left": right["left"]}),
        "seq_7": ("run", "seq_7", right),
        r"leading axes are \[2, 3\]": ("run_many", "seq_8", uneven),
        r"leading axes are \[0\]": ("run_many", "seq_8", make_inputs(0, 1, 8)),
        r"leading axes are \[1\]": ("run_many", "seq_8", {**make_inputs(1, 1, 8), "left": pack(np.int16(3)[()])}),
        r"input left is int16\[8\]": ("run_many", "seq_8", make_inputs(1, 8)),
    }
    for message, (do, signature, inputs) in refused.items():
        with pytest.raises(LoweringFailed, match=message):
            litert.call(do=do, signature=signature, inputs=inputs)
    with pytest.raises(LoweringFailed, match="do is 'dance'; one of version, load"):
        litert.call(do="dance")
    with pytest.raises(LoweringFailed, match="TypeError"):
        litert.call(do="load", path=str(adder))
    litert.call(do="load", path=str(adder), threads=1)
    assert litert.call(do="run", signature="seq_8", inputs=right)["outputs"].keys() == {"total"}


@needs_litert
@pytest.mark.tflite
def test_a_file_that_cannot_be_loaded_is_named_and_leaves_no_older_one(
    litert: Worker, adder: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.tflite").write_bytes(b"no model")
    for name in ("broken.tflite", "missing.tflite"):
        litert.call(do="load", path=str(adder), threads=1)
        with pytest.raises(LoweringFailed, match=rf"litert: loading .*{name}: ValueError: "):
            litert.call(do="load", path=str(tmp_path / name), threads=1)
        with pytest.raises(LoweringFailed, match="no file is loaded"):
            litert.call(do="run", signature="seq_8", inputs=make_inputs(1, 8))


@needs_litert
@pytest.mark.tflite
def test_a_kernel_that_aborts_is_a_message(litert: Worker, tmp_path: Path) -> None:
    path = write_adder(tmp_path / "abort.tflite", (4,), output_scale=1e-6)
    litert.call(do="load", path=str(path), threads=1)
    with pytest.raises(LoweringFailed, match=r"died of SIGABRT while running seq_4 of .*abort.tflite \(1 of 1\)"):
        litert.call(do="run", signature="seq_4", inputs=make_inputs(1, 4))


def test_a_runtime_that_is_not_there_is_an_error_of_the_first_request() -> None:
    if importlib.util.find_spec("tflite_runtime") is not None:
        pytest.skip("tflite_runtime is installed here")
    with tflite_worker(sys.executable, "tflite-runtime") as worker:
        with pytest.raises(LoweringFailed, match="importing tflite_runtime.interpreter: ModuleNotFoundError"):
            worker.call(do="version")


def test_a_runtime_that_nobody_knows_is_refused() -> None:
    with tflite_worker(sys.executable, "onnx") as worker:
        with pytest.raises(LoweringFailed, match=r"(?s)exited with status 2.*\['onnx'\]; one of litert"):
            worker.call(do="version")


def test_what_a_runtime_prints_stays_out_of_the_replies(tmp_path: Path) -> None:
    package = tmp_path / "ai_edge_litert"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "1"', encoding="utf-8")
    chatter = "import os, sys\nprint('INFO: from Python', flush=True)\nos.write(1, b'INFO: from C')\n"
    (package / "interpreter.py").write_text(chatter, encoding="utf-8")
    command = child_command(sys.executable, TFLITE_CHILD, "litert")
    command[1] = "-P"  # not isolated: the variable counts
    with Worker(command, "litert", {"PYTHONPATH": str(tmp_path)}) as worker:
        assert worker.call(do="version")["version"] == "1"


# --- the server of children whose environments lack edgeq -------------------------------------------------------------

SERVED = """
import sys
sys.modules["edgeq"] = None  # as where it is not installed

import numpy as np

from edgeq.system.child_server import pack, serve_standard_streams, unpack


def main(arguments):
    def child(announce):
        def double(array):
            announce("doubling")
            return {"array": pack(2 * unpack(array)), "arguments": arguments}

        def leave():
            print("chatter")
            sys.exit("nothing to do")

        return {"double": double, "leave": leave}

    serve_standard_streams(child)
    return 0
"""


def test_a_served_child_needs_no_edgeq_and_keeps_its_replies_clean(tmp_path: Path) -> None:
    script = tmp_path / "served.py"
    script.write_text(SERVED, encoding="utf-8")
    with Worker(child_command(sys.executable, script, "one", "two"), "the tool") as worker:
        reply = worker.call(do="double", array=pack(np.arange(3, dtype=np.float32)))
        assert unpack_reply(reply["array"]).tolist() == [0.0, 2.0, 4.0] and reply["arguments"] == ["one", "two"]
        with pytest.raises(LoweringFailed, match=r"^the tool: doubling: ValueError: "):
            worker.call(do="double", array={**pack(np.zeros(2)), "shape": [3]})
        with pytest.raises(LoweringFailed, match=r"^the tool: SystemExit: nothing to do$"):
            worker.call(do="leave")
        with pytest.raises(LoweringFailed, match="do is 'fly'; one of double, leave is needed"):
            worker.call(do="fly")
        assert worker.call(do="double", array=pack(np.zeros(1)))["arguments"] == ["one", "two"]
