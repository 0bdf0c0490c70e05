"""Tokenizers read from a folder, checked for lost text, streamed, saved for others."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from deepdoctor.errors import DataError, ModelError
from deepdoctor.model.tokenizer import StreamDecoder, Tokenizer
from helpers_tokenizer import (
    ASSISTANT,
    BOS,
    CHAT_TEMPLATE,
    END_THINK,
    EOS,
    PAD,
    TEXT,
    THINK,
    USER,
    build_r1_tokenizer,
)

PROMPT = f"{BOS}{USER}A man, 45,  has\n\nchest pain.{ASSISTANT}{THINK}\nOkay — 38.2 °C 🩺{END_THINK}\n\nPneumonia{EOS}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as DeepSeek publishes it."""
    return build_r1_tokenizer(tmp_path_factory.mktemp("r1"))


@pytest.fixture(scope="module")
def r1(folder: Path) -> Tokenizer:
    """The R1-like tokenizer."""
    return Tokenizer.from_folder(folder)


def change(folder: Path, to: Path, name: str = "tokenizer_config.json", **values: object) -> Path:
    """Copy the folder with some entries of one JSON file replaced; None removes the entry."""
    to.mkdir(exist_ok=True)
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    file = to / name
    merged = {**(json.loads(file.read_text()) if file.exists() else {}), **values}
    file.write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
    return to


def core_of(folder: Path) -> tokenizers.Tokenizer:
    """A fresh ``tokenizers`` object of the folder."""
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def test_reads_ids_template_and_advice(folder: Path, r1: Tokenizer) -> None:
    """Ids, template, stop ids and sampling advice come from the folder; pad moves off eos to the unused pad token."""
    core = core_of(folder)
    assert 590 <= r1.vocab_size == core.get_vocab_size() <= 610
    assert r1.bos_id == core.token_to_id(BOS)
    assert r1.eos_id == core.token_to_id(EOS)
    assert r1.pad_id == core.token_to_id(PAD) != r1.eos_id
    assert r1.stop_ids == (r1.eos_id,)
    assert (r1.temperature, r1.top_p, r1.model_max_length) == (0.6, 0.95, 16384)
    assert r1.chat_template == CHAT_TEMPLATE
    assert r1.special_tokens == {BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK}


def test_encode_parses_special_texts_and_adds_nothing(r1: Tokenizer) -> None:
    """Each special text is one id, and neither bos nor eos appears by itself although the folder asks for bos."""
    ids = r1.encode(PROMPT)
    assert ids[0] == r1.bos_id and ids[1] == r1.token_to_id(USER) and ids[-1] == r1.eos_id
    assert ids.count(r1.bos_id) == ids.count(r1.eos_id) == 1
    assert r1.encode("chest pain")[0] not in (r1.bos_id, r1.eos_id)
    assert r1.decode(ids) == PROMPT
    assert r1.decode(ids, skip_special=True) == PROMPT.replace(BOS, "").replace(EOS, "")
    assert [r1.token(i) for i in r1.encode(" pain")] == ["Ġpain"]
    assert r1.token_to_id("no such token") is None


@pytest.mark.parametrize("id", [-1, 10_000])
def test_token_outside_the_vocabulary_is_an_error(r1: Tokenizer, id: int) -> None:
    """An id that no token has is named."""
    with pytest.raises(ModelError, match=f"has no token {id}; ids run from 0 to"):
        r1.token(id)


@given(st.text(max_size=60))
def test_any_text_comes_back(r1: Tokenizer, text: str) -> None:
    """Whatever the characters, decode(encode(text)) is the text."""
    assert r1.decode(r1.encode(text)) == text


def test_half_a_surrogate_pair_is_a_data_error(r1: Tokenizer) -> None:
    """JSON can spell text that is no Unicode; the place in the text is named."""
    with pytest.raises(DataError, match="character 2 is half of a surrogate pair"):
        r1.encode("ab\ud83d")


@given(st.data())
@settings(max_examples=200)
def test_stream_equals_decode(r1: Tokenizer, data: st.DataObject) -> None:
    """For any ids, broken bytes and unknown ids included, the pieces joined are what decode says."""
    ids = data.draw(st.lists(st.integers(0, r1.vocab_size + 5), max_size=60))
    for skip in (False, True):
        stream = StreamDecoder(r1, skip_special=skip)
        joined = "".join(stream.push(i) for i in ids) + stream.flush()
        assert joined == r1.decode(ids, skip_special=skip)


@given(st.text(max_size=40))
def test_stream_emits_whole_characters(r1: Tokenizer, text: str) -> None:
    """A character spread over several tokens is held back, never shown as a replacement character."""
    stream = StreamDecoder(r1)
    pieces = [stream.push(i) for i in r1.encode(text)]
    assert "".join(pieces) == text
    assert stream.flush() == ""


