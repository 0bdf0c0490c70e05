"""The words of the check's page, in English and Chinese; what was found is worded in check.py."""

from __future__ import annotations

from deepdoctor.data.check import MEANINGS

__all__ = ["MEANING", "REMEDY", "WORDS", "Both"]

Both = tuple[str, str]
"""One text in English and in Chinese."""

WORDS: dict[str, Both] = {
    "kicker": ("DeepDoctor data check", "DeepDoctor 数据检查"),
    "research": ("Research only, not clinical guidance.", "仅供研究，不作临床指导。"),
    "read": ("rows read", "读入行数"),
    "kept": ("rows kept", "保留行数"),
    "dropped": ("rows dropped", "去除行数"),
    "tokens": ("tokens kept", "保留的词元"),
    "trained": ("tokens that carry loss", "计入损失的词元"),
    "nothing": ("Nothing was found.", "未发现问题。"),
    "summary": ("What was found", "检查结果"),
    "finding": ("finding", "问题"),
    "share": ("share of rows", "占比"),
    "rule_note": (
        "Found by rules, so both kinds of error are possible. A row that was kept may have several findings; a dropped "
        "row is named once, with the first reason that applied. Nothing is cut.",
        "结果由规则得出，漏报和误报都可能出现。保留的行可以有多个问题；被去除的行只记一次，即最先适用的原因。不会截断任何行。",
    ),
    "lengths": ("Lengths in tokens", "长度（词元）"),
    "lengths_note": (
        "Rows that were kept. Left to right: number of tokens; upwards: number of rows.",
        "仅统计保留的行。横轴为词元数，纵轴为行数。",
    ),
    "row": ("whole row", "整行"),
    "reasoning": ("reasoning", "推理"),
    "answer": ("answer", "回答"),
    "question": ("question", "问题"),
    "median": ("median", "中位数"),
    "p99": ("99 % have at most", "99% 不超过"),
    "longest": ("longest", "最长"),
    "keeps_all": ("would keep every row", "时不会因长度去除任何行"),
    "openings": ("How reasonings begin", "推理的开头"),
    "openings_note": (
        "First three words of the reasonings that were read, commonest first; a Chinese character counts as a word.",
        "读入的推理的前三个词，按出现次数排列；每个汉字算一个词。",
    ),
    "details": ("Findings, with examples", "各项问题与示例"),
    "what_to_do": ("What to do", "如何处理"),
    "rows": ("Rows", "行号"),
    "more": ("more in check.json", "见 check.json"),
    "evidence": ("Evidence", "依据"),
    "masked": (
        "The texts of this row are not shown: they seem to hold personal data.",
        "此行疑似含有个人信息，不显示内容。",
    ),
    "no_texts": (
        "The rows themselves are not shown: the source has changed since the check, or cannot be read.",
        "未显示原文：数据来源在检查后有变动，或无法读取。",
    ),
    "first_row": ("earlier question", "前面的问题"),
    "limits": ("What this does not show", "局限"),
    "limit_facts": (
        "Whether an answer is right. Rules compare words; no model and no physician read the rows.",
        "不判断回答是否正确。规则只比较文字，没有模型或医生读过这些行。",
    ),
    "limit_absence": (
        "That something is absent. Personal data in particular can hide from every pattern.",
        "未发现不等于没有，个人信息尤其可能避开所有规则。",
    ),
    "limit_overlap": (
        "Overlap with a benchmark: this page does not search for it.",
        "与评测题的重叠：本页不作检查。",
    ),
}

_ZH = {
    "empty_field": "有空字段",
    "control_tokens": "文本含控制词元或 <think> 标签",
    "missing_image": "问题需要一张并不存在的图片",
    "picture_in_reasoning": "推理在看一张并不存在的图片",
    "duplicate": "与前面某行的问题、推理和回答都相同",
    "chat_markers": "文本含其他对话或推理格式的标记",
    "injection": "文本含对模型的指令（提示注入）",
    "markup": "文本含 HTML 或多余的代码围栏",
    "personal_data": "文本疑似含有个人信息",
    "language_mix": "各字段使用不同的文字",
    "answer_in_question": "问题中已给出答案",
    "unsupported_answer": "推理没有得出该回答",
    "uniform_opening": "推理的开头与许多行相同",
    "too_long": "超过 max_seq_len",
    "duplicate_question": "问题与前面某行相同，推理或回答不同",
    "near_duplicate": "问题和回答与前面某行几乎相同",
}
MEANING: dict[str, Both] = {code: (text, _ZH[code]) for code, text in MEANINGS.items()}

REMEDY: dict[str, Both] = {
    "empty_field": (
        "Always dropped. Check the names of the columns where there are many.",
        "一律去除。若数量很多，请核对列名。",
    ),
    "control_tokens": (
        "Always dropped: such text would become a control token. Take it out of the texts; the template writes it.",
        "一律去除：这类文本会变成控制词元。请从文本中删去，模板会自行写入。",
    ),
    "missing_image": (
        "Dropped; `data.missing_image: keep` trains on them all the same.",
        "默认去除；`data.missing_image: keep` 则照样训练。",
    ),
    "duplicate": (
        "Dropped; `data.duplicates: keep` trains on the copies too.",
        "默认去除；`data.duplicates: keep` 则保留副本。",
    ),
    "too_long": (
        "Dropped, never cut; raise `data.max_seq_len`, or stop the run with `data.too_long: error`.",
        "去除而不截断；可调大 `data.max_seq_len`，或用 `data.too_long: error` 停止运行。",
    ),
}
