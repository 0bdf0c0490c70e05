"""Planning a comparison: the numbers against the statistics they rest on, and what the command says."""

import json

import numpy as np
import pytest
from scipy import stats as scipy_stats

from deepdoctor.compare.power import TOKENS_PER_ANSWER, plan_comparison, plan_lines, plan_tasks, questions_needed
from deepdoctor.compare.stats import minimum_detectable_difference, tango_interval
from deepdoctor.compare.tasks.known import TASKS
from deepdoctor.errors import UsageError
from helpers_run import call, write_rows

Z = float(scipy_stats.norm.ppf(0.975))


@pytest.mark.parametrize("discordance", [0.02, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("resolution", [0.02, 0.05, 0.2])
def test_needed_questions_invert_the_detectable_difference(discordance: float, resolution: float) -> None:
    """So many questions show the resolution, one fewer does not; copies of a question count once."""
    n = questions_needed(resolution, discordance)
    few, enough = minimum_detectable_difference(n - 1, discordance), minimum_detectable_difference(n, discordance)
    assert enough is not None and enough <= resolution * (1 + 1e-9)
    assert few is None or few > resolution
    assert questions_needed(resolution, discordance, copies=1.2) == pytest.approx(1.2 * n, abs=2)


def test_planned_power_is_reached() -> None:
    """Simulated comparisons with the planned number of questions show the resolution in about 80 %."""
    n = questions_needed(0.05, 0.2)
    tables = np.random.default_rng(3).multinomial(n, [0.075, 0.125, 0.8], size=4000)
    low, _ = tango_interval(tables[:, 0], tables[:, 1], n, Z)
    assert 0.77 <= np.mean(low > 0) <= 0.83


def test_published_table() -> None:
    """MedQA's 1,273 questions show 3.0 to 3.9 points, 1,073 of them 3.3 to 4.3; MMLU-Pro health counts 683, not 818."""
    for name, asked, low, high in (
        ("medqa", None, 3.0, 3.9),
        ("medqa", 1073, 3.3, 4.3),
        ("pubmedqa", None, 4.8, 6.3),
        ("mmlu-pro-health", None, 4.1, 5.4),
        ("medmcqa", None, 1.7, 2.2),
    ):
        found = plan_comparison(TASKS[name], asked).detectable
        assert (100 * found[0], 100 * found[1]) == pytest.approx((low, high), abs=0.06), name


def test_sentences() -> None:
    """What the questions show, what a resolution needs, whether the set has so many, and the harm check's margin."""
    lines = "\n".join(plan_lines(plan_comparison(TASKS["medqa"], 1073, resolution=0.03)))
    assert "with these 1,073 questions you can see 3.3 to 4.3 points" in lines
    assert "only one side right on 15 to 25 % of them" in lines
    assert "to see 3 points it takes 1,309 to 2,181 questions; the public set has 1,273, which is too few" in lines
    assert "may be too few" in "\n".join(plan_lines(plan_comparison(TASKS["medqa"], resolution=0.035)))
    harm = "\n".join(plan_lines(plan_comparison(TASKS["pubmedqa"], discordance=(0.11,))))
    assert "500 questions can rule out a loss of 5 points" in harm and "right on 11 % of them" in harm
    assert "cannot rule out" in "\n".join(plan_lines(plan_comparison(TASKS["pubmedqa"], 50)))
    assert "no difference of any size" in "\n".join(plan_lines(plan_comparison(TASKS["medqa"], 3)))
    assert "holds" not in lines and "1,273 questions only" in "\n".join(
        plan_lines(plan_comparison(TASKS["medqa"], 2000))
    )


def test_minutes_only_with_a_measured_speed() -> None:
    """Two sides, the most tokens of each answer, the speed given; without one a sentence says why there are none."""
    plan = plan_comparison(TASKS["medqa"], 300, tokens_per_s=1000)
    assert plan.minutes == pytest.approx(2 * 300 * TOKENS_PER_ANSWER / 1000 / 60)
    assert "at most 11 minutes" in plan_lines(plan)[-1]
    without = plan_comparison(TASKS["medqa"], 300)
    assert without.minutes is None and "--tokens-per-s" in plan_lines(without)[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"questions": 0}, "--questions is 0"),
        ({"resolution": 0.0}, "--resolution is 0 points"),
        ({"resolution": 3.0}, "--resolution is 300 points"),
        ({"discordance": (0.1, 0.2, 0.3)}, "--discordance is 0.1 0.2 0.3"),
        ({"discordance": (15.0,)}, "--discordance is 15"),
        ({"tokens_per_s": 0.0}, "--tokens-per-s is 0"),
    ],
)
def test_values_out_of_range_are_named(words: dict, message: str) -> None:
    """Each option out of range is named as it was written."""
    with pytest.raises(UsageError, match=message):
        plan_comparison(TASKS["medqa"], **words)


def test_command(capsys: pytest.CaptureFixture[str], tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`compare --plan` prints sentences or JSON; of a file the questions and the different ones are counted."""
    monkeypatch.chdir(tmp_path)
    said = call(capsys, "compare", "--plan", "--task", "medqa", "--questions", 1073, "--resolution", 3)
    assert said.code == 0 and "you can see 3.3 to 4.3 points" in said.out and said.err == ""
    options = {"A": "yes", "B": "no"}
    rows = [
        {"id": f"q{i}", "question": f"Is {i // 2} even?", "options": options, "answer": "AB"[i % 2]} for i in range(40)
    ]
    write_rows(tmp_path / "mine.jsonl", rows)
    out = call(capsys, "compare", "--plan", "--task", "mine.jsonl", "--tokens-per-s", 50, "--json")
    plan = json.loads(out.out)["plans"][0]
    assert (plan["task"], plan["questions"], plan["units"], plan["available"]) == ("mine", 40, 20.0, None)
    assert plan["minutes"] == pytest.approx(2 * 40 * TOKENS_PER_ANSWER / 50 / 60)
    assert plan_tasks(["mine.jsonl"], 10, None, (0.2,), None)[0].questions == 10
    for words, code, message in (
        (["--plan"], 2, "--plan needs a question set"),
        (["--plan", "--task", "mine.jsonl", "--questions", "41"], 2, "holds 40"),
        (["--plan", "--task", "medqu"], 2, "did you mean `medqa`?"),
        (["--plan", "--task", "none.jsonl"], 1, "there is no file none.jsonl"),
        (["--plan", "--task", "medqa", "--out", "x"], 2, "--out does not go with --plan"),
        (["--plan", "--task", "medqa", "--seed", "3"], 2, "recipe fields does not go with --plan"),
        (["recipe.yaml", "--resolution", "3"], 2, "--resolution does not go with a RECIPE"),
        ([], 2, "a RECIPE, --answers, or --plan"),
        (["recipe.yaml", "--plan"], 2, "a RECIPE, --answers, or --plan"),
    ):
        refused = call(capsys, "compare", *words)
        assert refused.code == code and message in refused.err and refused.out == "", words
