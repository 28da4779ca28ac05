"""The READMEs that list what lies beside them list all of it, and nothing else."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def present(folder: Path) -> set[str]:
    """What a README of this folder has to name."""
    match folder.name:
        case "configs":
            parts = {f"{path.name}/" for path in folder.iterdir() if path.is_dir()}
            return parts | {path.stem for path in folder.glob("*/[!_]*.*") if path.suffix in (".yaml", ".py")}
        case "tools":
            return {path.name for path in folder.glob("*.py")}
        case _:
            return {f"{path.name}/" for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"}


def listed(readme: Path) -> set[str]:
    """Names in the cells of its tables; of a command the program alone."""
    rows = [line for line in readme.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return {name.split()[0] for row in rows for name in re.findall(r"`([^`]+)`", row)} - {"extends"}


@pytest.mark.parametrize("name", ["configs", "tools", "tests"])
def test_a_readme_lists_what_is_there(name):
    assert listed(ROOT / name / "README.md") == present(ROOT / name)


def test_a_forgotten_and_an_invented_name_are_found(tmp_path):
    folder = tmp_path / "tools"
    folder.mkdir()
    (folder / "a.py").touch()
    (folder / "README.md").write_text("| `a.py --x N` | an answer |\n")
    assert listed(folder / "README.md") == present(folder)
    (folder / "b.py").touch()
    assert listed(folder / "README.md") != present(folder)
    (folder / "README.md").write_text("| `a.py` | |\n| `b.py` | |\n| `c.py` | |\n")
    assert listed(folder / "README.md") != present(folder)
