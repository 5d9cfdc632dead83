"""The commands of the Makefile, and how the Python behind them is found: with interpreters that only pretend."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from project.env import REPOSITORY

MAKEFILE = (REPOSITORY / "Makefile").read_text()
TOOLS = ("sh", "dirname", "tr", "cmp", "cp", "rm", "date", "mkdir", "cat", "chmod")

# Says what the probe would find, and makes environments whose Python is like itself and whose pip writes down its calls.
PRETENDER = """\
#!/bin/sh
case "$1 $2" in
    "-c import sys; print("*) echo "{version}" ;;
    "-c "*) echo "{found}" ;;
    "-m venv")
        mkdir -p "$4/bin"
        cp "$0" "$4/bin/python"
        echo "made by $0" >> "{log}"
        ;;
    "-m pip") [ "$3" = --version ] || echo "pip $*" >> "{log}" ;;
esac
"""


class Machine:
    """A folder that is all of PATH, and a checkout with one requirement."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "bin of it"
        self.checkout = folder / "check out"
        self.log = folder / "log"
        (self.checkout / "requirements").mkdir(parents=True)
        self.path.mkdir()
        for tool in TOOLS:
            (self.path / tool).symlink_to(str(shutil.which(tool)))
        shutil.copy(REPOSITORY / "requirements/install.sh", self.checkout / "requirements")
        self.require("thing==1")

    def require(self, line: str) -> None:
        (self.checkout / "requirements/base.txt").write_text(line + "\n")

    def has(self, name: str, found: str, folder: Path | None = None, *, took: int = 8000) -> Path:
        """Put an interpreter there; `found` is its version and the modules it lacks, `took` the time of the probe's work."""
        version, _, missing = found.partition(" ")
        interpreter = (folder or self.path) / name
        interpreter.write_text(PRETENDER.format(version=version, found=f"{version} {took} {missing}".rstrip(), log=self.log))
        interpreter.chmod(0o755)
        return interpreter

    def install(self, *, path: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["sh", "requirements/install.sh", "base"],
            cwd=self.checkout,
            env={"PATH": path or str(self.path), **environment},
            capture_output=True,
            text=True,
            check=False,
        )

    def done(self) -> list[str]:
        """What was made and installed since the last look."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    return Machine(tmp_path)


def the_line(run: subprocess.CompletedProcess[str]) -> str:
    """The one line in which a refusal is said."""
    assert run.returncode == 1
    assert run.stdout == ""
    [line] = run.stderr.splitlines()
    return line


def test_the_newest_fitting_python_makes_the_environment(machine: Machine) -> None:
    machine.has("python3", "3.11")
    machine.has("python3.11", "3.11")
    chosen = machine.has("python3.12", "3.12")
    assert machine.install().returncode == 0
    made, installed = machine.done()
    assert made == f"made by {chosen}"
    assert "--require-hashes" in installed
    assert installed.endswith("-r requirements/base.txt")


def test_of_several_that_fit_a_clearly_faster_one_is_taken(machine: Machine, tmp_path: Path) -> None:
    """A Python that somebody compiled without profiles takes twice the time of a distribution's, whose version may be older."""
    compiled = tmp_path / "compiled"
    compiled.mkdir()
    slow = machine.has("python3.12", "3.12", compiled, took=9000)
    machine.has("python3.12", "3.12", took=8000)
    machine.has("python3.13", "3.13 sqlite3", took=2000)
    path = f"{compiled}:{machine.path}"
    assert machine.install(path=path).returncode == 0
    assert machine.done()[0] == f"made by {slow}", "a tenth may be chance"

    shutil.rmtree(machine.checkout / ".venv")
    fast = machine.has("python3.11", "3.11", took=5000)
    assert machine.install(path=path).returncode == 0
    assert machine.done()[0] == f"made by {fast}"


def test_a_second_install_does_nothing_until_the_requirements_change(machine: Machine) -> None:
    machine.has("python3", "3.12")
    machine.install()
    machine.done()

    again = machine.install()
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")
    assert machine.done() == []

    machine.require("thing==2")
    assert "Installed in" in machine.install().stdout
    assert [line.split()[0] for line in machine.done()] == ["pip"]


def test_an_environment_whose_python_is_gone_is_made_again(machine: Machine) -> None:
    machine.has("python3", "3.12")
    machine.install()
    machine.done()
    (machine.checkout / ".venv/bin/python").unlink()
    machine.install()
    assert [line.split()[0] for line in machine.done()] == ["made", "pip"]


