"""Rows from every kind of source, and an error that names the place for everything that can be wrong with one."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_prompt import SHARED, write_jsonl

from deepdoctor.data.sources import load_records, load_rows
from deepdoctor.errors import DataError, HubError
from deepdoctor.recipe import DataSection

TEXTS = [
    {"Question": f'q{n} 发热, "quoted"\nnext line', "Complex_CoT": f"r{n} 🩺\u2028same row", "Response": f"a{n}"}
    for n in range(3)
]


def write(path: Path, records) -> str:
    """Write records in the format the extension names."""
    if path.suffix == ".jsonl":
        return write_jsonl(path, records)
    if path.suffix == ".json":
        path.write_text(json.dumps(records, indent=1), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as stream:
            table = csv.DictWriter(stream, list(records[0]))
            table.writeheader()
            table.writerows(records)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return str(path)


def fails(source: str, kind=DataError, **settings) -> str:
    """Return the whole message with which loading fails."""
    with pytest.raises(kind) as caught:
        load_rows(DataSection(source=source, **settings))
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    """Texts with quotes, line breaks, CJK, emoji and U+2028 come back as written, from each format."""
    rows = load_rows(DataSection(source=write(tmp_path / f"rows{suffix}", TEXTS)))
    assert [(r.index, r.question, r.reasoning, r.answer) for r in rows] == [
        (n, t["Question"], t["Complex_CoT"], t["Response"]) for n, t in enumerate(TEXTS)
    ]
    assert len({r.place for r in rows}) == 3


def test_places_name_the_line(tmp_path):
    """JSONL and CSV places hold the line a row starts on, blank lines and multi-line cells counted."""
    lines = [json.dumps(t) for t in TEXTS]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text(f"{lines[0]}\n\n   \n{lines[1]}\r\n{lines[2]}", encoding="utf-8")
    assert load_records(str(jsonl), None, None, "train")[1] == [f"{jsonl}:{n}" for n in (1, 4, 5)]
    table = write(tmp_path / "a.csv", TEXTS)
    assert load_records(table, None, None, "train")[1] == [f"{table}:{n}" for n in (2, 4, 6)]


def test_columns_are_mapped_and_others_ignored(tmp_path):
    """Named columns are read, further ones (of any type) left alone, null becomes the empty text."""
    source = write(tmp_path / "a.jsonl", [{"q": "Q", "c": None, "a": "A", "id": 7, "tags": ["x"]}])
    (only,) = load_rows(DataSection(source=source, question="q", reasoning="c", answer="a"))
    assert (only.question, only.reasoning, only.answer) == ("Q", "", "A")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_max_rows_takes_the_first(tmp_path, suffix):
    """The first N rows are read, and a number beyond the end takes all."""
    source = write(tmp_path / f"rows{suffix}", TEXTS)
    assert [r.answer for r in load_rows(DataSection(source=source, max_rows=2))] == ["a0", "a1"]
    assert len(load_rows(DataSection(source=source, max_rows=9))) == 3


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_byte_order_mark_is_tolerated(tmp_path, suffix):
    """A file saved with a BOM, as Windows editors do, reads like one without."""
    source = Path(write(tmp_path / f"rows{suffix}", TEXTS))
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes())
    assert load_rows(DataSection(source=str(source)))[0].question == TEXTS[0]["Question"]


def test_json_may_hold_its_rows_under_data(tmp_path):
    """{"data": [...]} is read like a list; another object says what is expected."""
    assert len(load_rows(DataSection(source=write(tmp_path / "a.json", {"data": TEXTS})))) == 3
    assert '{"data": [...]}' in fails(write(tmp_path / "b.json", {"rows": TEXTS}))


def test_missing_file_names_its_neighbours(tmp_path):
    """A misspelt file suggests the near name; a missing folder is named."""
    write(tmp_path / "train_rows.jsonl", TEXTS)
    assert "did you mean train_rows.jsonl" in fails(str(tmp_path / "train_row.jsonl"))
    assert "has train_rows.jsonl" in fails(str(tmp_path))
    assert f"folder {tmp_path / 'no'} does not exist" in fails(str(tmp_path / "no" / "a.jsonl"))


def test_unclear_source_says_both_possibilities(tmp_path, monkeypatch):
    """A bare word is neither a file nor a Hub id, and the message says both."""
    monkeypatch.chdir(tmp_path)
    message = fails("medical_o1")
    assert "neither an existing file nor a Hub data set id (owner/name)" in message
    (tmp_path / "rows.txt").write_text("x")
    assert "'.txt', expected .jsonl, .json, .csv, .parquet" in fails("rows.txt")
    assert "the embedded set is `embedded:rows`" in fails("embedded:row")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"Question": "a"\n', ':1 is not JSON at column 17 (Expecting \',\' delimiter): {"Question": "a"'),
        ('{"a": 1}\n\n{"Question": ' + "x" * 100, ':3 is not JSON at column 14 (Expecting value): {"Question": xxx'),
        ('{"a": 1}\n["a", "b"]\n', ':2 is a list, expected an object with named fields: ["a", "b"]'),
        ('{"a": 1}\nnull\n', ":2 is null, expected an object"),
        ("\n \n", "holds no rows"),
        ("[" * 100_000, ":1 is not JSON"),
    ],
)
def test_broken_lines_are_shown(tmp_path, text, said):
    """The message has the line's number and its beginning."""
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    message = fails(str(path))
    assert said in message
    assert len(message) < 400 + len(str(path)) * 2


