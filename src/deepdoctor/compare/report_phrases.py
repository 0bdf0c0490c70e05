"""Chinese for what reaches the report in English: names of settings, and sentences that other stages wrote.

A sentence is known by its pattern; what stands in a pattern's groups is taken over as it is.
"""

from __future__ import annotations

import re

__all__ = ["FIELDS", "chinese_sentence"]

FIELDS = {
    "run": "运行名称", "recipe": "配方", "id": "名称", "model": "模型", "revision": "修订版本", "precision": "权重精度",
    "compute_dtype": "计算精度", "parameters": "参数量", "trainable_parameters": "可训练参数量", "source": "来源",
    "train": "训练", "held_out": "留出", "read": "读入", "dropped": "去除", "content_hash": "内容哈希",
    "template": "模板", "prompt_fingerprint": "提示指纹", "steps": "优化步数", "optimizer": "优化器",
    "tokens": "词元数",
    "label_tokens": "标签词元数", "seconds": "秒数", "tokens_per_s": "词元/秒", "updates_applied": "已执行的更新",
    "predicted_peak_mib": "预计内存峰值（MiB）", "peak_mib": "内存峰值（MiB）", "token_budget": "每批词元上限",
    "max_new_tokens": "生成长度上限", "max_thinking_tokens": "思考长度上限", "temperature": "温度", "top_p": "top-p",
    "kv_cache": "键值缓存格式",
    "top_k": "top-k", "min_p": "min-p", "repetition_penalty": "重复惩罚", "seed": "随机种子",
    "extraction_rule": "读取选项的规则", "lax_rule": "宽松规则", "batch_size": "批大小", "date": "日期",
    "machine": "机器", "platform": "系统", "cores": "核数", "threads": "线程数", "gpu": "GPU",
    "gpu_memory_mib": "显存（MiB）", "compute_capability": "计算能力", "versions": "版本", "base": "基座",
    "tuned": "微调后", "tasks": "题集", "version": "版本", "licence": "许可", "protocol": "方案",
    "clusters": "聚类字段",    "questions": "题目", "file": "文件", "sha256": "SHA-256", "samples": "每题回答次数",
    "shuffle_options": "打乱选项", "harm_margin": "非劣效界值", "loss": "损失", "seconds_per_step": "秒/步",
    "data": "数据", "compare": "比较", "export": "导出", "energy_wh": "能耗（Wh）", "energy_j": "能耗（J）",
    "energy_joules": "能耗（J）", "asking_seconds": "作答秒数", "answering_seconds": "作答秒数",
    "loss_seconds": "计算损失秒数", "mean_power_w": "平均功率（W）", "cost": "消耗", "python": "Python",
    "answer_tokens_per_s": "作答词元/秒", "words": "思考收尾文本", "stage": "阶段", "peak_gpu_mib": "显存峰值（MiB）",
    "placebo_shuffled_answers": "安慰剂（打乱答案）", "placebo_shuffled_rows": "安慰剂（打乱推理与答案）",
    "config": "配置", "split": "划分", "hub": "Hub 数据集",
    "system": "系统提示", "held_as": "存放精度", "reduced": "缩减的计算",
}  # fmt: skip
"""Field of a result -> its name in Chinese. A field that is not here is shown by its own name."""

