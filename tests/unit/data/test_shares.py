"""Mixtures as asked and as drawn: weights, epochs, tiny sources, validation by source."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from maha_megatron.config.schema import Config, Source
from maha_megatron.data.loader import Loader, build_loader
from maha_megatron.errors import DataError
from tests.support.pairs import END, random_documents

S = 16


def open_loader(config: Config, split: str = "train") -> Loader:
    return build_loader(config, data_parallel_rank=0, data_parallel_size=1, split=split)


def with_sources(config: Config, *sources: Source, **data) -> Config:
    return replace(config, data=replace(config.data, train=sources, **data))


@pytest.fixture
def prefixes(write_pair: Callable[..., str]) -> tuple[str, str]:
    return write_pair("a", random_documents(60)), write_pair("b", random_documents(15, seed=1))


def test_epochs_are_passes_relative_to_one_another(
    prefixes: tuple[str, str], make_config: Callable[..., Config]
) -> None:
    a, b = prefixes
    config = with_sources(make_config(a), Source(prefix=a, epochs=1), Source(prefix=b, epochs=3), validation_frac=0.0)
    loader = open_loader(config)
    sizes = [source["samples_per_epoch"] for source in loader.describe_sources(0)]
    one_and_three = sizes[0] + 3 * sizes[1]
    first, second = loader.shares(one_and_three)
    assert (first.epochs, second.epochs) == (pytest.approx(1, abs=0.06), pytest.approx(3, abs=0.2))
    assert first.asked_frac == pytest.approx(sizes[0] / one_and_three)
    twice = with_sources(config, Source(prefix=a, epochs=2), Source(prefix=b, epochs=6))
    assert open_loader(twice).identity == loader.identity
    by_weight = with_sources(config, Source(prefix=a, weight=sizes[0]), Source(prefix=b, weight=3 * sizes[1]))
    assert open_loader(by_weight).identity == loader.identity


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_what_can_be_refused_is_refused_by_name_before_an_index_is_built(
    prefixes: tuple[str, str],
    write_pair: Callable[..., str],
    make_config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    packing: str,
    split: str,
) -> None:
    monkeypatch.setattr("maha_megatron.data.order.build_index", lambda *_: pytest.fail("an index was built"))
    a, b = prefixes
    short = write_pair("short", [[END]] * 20 if packing == "best_fit" else [[]] * 20)
    for sources, message in [
        ((Source(prefix=a), Source(prefix=b, weight=1e-13)), r"source .*/b has a share"),
        ((Source(prefix=a, weight=1e308), Source(prefix=b, weight=1e308)), r"sources .*/a, .*/b sum to inf"),
        ((Source(prefix=a, epochs=1), Source(prefix=b, epochs=1e-14)), r"source .*/b has a share"),
        ((Source(prefix=a, epochs=1), Source(prefix=b, epochs=1e308)), r"source .*/b asks for inf"),
        ((Source(prefix=a), Source(prefix=short)), r"/short"),
        ((Source(prefix=a), Source(prefix=f"{b}-missing")), r"/b-missing"),
    ]:
        with pytest.raises(DataError, match=message):
            open_loader(with_sources(make_config(a), *sources, packing=packing), split)
    for split_of_a_good_one in ("train", "validation"):
        good = with_sources(make_config(a), Source(prefix=a, epochs=1), Source(prefix=b, epochs=2), packing=packing)
        open_loader(good, split_of_a_good_one)


def test_what_was_drawn_is_what_was_read(prefixes: tuple[str, str], make_config: Callable[..., Config]) -> None:
    loader = open_loader(make_config(*prefixes, weights=(0.8, 0.2)))
    sources = [origin.source for step in range(10) for origin in loader.origins(8 * step)]
    shares = loader.shares(80)
    assert [share.drawn_samples for share in shares] == [sources.count(prefix) for prefix in prefixes]
    assert [share.name for share in shares] == ["a", "b"]
    assert [share.asked_frac for share in shares] == pytest.approx([0.8, 0.2])
    assert sum(share.drawn_frac for share in shares) == pytest.approx(1)


def test_a_tiny_source_with_a_large_share_is_passed_over_and_over(
    prefixes: tuple[str, str], write_pair: Callable[..., str], make_config: Callable[..., Config]
) -> None:
    tiny = write_pair("tiny", [[3, 4, END]])
    config = make_config(prefixes[0], tiny, weights=(1, 9), validation_frac=0.0)
    loader = open_loader(config)
    rows = [row for step in range(20) for batch in loader.step_batches(8 * step) for row in [batch.input_ids_t]]
    of_tiny = [row for row in rows if set(row.tolist()) == {3, 4, END}]
    assert 140 <= len(of_tiny) <= 148
    assert loader.shares(160)[1].epochs == len(of_tiny)


def test_validation_tells_sources_apart(prefixes: tuple[str, str], make_config: Callable[..., Config]) -> None:
    config = make_config(*prefixes, weights=(0.5, 0.5), validation_frac=0.3)
    loader = open_loader(config, "validation")
    names = [name for name, _ in loader.validation_batches()]
    assert names == sorted(names)
    assert set(names) == {"a", "b"}
    own = replace(
        config,
        data=replace(config.data, train=config.data.train[:1], validation=(Source(prefix=prefixes[1]),)),
    )
    assert {name for name, _ in open_loader(own, "validation").validation_batches()} == {"b"}


def test_sources_of_one_name_are_numbered(
    tmp_path_factory: pytest.TempPathFactory, prefixes: tuple[str, str], make_config: Callable[..., Config]
) -> None:
    import shutil
    from pathlib import Path

    folder = tmp_path_factory.mktemp("other")
    for path in Path(prefixes[0]).parent.glob("a.*"):
        shutil.copy(path, folder)
    loader = open_loader(make_config(prefixes[0], str(folder / "a"), prefixes[1]))
    assert [share.name for share in loader.shares(0)] == ["a.0", "a.1", "b"]