def test_json_syntax_errors_have_a_line(tmp_path):
    """Line and column of a JSON file's fault are given; JSONL named .json is recognised."""
    path = tmp_path / "a.json"
    path.write_text('[\n {"Question": "a"},\n {"Question": }\n]')
    assert f"{path}:3 is not JSON at column 15" in fails(str(path))
    path.write_text('{"Question": "a"}\n{"Question": "b"}\n')
    assert "name the file .jsonl" in fails(str(path))
    path.write_text('[{"Question": "a", "Complex_CoT": "b", "Response": "c"}, 5]')
    assert f"{path}[1] is a number, expected an object" in fails(str(path))


def test_other_encodings_are_named_with_a_remedy(tmp_path):
    """Latin-1 and UTF-16 files stop with the line and an iconv command that mends them."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"Question": "a"}\n{"Question": "caf\xe9"}\n')
    assert f"{path}:2 is not UTF-8: byte 0xe9" in fails(str(path))
    path.write_bytes(json.dumps(TEXTS[0]).encode("utf-16"))
    assert "iconv -f UTF-16" in fails(str(path))
    table = tmp_path / "a.csv"
    table.write_bytes("Question,Complex_CoT,Response\na,b,c\nd,é,f\n".encode("latin1"))
    assert f"{table}:3 is not UTF-8" in fails(str(table))


def test_missing_columns_list_those_that_exist(tmp_path):
    """All missing columns are named at once, with the flags that would choose from those there are."""
    message = fails(write(tmp_path / "a.jsonl", [{"question": "q", "cot": "c", "Response": "a"}]))
    assert "has no column 'Question', 'Complex_CoT'" in message
    assert "it has question, cot, Response" in message
    assert "--data.question question --data.reasoning COLUMN" in message
    later = fails(write(tmp_path / "b.jsonl", [TEXTS[0], {"Question": "q", "Response": "a"}]))
    assert "b.jsonl:2 has no 'Complex_CoT'" in later
    (tmp_path / "c.csv").write_text("Question;Complex_CoT;Response\na;b;c\n")
    assert "set apart by ';', expected commas" in fails(str(tmp_path / "c.csv"))


@pytest.mark.parametrize(
    ("value", "said"),
    [(3, "a number, expected text: 3"), (True, "true/false"), ({"a": 1}, "an object"), (["a"], "a list")],
)
def test_cells_must_be_text(tmp_path, value, said):
    """A cell that is no text stops the run with row and column."""
    message = fails(write(tmp_path / "a.jsonl", [TEXTS[0], {**TEXTS[0], "Response": value}]))
    assert f"a.jsonl:2: Response is {said}" in message


def test_half_a_character_is_refused(tmp_path):
    """A lone surrogate escape, which no tokenizer takes, is named with its row."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"Question": "ab\\ud83d", "Complex_CoT": "c", "Response": "a"}')
    assert "a.jsonl:1: Question holds half a character (U+D83D) at position 2" in fails(str(path))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Question,Complex_CoT,Response\na,b\n", ":2 has 2 cells, the header names 3"),
        ("Question,Complex_CoT,Response\na,b,c\nd,e,f,g\n", ":3 has 4 cells, the header names 3"),
        ('Question,Complex_CoT,Response\na,b,"c\n', "is not CSV"),
        ("Question,Question,Response\na,b,c\n", "names the column 'Question' twice"),
        ("Question,Complex_CoT,Response\n", "holds no rows"),
        ("", "holds no rows"),
    ],
)
def test_broken_tables(tmp_path, text, said):
    """A CSV whose rows and header disagree is refused instead of being read askew."""
    path = tmp_path / "a.csv"
    path.write_text(text)
    assert said in fails(str(path))


