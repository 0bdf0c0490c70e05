"""What a built wheel holds, and that it runs without a checkout: recipes, rows, templates, the type marker."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from deepdoctor.errors import RecipeError
from deepdoctor.recipe_file import find_recipe, is_recipe, load_recipe, shipped_recipes
from helpers_run import PROJECT, call

RECIPES = sorted((PROJECT / "recipes").glob("*.yaml"))
SOURCES = ("src", "recipes", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy of the sources and unpacked."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    leave = shutil.ignore_patterns("*.egg-info", "__pycache__")
    for name in SOURCES:
        path = PROJECT / name
        if path.is_dir():
            shutil.copytree(path, folder / "copy" / name, symlinks=True, ignore=leave)
        else:
            shutil.copy(path, folder / "copy" / name)
    options = ("--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q", "-w", str(folder))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(folder / "copy")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(folder.glob("deepdoctor-*.whl"))) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_every_file_that_is_read(wheel: Path) -> None:
    """Byte for byte; recipes used to be left out, so that an installed package had none."""
    for path in (PROJECT / "src" / "deepdoctor").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            inside = wheel / path.relative_to(PROJECT / "src")
            assert inside.is_file() and inside.read_bytes() == path.read_bytes(), inside
    for path in RECIPES:
        assert (wheel / "deepdoctor" / "recipes" / path.name).read_bytes() == path.read_bytes()
    assert not list(wheel.rglob("tests"))


def test_an_installed_package_runs_its_recipes(wheel: Path, tmp_path: Path) -> None:
    """In a folder without anything: the wheel's own code lists, prints and resolves recipes by name."""
    environment = {**os.environ, "PYTHONPATH": str(wheel)}

    def said(*words: str) -> str:
        command = [sys.executable, "-c", "import sys; from deepdoctor.cli import main; sys.exit(main())", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert said("recipe").count("\n") == len(RECIPES)
    text = (PROJECT / "recipes" / "demo.yaml").read_text(encoding="utf-8")
    assert said("recipe", "demo") == text
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    resolved = [yaml.safe_load(said("run", name, "--dry-run").split("---\n")[0]) for name in ("demo", "mine.yaml")]
    assert resolved[0] == resolved[1]
    place = subprocess.run(
        [sys.executable, "-c", "import deepdoctor; print(deepdoctor.__file__)"],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=True,
    )  # fmt: skip
    assert place.stdout.startswith(str(wheel)), "else the checkout answered"


def test_there_is_one_copy_of_each_recipe() -> None:
    """The package's folder is the project's, not a second one that could differ."""
    assert {path.resolve() for path in shipped_recipes().values()} == {path.resolve() for path in RECIPES}


def test_recipes_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bare name is a shipped recipe, from any folder; a file of that name comes first; a path stays a path."""
    monkeypatch.chdir(tmp_path)
    assert load_recipe("demo", environ={}) == load_recipe(PROJECT / "recipes" / "demo.yaml", environ={})
    assert is_recipe("demo") and is_recipe("any.yml") and not is_recipe("rows.jsonl") and not is_recipe("owner/rows")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    assert find_recipe("runs/demo") == Path("runs/demo")
    (tmp_path / "demo").mkdir()
    assert find_recipe("demo").suffix == ".yaml", "a folder is no recipe"
    (tmp_path / "tutorial").write_text("model: {id: a/b}\ndata: {source: rows.jsonl}\n", encoding="utf-8")
    assert load_recipe("tutorial", environ={}).model.id == "a/b"
    with pytest.raises(RecipeError, match=r"no recipe file demo\.yaml") as caught:
        load_recipe("demo.yaml", environ={})
    assert "deepdoctor recipe NAME > mine.yaml" in str(caught.value.hint)


def test_recipe_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Listed with their goals; printed with their comments; a name that is not there is a usage error."""
    listed = call(capsys, "recipe").out.splitlines()
    assert [line.split(":")[0] for line in listed] == [path.stem for path in RECIPES]
    assert all(len(line) > 40 for line in listed)
    assert call(capsys, "recipe", "tutorial").out == (PROJECT / "recipes/tutorial.yaml").read_text(encoding="utf-8")
    outcome = call(capsys, "recipe", "tutorail")
    assert (outcome.code, "it has deepdoctor-8b, demo, tutorial" in outcome.err) == (2, True)