def test_a_failed_install_is_tried_again(machine: Machine) -> None:
    broken = machine.has("python3", "3.12")
    broken.write_text(broken.read_text().replace('|| echo "pip', '|| exit 1 "pip'))
    assert "could not be installed" in machine.install().stderr
    machine.has("python3", "3.12")
    shutil.copy(machine.path / "python3", machine.checkout / ".venv/bin/python")
    assert machine.install().returncode == 0
    assert [line.split()[0] for line in machine.done()][-1] == "pip"


def test_a_shim_that_fails_does_not_hide_the_python_behind_it(machine: Machine, tmp_path: Path) -> None:
    shims = tmp_path / "shims"
    shims.mkdir()
    shim = shims / "python3.12"
    shim.write_text("#!/bin/sh\necho 'no such version here' >&2\nexit 127\n")
    shim.chmod(0o755)
    behind = machine.has("python3.12", "3.12")
    run = machine.install(path=f"{shims}:{machine.path}")
    assert run.returncode == 0
    assert run.stderr == ""
    assert machine.done()[0] == f"made by {behind}"


def test_without_any_python_one_line_says_which_are_wanted(machine: Machine) -> None:
    assert the_line(machine.install()) == "No Python was found. Sluice needs Python 3.11, 3.12, 3.13 or 3.14."


@pytest.mark.parametrize(("version", "why"), [("2.7", "too old"), ("3.9", "too old"), ("3.10", "too old"), ("3.15", "not supported yet")])
def test_a_python_of_the_wrong_version_is_named(machine: Machine, version: str, why: str) -> None:
    machine.has("python3", version)
    assert f"Found Python {version} ({machine.path}/python3): {why}. Sluice needs" in the_line(machine.install())


def test_a_missing_venv_module_is_named_with_the_package_that_has_it(machine: Machine) -> None:
    machine.has("python3.11", "3.11 ensurepip")
    machine.has("python3", "3.9")
    line = the_line(machine.install())
    assert "Python 3.11" in line
    assert "apt install python3-venv" in line


def test_a_python_without_sqlite_is_passed_over(machine: Machine) -> None:
    machine.has("python3.13", "3.13 sqlite3")
    assert "was built without sqlite3" in the_line(machine.install())
    chosen = machine.has("python3.12", "3.12")
    machine.install()
    assert machine.done()[0] == f"made by {chosen}"


def test_the_python_that_is_asked_for_is_taken_or_refused(machine: Machine, tmp_path: Path) -> None:
    machine.has("python3.13", "3.13")
    assert "Found Python 3.9" in the_line(machine.install(PYTHON=str(machine.has("mine", "3.9", tmp_path))))
    assert "'nowhere' cannot be run" in the_line(machine.install(PYTHON="nowhere"))
    mine = machine.has("mine", "3.12", tmp_path)
    assert machine.install(PYTHON=str(mine)).returncode == 0
    assert machine.done()[0] == f"made by {mine}"


def test_help_lists_what_one_may_make() -> None:
    said = subprocess.run(["make"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    listed = re.findall(r"^  make ([a-z-]+) +\S", said, re.MULTILINE)
    assert {"install", "run", "test", "check", "css", "lint", "types", "format", "contracts", "migrations-check", "lock", "help"} <= set(
        listed
    )


def test_run_sets_everything_up_before_it_serves() -> None:
    said = subprocess.run(["make", "-n", "run"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    steps = [said.index(step) for step in ("requirements/install.sh base", "migrate", "bootstrap", "serve")]
    assert steps == sorted(steps)


def test_check_includes_all_that_test_runs() -> None:
    [steps] = re.findall(r"^STEPS = (.*)$", MAKEFILE, re.MULTILINE)
    assert steps.split() == ["format-check", "lint", "types", "contracts", "migrations-check", "test"]
    assert "make check" in (REPOSITORY / ".ci/run").read_text()


def test_requirements_are_hashed_agree_and_name_no_index() -> None:
    pins: dict[str, dict[str, str]] = {}
    for name in ("base", "dev", "prod"):
        text = (REPOSITORY / f"requirements/{name}.txt").read_text()
        assert "://" not in text
        assert not re.search(r"^--?[a-z-]*(index|find-links|host)", text, re.MULTILINE)
        blocks = re.findall(r"^([\w.-]+)(?:\[[^\]]*\])?==([^\s;]+)((?:.*\n)(?:    --hash.*\n?)*)", text, re.MULTILINE)
        assert all("--hash=sha256:" in rest for _, _, rest in blocks)
        pins[name] = {package: version for package, version, _ in blocks}
    # What is tested is what is served.
    assert pins["base"].items() <= pins["dev"].items()
    assert pins["base"].items() <= pins["prod"].items()
