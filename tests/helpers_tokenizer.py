"""A small byte-level BPE tokenizer that looks, on disk, like DeepSeek's R1-Distill-Llama."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT, THINK, END_THINK = "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"

TEXT = """\
A 45-year-old man has chest pain and shortness of breath for 3 days. His blood pressure is 150/90 mmHg.
Okay, let's think about this patient. The pain is sharp and gets worse with a deep breath, so it could be pleurisy.
Hmm, but the fever of 38.2 °C and the cough with rusty sputum suggest pneumonia. What about the laboratory values?
White cells are 14,000 and the C-reactive protein is high. So the diagnosis is lobar pneumonia.
The most likely diagnosis is iron deficiency anaemia; the patient should take ferrous sulfate 325 mg once a day.
Which of the following is the best next step in management? A) chest radiograph B) antibiotics C) no treatment
In conclusion, the treatment is an antibiotic such as amoxicillin, and the prognosis is good in most patients.
Wait, maybe I should also consider pulmonary embolism, heart failure and asthma before I settle on an answer.
The physical examination shows dullness to percussion, bronchial breath sounds and crackles over the right lower lobe.
"""

# The shape of R1's chat format: reasoning of earlier turns is dropped, and the generation prompt opens <think>.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
)

_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_r1_tokenizer(folder: Path, vocab_size: int = 600, text: str = TEXT) -> Path:
    """Train a vocabulary of about ``vocab_size`` tokens on ``text`` and write it to ``folder``; return the folder.

    As DeepSeek publishes it: tokenizer_class LlamaTokenizerFast, add_bos_token true with a post-processor that adds
    bos, pad equal to eos, <think> and the role markers added but not marked special, sampling advice 0.6 / 0.95.
    """
    core = Tokenizer(models.BPE(ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 7,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(text.splitlines(keepends=True), trainer)
    core.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (BOS, EOS, PAD)])
    core.add_tokens([AddedToken(t, normalized=False) for t in (USER, ASSISTANT, THINK, END_THINK)])
    bos = core.token_to_id(BOS)
    core.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS}:0 $A:0", pair=f"{BOS}:0 $A:0 $B:1", special_tokens=[(BOS, bos)]
            ),
        ]
    )
    folder.mkdir(parents=True, exist_ok=True)
    core.save(str(folder / "tokenizer.json"))

    def entry(content: str) -> dict[str, object]:
        flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
        return {"__type": "AddedToken", "content": content, "normalized": True, **flags}

    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": entry(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": entry(EOS),
        "legacy": True,
        "model_max_length": 16384,
        "pad_token": entry(EOS),
        "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {
        "_from_model_config": True,
        "bos_token_id": bos,
        "eos_token_id": core.token_to_id(EOS),
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder
