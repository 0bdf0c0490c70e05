"""What one row's texts show on their own: debris, personal data, mixed languages, answers that do not follow.

Rules, not judgement: each names the words that made it speak, and both kinds of error are possible. They are written to
stay silent in doubt; shares per file and known false alarms stand in docs/guide/data.md.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator

from deepdoctor.data.overlap_score import IS_UNSPACED, STEM, STOP_WORDS, TOKEN, plain_text
from deepdoctor.data.rows import Row

__all__ = ["FIELDS", "personal_data", "short", "text_findings"]

FIELDS = ("question", "reasoning", "answer")
LONG_ANSWER = 12
"""Content words from which an answer is a text of its own, of which more than a word must stand in the reasoning."""
SUPPORTED = 0.25
"""Share of a long answer's content words that the reasoning must hold. Of 273 real rows the lowest had 0.30; with the
answer of another row 95 % had less than 0.26."""
WHOLE_REASONING = 1000
"""Characters up to which all of a reasoning counts as its end: short explanations name the answer first."""
LEAST_REASONING = 80
"""Characters below which a reasoning is not searched for its answer."""
COPIED_WORDS = 5
EMPTY_WORDS = {"answer", "correc", "final", "option", "choice", "答案", "案是", "是的", "正确"}


def short(text: str, limit: int = 80) -> str:
    """Return a text on one line, cut to ``limit`` characters."""
    joined = " ".join(text.split())
    return joined if len(joined) <= limit else joined[:limit] + "..."


def text_findings(row: Row) -> Iterator[tuple[str, str]]:
    """Yield (code, detail) for each rule that speaks, at most once a code; details never repeat personal data."""
    for code, rule in RULES.items():
        if detail := rule(row):
            yield code, detail


def _first(row: Row, find: Callable[[str], str | None]) -> str | None:
    for field in FIELDS:
        if found := find(getattr(row, field)):
            return f"{found} in {field}"
    return None


# Marks of chat, reasoning and instruction formats. A gate of plain words ahead of a rule saves most of its time.
CHAT = re.compile(
    r"<\|[A-Za-z][\w ]{0,40}\|>|<｜[^｜\n]{1,40}｜>|\[/?INST\]|<</?SYS>>|</?s>|<(?:start|end)_of_turn>"
    r"|<(?:bos|eos|unk)>|</?(?:thinking|thought|reasoning|reflection|scratchpad|answer|final_answer|solution)>"
)
TURN = re.compile(
    r"^[ \t]*(?:#{2,4} ?(?:Instruction|Input|Response|Human|Assistant|System|User) ?:"
    r"|(?:Human|Assistant|User|System|USER|ASSISTANT|SYSTEM) ?:(?=\s))",
    re.MULTILINE,
)
TURN_GATE = ("##", "Human", "Assistant", "User", "System", "USER", "ASSISTANT", "SYSTEM")
TAGS = (
    "html|head|body|div|span|p|br|hr|a|b|i|u|em|strong|sub|sup|ul|ol|li|table|thead|tbody|tr|td|th|img|h[1-6]|font"
    "|script|style|iframe|input|button|form|pre|code|blockquote|center|small"
)
HTML = re.compile(
    rf"</?(?:{TAGS})(?:\s+[a-z-]+\s*=\s*(?:\"[^\"<>]*\"|'[^'<>]*'|[^\s<>\"']+))*\s*/?>"
    r"|&(?:nbsp|lt|gt|amp|quot|apos|[mn]dash|hellip|deg|micro|plusmn|#\d{2,5}|#x[0-9a-f]{2,4});",
    re.IGNORECASE,
)
FENCE = re.compile(r"^[ \t]*```", re.MULTILINE)
INJECTION = re.compile(
    r"\b(?:ignore|disregard|forget|override|bypass) (?:(?:any|all|the|of|your|these|my) ){0,3}"
    r"(?:previous|prior|above|earlier|preceding|system)(?: \w+){0,2} (?:instructions?|prompts?|messages?)\b"
    r"|\b(?:ignore|disregard|forget|override|bypass) (?:all|your|all your) (?:instructions?|prompts?)\b"
    r"|\b(?:reveal|print|repeat|show) (?:me )?(?:your|the) (?:system|hidden) (?:prompt|message|instructions?)\b"
    r"|\byou are now (?:dan\b|jailbroken|in developer mode)"
    r"|(?:忽略|无视|忘记)(?:掉)?(?:你)?(?:之前|以上|上述|前面|先前)的?(?:所有|全部|一切)?(?:指令|指示|提示词?)",
    re.IGNORECASE,
)
INJECTION_GATE = ("instruction", "prompt", "message", "you are now", "指令", "指示", "提示")


def _chat_markers(row: Row) -> str | None:
    def find(text: str) -> str | None:
        match = CHAT.search(text) if "<" in text or "[" in text else None
        if not match and any(word in text for word in TURN_GATE):
            match = TURN.search(text)
        return repr(match.group().strip()) if match else None

    return _first(row, find)


def _markup(row: Row) -> str | None:
    def find(text: str) -> str | None:
        if ("<" in text or "&" in text) and (match := HTML.search(text)):
            return repr(short(match.group()))
        if "```" not in text:
            return None
        if len(FENCE.findall(text)) % 2:
            return "a ``` fence that is never closed"
        return "a text that opens with a ``` fence" if text.lstrip().startswith("```") else None

    return _first(row, find)


def _injection(row: Row) -> str | None:
    def find(text: str) -> str | None:
        folded = text.lower()
        match = INJECTION.search(text) if any(word in folded for word in INJECTION_GATE) else None
        return repr(short(match.group())) if match else None

    return _first(row, find)


_MONTH = r"(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?"
_DAY = (
    r"(?:\d{1,2}[/.-]\d{1,2}[/.-](?:19|20)\d\d|(?:19|20)\d\d[/.-]\d{1,2}[/.-]\d{1,2}"
    rf"|(?:19|20)\d\d ?年\d{{1,2}} ?月\d{{1,2}} ?日|\d{{1,2}}(?:st|nd|rd|th)? {_MONTH},? (?:19|20)\d\d"
    rf"|{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?,? (?:19|20)\d\d)"
)
_NAME = (
    r"(?:\b(?:Mr|Mrs|Ms|Miss)\.? (?:[A-Z][a-z]+|[A-Z]\.)(?: [A-Z][a-z]+)+"
    r"|\b(?:[Pp]atient )?[Nn]ame: ?[A-Z][a-z]+ [A-Z][a-z]+|姓名[:：] ?[\u4e00-\u9fff]{2,4})"
)
PERSONAL = {
    "an e-mail address": re.compile(r"[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,}\b"),
    "a phone number": re.compile(
        r"(?<![\w.+-])(?:\+[1-9]\d{0,2}[ .-]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d[.-])\d{3}[.-]\d{4}(?![\d.-]*\d)"
        r"|(?<![\w.])\+[1-9]\d{0,2}(?:[ .-]\d{2,4}){3,4}(?!\d)|(?<![\d.])1[3-9]\d{9}(?![\d.])"
    ),
    "a record number": re.compile(
        r"\b(?:MRN|(?i:(?:medical|hospital|patient) (?:record )?(?:number|no\.|id)))"
        r"(?: is|:| ?#)* ?[A-Z]{0,3}-?\d{5,12}\b|(?:住院号|病历号|病案号|门诊号)(?:为|是|[:：])? ?\d{5,}"
    ),
    "an identity number": re.compile(
        r"(?<![\d-])\d{3}-\d{2}-\d{4}(?![\d-])|(?<!\d)[1-9]\d{5}(?:19|20)\d\d[01]\d[0-3]\d{4}[\dXx](?!\d)"
    ),
    "a date of birth": re.compile(
        rf"(?:\bDOB\b|\bD\.O\.B\.|\b[Dd]ate of birth\b|\b[Bb]orn on\b|出生日期)[^\w]{{0,3}}(?:is )?{_DAY}"
    ),
    "a name with a date": re.compile(rf"{_NAME}[^\n]{{0,60}}?\b{_DAY}|\b{_DAY}[^\n]{{0,60}}?{_NAME}"),
}
FOUR_DIGITS = re.compile(r"\d{3}[-. )]{0,2}\d")
YEAR = re.compile(r"(?:19|20)\d\d")
DATED = ("a date of birth", "a name with a date")
RECORD_GATE = ("mrn", "record", "hospital", "patient", "住院", "病历", "病案", "门诊")


def personal_data(row: Row) -> str | None:
    """Return which kind of personal data a row seems to hold and in which text, never the data itself; or None."""

    def find(text: str) -> str | None:
        if "@" in text and PERSONAL["an e-mail address"].search(text):
            return "an e-mail address"
        if not FOUR_DIGITS.search(text):
            return None
        rules = ["a phone number", "an identity number"]
        folded = text.lower()
        if any(word in folded for word in RECORD_GATE):
            rules.append("a record number")
        if YEAR.search(text):
            rules += DATED
        return next((kind for kind in rules if PERSONAL[kind].search(text)), None)

    return _first(row, find)


SCRIPTS = {
    "Chinese or Japanese": re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"),
    "Korean": re.compile("[\uac00-\ud7af]"),
    "Cyrillic": re.compile("[\u0400-\u052f]"),
    "Arabic": re.compile("[\u0600-\u06ff]"),
    "Hebrew": re.compile("[\u05d0-\u05ea]"),
    "Devanagari": re.compile("[\u0904-\u0939]"),
    "Thai": re.compile("[\u0e01-\u0e30]"),
}
COMMON_SIGNS = re.compile("[\x00-\u03ff\u2000-\u2bff]+")
LATIN_WORD = re.compile("[A-Za-z\u00c0-\u024f]{2,}")
LATIN_SENTENCE = re.compile(r"(?:[A-Za-z][A-Za-z'’-]*[,;]? ){9,}[A-Za-z]+")
LETTERS_A_WORD = {"Chinese or Japanese": 2, "Korean": 3}
WORDS_TO_TELL = 5
STRAY_LETTERS = 4


def _letters(text: str) -> dict[str, int]:
    """Letters per script other than Latin; Greek ones are symbols here."""
    rest = "" if text.isascii() else COMMON_SIGNS.sub("", text)
    return {name: count for name, rule in SCRIPTS.items() if (count := len(rule.findall(rest)))} if rest else {}


def _script(text: str, letters: dict[str, int]) -> str | None:
    """The script of most of a text's words, or None where there are too few to tell."""
    words = {name: count / LETTERS_A_WORD.get(name, 5) for name, count in letters.items()}
    words["Latin"] = len(LATIN_WORD.findall(text if letters else text[:500]))
    name = max(words, key=lambda script: words[script])
    return name if words[name] >= WORDS_TO_TELL else None


