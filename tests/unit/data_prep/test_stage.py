from pathlib import Path

import pytest

from maha_megatron.data.prepare.inputs import list_inputs, refuse_output_in_input
from maha_megatron.data.prepare.stage import (
    dataset_identity,
    finished_record,
    input_identity,
    parse_bytes,
    record_path,
    run_command,
    write_record,
)
from maha_megatron.data.writing import whole_file
from maha_megatron.errors import DataError


def test_a_stage_is_finished_only_with_its_arguments_and_outputs(tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = {"bytes": 5, "input": [("a", 1)]}
    assert finished_record(record_path(output), [output], arguments) is None
    write_record(record_path(output), arguments, {"documents": 3})
    assert finished_record(record_path(output), [output], arguments) is None  # the output is missing
    output.touch()
    assert finished_record(record_path(output), [output], arguments)["documents"] == 3
    assert finished_record(record_path(output), [output], {**arguments, "bytes": 6}) is None
    record_path(output).write_text('{"arguments": ')
    assert finished_record(record_path(output), [output], arguments) is None


def test_a_changed_input_has_another_identity(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a.txt"
    path.parent.mkdir()
    path.write_text("one")
    before = input_identity([str(tmp_path)])
    assert input_identity([str(tmp_path)]) == before
    path.write_text("other")
    assert input_identity([str(tmp_path)]) != before
    with pytest.raises(DataError, match=r"input .*missing does not exist"):
        input_identity([str(tmp_path / "missing")])


def test_a_changed_local_data_set_has_another_identity(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    before = dataset_identity(str(tmp_path), None, "train")
    assert dataset_identity(str(tmp_path), None, "train") == before
    (tmp_path / "train.jsonl").write_text('{"text": "another"}\n')
    assert dataset_identity(str(tmp_path), None, "train") != before
    assert dataset_identity("of/the_hub", None, "train") == ["of/the_hub", None, "train"]


def test_what_is_read_is_what_decides_whether_it_is_done(tmp_path: Path) -> None:
    """Hidden files and other endings are neither read nor part of the identity."""
    for name in ("a.txt", "b.c", ".cache/c.txt", ".hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    for suffixes in (None, [".c"]):
        listed = [str(file.path) for file in list_inputs([str(tmp_path)], suffixes)]
        assert [name for name, _, _ in input_identity([str(tmp_path)], suffixes)] == listed
    assert listed == [str(tmp_path / "b.c")]


def test_an_output_among_the_inputs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for output in ("texts/p", "texts/sub/p", "elsewhere/../texts/p", "texts"):
        with pytest.raises(DataError, match=r"lies in the input .*texts and would be read by the next run"):
            refuse_output_in_input(tmp_path / output, [str(tmp_path / "texts")])
    refuse_output_in_input(tmp_path / "texts2", [str(tmp_path / "texts"), "a/hub/name"])
    (tmp_path / "linked" / "sub").mkdir(parents=True)
    (tmp_path / "texts" / "link").symlink_to(tmp_path / "linked")
    with pytest.raises(DataError, match=r"lies in the input .*texts and would be read by the next run"):
        refuse_output_in_input(tmp_path / "linked" / "sub" / "p", [str(tmp_path / "texts")])


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with whole_file(path) as partial:
        partial.write_text("old")

    def fail(error: Exception) -> None:
        with whole_file(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(DataError, match=r"cannot write .*file: No space left on device"):
        fail(OSError(28, "No space left on device"))
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("text", "expected"), [("24MB", 24_000_000), ("1.5 gb", 1_500_000_000), ("800k", 800_000), ("17", 17)]
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


def test_a_size_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no size such as 24MB"):
        parse_bytes("much")


def test_an_error_for_the_user_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise DataError("the reason")

    with pytest.raises(SystemExit) as caught:
        run_command(fail)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: the reason\n"
