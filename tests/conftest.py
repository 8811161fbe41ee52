"""Spread the tests over the workers of pytest-xdist, the slowest first, and mark what one interpreter is enough for."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import export_server
import pytest

TESTS = Path(__file__).resolve().parent

# Threads that wait for work sleep. OpenBLAS and OpenMP would let them spin, which takes the core from the test beside:
# that was half the time of tests that compute with numpy. How many threads share a sum, and so every bit, stays.
# The libraries read this when they are loaded, which is after this file.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # 2**4 clock ticks, the least
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# These compute with numpy, onnx and ONNX Runtime, which are compiled code: what differs between interpreters is whether
# edgeq's modules can be imported, and collecting these files imports them. The runs of the base package on every Python
# collect them all, and leave running them to the main environment.
ONE_INTERPRETER = (
    "test_affine", "test_attention_forms", "test_attention_shares", "test_flat_tokens", "test_htp_form",
    "test_image_passes", "test_integer_form", "test_layer_errors", "test_narrowing", "test_one_token", "test_parity",
    "test_passes", "test_passes_text", "test_quantize", "test_recovered_forms", "test_row_tables", "test_sensitivity",
    "test_vendor_form",
)  # fmt: skip

# Files that take a minute or more, the longest first: a worker that meets one of them last works alone at the end.
LONGEST_FIRST = (
    "test_real_model", "test_pipeline", "test_architectures", "test_check_architectures", "test_qnn",
    "test_sentence_modules", "test_export", "test_long_texts", "test_faults", "test_images", "test_images_tflite",
    "test_environments",
    "test_onnx_source", "test_export_server", "test_docs", "test_same_bytes", "test_arm64", "test_wheel", "test_lab",
    "test_text_towers", "test_tensorflow", "test_kernel_sets", "test_tflite_kernels", "test_channels_first",
)  # fmt: skip

# A file's tests go to one worker, which makes the fixtures of the module once. In these files the costly fixture has
# parameters and shares nothing between them: a worker gets all tests of one parameter, of all these files.
BY_PARAMETER = ("test_architectures", "test_check_architectures", "test_long_texts")


def pytest_configure() -> None:
    """Refuse a name that is no test file's, which would mark nothing."""
    for name in (*ONE_INTERPRETER, *LONGEST_FIRST, *BY_PARAMETER):
        if not (TESTS / f"{name}.py").is_file():
            raise pytest.UsageError(f"tests/conftest.py names {name}, but tests/{name}.py is not there")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what one interpreter is enough for, and put the longest files first where workers share them."""
    for item in items:
        if item.path.stem in ONE_INTERPRETER:
            item.add_marker(pytest.mark.one_interpreter)
    if hasattr(config, "workerinput"):
        places = {name: place for place, name in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(scope="session")
def real_model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the cache of every test that exports all-MiniLM-L6-v2: what two of them need is made by the first.

    All workers share it; `edgeq.system.cache` lets two that want the same entry at once wait for each other.
    """
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "real-model-cache"


@pytest.fixture(scope="session")
def exported_architecture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Give what `measured_architecture.export` makes of an architecture, once for the files that measure it."""
    import measured_architecture

    @functools.lru_cache(maxsize=1)  # a worker runs the tests of one architecture after the other
    def export(name: str) -> measured_architecture.Exported:
        return measured_architecture.export(name, tmp_path_factory.mktemp(name))

    return export


@pytest.fixture(scope="session", autouse=True)
def exporting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[export_server.Server]:
    """Let the models that tests write be exported by forks of one process that has torch imported.

    The real model, and whatever a test starts as a command, is exported as it is for users: by a new process.
    """
    server = export_server.Server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", export_server.forked(server, tmp_path_factory.getbasetemp()))
        yield server
    server.close()


@pytest.fixture(autouse=True)
def _logs_as_at_the_start() -> Iterator[None]:
    """Let every test see warnings, whatever a command such as `--quiet` of another test or of a fixture has set."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    _show_warnings()
    yield
    root.handlers[:] = handlers
    _show_warnings()


def _show_warnings() -> None:
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("edgeq").setLevel(logging.NOTSET)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """Give a worker whole files, in the order of collection; of some files, all tests of one parameter."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            if Path(file).stem in BY_PARAMETER:
                return test.partition("[")[2].rstrip("]").partition("-")[0]
            return file

    config.option.loadscopereorder = False
    return ByFile(config, log)