def test_stream_shows_half_a_character_only_when_flushed(r1: Tokenizer) -> None:
    """The first bytes of an emoji show nothing until the end is declared, and do not leak into the next text."""
    ids = r1.encode("🩺")
    assert len(ids) > 1
    stream = StreamDecoder(r1)
    assert [stream.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert stream.flush() == "\ufffd"
    assert stream.push(r1.encode("a")[0]) == "a"


def test_stream_cost_does_not_grow(r1: Tokenizer) -> None:
    """100,000 tokens, invalid bytes among them, stream in seconds; decoding the whole text each time takes hours."""
    ids = (r1.encode(TEXT) + r1.encode("🩺")[:1]) * (100_000 // len(r1.encode(TEXT)))
    start = time.perf_counter()
    stream = StreamDecoder(r1)
    joined = "".join([stream.push(i) for i in ids])
    assert time.perf_counter() - start < 10
    assert joined.count("\ufffd") >= 100


@pytest.mark.parametrize("loader", ["AutoTokenizer", "PreTrainedTokenizerFast"])
def test_saved_folder_loads_in_transformers(r1: Tokenizer, tmp_path: Path, loader: str) -> None:
    """transformers reads the saved folder with our ids, pad and template, and adds no bos of its own."""
    import transformers

    (tmp_path / "chat_template.jinja").write_text("an older template")
    template = CHAT_TEMPLATE + "{# ours #}"
    r1.save(tmp_path, template, extra={"note": 1})
    theirs = getattr(transformers, loader).from_pretrained(tmp_path)
    for text in (PROMPT, TEXT, "chest pain", "  12\n\t3 "):
        assert theirs(text)["input_ids"] == r1.encode(text)
        assert theirs.decode(r1.encode(text)) == text
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.bos_token_id) == (r1.pad_id, r1.eos_id, r1.bos_id)
    assert len(theirs) == r1.vocab_size
    assert theirs.chat_template == template
    assert theirs.model_max_length == 16384
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["note"] == 1
    assert config["chat_template"] == template and config["add_bos_token"] is False


def test_saved_folder_loads_again(r1: Tokenizer, tmp_path: Path) -> None:
    """Saving and loading keeps ids, pad and template; without a template none is left from before."""
    r1.save(tmp_path, "first")
    r1.save(tmp_path, None)
    again = Tokenizer.from_folder(tmp_path)
    assert again.encode(PROMPT) == r1.encode(PROMPT)
    assert (again.bos_id, again.eos_id, again.pad_id) == (r1.bos_id, r1.eos_id, r1.pad_id)
    assert again.chat_template is None
    assert again.temperature is None and again.top_p is None


def test_truncation_and_padding_of_the_file_do_not_act(folder: Path, r1: Tokenizer, tmp_path: Path) -> None:
    """A tokenizer.json saved with truncation used to cut every text silently."""
    core = core_of(folder)
    core.enable_truncation(4)
    core.enable_padding(length=16)
    change(folder, tmp_path)
    core.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).encode(TEXT) == r1.encode(TEXT)


@pytest.mark.parametrize(
    ("added", "configured", "chosen"),
    [
        ([PAD, "<|pad|>"], "<|pad|>", "<|pad|>"),
        ([PAD, "<|pad|>"], EOS, PAD),
        (["<|fim_pad|>"], EOS, "<|fim_pad|>"),
        (["<unk>", "<|finetune_right_pad_id|>"], None, "<|finetune_right_pad_id|>"),
        (["<|endoftext|>"], "[PAD]", "<|endoftext|>"),
    ],
)
def test_pad_is_configured_or_an_unused_token(added: list[str], configured: str | None, chosen: str) -> None:
    """The configured pad is kept unless it is eos or unknown; then the first unused token known is taken."""
    core = byte_level(added)
    assert Tokenizer(core, eos=EOS, pad=configured).pad_id == core.token_to_id(chosen)


def test_no_possible_pad_is_an_error() -> None:
    """Padding with eos would hide the eos the model has to learn."""
    with pytest.raises(ModelError, match="no other token can serve") as caught:
        Tokenizer(byte_level([]), eos=EOS, pad=EOS)
    assert "set pad_token" in str(caught.value.hint)


