"""Read, split, sample and batch texts; the default sets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from edgeq.calibration.observe import equal_length_batches
from edgeq.data import splits, text_files, tokens
from edgeq.data.plans import plan_texts
from edgeq.data.tokenizer import Tokenizer
from edgeq.errors import ConfigError
from edgeq.pipeline.growing_validation import sizes

REPOSITORY = Path(__file__).resolve().parent.parent


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("a.txt", "one text\n\n  two texts \r\nthree\n", None),
        ("a.jsonl", '{"text": "one text"}\n\n{"text": "two texts"}\n{"text": "three", "x": 1}\n', None),
        ("a.csv", 'id,body\n1,one text\n2,"two texts"\n3,three\n4,\n', "body"),
        ("bom.txt", "\ufeffone text\ntwo texts\nthree", None),
    ],
)
def test_every_format_is_read(name: str, content: str, column: str | None, tmp_path: Path) -> None:
    assert text_files.read_texts(write(tmp_path, name, content), column) == ["one text", "two texts", "three"]


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("a.txt", "", None, "the file is empty"),
        ("a.txt", " \n\t\n", None, "every line is blank"),
        ("a.txt", b"good\n\xff\xfe\n", None, "a.txt:2: byte 0xff is not UTF-8"),
        ("a.txt", "x", "body", "has no columns"),
        ("a.jsonl", '{"text": "x"}\n{', None, "a.jsonl:2: not JSON"),
        ("a.jsonl", '{"body": "x"}', None, 'no text under "text"; found body'),
        ("a.jsonl", '{"text": null}', None, '"text" is null; a string is needed. Write ""'),
        ("a.jsonl", '{"text": 5}', None, '"text" is a number; a string is needed.$'),
        ("a.jsonl", '"a text"', None, 'a.jsonl:1: the line is a string; an object is needed, such as {"text"'),
        ("a.jsonl", '{"text": "\\ud83d"}', None, "half a character"),
        ("a.csv", "id,text\n1,one, two\n", None, "a.csv:2: more values than the 2 columns"),
        ("a.csv", "id,body\n1,x\n", "boddy", 'no column "boddy"; found id, body'),
        ("a.pdf", "x", None, "rename or convert"),
    ],
)
def test_a_bad_file_is_one_message(
    name: str, content: str | bytes, column: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        text_files.read_texts(write(tmp_path, name, content), column)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\u2028text\n\n \x0b\nlast\r\n"),
        ("a.jsonl", '{"text": "one\\u2028text"}\n\n{"text": ""}\n{"text": " \\u000b"}\n{"text": "last"}'),
        ("a.csv", 'id,text\n1,one\u2028text\n2,\n3," \x0b"\n4,last\n'),
    ],
)
def test_records_stay_in_their_rows_blank_ones_too(name: str, content: str, tmp_path: Path) -> None:
    path = write(tmp_path, name, content)
    assert text_files.read_records(path) == ["one\u2028text", "", " \x0b", "last"]
    assert text_files.read_texts(path) == ["one\u2028text", "last"]


def test_a_missing_file_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        text_files.read_texts(tmp_path / "none.txt")


def test_a_text_stays_on_its_side_whatever_stands_beside_it() -> None:
    many = [f"text number {row}" for row in range(500)]
    calibration, validation = splits.split(many, splits.sha256_text)
    assert 60 < len(validation) < 140
    assert splits.split(many[::2], splits.sha256_text)[1] == [text for text in validation if text in set(many[::2])]


def test_overlap_is_found_whatever_case_and_spacing() -> None:
    with pytest.raises(ConfigError, match='text 2 and text 1: "B  two"'):
        splits.refuse_overlap(["a", "b two"], "one", ["B  two", "c"], "other")


def test_sampling_is_repeatable_and_keeps_the_order() -> None:
    many = [str(row) for row in range(100)]
    drawn = splits.sample(many, 10, 3)
    assert drawn == splits.sample(many, 10, 3) != splits.sample(many, 10, 4)
    assert drawn == sorted(drawn, key=int)


def test_a_plan_with_own_texts_splits_them(tmp_path: Path) -> None:
    path = write(tmp_path, "own.txt", "\n".join(f"text number {row}" for row in range(200)))
    plan = plan_texts(path, None, None, (), 50, 0)
    assert len(plan.calibration) == 50 and not set(plan.calibration) & set(plan.validation)
    assert plan.origin == "own.txt"


def test_batches_hold_every_text_once_and_pad_only_behind() -> None:
    rng = np.random.default_rng(0)
    ids = tuple(tuple(rng.integers(1, 9, rng.integers(2, 30)).tolist()) for _ in range(100))
    made = tokens.batches(tokens.Tokens(ids, 0, 0), batch_size=8)
    assert sorted(row for batch in made for row in batch.rows) == list(range(100))
    for batch in made:
        for line, row in enumerate(batch.rows):
            assert batch.feeds.attention_mask[line].tolist() == [1] * len(ids[row]) + [0] * (
                batch.feeds.attention_mask.shape[1] - len(ids[row])
            )


def test_observed_batches_hold_no_padding_and_stay_small() -> None:
    ids = tuple((1,) * length for length in (3, 3, 3, 7, 12, 12, 40))
    made = equal_length_batches(tokens.Tokens(ids, 0, 0), 40)
    assert sorted(row for batch in made for row in batch.rows) == list(range(7))
    assert all(batch.feeds.attention_mask.all() for batch in made)
    assert all(batch.feeds.input_ids.size <= 40 for batch in made)


def check(folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPOSITORY / "tools" / "check_calibration_data", *([folder] if folder else [])]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_text_without_tokens_is_one_masked_column() -> None:
    (batch,) = tokens.batches(tokens.Tokens(((), ()), 0, 7))
    assert batch.feeds.input_ids.tolist() == [[7], [7]] and not batch.feeds.attention_mask.any()
    (seen,) = equal_length_batches(tokens.Tokens(((), (3,)), 0, 7), 4)
    assert seen.feeds.input_ids.tolist() == [[7], [3]]


@pytest.mark.parametrize(("side", "kept"), [("left", (2, 3)), ("right", (0, 1))])
def test_a_long_text_is_cut_at_the_side_that_the_tokenizer_names(side: str, kept: tuple[int, ...]) -> None:
    words = {word: row for row, word in enumerate("abcd")}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(3, direction=side)
    found = Tokenizer(tokenizer, 2).encode(["a b c d", "b"])
    assert found.ids == (kept, (1,)) and found.truncated == 1


def test_the_default_texts_pass_their_check() -> None:
    done = check()
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "too short", "domain": "chat"}', "2 words"),
        (None, "stands there 2 times"),
        ('{"text": "one text without a domain"}', "keys ['text']"),
    ],
)
def test_the_check_finds_what_is_wrong(line: str | None, message: str, tmp_path: Path) -> None:
    for path in (REPOSITORY / "calibration_data").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    first = (tmp_path / "validation.jsonl").read_text(encoding="utf-8").splitlines()[0]
    with (tmp_path / "calibration.jsonl").open("a", encoding="utf-8") as file:
        file.write(f"{line or first}\n")
    done = check(tmp_path)
    assert done.returncode == 1
    assert message in done.stderr


def test_positions_are_evenly_spaced() -> None:
    assert splits.evenly_spaced(100, 4) == [0, 33, 66, 99]
    assert splits.evenly_spaced(5, None) == splits.evenly_spaced(5, 100) == [0, 1, 2, 3, 4]
    assert splits.evenly_spaced(9, 1) == [0]
    assert splits.evenly_spaced(0, 4) == splits.evenly_spaced(0, None) == []
    for count in range(1, 200):
        for most in range(2, count + 1):
            positions = splits.evenly_spaced(count, most)
            assert positions == sorted(set(positions)), "each position once"
            assert (len(positions), positions[0], positions[-1]) == (most, 0, count - 1)


def test_the_default_set_grows_and_the_users_own_texts_run_at_once() -> None:
    assert sizes(2048, "default", None) == (512, 1024, 2048)
    assert sizes(2048, "default", 300) == (300, 600, 1200, 2048)
    assert sizes(2048, "default", 24) == (256, 512, 1024, 2048)  # fewer are judged by nobody
    assert sizes(700, "mine.txt", None) == (700,)
    assert sizes(700, "mine.txt", 48) == (256, 512, 700)
