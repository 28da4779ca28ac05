"""Every configuration key has one owner, and the owner really consumes it.

Keys owned by a rendered table are changed one by one, and the table must change. The others must be read by a module of
the owner's room: an attribute `section.key`, as in `config.train.steps` or `train.steps`.
"""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from maha_megatron.config.render_deepspeed import deepspeed_config
from maha_megatron.config.render_mcore import transformer_config_fields
from maha_megatron.config.schema import OWNERS, Config, SkipRange, Source

ROOT = Path(__file__).parents[2]
TABLES = {"mcore": transformer_config_fields, "deepspeed": lambda config: deepspeed_config(config, world_size=1)}
# owner -> where its keys are read; attention sees numbers only, so model/ reads for it, and config/derive.py reads
# what others get as a derived value
READERS = {
    "config": ("maha_megatron/config/rules.py",),
    "attention": ("maha_megatron/model",),
    "model": ("maha_megatron/model",),
    "parallel": ("maha_megatron/parallel",),
    "data": ("maha_megatron/data",),
    "train": ("maha_megatron/train", "launch"),
    "checkpoint": ("maha_megatron/checkpoint", "maha_megatron/train"),
}
DERIVED = "maha_megatron/config/derive.py"


def leaves() -> Iterator[tuple[str, dataclasses.Field]]:
    """(section, field) of every key; the keys of a list's elements are those of the sections "source" and "skip"."""
    for section in dataclasses.fields(Config):
        for field in dataclasses.fields(section.default_factory):
            yield section.name, field
    for element in (Source, SkipRange):
        for field in dataclasses.fields(element):
            yield {Source: "source", SkipRange: "skip"}[element], field


def owned_by(*owners: str) -> list[tuple[str, str]]:
    return [(section, field.name) for section, field in leaves() if field.metadata["owner"] in owners]


def another_value(field: dataclasses.Field, value: Any) -> Any:
    choices = field.metadata["choices"]
    if choices:
        return next(choice for choice in choices if choice != value)
    return not value if isinstance(value, bool) else value * 2 + 2


def changed(config: Config, section: str, name: str) -> Config:
    """`config` with another value of one key; rules are not asked."""
    part = getattr(config, section)
    field = next(field for field in dataclasses.fields(part) if field.name == name)
    part = dataclasses.replace(part, **{name: another_value(field, getattr(part, name))})
    return dataclasses.replace(config, **{section: part})


def attributes_read(root: Path, places: tuple[str, ...]) -> set[tuple[str, str]]:
    """(section, key) of every attribute `section.key` or `anything.section.key` that files below the places read."""
    paths = [root / place for place in places]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))]
    found = set()
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        aliases = section_aliases(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                found |= {(name, node.attr) for name in (node.value.id, *aliases.get(node.value.id, ()))}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute):
                found.add((node.value.attr, node.attr))
    return found


def section_aliases(tree: ast.AST) -> dict[str, set[str]]:
    """Names that stand for a section in a file: `settings = config.train`, or a parameter `settings: Train`."""
    aliases: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    aliases.setdefault(target.id, set()).add(node.value.attr)
        elif isinstance(node, ast.arg) and isinstance(node.annotation, ast.Name):
            aliases.setdefault(node.arg, set()).add(node.annotation.id.lower())
    return aliases


def unread_keys(root: Path, owner: str) -> list[str]:
    read = attributes_read(root, (*READERS[owner], DERIVED))
    return [f"{section}.{name}" for section, name in owned_by(owner) if (section, name) not in read]


def test_every_key_has_one_known_owner_and_a_sentence():
    for section, field in leaves():
        assert field.metadata.get("owner") in OWNERS, f"{section}.{field.name}"
        assert field.metadata["help"].endswith("."), f"{section}.{field.name}"
    assert set(OWNERS) == {*TABLES, *READERS}


def test_the_schema_holds_nothing_but_keys():
    """Sections hold leaves with defaults; derived values are computed elsewhere."""
    for section, field in leaves():
        assert field.metadata, f"{section}.{field.name} is not made by leaf()"


@pytest.mark.parametrize(
    ("owner", "section", "name"), [(owner, *key) for owner in TABLES for key in owned_by(owner)], ids="-".join
)
def test_a_tables_key_changes_the_table(owner, section, name):
    config = changed(Config(), "train", "global_batch_samples")  # 18 samples, so that a micro-batch of 4 shows
    assert TABLES[owner](changed(config, section, name)) != TABLES[owner](config)


@pytest.mark.parametrize("owner", READERS)
def test_a_rooms_keys_are_read_there(owner):
    assert [place for place in READERS[owner] if not (ROOT / place).exists()] == []
    assert unread_keys(ROOT, owner) == []


def test_an_unread_key_is_found(tmp_path):
    room = tmp_path / "maha_megatron" / "parallel"
    room.mkdir(parents=True)
    (tmp_path / DERIVED).parent.mkdir()
    (tmp_path / DERIVED).write_text("")
    (room / "a.py").write_text("timeout_minutes = 3\nx = config.train.timeout_minutes")
    assert unread_keys(tmp_path, "parallel") == ["parallel.timeout_minutes"]
    for text in (
        "def f(config):\n    return config.parallel.timeout_minutes",
        "parallel = config.parallel\nx = parallel.timeout_minutes",
        "grid = config.parallel\nx = grid.timeout_minutes",
        "def f(grid: Parallel):\n    return grid.timeout_minutes",
    ):
        (room / "a.py").write_text(text)
        assert unread_keys(tmp_path, "parallel") == []


def test_a_key_that_a_table_forgets_is_found():
    """Changing a key that no table owns leaves both as they are: the check above can fail."""
    for table in TABLES.values():
        assert table(changed(Config(), "run", "seed")) == table(Config())
