"""One prompt for training, asking and the exported tokenizer: the same tokens everywhere, and nothing learnt amiss."""

import pytest
import tokenizers
from helpers_prompt import byte_tokenizer
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from deepdoctor.data.prompt import Prompt, native_template
from deepdoctor.data.rows import Row
from deepdoctor.errors import ModelError, UsageError
from deepdoctor.kernels.linear_cross_entropy import IGNORE_INDEX
from deepdoctor.model.tokenizer import Tokenizer
from helpers_tokenizer import _SPLIT, TEXT

SMOLLM_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QUESTION = "A 45-year-old man has fever of 38.2 °C and cough.\nWhat is the diagnosis?"
REASONING = "Okay, let's think.\n\nRusty sputum, so it could be pneumonia — 肺炎?"
ANSWER = "Lobar pneumonia; take amoxicillin.\n\n1. Antibiotics"
TUTORIAL = """\
Below is an instruction that describes a task, paired with an input that provides further context. Write a response \
that appropriately completes the request. Before answering, think carefully about the question and create a \
step-by-step chain of thoughts to ensure a logical and accurate response.

### Instruction:
You are a medical expert with advanced knowledge in clinical reasoning, diagnostics, and treatment planning.
Please answer the following medical question.

### Question:
{question}

### Response:
<think>
"""
CUSTOM = """\
{%- for message in messages %}
{%- if message.role == 'system' %}{{ message.content }} | {% continue %}{% endif %}
Q: {{ message.content }}
{% endfor %}
A:
"""
LLAMA3_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|finetune_right_pad_id|>",
)
CASES = ["r1", "smollm2", "llama3", "r1+tutorial", "smollm2+tutorial", "r1+custom", "smollm2+custom"]
BOS_IN = {"r1": 1, "llama3": 1, "r1+tutorial": 1, "smollm2+tutorial": 0, "r1+custom": 0, "smollm2+custom": 0}
"""How many BOS a row has; SmolLM2's is <|im_start|>, which ChatML writes at every turn."""


@pytest.fixture(scope="session")
def llama3_tokenizer() -> Tokenizer:
    """A few hundred tokens with the header tokens of Llama 3 and a post-processor that adds BOS."""
    core = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    core.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in LLAMA3_SPECIAL])
    bos = LLAMA3_SPECIAL[0]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
    stops = [core.token_to_id("<|end_of_text|>"), core.token_to_id("<|eot_id|>")]
    return Tokenizer(
        core,
        bos=bos,
        eos="<|end_of_text|>",
        pad="<|finetune_right_pad_id|>",
        generation={"eos_token_id": stops},
    )


@pytest.fixture(scope="session")
def make_prompt(request, tmp_path_factory):
    """Return ``make(case, **settings)`` -> Prompt of that tokenizer and template; tokenizers are read once."""
    custom = tmp_path_factory.mktemp("templates") / "mine.jinja"
    custom.write_text(CUSTOM, encoding="utf-8")
    read = {}

    def make(case: str, **settings) -> Prompt:
        name, _, template = case.partition("+")
        if name not in read:
            if name == "llama3":
                read[name] = request.getfixturevalue("llama3_tokenizer")
            else:
                folder = request.getfixturevalue({"r1": "tiny_r1"}.get(name, name))
                read[name] = Tokenizer.from_folder(folder)
        chosen = {"": "native", "custom": str(custom)}.get(template, template)
        return Prompt(read[name], chosen, **settings)

    return make


def exported(prompt: Prompt, folder):
    """The tokenizer as transformers loads it from an export."""
    from transformers import AutoTokenizer

    prompt.tokenizer.save(folder, prompt.chat_template)
    return AutoTokenizer.from_pretrained(folder)


def check_invariants(prompt: Prompt, bos_count: int | None, row: Row) -> None:
    """What must hold for every row, whatever its texts."""
    encoded, tokenizer = prompt.encode_row(row), prompt.tokenizer
    ids, labels = encoded.input_ids, encoded.labels
    begin, split = encoded.reasoning
    assert ids[:begin] == prompt.prompt_ids(row.question), "the training prefix is not the prompt that is asked"
    assert (begin, split, split, len(ids)) == (*encoded.reasoning, *encoded.answer)
    if bos_count is not None and tokenizer.bos_id is not None:
        assert ids.count(tokenizer.bos_id) == bos_count
        assert (ids[0] == tokenizer.bos_id) == bool(bos_count)
    assert ids[-1] == labels[-1] == prompt.eos_id, "no learnt EOS"
    assert ids.count(prompt.eos_id) - ids[:begin].count(prompt.eos_id) == 1
    assert tokenizer.pad_id not in (prompt.eos_id, *prompt.stop_ids)
    assert prompt.eos_id in prompt.stop_ids
    assert labels == [IGNORE_INDEX] * begin + ids[begin:], "reasoning and answer are not what trains"
    opening = "" if prompt.opens_think else "<think>\n"
    assert tokenizer.decode(ids[begin:split]) == f"{opening}{row.reasoning.strip()}\n</think>{prompt.gap}"
    assert tokenizer.decode(ids[split:-1]) == row.answer.strip()


