"""What the README and docs/ show is what happens: Python runs, names and files exist."""

import ast
import functools
import re
import shlex
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn import cli
from fastattn.bench import readme
from fastattn.bench.results import Report, Result

ROOT = Path(__file__).parents[1]
PAGES = [path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if path.exists()]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page, language):
    """(line number, code) of each fenced block."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text.count("\n", 0, found.start(1)), found[1]


def test_there_are_pages():
    assert {page.name for page in PAGES} >= {"README.md", "api.md", "design.md", "install.md"}
    assert sum(1 for page in PAGES for _ in blocks(page, "python")) >= 8


@pages
def test_python_runs(page):
    torch.manual_seed(0)
    names = {}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, str(page), "exec"), names)  # in one namespace, in order


@pages
def test_fastattn_commands_are_understood(page):
    for _, code in blocks(page, "sh"):
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["fastattn"]:
                cli.parser().parse_args(words[1:])  # SystemExit if not


@pages
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


@functools.cache
def named_in(path):
    """The lines of each function, class and method of a file, by its name, "Class.method", without
    comments."""
    text = path.read_text(encoding="utf-8")
    lines = [line.split("  # ")[0].strip() for line in text.splitlines()]
    found = {}

    def visit(node, prefix=""):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found[prefix + child.name] = lines[child.lineno - 1 : child.end_lineno]
                visit(child, f"{prefix}{child.name}.")

    visit(ast.parse(text))
    return found


def test_the_textbook_names_the_lines_that_are_there():
    text = (ROOT / "docs" / "textbook.md").read_text(encoding="utf-8")
    link = r"\[`([\w/]+\.py): ([\w.]+)`\]\(([^)]+)\)"
    named = re.findall(link, text)
    assert len(named) == len(re.findall(r"\.py: ", text)) > 40
    for file, name, target in named:
        assert target == f"../{file}"
        assert name in named_in(ROOT / file), f"{file} has no {name}"
    quoted = re.findall(link + r": `([^`]+)`", text)
    assert len(quoted) > 35
    for file, name, _, line in quoted:
        assert line in named_in(ROOT / file)[name], f"{file}: {name} has no line {line}"


def test_every_public_function_has_its_place_in_the_api():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    headings = " ".join(re.findall(r"^## (.*)$", text, re.MULTILINE))
    for name in set(fastattn.__all__) - {"__version__"}:
        assert re.search(rf"\b{name}\b", headings), name


@pages
def test_make_targets_exist(page):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for _, code in blocks(page, "sh"):
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert [word for word in words[1:] if "=" not in word and word not in targets] == []


def spread(value):
    return {"median": value, "low": value, "high": value, "rounds": 5}


def test_the_figures_of_the_readme_come_from_a_report(tmp_path):
    pytest.importorskip("matplotlib")
    results = [
        Result(
            f"attention-{n}",
            op="attention",
            kind="causal",
            direction="forward",
            dtype=dtype,
            shape={},
            goal=1.5,
            ratios={"torch": spread(ratio), "naive": spread(9.0)},
        )
        for n, (dtype, ratio) in enumerate(
            [("float32", 1.42), ("float32", 1.78), ("bfloat16", 3.0)]
        )
    ]
    results.append(Result("broken", "softmax", "softmax", "forward", "float32", {}, failure="x"))
    machine = {"cpu": "Abacus 3000", "threads": 2, "torch": "2.13.0"}
    Report("full", machine=machine, started="2026-01-02 03:04:05", results=results).save(
        tmp_path / "full.json"
    )
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    arguments = [str(tmp_path / "full.json"), "--readme", str(page)]
    assert readme.main(arguments) == 0
    text = page.read_text()
    assert readme.main(arguments) == 0
    assert page.read_text() == text  # twice is once
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| attention forward, causal | 1.4 to 1.8x | 3.0x |  |" in text
    assert "softmax forward" not in text  # it has no figures
    assert "2 of 3 goals reached, 1 cases failed" in text
    assert "Abacus 3000 (2 threads)" in text
    assert (tmp_path / readme.PICTURE).read_text().startswith("<svg")
    assert readme.main([str(tmp_path / "none.json"), "--readme", str(page)]) == 2
