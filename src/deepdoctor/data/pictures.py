"""Does a text lean on a picture that is not there?

The rules look for words that point at something outside the text ("shown below", "see image", "the provided diagram").
A finding told in words ("a chest x-ray shows ...", "the imbalance shown in the gas analysis") points at nothing and
passes. Written by reading medical-o1 rows and MedQA, MedMCQA and MedXpertQA questions; measured in
tests/data/test_pictures.py.
"""

from __future__ import annotations

import re

__all__ = ["picture_in_reasoning", "picture_reference"]

# Things that are only ever seen; not "the clinical picture" and its kin.
PICTURE = (
    r"(?:(?<!clinical )(?<!overall )(?<!whole )(?<!full )(?<!fuller )(?<!big )(?<!bigger )(?<!broader )(?<!complete )"
    r"(?<!larger )pictures?|images?|photo(?:graph|micrograph)?s?|micrographs?|figures?|fig\b\.?|(?:line )?drawings?"
    r"|diagrams?|illustrations?|graphs?|exhibits?|videos?|colou?r plates?|flow ?cha(?:rt)?s?|pedigrees?|schematics?)"
)
# Examinations and things that may be a picture but are mostly told in words.
SCAN = (
    r"(?:x\s?[-‑]?\s?rays?|radiographs?|roentgenograms?|films?|imaging|(?:ct|mri|mr|ultrasound)(?: (?:scan|slice)s?)?"
    r"|scans?|mris?|ultrasonogra(?:phy|m)s?|sonograms?|e[ck]g|eeg|electrocardiogra(?:m|phy)s?|tracings?|smears?"
    r"|(?:rhythm )?strips?|slides?|histo(?:logy|pathology)|biops(?:y|ies)|specimens?|angiogra(?:m|phy)s?|fundoscopy"
    r"|echocardiogra(?:m|phy)s?|(?:mammo|audio|myelo|arterio|veno|urethro|cysto|pyelo|hysterosalpingo)grams?"
    r"|spirometry|(?:flow|pressure)[- ]volume (?:loop|curve)s?|electrophoresis(?: results?)?|gels?|karyotypes?"
    r"|instruments?|devices?|rash(?:es)?|lesions?)"
)
SHOWN = r"(?:shown|depicted|displayed|pictured|illustrated|reproduced|provided|given|attached)"
SEEN = rf"(?:{SHOWN[3:-1]}|presented|seen|demonstrated|marked|label+ed|indicated|identified|visible)"
WORDS = r"(?:\w+ ){0,2}?"
NO_FINDINGS = (
    r"(?![-\s]*(?:findings?|changes?|patterns?|signs?|features?|results?|tests?|techniques?|modalit\w+|stud(?:y|ies)"
    r"|methods?|guided|quality))"
)
END = r"(?=\s*(?:[.,;?!)\]]|$|below|above|here\b|in (?:the|figure)|as (?:image|figure)|with\b|what\b|which\b))"


def _rules(*rules: str) -> list[re.Pattern[str]]:
    return [re.compile(rule, re.IGNORECASE) for rule in rules]