def byte_level(added: list[str]) -> tokenizers.Tokenizer:
    """A tokenizer of the 256 bytes, eos and further special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(models.BPE({c: n for n, c in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([EOS, *added])
    return core


def test_generation_config_gives_more_stops(folder: Path, tmp_path: Path) -> None:
    """All eos ids of generation_config.json stop an answer; sampling advice counts only with do_sample."""
    change(folder, tmp_path, "generation_config.json", eos_token_id=[7, 9, 7], do_sample=False)
    read = Tokenizer.from_folder(tmp_path)
    assert read.stop_ids == (read.eos_id, 7, 9)
    assert read.temperature is None and read.top_p is None
    change(folder, tmp_path, "generation_config.json", temperature=None, top_p=None)
    read = Tokenizer.from_folder(tmp_path)
    assert (read.temperature, read.top_p) == (1.0, 1.0)


def test_eos_may_come_from_other_files(folder: Path, r1: Tokenizer, tmp_path: Path) -> None:
    """Without eos_token in the config, the special token map or the generation config names it."""
    change(folder, tmp_path / "a", eos_token=None)
    assert Tokenizer.from_folder(tmp_path / "a").eos_id == r1.eos_id
    change(tmp_path / "a", tmp_path / "b", "special_tokens_map.json", eos_token={"content": PAD})
    assert Tokenizer.from_folder(tmp_path / "b").token(Tokenizer.from_folder(tmp_path / "b").eos_id) == PAD
    change(tmp_path / "a", tmp_path / "c", "generation_config.json", eos_token_id=None)
    with pytest.raises(ModelError, match="names no eos token"):
        Tokenizer.from_folder(tmp_path / "c")


def test_template_file_wins_over_config(folder: Path, tmp_path: Path) -> None:
    """chat_template.jinja, which transformers 5 writes, is what counts; a list of named templates gives its default."""
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d\r\n"}]
    change(folder, tmp_path, chat_template=named)
    assert Tokenizer.from_folder(tmp_path).chat_template == "d\r\n"
    (tmp_path / "chat_template.jinja").write_bytes(b"von der Datei\r\n")
    assert Tokenizer.from_folder(tmp_path).chat_template == "von der Datei\r\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", '{"version": "1.0", "model"', r"tokenizer\.json cannot be read as a tokenizer"),
        ("tokenizer.json", "[]", r"tokenizer\.json cannot be read as a tokenizer"),
        ("tokenizer_config.json", "{", r"tokenizer_config\.json cannot be read"),
        ("tokenizer_config.json", "[1]", r"tokenizer_config\.json must hold a JSON object, not list"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token is 5, expected a token's text"),
        ("tokenizer_config.json", '{"eos_token": "</nope>"}', "eos_token '</nope>' is not in the vocabulary"),
        ("tokenizer_config.json", f'{{"eos_token": "{EOS}", "chat_template": 3}}', "chat_template .* is int"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id in generation_config.json is 'x'"),
        ("generation_config.json", "\udcff", "cannot be read"),
    ],
)
def test_broken_files_are_named(folder: Path, tmp_path: Path, file: str, content: str, message: str) -> None:
    """A broken file is an error with its name and what to do."""
    change(folder, tmp_path)
    (tmp_path / file).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_folder(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    """No folder, no tokenizer.json, or only a SentencePiece model: each says what is there."""
    with pytest.raises(ModelError, match="no such folder"):
        Tokenizer.from_folder(tmp_path / "none")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelError, match=r"it has: tokenizer\.model") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "SentencePiece" in str(caught.value.hint)


def lowercase(core: tokenizers.Tokenizer) -> None:
    """Lose capitals."""
    core.normalizer = normalizers.Lowercase()


def prefix_space(core: tokenizers.Tokenizer) -> None:
    """Put a space before every piece."""
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def as_llama_class(core: tokenizers.Tokenizer) -> None:
    """What transformers 5.17 to 5.21 make of a local R1-Distill copy: SentencePiece parts, byte-level vocabulary."""
    core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


@pytest.mark.parametrize("spoil", [lowercase, prefix_space, as_llama_class])
def test_a_tokenizer_that_loses_text_is_refused(folder: Path, tmp_path: Path, spoil) -> None:
    """Changed capitals, added or lost spaces are found at load time, not in a ruined training run."""
    core = core_of(folder)
    spoil(core)
    change(folder, tmp_path)
    core.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelError, match=r"loses text: .* comes back as") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "publisher" in str(caught.value.hint)


def sentencepiece(prepend: bool) -> tokenizers.Tokenizer:
    """A Llama 2 style byte-fallback tokenizer: spaces become ▁, unknown characters become <0xNN>."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *map(chr, range(33, 127))]
    vocab = {piece: n for n, piece in enumerate(pieces)}
    core = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepend else spaces
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prepend else parts)
    core.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    return core


def test_sentencepiece_with_prefix_space_is_refused() -> None:
    """It round-trips one text, but not prompt and answer tokenized apart, which is what training does."""
    core = sentencepiece(prepend=True)
    assert core.decode(core.encode("A man, 45").ids) == "A man, 45"
    with pytest.raises(ModelError, match="loses text"):
        Tokenizer(core, eos="</s>", bos="<s>")


def test_lossless_sentencepiece_is_refused_by_name() -> None:
    """Without the prefix space nothing is lost, but ids are not bytes of a byte-level alphabet, so it is named."""
    with pytest.raises(ModelError, match="decoder Sequence is not supported, only ByteLevel"):
        Tokenizer(sentencepiece(prepend=False), eos="</s>", bos="<s>")