def _language_mix(row: Row) -> str | None:
    if row.question.isascii() and row.reasoning.isascii() and row.answer.isascii():
        return None
    letters = {field: _letters(getattr(row, field)) for field in FIELDS}
    scripts = {field: _script(getattr(row, field), letters[field]) for field in FIELDS}
    asked = scripts["question"]
    for field in ("answer", "reasoning"):
        if asked and scripts[field] and scripts[field] != asked:
            return f"question in {asked}, {field} in {scripts[field]} letters"
    for field in ("answer", "reasoning"):
        if scripts[field] == "Latin":
            for name, count in letters[field].items():
                if count >= STRAY_LETTERS and name not in letters["question"]:
                    return f"{count} {name} letters amid Latin ones in {field}"
        elif scripts[field] and (match := LATIN_SENTENCE.search(getattr(row, field))):
            return f"{short(match.group(), 40)!r} amid {scripts[field]} letters in {field}"
    return None


OPTION = re.compile(r"^[ \t]*\(?([A-J])[.):、．][ \t]*\S", re.MULTILINE)
THOUSANDS = re.compile(r",(?<=\d,)(?=\d{3}(?!\d))")
OWN_LETTER = re.compile(
    r"(?:\b(?:answer|option|choice)(?: is)?:? ?|答案(?:是|为)?[:：]? ?|^\W{0,3})(?:option )?\(?([A-J])\b"
    r"(?:[.):,、]|\W*$)"
)
_SAID = r"(?i:\bans(?:wer)?\b|\b(?:correct|right|best) (?:answer|option|choice)\b|正确答案|答案)"
STATED_LETTER = re.compile(
    rf"{_SAID}[ .:：=–-]*(?:(?:is|would be|should be|must be|是|为|选)[ .:：=–-]*)?(?:(?i:option|choice) )?"
    r"(?:[\"'“‘(\[]\s*([A-Ja-j])\s*[\"'”’)\]]|([A-J])(?=[.):,，。]|\s*$|\s+i\.?e)|([a-j])(?=[.):]))",
    re.MULTILINE,
)
STATED_GATE = ("ans", "correct", "right", "best", "答案")
STATED_TEXT = re.compile(
    r"(?:\b(?:correct|right) answer(?: is|:| is:)|^[ \t]*ans(?:wer)?[.:]|正确答案(?:是|为)?[:：]?)[ \t]*"
    r"(\S[^\n]{2,200})",
    re.IGNORECASE | re.MULTILINE,
)