QUESTIONS = r"([\d,]+)(?: questions?)?"
SENTENCES: tuple[tuple[str, str], ...] = (
    # What a run says of itself
    (
        r"(.+) and (.+): written for DeepDoctor as an illustration, reviewed by no clinician\.",
        "{0} 和 {1}：为 DeepDoctor 编写的示例，未经临床医生审阅。",
    ),
    (
        r"(.+): written for DeepDoctor as an illustration, reviewed by no clinician\.",
        "{0}：为 DeepDoctor 编写的示例，未经临床医生审阅。",
    ),
    (
        r"A model of this size gains form, not medical knowledge, from such training\.",
        "这种规模的模型经此训练只会改善格式，不会获得医学知识。",
    ),
    (
        r"No question has a key, so nothing here measures whether answers are right\.",
        "题目均无标准答案，因此本报告不衡量回答是否正确。",
    ),
    (
        r"(.+) of (.+) questions look like one of the (.+) training rows \(overlap\.json names them\); a full "
        r"paraphrase would not be seen\.",
        "{1} 题中有 {0} 题与 {2} 行训练数据中的某行相似（见 overlap.json）；完全改写的题目检索不到。",
    ),
    (
        r"(.+) question\(s\) kept the order of their options, one of which speaks of others by place or letter "
        r'\("all of the above"\)\.',
        "{0} 题保持原有的选项顺序，因其选项以位置或字母提及其他选项（如“以上都是”）。",
    ),
    (
        r"(.+): look (.+) of this run at this question set; the first, on (.+), said (.+)\. Intervals and p values are "
        r"not corrected for earlier looks; a gain \(or that a loss is ruled out\) is claimed only where every look "
        r"says so\.",
        "{0}：本次运行第 {1} 次查看该题集；首次（{2}）结论为{3}。置信区间和 P 值未因先前查看而校正；"
        "仅当每次查看结论一致时才称有提高（或已排除下降）。",
    ),
    # Answers made elsewhere
    (
        r"The answers were made elsewhere: whether both sides had the same prompts, limits and sampling is not known, "
        r"nor whether the questions were trained on\.",
        "回答在别处生成：双方的提示、长度上限和采样是否相同，以及训练时是否见过这些题目，均不可知。",
    ),
    (
        r"(.+): the verdict hangs on how letters are read: (.+) by the rule, (.+) when letters are read at any price\.",
        "{0}：结论取决于读取选项的方法：按既定规则为{1}，尽量读出选项时为{2}。",
    ),
    (
        r"(.+): (.+) cluster\(s\) are too few to tell how far the difference would vary; the interval may be too "
        r"narrow\.",
        "{0}：仅 {1} 个聚类，不足以估计差值的变异；置信区间可能过窄。",
    ),
    (
        r"(.+): no questions file was found, so keys come from the answers and repeated questions are not known; where "
        r"some repeat, the interval is too narrow\. `--task (.+)` names one\.",
        "{0}：未找到题目文件，答案取自回答文件，无法识别重复题目；若有重复，置信区间会过窄。可用 `--task {1}` 指定。",
    ),
    (
        r"(.+?): (.+?)(?: of ([\d,]+) answered questions?)? not usable or not in (.+), left out \((.+)\)\.",
        "{0}：{1} 题不可用或不在 {3} 中，已剔除（{4}）。",
    ),
    (r"(.+): (.+) of (.+) questions in (.+) were answered\.", "{0}：{3} 的 {2} 题中有 {1} 题得到回答。"),
    (
        rf"(.+): {QUESTIONS} left out on both sides, asked in another version \((.+)\)\.",
        "{0}：{1} 题因版本不同在双方均剔除（{2}）。",
    ),
    (
        rf"(.+): in {QUESTIONS} two options read like the right one; only the key counts\.",
        "{0}：{1} 题有两个选项与正确选项文字相同；仅以标准答案为准。",
    ),
    (
        rf"(.+): {QUESTIONS} asked twice, with different keys; both copies are kept\.",
        "{0}：{1} 题重复出现而答案不同；两份均保留。",
    ),
    (
        rf"(.+): {QUESTIONS} with reference to a picture that neither side saw\.",
        "{0}：{1} 题提到双方都看不到的图片。",
    ),
    (
        r"(.+): both sides gave the same answers, word for word; look whether these are two models' answers\.",
        "{0}：双方回答逐字相同；请核实是否为两个模型的回答。",
    ),
    (
        r"(.+): ([\d,]+)(?: letters?)? not among the question's options, counted as wrong\.",
        "{0}：{1} 个字母不在题目选项中，计为错误。",
    ),
    (r"(.+): the letters were read elsewhere, by a rule not known here\.", "{0}：选项字母由别处读出，规则不明。"),
    (
        r"(.+): (.+) of (.+) answers in which no letter can be read carry (.+) in the file, a fill-in; letters in the "
        r"file are not used\.",
        "{0}：{2} 个无法读出选项的回答中，有 {1} 个在文件中填为 {3}，系填充值；不采用文件中的字母。",
    ),
    (
        r"(.+): no letter could be read from any answer, so the difference is one of form\.",
        "{0}：没有任何回答能读出选项，因此差值只反映格式。",
    ),
    (
        r"The answers files named under Asking \(sha256\) give the same numbers again; answers\.jsonl holds what was "
        r"read, stats\.json the numbers of this page\.",
        "用“作答”一栏列出的回答文件（sha256）可得到相同数字；answers.jsonl 为读入内容，stats.json 为本页的数字。",
    ),
    (r"not found", "未找到"),
    (r"not stated", "未说明"),
    (r"(.+) against (.+)", "{0} 对 {1}"),
    # Question sets
    (
        r"medmcqa: a third of the keys are A; some rows of medical-o1 were made from questions of this split\.",
        "medmcqa：三分之一的答案为 A；medical-o1 的部分数据由该划分的题目改写而来。",
    ),
    (
        r"medqa: about one question in ten refers to a picture that is not part of the set\.",
        "medqa：约十分之一的题目提到题集中没有的图片。",
    ),
    (
        r"medqa: fine-tuning on chains of thought with wrong answers has raised it by 3\.5 points \(med-s1\), so a "
        r"gain is not proof of new knowledge\.",
        "medqa：用答案错误的思维链微调也曾使其提高 3.5 个百分点（med-s1），因此提高不等于获得新知识。",
    ),
    (
        r"medxpertqa: about 13 % \(8 to 20 %\) of the questions seem to be rewritten from MedQA's training split, "
        r"others from its test split; a gain after training on such rows is suspect\.",
        "medxpertqa：约 13%（8% 至 20%）的题目似由 MedQA 训练集改写，另有一些由其测试集改写；"
        "用此类数据训练后的提高值得怀疑。",
    ),
    (
        r"medxpertqa: models of 8 billion parameters score 11 to 23 %, guessing 10 %\.",
        "medxpertqa：80 亿参数模型的正确率为 11% 至 23%，随机猜测为 10%。",
    ),
    (
        r"mmlu-pro-health: 818 rows are 683 different questions; 416 of them stand in MMLU's medical subjects too, so "
        r"the two are not to be averaged\.",
        "mmlu-pro-health：818 行中只有 683 道不同的题目，其中 416 道也见于 MMLU 医学科目，两者不应取平均。",
    ),
    (
        r"pubmedqa: ten models from GPT-4o-mini to DeepSeek-R1 lie between 73\.6 and 79\.6 %, and always answering yes "
        r"scores 55 %; it is used to look for harm only\.",
        "pubmedqa：从 GPT-4o-mini 到 DeepSeek-R1 的十个模型均在 73.6% 至 79.6% 之间，始终回答 yes 可得 55%；"
        "仅用于非劣效检验。",
    ),
    (r"question and four lettered options; free reasoning, then one letter", "题干和四个选项；自由推理后给出一个字母"),
    (r"question and ten lettered options; free reasoning, then one letter", "题干和十个选项；自由推理后给出一个字母"),
    (
        r"question and three to ten lettered options; free reasoning, then one letter",
        "题干和三至十个选项；自由推理后给出一个字母",
    ),
    (
        r"abstract without its conclusion, question, yes / no / maybe as A / B / C; reasoning, then one letter",
        "去除结论的摘要、题干，yes / no / maybe 对应 A / B / C；推理后给出一个字母",
    ),
    # What the search for overlap cannot see
    (
        r"One changed word hides a question from it, and it does not see reasoning or answers\.",
        "改动一个词即检索不到，也不检索推理和回答。",
    ),
    (
        r"It does not see questions put into synonyms or another language, vignettes shortened to their core, "
        r"questions of one or two rare words, options or contexts without their question, or what stands only in "
        r"reasoning or answer; and the more rows there are, the closer a pair has to be\.",
        "检索不到换用同义词或其他语言的题目、压缩后的病例、仅含一两个少见词的题目、脱离题干的选项或背景，以及只出现在推理或回答中的内容；"
        "数据行越多，判定所需的相似度越高。",
    ),
    (
        r"It does not see rephrased text, nor runs of fewer than (.+) content words in the same order\.",
        "检索不到改写的文本，以及少于 {0} 个实词的相同词串。",
    ),
    (
        r"Texts are not compared by an embedding model: a full paraphrase can pass every method\.",
        "未用嵌入模型比较文本：完全改写的题目可能通过所有方法的检查。",
    ),
    (
        r"It compares the questions only, by the mean of their token vectors: it sees neither word order nor negation "
        r"nor what stands in reasoning, answer or options, and a paraphrase in other terms mostly passes it\.",
        "只用词元向量的均值比较题干：不分辨词序和否定，不检索推理、回答和选项中的内容；换用其他词语的改写大多检索不到。",
    ),
    # Methods
    (r"Tango score interval; exact McNemar test", "Tango 得分区间；McNemar 精确检验"),
    (
        r"Tango score interval; exact McNemar test; counts divided by the design effect (.+) of (.+) clusters "
        r"\(Rao-Scott\), t quantile with (.+) degrees of freedom",
        "Tango 得分区间；McNemar 精确检验；计数除以 {1} 个聚类的设计效应 {0}（Rao-Scott 法），t 分位数的自由度为 {2}",
    ),
    (r"no pairs", "无配对"),
)
VERDICTS = {"better": "优于基座", "worse": "劣于基座", "cannot tell": "无法判断"}
PATTERNS = tuple((re.compile(pattern), text) for pattern, text in SENTENCES)


def chinese_sentence(sentence: str) -> str | None:
    """Return a known English sentence in Chinese, or None for one that no pattern fits."""
    for pattern, text in PATTERNS:
        if match := pattern.fullmatch(sentence):
            return text.format(*(VERDICTS.get(group or "", group or "") for group in match.groups()))
    return None