@pytest.mark.parametrize("case", CASES)
def test_a_row_is_prompt_reasoning_answer_and_a_learnt_eos(case, make_prompt):
    """Prefix, BOS, EOS, pad, mask and both spans are right for every template."""
    check_invariants(make_prompt(case), BOS_IN.get(case), Row(0, "rows:1", QUESTION, REASONING, ANSWER))


@pytest.mark.parametrize("case", CASES)
def test_any_text_keeps_the_invariants(case, make_prompt):
    """Whatever Unicode the three texts hold (control tokens aside, which the check drops), the promises hold."""
    prompt = make_prompt(case)
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)

    @settings(max_examples=25, deadline=None)
    @given(texts, texts, texts)
    def check(question, reasoning, answer):
        for text in (question, reasoning, answer):
            assume(not any(token in text for token in prompt.tokenizer.special_tokens))
            # SmolLM2's vocabulary lacks a few bytes, such as \x16 and those of U+40000.
            assume(prompt.tokenizer.decode(prompt.tokenizer.encode(text)) == text)
        check_invariants(prompt, BOS_IN.get(case), Row(0, "rows:1", question, reasoning, answer))

    check()


@pytest.mark.parametrize("case", CASES)
def test_the_exported_tokenizer_asks_as_training_did(case, make_prompt, tmp_path):
    """transformers' apply_chat_template on the export gives the ids of prompt_ids, with a system message too."""
    prompt = make_prompt(case)
    theirs = exported(prompt, tmp_path)
    messages = [{"role": "user", "content": QUESTION}]

    def ask(messages):
        return list(theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    assert ask(messages) == prompt.prompt_ids(QUESTION)
    if "tutorial" not in case:
        told = make_prompt(case, system="Answer briefly.")
        assert ask([{"role": "system", "content": "Answer briefly."}, *messages]) == told.prompt_ids(QUESTION)
        assert told.prompt_ids(QUESTION) != prompt.prompt_ids(QUESTION)


@pytest.mark.parametrize("case", CASES[:5])
def test_the_exported_template_renders_a_whole_row_with_its_reasoning(case, make_prompt, tmp_path):
    """A conversation with the answer in it gives back the training row: nothing up to </think> is dropped."""
    prompt = make_prompt(case)
    row = Row(0, "rows:1", QUESTION, REASONING, ANSWER)
    completion = prompt.completion(REASONING, ANSWER)[0]
    said = completion if completion.startswith("<think>") else f"<think>\n{completion}"
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": said}]
    text = exported(prompt, tmp_path).apply_chat_template(messages, tokenize=False)
    whole = prompt.tokenizer.decode(prompt.encode_row(row).input_ids)
    # The tutorial ends with the tokenizer's own EOS, ChatML with a line break after it.
    assert text.rstrip("\n") == whole


@pytest.mark.parametrize("train_on", ["reasoning_and_answer", "answer", "all"])
@pytest.mark.parametrize("case", ["r1", "smollm2"])
def test_train_on_masks_what_it_says(case, train_on, make_prompt):
    """all trains everything; reasoning_and_answer all but the prompt; answer only the answer with EOS."""
    prompt = make_prompt(case, train_on=train_on)
    encoded = prompt.encode_row(Row(0, "rows:1", QUESTION, REASONING, ANSWER))
    trained_from = {"all": 0, "reasoning_and_answer": encoded.reasoning[0], "answer": encoded.answer[0]}[train_on]
    assert 0 < encoded.reasoning[0] < encoded.answer[0]
    assert encoded.labels[:trained_from] == [IGNORE_INDEX] * trained_from
    assert encoded.labels[trained_from:] == encoded.input_ids[trained_from:]


def test_chatml_is_the_template_that_smollm2_ships(smollm2, make_prompt):
    """With the model's default system message, ours gives the ids of the template in its own folder."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2)
    messages = [{"role": "user", "content": QUESTION}]
    expected = list(theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    assert make_prompt("smollm2", system=SMOLLM_SYSTEM).prompt_ids(QUESTION) == expected


@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_r1_is_the_template_that_the_model_ships(system, tiny_r1, make_prompt):
    """Ours gives the ids of R1's own template, which already opens <think>."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(tiny_r1)
    messages = [{"role": "user", "content": QUESTION}]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    expected = list(theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    assert make_prompt("r1", system=system).prompt_ids(QUESTION) == expected


@pytest.mark.parametrize("case", ["r1+tutorial", "smollm2+tutorial"])
def test_the_tutorial_is_the_articles_format(case, make_prompt):
    """The row is the article's training text with EOS; the prompt ends at the open <think>, not at </think>."""
    prompt = make_prompt(case)
    tokenizer = prompt.tokenizer
    bos = tokenizer.token(tokenizer.bos_id) if case.startswith("r1") else ""
    asked = bos + TUTORIAL.format(question=QUESTION)
    assert prompt.text(QUESTION) == asked
    assert asked.endswith("### Response:\n<think>\n")
    row = prompt.encode_row(Row(0, "rows:1", f"  {QUESTION}\n", f"\n{REASONING} ", f" {ANSWER}\n"))
    eos = tokenizer.token(tokenizer.eos_id)
    assert tokenizer.decode(row.input_ids) == f"{asked}{REASONING}\n</think>\n{ANSWER}{eos}"


def test_answers_end_with_the_token_of_their_format(make_prompt):
    """R1 ends with the model's EOS, ChatML with <|im_end|>, Llama 3 with <|eot_id|> though its EOS differs."""
    ends = {case: (p := make_prompt(case)).tokenizer.token(p.eos_id) for case in ("r1", "smollm2", "llama3")}
    assert ends == {"r1": "<｜end▁of▁sentence｜>", "smollm2": "<|im_end|>", "llama3": "<|eot_id|>"}
    llama3 = make_prompt("llama3")
    assert [llama3.tokenizer.token(i) for i in llama3.stop_ids] == ["<|eot_id|>", "<|end_of_text|>"]


def test_the_fingerprint_tells_prompts_apart(make_prompt):
    """Template, system message and mask rule each change the fingerprint; making it twice does not."""
    made = [
        make_prompt("r1"),
        make_prompt("r1+tutorial"),
        make_prompt("r1", system="Answer briefly."),
        make_prompt("r1", train_on="answer"),
    ]
    assert len({p.fingerprint for p in made}) == 4
    assert make_prompt("r1").fingerprint == made[0].fingerprint


def test_a_missing_template_file_is_named(make_prompt, tmp_path):
    """A path that does not exist, a folder, and a file that is no text are refused with their names."""
    tokenizer = byte_tokenizer()
    for path in (tmp_path / "none.jinja", tmp_path):
        with pytest.raises(UsageError, match="neither `native` nor `tutorial` nor a readable file") as caught:
            Prompt(tokenizer, str(path))
        assert str(path) in caught.value.message
    binary = tmp_path / "binary.jinja"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="not UTF-8"):
        Prompt(tokenizer, str(binary))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{% for m in messages %}{{ m.content }}", "is not Jinja"),
        ("{{ messages[0].content + 1 }}", "fails"),
        ("{{ raise_exception('no user turn') }}", "no user turn"),
        ("{{ messages.__class__.__mro__ }}", "fails"),
    ],
)
def test_a_broken_template_is_refused(text, said, tmp_path):
    """Bad syntax, an error while rendering, a template's own complaint and a grab for internals name the file."""
    path = tmp_path / "broken.jinja"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=said) as caught:
        Prompt(byte_tokenizer(), str(path))
    assert str(path) in caught.value.message


@pytest.mark.parametrize("system", ["Answer briefly.", "You are a medical expert"])
def test_a_system_message_needs_a_place(system):
    """The tutorial has none; words that its own text happens to hold used to pass as rendered."""
    with pytest.raises(UsageError, match="no place for a system message"):
        Prompt(byte_tokenizer(), "tutorial", system=system)


def test_a_tokenizer_of_another_format_is_refused(make_prompt):
    """native needs a known format, and ChatML a tokenizer that has its end token."""
    with pytest.raises(ModelError, match="<\\|im_end\\|>"):
        Prompt(byte_tokenizer(), "chatml")
    core = tokenizers.Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["</s>", "<|pad|>"])
    with pytest.raises(ModelError, match="none of the chat formats"):
        native_template(Tokenizer(core, eos="</s>", pad="<|pad|>"))
