"""``data/`` of a run comes back as it was written, or is refused with its folder named."""

import json

import pytest
from helpers_prompt import byte_prompt, row
from safetensors.torch import load_file, save_file

from deepdoctor.data.prompt import EncodedRow
from deepdoctor.data.rows import Row
from deepdoctor.data.store import load_prepared, save_prepared
from deepdoctor.errors import RunError
from deepdoctor.run_folder import write_json

PRINT = "a fingerprint"


@pytest.fixture
def stored(tmp_path):
    """A complete folder of two training rows and a held-out one, and what was saved."""
    prompt = byte_prompt()
    rows = [row(index=0), row("发热 🩺?", "三\u2028天\u0085 x", "流感\u2029.", index=4), row("Third?", index=2)]
    pairs = [(r, prompt.encode_row(r)) for r in rows]
    saved = save_prepared(tmp_path, pairs[:2], pairs[2:], PRINT)
    write_json(tmp_path / "summary.json", {"content_hash": saved.content_hash})
    return tmp_path, saved


def test_rows_come_back_as_they_were(stored):
    """Texts, places, tokens, labels, spans and sides are equal, also with Unicode's own line separators in a text.

    A text with U+2028 used to make the whole folder unreadable: its JSON line was cut there.
    """
    folder, saved = stored
    assert load_prepared(folder, PRINT) == saved
    assert [r.index for r, _ in saved.train] == [0, 4]


def test_one_side_may_be_empty(tmp_path):
    """Nothing held out."""
    prompt = byte_prompt()
    saved = save_prepared(tmp_path, [(row(), prompt.encode_row(row()))], [], PRINT)
    write_json(tmp_path / "summary.json", {"content_hash": saved.content_hash})
    assert load_prepared(tmp_path, PRINT) == saved


def test_the_hash_covers_tokens_labels_sides_and_prompt(tmp_path):
    """Changing any one of them changes the hash; the row's place does not."""
    texts = Row(0, "a:1", "q", "r", "a")
    one = (texts, EncodedRow([1, 2, 3], [-100, 2, 3], (1, 2), (2, 3)))
    variants = {
        "as it is": ([one], [], PRINT),
        "token": ([(texts, EncodedRow([1, 2, 4], [-100, 2, 3], (1, 2), (2, 3)))], [], PRINT),
        "label": ([(texts, EncodedRow([1, 2, 3], [-100, -100, 3], (1, 2), (2, 3)))], [], PRINT),
        "side": ([], [one], PRINT),
        "prompt": ([one], [], "another"),
    }
    hashes = {name: save_prepared(tmp_path, *values).content_hash for name, values in variants.items()}
    assert len(set(hashes.values())) == len(hashes)
    moved = (Row(9, "b:10", "q", "r", "a"), one[1])
    assert save_prepared(tmp_path, [moved], [], PRINT).content_hash == hashes["as it is"]


def test_another_prompt_or_changed_tokens_are_refused(stored):
    """Rows encoded with another template, or with one token changed by hand, do not train."""
    folder, _ = stored
    with pytest.raises(RunError, match="prompt or was changed by hand"):
        load_prepared(folder, "another prompt")
    tensors = load_file(folder / "tokens.safetensors")
    tensors["labels"][-1] += 1
    save_file(tensors, folder / "tokens.safetensors")
    with pytest.raises(RunError, match="prompt or was changed by hand") as caught:
        load_prepared(folder, PRINT)
    assert str(folder) in caught.value.message


@pytest.mark.parametrize("damage", ["tokens cut", "tokens lack spans", "rows cut", "rows half a line", "no summary"])
def test_a_damaged_folder_names_itself(stored, damage):
    """A file that is cut, lacks a part or is gone gives a RunError with the remedy."""
    folder, _ = stored
    tokens, rows = folder / "tokens.safetensors", folder / "rows.jsonl"
    if damage == "tokens cut":
        tokens.write_bytes(tokens.read_bytes()[:-40])
    elif damage == "tokens lack spans":
        tensors = load_file(tokens)
        save_file({"input_ids": tensors["input_ids"], "labels": tensors["labels"]}, tokens)
    elif damage == "rows cut":
        rows.write_text(rows.read_text(encoding="utf-8").split("\n")[0] + "\n", encoding="utf-8")
    elif damage == "rows half a line":
        rows.write_text(rows.read_text(encoding="utf-8")[:-30] + "\n", encoding="utf-8")
    else:
        (folder / "summary.json").unlink()
    with pytest.raises(RunError, match="cannot be read") as caught:
        load_prepared(folder, PRINT)
    assert str(folder) in caught.value.message
    assert "deepdoctor data" in caught.value.hint


def test_rows_are_one_json_line_each(stored):
    """rows.jsonl can be read by any JSON-lines reader and says side, place and hash."""
    folder, saved = stored
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_bytes().split(b"\n")[:-1]]
    assert [line["side"] for line in lines] == ["train", "train", "held_out"]
    assert [line["hash"] for line in lines] == [r.content_hash for r, _ in [*saved.train, *saved.held_out]]