def test_long_cells_leave_the_csv_module_as_it_was(tmp_path):
    """A cell over the csv module's 128 KiB limit is read, and the limit other code sees is unchanged after it."""
    limit = csv.field_size_limit()
    long = [{**TEXTS[0], "Complex_CoT": "word " * 60_000}]
    assert load_rows(DataSection(source=write(tmp_path / "a.csv", long)))[0].reasoning == long[0]["Complex_CoT"]
    assert csv.field_size_limit() == limit


def test_damaged_parquet(tmp_path):
    """A file that only has the name of a Parquet file is a DataError."""
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 but no more")
    assert "is not a Parquet file that can be read" in fails(str(path))


def test_embedded_rows_are_there():
    """The rows that ship with the package load, each with all three texts."""
    rows = load_rows(DataSection(source="embedded:rows"))
    assert len(rows) > 50
    assert rows[0].place == "embedded:rows:1"
    assert all(r.question and r.reasoning and r.answer for r in rows)


@pytest.mark.parametrize(
    "path", sorted(SHARED.glob("*.jsonl")) + sorted(SHARED.glob("train-derived/*.jsonl")), ids=lambda p: p.name
)
def test_real_rows(path):
    """Every shared training file loads completely, one row a line."""
    if path.name.endswith("verifiable.jsonl"):
        section = DataSection(source=str(path), question="mcq_question", reasoning="answer_idx", answer="ground_truth")
    else:
        section = DataSection(source=str(path))
    assert len(load_rows(section)) == len(path.read_bytes().splitlines())


def test_hub_away_names_what_was_wanted(tmp_path):
    """Offline and not cached: data set, config, revision and the local way out stand in the message."""
    code = (
        "from deepdoctor.data.sources import load_rows; from deepdoctor.recipe import DataSection\n"
        "from deepdoctor.errors import HubError\n"
        "try: load_rows(DataSection(source='owner/rows', config='en', revision='abc123', split='train'))\n"
        "except HubError as error: print(error)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    for words in (
        "owner/rows (config en, revision abc123, split train)",
        "`--data.source path.jsonl`",
        "HF_HUB_OFFLINE",
    ):
        assert words in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("error", "said", "flag"),
    [
        (ValueError("BuilderConfig 'fr' not found. Available: ['en', 'zh']"), "known: en, zh", "--data.config en"),
        (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'zh']\nExample"),
            "known: en, zh",
            "--data.config en",
        ),
        (ValueError("Couldn't find cache for o/d for config 'fr'\nAvailable configs in the cache: ['en']"), "en", "en"),
        (ValueError("Unknown split \"test\". Should be one of ['train']."), "known: train", "--data.split train"),
        (OSError("Client error '401 Unauthorized' for url"), "or needs a token", "HF_TOKEN"),
        (
            OSError("Dataset 'o/d' doesn't exist on the Hub or cannot be accessed."),
            "not on the Hub",
            "HF_TOKEN",
        ),
        (RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer", "--data.source path.jsonl"),
    ],
)
def test_hub_answers_become_hub_errors(monkeypatch, error, said, flag):
    """What ``datasets`` says about configs, splits and ids is passed on with the flag that mends it."""
    import datasets

    def load_dataset(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = fails("o/d", HubError, config="fr")
    assert said in message and flag in message and "o/d (config fr" in message


def cached(tmp_path, commits):
    """Write a cache as ``datasets`` lays it out, one folder a commit, and return the newest data set."""
    import datasets

    folder = tmp_path / "o___d" / "en" / "0.0.0"
    for commit in commits:
        made = datasets.Dataset.from_list([{**TEXTS[0], "Response": commit}])
        made.save_to_disk(tmp_path / commit)
        (folder / commit).mkdir(parents=True)
        (tmp_path / commit / "data-00000-of-00001.arrow").rename(folder / commit / "d-train.arrow")
    return datasets.Dataset.from_file(str(folder / commits[-1] / "d-train.arrow"))


def test_a_pinned_revision_is_never_swapped_for_another(tmp_path, monkeypatch):
    """Without the Hub ``datasets`` answers any revision with its newest; ours finds the pinned one or stops."""
    import datasets

    old, new, other = "a" * 40, "b" * 40, "c" * 40
    newest = cached(tmp_path, [old, new])
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: newest)
    for pinned in (old, new, old[:8]):
        assert load_rows(DataSection(source="o/d", config="en", revision=pinned))[0].answer == pinned[0] * 40
    assert load_rows(DataSection(source="o/d", config="en"))[0].answer == new
    message = fails("o/d", HubError, config="en", revision=other)
    assert f"the cache has revision {new[:12]}" in message and "not the pinned one" in message
