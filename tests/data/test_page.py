"""The check's page: whole, self-contained, escaped, in both languages, and silent about persons."""

import json
import re
from html.parser import HTMLParser

import pytest
from helpers_prompt import byte_prompt, row, write_jsonl

from deepdoctor.data.check import MEANINGS, check_rows
from deepdoctor.data.command import check_source
from deepdoctor.data.page import histograms, write_page
from deepdoctor.data.page_text import MEANING, WORDS
from deepdoctor.errors import RunError
from deepdoctor.recipe import DataSection
from deepdoctor.ui import SilentReporter

VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Tags with their attributes, and the text inside those of each language."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.words, self.open = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        """Note a tag and, unless it is void, that it is open."""
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        """Note a tag that closes itself."""
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        """Close the innermost tag, which must be this one."""
        assert self.open.pop() == tag, f"</{tag}> out of place"

    def handle_data(self, data):
        """Collect what is read."""
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def page_of(tmp_path, rows, again=None, **settings):
    """Check rows and return the page's text and parts; ``again``: the rows as the source holds them now."""
    kept, report = check_rows(rows, byte_prompt(), DataSection(source="rows.jsonl", **settings))
    path = tmp_path / "check.html"
    write_page(path, json.loads(json.dumps(report.to_json())), kept, rows if again is None else again)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


ROWS = [
    row(),
    row("Is <b>this</b> & that?", "</dd><script>alert(1)</script>", "It is <this>.\x1b[2J", index=1),
    row("Mail jane.roe@clinic.example.org about Jane's cough?", answer="Privately seen <br> cough.", index=2),
    row(answer="", index=3),
    row(answer="Other.", index=4),
    row("What does the image below show? Call (555) 123-4567.", answer="Nobody's business.", index=5),
]


def test_rows_are_escaped(tmp_path):
    """Markup inside rows is text on the page; control characters are replaced."""
    text, page = page_of(tmp_path, ROWS)
    assert not {"script", "b", "img", "iframe", "link"} & {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script>" in " ".join(page.words)
    assert "\x1b" not in text


def test_nothing_is_fetched_or_run(tmp_path):
    """No address of another place, no handler, and a policy that forbids both."""
    text, page = page_of(tmp_path, ROWS)
    for tag, attributes in page.tags:
        assert not {"src", "srcset", "action", "onload", "onclick"} & attributes.keys(), tag
        assert attributes.get("href", "#").startswith("#")
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|url\((?!#)|@import", text)


def test_ids_are_unique_and_links_have_targets(tmp_path):
    """Charts and findings do not share ids, and every link within the page leads somewhere."""
    _, page = page_of(tmp_path, ROWS)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for tag, a in page.tags if tag == "a"] + [a["for"] for t, a in page.tags if t == "label"]
    assert targets and set(targets) <= set(ids)


def test_personal_data_are_not_quoted(tmp_path):
    """The texts of a row that seems to hold personal data stand nowhere, whatever else was found in it."""
    text, _ = page_of(tmp_path, ROWS)
    assert "jane.roe" not in text
    assert "Privately seen" not in text
    assert "Nobody" not in text and "123-4567" not in text
    assert text.count(WORDS["masked"][0]) == 3
    assert "an e-mail address in question" in text


def test_every_word_has_two_languages(tmp_path):
    """Each text stands in English and in Chinese, and each finding's meaning is worded."""
    text, _ = page_of(tmp_path, ROWS)
    assert text.count('class="en"') == text.count('class="zh"') > 40
    assert set(MEANING) == set(MEANINGS)
    for english, chinese in [*WORDS.values(), *MEANING.values()]:
        assert english and chinese
        assert english.isascii()


def test_dropped_rows_say_why(tmp_path):
    """What the recipe drops is said to be dropped by it; what is kept is told how to be left out."""
    text, _ = page_of(tmp_path, ROWS)
    assert "--data.drop markup" in text
    text, _ = page_of(tmp_path, ROWS, drop=("markup",))
    assert "Dropped because <code>data.drop</code> names <code>markup</code>" in text


def test_changed_sources_give_no_examples(tmp_path):
    """Rows that are no longer those that were checked are not quoted."""
    for again in ([], ROWS[:3], [row(index=n + 1) for n in range(6)]):
        text, _ = page_of(tmp_path, ROWS, again)
        assert WORDS["no_texts"][0] in text
        assert "alert(1)" not in text


def test_the_earlier_row_is_quoted(tmp_path):
    """A repeated question stands beside the one it repeats."""
    text, _ = page_of(tmp_path, ROWS)
    assert WORDS["first_row"][0] in text


def test_a_page_without_findings(tmp_path):
    """Sound rows give a page that says so."""
    text, _ = page_of(tmp_path, [row()])
    assert WORDS["nothing"][0] in text


def test_histograms():
    """Bars carry CSS colours, text stays text, and one length is enough; the limit is marked where it is near."""
    for values in ([1], [5] * 3, list(range(1, 2000))):
        for size in ("wide", "narrow"):
            svg = histograms("row", values, 2048, size)
            assert svg.startswith("<svg") and "var(--accent)" in svg and "#0" not in svg and "<text" in svg
            assert ("var(--warn)" in svg) is (len(values) > 3)


def test_the_command_writes_it(tmp_path, capsys):
    """`--page` writes the page of a bare file and prints its path; a folder that is not there is an error before."""
    rows = [{"Question": f"Q{n}?", "Complex_CoT": "R.", "Response": f"A{n}."} for n in range(4)]
    source = tmp_path / "rows.jsonl"
    write_jsonl(source, rows)
    page = tmp_path / "page.html"
    assert check_source(source, {}, 0, False, SilentReporter(), page) == 0
    assert capsys.readouterr().out == f"{page}\n"
    Page(page.read_text(encoding="utf-8"))
    with pytest.raises(RunError, match="cannot be written"):
        check_source(source, {}, 0, False, SilentReporter(), tmp_path / "nowhere" / "page.html")
