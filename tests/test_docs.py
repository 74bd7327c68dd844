"""What the documents say is true of the code, as far as a program can tell."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from ulimi import __version__, cli
from ulimi.recipe import load_recipe, recipe_names

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
GUIDES = [ROOT / "docs" / f"{name}.md" for name in ("training", "judging", "serving")]


def commands(text: str) -> list[str]:
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.S))
    return re.findall(r"^(?:\$ )?ulimi ([^#|>\n]+)", blocks, re.M)


COMMANDS = commands(README)


def help_of(command: str, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["ulimi", *command.split(), "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("line", COMMANDS + [line for guide in GUIDES for line in commands(guide.read_text("utf-8"))])
def test_the_commands_and_options_of_readme_and_guides_exist(line, monkeypatch, capsys):
    command, *words = line.split()
    text = help_of(f"corpus {words[0]}" if command == "corpus" else command, monkeypatch, capsys)
    for option in (word for word in words if re.match(r"--?[a-z]", word)):
        assert re.search(rf"(^|[\s,]){re.escape(option)}\b", text), f"ulimi {command} has no {option}"
    settings = [word for word in words if re.fullmatch(r"[a-z]+\.[a-z_]+=\S+", word)]
    recipe = words[words.index("--recipe") + 1] if "--recipe" in words else None
    load_recipe(recipe, settings)


def test_there_are_commands_to_look_at():
    assert {line.split()[0] for line in COMMANDS} == {
        "train", "evaluate", "score", "generate", "suggest", "export", "info", "recipe", "ngram", "mix", "corpus",
        "study", "judge", "release", "serve", "web", "hub",
    }  # fmt: skip


def test_the_readme_names_every_recipe():
    assert all(f"`{name}`" in README for name in recipe_names())


def test_architecture_names_every_module():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for path in (ROOT / "src" / "ulimi").glob("*.py"):
        if not path.name.startswith("__"):
            assert f"  {path.name}" in text, f"ARCHITECTURE.md does not name {path.name}"


def test_imports_go_down_the_list_of_architecture():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    names = re.findall(r"^  (\w+)\.py ", text, re.M)
    for place, name in enumerate(names):
        source = (ROOT / "src" / "ulimi" / f"{name}.py").read_text(encoding="utf-8")
        imported = re.findall(r"^from ulimi\.(\w+) import", source, re.M)
        imported += [n for found in re.findall(r"^from ulimi import (.+)$", source, re.M) for n in found.split(", ")]
        assert set(imported) <= set(names[:place]), f"{name}.py imports a module that stands below it"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_gap_is_left_and_every_link_leads_somewhere(path):
    text = path.read_text(encoding="utf-8")
    assert "@@" not in text
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_the_versions_agree():
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
