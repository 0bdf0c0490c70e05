"""The project's shape: imports point one way, files are small and say what they are, nothing private is tracked."""

import ast
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import pytest

from helpers_run import PROJECT

SOURCE = PROJECT / "src" / "deepdoctor"
FILES = sorted(SOURCE.rglob("*.py"))

LAYERS = (
    {"errors"},
    {"sizes"},
    {"kernels", "recipe", "ui", "cpu", "pages"},
    {"recipe_file"},
    {"model", "run_folder"},
    {"engine"},
    {"data"},
    {"compare.tasks"},
    {"session"},
    {"data.stage", "train", "export"},
    {"compare", "disk"},
    {"ask", "dry_run", "data.command", "publish"},
    {"track"},
    {"pipeline", "doctor", "options"},
    {"commands"},
    {"cli"},
)
"""Lowest first. A module imports from lower layers and from its own package; the longest matching name decides."""


def name_of(path: Path) -> str:
    """``kernels.nf4`` for src/deepdoctor/kernels/nf4.py; "" for the package itself."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def layer_of(module: str) -> tuple[int, str]:
    """Rank and name of the layer entry a module belongs to."""
    for length in range(module.count(".") + 1, 0, -1):
        prefix = ".".join(module.split(".")[:length])
        for rank, names in enumerate(LAYERS):
            if prefix in names:
                return rank, prefix
    raise AssertionError(f"{module} is in no layer of tests/test_architecture.py: give it one")


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """Every module of ours that a file imports anywhere, with the line."""
    known = {name_of(file) for file in FILES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written in full"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name.removeprefix("deepdoctor.") in known else str(node.module) for name in inner]
        for name in found:
            if name.startswith("deepdoctor."):
                yield name.removeprefix("deepdoctor."), node.lineno


def test_imports_point_one_way() -> None:
    """cli -> commands -> pipeline -> stages -> session -> data -> model -> kernels; nothing points back up."""
    wrong = []
    for path in FILES:
        module = name_of(path)
        if not module:
            continue
        rank, layer = layer_of(module)
        for target, line in imports_of(path):
            target_rank, target_layer = layer_of(target)
            if target_rank > rank or (target_rank == rank and target_layer != layer):
                wrong.append(f"{path.relative_to(PROJECT)}:{line}: {layer} (layer {rank}) imports {target}")
    assert not wrong, "\n".join(wrong)


ABOVE_MODEL = {"data", "train", "compare", "export", "session", "run", "recipe", "recipe_file", "pipeline"}


@pytest.mark.parametrize(
    ("package", "barred"),
    [
        ("kernels", {"model", *ABOVE_MODEL}),
        ("model", ABOVE_MODEL),
        ("train", {"compare", "export", "pipeline"}),
        ("export", {"train", "compare", "pipeline"}),
    ],
)
def test_packages_do_not_know_who_uses_them(package: str, barred: set[str]) -> None:
    """Kernels and decoder can be used on their own: settings reach them as plain values."""
    seen = {target.split(".")[0] for path in (SOURCE / package).glob("*.py") for target, _ in imports_of(path)}
    assert seen & barred == set()


def test_package_itself_imports_nothing_at_import() -> None:
    """``deepdoctor/__init__.py`` names its public objects; at import it runs none of our modules."""
    tree = ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            assert node.module in ("__future__", "typing")


@pytest.mark.parametrize("path", FILES, ids=lambda path: name_of(path) or "deepdoctor")
def test_module_says_what_it_is(path: Path) -> None:
    """A docstring, at most 500 lines, and an __all__ of things defined here (a package may be its docstring alone)."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree)
    assert text.count("\n") <= 500
    exported = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and "__all__" in {getattr(t, "id", "") for t in getattr(node, "targets", [getattr(node, "target", None)])}
    ]
    if path.name == "__init__.py" and not exported:
        assert len(tree.body) == 1, "a package without __all__ is its docstring"
        return
    assert len(exported) == 1 and exported[0] is not None
    names = ast.literal_eval(exported[0])
    assert sorted(set(names)) == sorted(names)
    if name_of(path):
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assigned = [n for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign)]
        targets = [t for n in assigned for t in getattr(n, "targets", [getattr(n, "target", None)])]
        defined |= {inner.id for t in targets for inner in ast.walk(t) if isinstance(inner, ast.Name)}
        missing = set(names) - defined
        assert not missing, f"__all__ names {missing}, which this module does not define"


def tracked() -> list[Path]:
    """Files under version control; skips where there is none."""
    if not (PROJECT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=PROJECT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("git does not list this checkout's files")
    return [PROJECT / name for name in listed.stdout.decode().split("\0") if name and (PROJECT / name).is_file()]


def test_no_machine_paths_or_private_hosts_are_tracked() -> None:
    """Nothing tracked holds a path of somebody's machine, a private package index, or a secret-looking token."""
    hosts = {urlparse(url).hostname for name, url in os.environ.items() if name.endswith(("INDEX_URL", "_PROXY"))}
    private = [re.escape(host) for host in hosts if host and host not in ("pypi.org", "download.pytorch.org")]
    home = re.escape(str(Path.home())) + "/" if len(Path.home().parts) > 1 else "(?!)"
    pattern = re.compile(
        "|".join(
            [
                r"(?<![\w.])/(?:work|home/\w+|Users/\w+|root|mnt|opt)/\w+",
                home,
                r"\bhf_[A-Za-z0-9]{30,}",
                r"(?m:^)\s*(?:--)?(?:extra-)?index-url\s*=?\s*http(?!s://(?:pypi\.org|download\.pytorch\.org))",
                *private,
            ]
        )
    )
    found = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(PROJECT)}: {match.group()}" for match in pattern.finditer(text)]
    assert not found, "\n".join(found)


def test_no_build_products_are_tracked() -> None:
    """Runs, caches and weights stay out of version control."""
    parts = {"__pycache__", "runs", ".venv", ".mypy_cache", ".pytest_cache"}
    names = [path.relative_to(PROJECT) for path in tracked()]
    assert [
        n for n in names if set(n.parts) & parts or n.suffix in (".pyc", ".safetensors", ".gguf", ".bin", ".pt")
    ] == []
