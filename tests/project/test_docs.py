"""The documents agree with the code: what they name exists, and what exists is named."""

from __future__ import annotations

import re
from argparse import SUPPRESS
from dataclasses import fields
from pathlib import Path

import pytest
from django.core.management import get_commands, load_command_class
from django.core.management.base import BaseCommand

from project.env import REPOSITORY, Env
from proxy.queries import USAGE_COLUMNS

OWN_APPS = {"accounts", "providers", "proxy", "project"}
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md")])
OTHERS_COMMANDS = {"migrate", "runserver"}  # Django's and Daphne's: their options are theirs to tell
COMMANDS = sorted(name for name, app in get_commands().items() if app in OWN_APPS and name not in OTHERS_COMMANDS)


def page(name: str) -> str:
    return (REPOSITORY / name).read_text()


def outside_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and GitLab make them."""
    headings = re.findall(r"^#+ +(.+)$", outside_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_inside_the_repository_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", outside_code(path.read_text())):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.is_relative_to(REPOSITORY), link
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{link}: no such heading"


def test_the_two_commands_of_the_readme_are_targets() -> None:
    named = re.findall(r"^(make [a-z]+) ", page("README.md"), re.MULTILINE)
    assert named == ["make run", "make test"]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_every_make_target_that_is_named_exists(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", page("Makefile"), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z-]+)", path.read_text())) | set(re.findall(r"^make ([a-z-]+)", path.read_text(), re.MULTILINE))
    assert named <= targets


def test_every_variable_is_documented_and_no_other() -> None:
    documented = re.findall(r"^\| `([A-Z_]+)` \|", page("docs/configuration.md"), re.MULTILINE)
    assert sorted(documented) == sorted(field.name.upper() for field in fields(Env))


def test_every_system_check_is_documented_and_no_other() -> None:
    pattern = r"sluice\.[EW]\d{3}"
    listed = re.findall(rf"^\| `({pattern})` \|", page("docs/configuration.md"), re.MULTILINE)
    assert sorted(listed) == sorted(re.findall(rf'id="({pattern})"', page("project/checks.py")))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented_with_its_options(name: str) -> None:
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", page("docs/commands.md"), re.MULTILINE | re.DOTALL))
    command = load_command_class(get_commands()[name], name)
    assert isinstance(command, BaseCommand)
    common = {option for action in BaseCommand().create_parser("manage.py", name)._actions for option in action.option_strings}
    shown = [action for action in command.create_parser("manage.py", name)._actions if action.help != SUPPRESS]
    own = {option for action in shown for option in action.option_strings} - common
    missing = [option for option in sorted(own) if f"`{option}" not in sections[name]]
    assert missing == [], f"docs/commands.md does not name these options of {name}"


def test_no_command_is_documented_that_is_not_there() -> None:
    documented = set(re.findall(r"^### `(\w+)`", page("docs/commands.md"), re.MULTILINE))
    assert documented - OTHERS_COMMANDS == set(COMMANDS)


def test_every_column_of_usage_is_documented() -> None:
    [columns] = re.findall(r"^The columns: (.*?)\n\n", page("docs/commands.md"), re.MULTILINE | re.DOTALL)
    assert re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", columns)) == list(USAGE_COLUMNS)


def drawn() -> set[str]:
    """The paths in the tree of docs/architecture.md. A line: names, two spaces or more, what they are for."""
    [tree] = re.findall(r"^## The tree\n\n```\n(.*?)^```", page("docs/architecture.md"), re.MULTILINE | re.DOTALL)
    paths, folder = set(), ""
    for line in tree.splitlines():
        names = re.split(r" {2,}", line.strip())[0].split(" ")
        inside = line.startswith(" ")
        if not inside:
            folder = names[0]
        paths |= {(folder if inside else "") + name for name in names}
    return paths


def test_the_tree_names_only_what_exists() -> None:
    absent = [path for path in sorted(drawn()) if not (REPOSITORY / path).exists()]
    assert absent == []
    assert all((REPOSITORY / path).is_dir() == path.endswith("/") for path in drawn())


def test_the_tree_names_every_module() -> None:
    paths = drawn()
    modules = {str(path.relative_to(REPOSITORY)) for app in OWN_APPS for path in (REPOSITORY / app).glob("*.py")}
    folders = {f"{path.parent.relative_to(REPOSITORY)}/" for app in OWN_APPS for path in (REPOSITORY / app).glob("*/__init__.py")}
    trivial = {f"{app}/{name}" for app in OWN_APPS for name in ("__init__.py", "apps.py", "management/", "migrations/", "templatetags/")}
    assert (modules | folders) - trivial - paths == set(), "docs/architecture.md does not draw these"


def test_every_decision_is_in_the_list() -> None:
    folder = REPOSITORY / "docs/decisions"
    listed = re.findall(r"\]\((\d{4}-[a-z0-9-]+\.md)\)", page("docs/decisions/README.md"))
    assert listed == sorted(path.name for path in folder.glob("[0-9]*.md"))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_no_page_invents_an_address_of_the_repository(path: Path) -> None:
    hosts = ("github.com", "gitlab.com", "codeberg.org", "bitbucket.org", "readthedocs.io")
    assert [host for host in hosts if host in path.read_text()] == []