def _stated(text: str) -> list[str]:
    folded = text.lower()
    if not any(word in folded for word in STATED_GATE):
        return []
    return [next(filter(None, match.groups())).upper() for match in STATED_LETTER.finditer(text)]


def _own_letter(answer: str) -> str | None:
    match = OWN_LETTER.search(answer[:200])
    return match.group(1) if match else None


def _content(text: str) -> set[str]:
    """The first letters of a text's content words (pairs of characters without spaces), as overlap_score has them."""
    found: set[str] = set()
    for token in TOKEN.findall(_folded(text)):
        if IS_UNSPACED.match(token):
            found.update(token[at : at + 2] for at in range(max(1, len(token) - 1)))
        elif token not in STOP_WORDS and not (len(token) == 1 and token.isascii() and token.isalpha()):
            found.add(token if token[0].isdigit() else token[:STEM])
    return found


def _folded(text: str) -> str:
    return THOUSANDS.sub("", text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold())


def _unsupported_answer(row: Row) -> str | None:
    options = set(OPTION.findall(row.question))
    if len(options) >= 2:
        letter, stated = _own_letter(row.answer), _stated(row.reasoning)
        if letter in options and stated and stated[-1] in options and stated[-1] != letter:
            return f"the reasoning says {stated[-1]}, the answer {letter}"
    words = _content(row.answer) - EMPTY_WORDS
    if len(row.reasoning) < LEAST_REASONING:
        return None
    if len(words) >= LONG_ANSWER:
        held, where = _held(words, row.reasoning), "the reasoning"
        unsupported = held < SUPPORTED * len(words)
    elif words and len(options) < 2:
        whole = len(row.reasoning) <= WHOLE_REASONING
        held = _held(words, row.reasoning if whole else row.reasoning[len(row.reasoning) // 2 :])
        where = "the reasoning" if whole else "the reasoning's second half"
        unsupported = not held
    else:
        return None
    return f"{held} of the answer's {len(words)} content words stand in {where}" if unsupported else None


def _held(words: set[str], text: str) -> int:
    text = _folded(text)
    return sum(word in text for word in words)


def _answer_in_question(row: Row) -> str | None:
    stated = _stated(row.question)
    letter = _own_letter(row.answer) if stated else None
    if letter and letter in stated:
        return f"the question says that the answer is {letter}"
    claims = list(STATED_TEXT.finditer(row.question))
    copied = len(row.answer) <= len(row.question) and len(OPTION.findall(row.question)) < 2
    if not claims and not copied:
        return None
    answer = plain_text(row.answer).removeprefix("the answer is ").removeprefix("answer ")
    for claim in claims:
        given = plain_text(claim.group(1))
        if len(given) >= 4 and (f"{answer} ".startswith(f"{given} ") or f"{given} ".startswith(f"{answer} ")):
            return f"the question says {short(claim.group())!r}"
    if copied and f" {answer} " in f" {plain_text(row.question)} " and len(_content(answer)) >= COPIED_WORDS:
        return f"the whole answer stands in the question: {short(row.answer)!r}"
    return None


RULES: dict[str, Callable[[Row], str | None]] = {
    "chat_markers": _chat_markers,
    "injection": _injection,
    "markup": _markup,
    "personal_data": personal_data,
    "language_mix": _language_mix,
    "answer_in_question": _answer_in_question,
    "unsupported_answer": _unsupported_answer,
}
