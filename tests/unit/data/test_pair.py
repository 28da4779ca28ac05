from collections.abc import Callable
from pathlib import Path

import pytest

from maha_megatron.data.pair import open_pair
from maha_megatron.errors import DataError
from tests.support.pairs import random_documents


@pytest.fixture
def prefix(write_pair: Callable[..., str]) -> str:
    return write_pair("corpus_text_document", random_documents(5), manifest=False)


def edit(path: str, change: Callable[[bytes], bytes]) -> None:
    Path(path).write_bytes(change(Path(path).read_bytes()))


def test_a_pair_of_other_tools_opens_unchanged(prefix: str) -> None:
    assert [document.tolist() for document in open_pair(prefix)] == random_documents(5)


@pytest.mark.parametrize(
    ("ending", "change", "message"),
    [
        ("bin", lambda content: content[:-2], r"bytes where its index .* expects .*cut off"),
        ("bin", lambda content: content + b"xx", r"bytes where its index .* expects .*belongs to another index"),
        ("bin", lambda content: b"", r"has 0 bytes where its index"),
        ("idx", lambda content: b"", r"empty or cut off \(0 bytes\)"),
        ("idx", lambda content: content[:20], r"empty or cut off \(20 bytes\)"),
        ("idx", lambda content: content[:-8], r"where its header announces .*cut off"),
        ("idx", lambda content: b"GARBAGE!!" + content[9:], r"is no Megatron index"),
        ("idx", lambda content: content[:17] + b"\x06" + content[18:], r"dtype code 6, which are no token ids"),
        ("idx", lambda content: content[:-8] + bytes(8), r"damaged"),
    ],
)
def test_a_damaged_pair_is_refused(prefix: str, ending: str, change: Callable[[bytes], bytes], message: str) -> None:
    edit(f"{prefix}.{ending}", change)
    with pytest.raises(DataError, match=message) as caught:
        open_pair(prefix)
    assert "data_prep/preprocess.py" in str(caught.value)


def test_a_pair_without_tokens_is_refused(write_pair: Callable[..., str]) -> None:
    with pytest.raises(DataError, match="holds no tokens"):
        open_pair(write_pair("empty", []))


def test_a_missing_pair_says_what_is_near(prefix: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"did you mean .*corpus_text_document\?"):
        open_pair(str(tmp_path / "corpus"))
    with pytest.raises(DataError, match=r"without its ending; write .*corpus_text_document$"):
        open_pair(f"{prefix}.bin")
    with pytest.raises(DataError, match=r"make it with data_prep/preprocess\.py"):
        open_pair(str(tmp_path / "elsewhere"))
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(DataError, match=r"\.bin does not exist"):
        open_pair(prefix)