# Words that name the picture they point at.
NAMED = _rules(
    # Left over from the page the row was taken from.
    r"\[\s*img\b|<\s*img\b|!\[[^\]]*\]\(|\[(?:image|figure|picture|photo|diagram)[^\]]{0,40}\]",
    r"\b[\w/-]{1,80}\.(?:jpe?g|png|gif|bmp|tiff?|webp|svg)\b",
    # "see image", "looking at the CT images", "(Figure 1)", "Image A".
    rf"\b(?:see|refer to|view|look(?:ing)?(?: \w+){{0,2}} at|examin(?:e|ing)|review|observe|consult|click(?: on)?)"
    rf"\s+(?:the|this|these)?\s*{WORDS}{PICTURE}\b(?! (?:quality|of (?:a|an|the) (?:patient|person)))",
    r"\((?:see |as in )?(?:fig(?:ure)?s?\b\.?|(?:images?|picture|exhibit|photo)\b)(?:\s*(?:\d+|[a-h])\b)?[^()]{0,40}\)",
    r"\b(?-i:[Ff]ig(?:ure)?s?\b\.?|FIG(?:URE)?|[Ii]mages?|IMAGE|Exhibit)\s*(?-i:[A-H]\b|\d+\b)(?!\s*(?:%|mg|ml|cm|mm))",
    # "the following x-ray", "in the provided diagram", "the accompanying photograph".
    rf"(?<!of )\bthe following {WORDS}(?:{PICTURE}|{SCAN})\b{NO_FINDINGS}(?! (?:is|are|was|were|except|for)\b)",
    rf"\b(?:accompanying|attached|enclosed|adjacent|adjoining"
    rf"|(?:the|this|a|an) (?:provided|given|displayed|above|below|shown|depicted))"
    rf" {WORDS}(?:{PICTURE}|{SCAN})\b{NO_FINDINGS}",
    # "shown in the graph", "the structure in the image", "based on this picture".
    rf"\b{SEEN} (?:in|on|by|with|as|from) (?:the |this |these |an? )?{WORDS}{PICTURE}\b",
    rf"\b(?:in|from|based on|according to|on) (?:this|these) {WORDS}{PICTURE}\b",
    rf"\b(?:based on|according to|given|per|from) the {PICTURE}\b(?! (?:quality|of))",
    rf"\b(?:point|curve|line|bar|area|segment|label|structure|box|arrow(?:head)?|organism|parasite|cell|muscle|nerve"
    rf"|vessel|bone|tooth|device|instrument|condition|patient|child|lesion|abnormality|finding)s?\b[^.?;]{{0,20}}"
    rf" (?:in|on) the {PICTURE}\b",
    # The Chinese configuration of medical-o1.
    r"如(?:下|上|右|左|附)?图|下图(?!像)|上图(?!像)|附图|见图|图片(?:中|所示|显示|如下)",
)
# Words that say something is shown, marked or provided.
SAID = _rules(
    # "the x-ray is shown below", "an ECG is shown.", "CT imaging provided,", "radiograph below". After a colon, or in
    # laboratory tables, the finding follows in words.
    rf"\b(?:{PICTURE}|{SCAN})\b(?:\s+(?:[\w'’-]+|\([^)]*\))){{0,8}}?\s+(?:is|are|was|were)\s+(?:also |as )?"
    rf"(?:{SHOWN}|as follows){END}(?!\s*(?:below|above)?\s*:)",
    rf"\b(?:{PICTURE}|{SCAN})\b[^.;:?]{{0,60}}?\b(?:and|is|are|was|were|\()\s*(?:results? (?:is|are) )?{SEEN} "
    r"(?:below|above|here)\b(?!\s*:)",
    rf"\b(?:{PICTURE}|{SCAN})(?: findings?| images?| results?)? {SEEN}\b{END}",
    rf"\b(?:{PICTURE}|radiographs?|x[-‑ ]?rays?|e[ck]g|scan) (?:below|above)\b(?! (?:the|an?|\d))",
    r"\b(?:depicted|pictured|illustrated) (?:below|above|here)\b",
    r"(?<!been )\b(?:shown|depicted|pictured|illustrated)(?: here| below| above)?\s*\?",
    # Arrows and letters drawn on it.
    r"\b(?:indicated|marked|pointed(?: out| to| at)?|shown|identified|designated|denoted|labell?ed) (?:by|with) "
    r"(?:the |an? |this )?(?:\w+ )?arrow(?:s|heads?)?\b",
    r"\barrow(?:s|heads?)? (?:points?|indicates?|marks?|shows?)\b",
    r"\b(?:structure|area|point|region|box|organ|nerve|vessel|part|line|curve|segment)s? (?:labell?ed|marked)\b"
    r"(?! (?:by|with|as|for)\b)|\blabell?ed (?:box|structure|area|region|part|curve)\b",
    r"\b(?:video|image|picture|photo)[- ]based question\b",
)
# "Results of the study are shown." ends a sentence; values follow as text, and a condition is no finding.
SHOWN_END = re.compile(r"\b(?:is|are) (?:also )?(?:shown|depicted|pictured)(?=\s*[.)])", re.IGNORECASE)
NO_PICTURE = re.compile(
    r"\b(?:lab\w*|values?|serum|panel|counts?|vitals?|reports?|if|unless|until|whether|no)\b", re.IGNORECASE
)
# No rule can match a lower-case text without one of these: most texts are done with here, in a tenth of the time.
NOUN_GATE = (
    r"imag(?!in)|picture|photo(?!ph)|micrograph|figures?\b(?! out| it| this| that| what)|fig\b|figs\b|diagram|drawing"
    r"|illustrat|graphs?\b|exhibit|video|plate\b|plates\b|flow ?cha|pedigree|schematic|\[|<\s*img"
    r"|\.(?:jp|png|gif|bmp|tif|webp|svg)|图"
)
IN_REASONING = re.compile(NOUN_GATE)
IN_QUESTION = re.compile(
    NOUN_GATE
    + r"|shown|depict|display|pictured|provided|given|following|presented|attached|below|above|arrow|labell?ed"
    r"|marked|accompan|enclosed|adja|adjoining|as follows"
)


def picture_reference(question: str) -> str | None:
    """Return the first words with which a question points at a picture, or None when it points at none.

    Found by rule, so both kinds of error are possible: of 138 medical-o1 questions it names 2 (both need a diagram), of
    743 MMLU-Pro health questions, which have no pictures, none.
    """
    question = _compact(question)
    if not IN_QUESTION.search(question.lower()):
        return None
    found = [match for rule in NAMED + SAID if (match := rule.search(question))]
    for match in SHOWN_END.finditer(question):
        sentence = max(question.rfind(mark, 0, match.start()) for mark in ".:;?!\n") + 1
        if not NO_PICTURE.search(question, sentence, match.start()):
            found.append(match)
            break
    return min(found, key=lambda match: match.start()).group().strip() if found else None


def picture_in_reasoning(reasoning: str) -> str | None:
    """Return the first words with which a chain of thought claims to look at a picture, or None.

    Only rules that name the picture count: a chain of thought says "shown" and "provided" of many things.
    """
    reasoning = _compact(reasoning)
    if not IN_REASONING.search(reasoning.lower()):
        return None
    found = [match for rule in NAMED if (match := rule.search(reasoning))]
    return min(found, key=lambda match: match.start()).group().strip() if found else None


def _compact(text: str) -> str:
    """Return the first 20,000 characters, single spaces and no empty lines: keeps every rule linear in the text."""
    lines = (" ".join(line.split()) for line in text[:20_000].split("\n"))
    return "\n".join(line for line in lines if line)
