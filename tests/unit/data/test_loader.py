from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from maha_megatron.config.schema import Config, SkipRange, Source
from maha_megatron.data.batch import MicroBatch
from maha_megatron.data.loader import Loader, build_loader
from maha_megatron.data.manifest import manifest_path
from maha_megatron.errors import DataError
from tests.support.pairs import END, VOCABULARY, random_documents

S = 16


def rows(batches: list) -> list[list[int]]:
    """Every sample's tokens, in the order of the batches."""
    return [sample for batch in batches for sample in batch.input_ids_t.reshape(-1, S).tolist()]


def validation_of(loader: Loader) -> list[MicroBatch]:
    """The batches of a validation."""
    return [batch for _, batch in loader.validation_batches()]


def at_topology(config: Config, size: int, micro: int, global_batch: int = 8) -> Config:
    train = replace(config.train, global_batch_samples=global_batch, micro_batch_samples=micro)
    return replace(config, train=train)


@pytest.fixture
def mixed(write_pair: Callable[..., str], make_config: Callable[..., Config]) -> Config:
    """Two sources of unequal weight, both short enough that a few steps cross epochs."""
    return make_config(
        write_pair("a", random_documents(20)), write_pair("b", random_documents(12, seed=1)), weights=(3, 1)
    )


def test_a_step_has_the_same_samples_at_every_topology(mixed: Config) -> None:
    reference = build_loader(at_topology(mixed, 1, 1), data_parallel_rank=0, data_parallel_size=1)
    for size, micro in [(1, 2), (1, 8), (2, 1), (2, 4), (4, 2), (8, 1)]:
        loaders = [
            build_loader(at_topology(mixed, size, micro), data_parallel_rank=rank, data_parallel_size=size)
            for rank in range(size)
        ]
        for consumed in (0, 8, 800):
            by_rank = [loader.step_batches(consumed) for loader in loaders]
            assert all(len(batches) == 8 // (size * micro) for batches in by_rank)
            in_global_order = [sample for turn in zip(*by_rank, strict=True) for sample in rows(list(turn))]
            assert in_global_order == rows(reference.step_batches(consumed))
            unmasked = sum(batch.unmasked for batches in by_rank for batch in batches)
            assert unmasked == sum(batch.unmasked for batch in reference.step_batches(consumed))


def test_the_samples_do_not_depend_on_the_batch_size_or_the_planned_steps(mixed: Config) -> None:
    small = build_loader(mixed, data_parallel_rank=0, data_parallel_size=1)
    longer = replace(mixed, train=replace(mixed.train, steps=99_999, global_batch_samples=16))
    large = build_loader(longer, data_parallel_rank=0, data_parallel_size=1)
    assert rows(large.step_batches(80)) == rows(small.step_batches(80)) + rows(small.step_batches(88))


def test_a_new_loader_continues_where_the_old_one_stopped(mixed: Config) -> None:
    old = build_loader(mixed, data_parallel_rank=0, data_parallel_size=1)
    straight = [rows(old.step_batches(8 * step)) for step in range(20)]
    resumed = build_loader(mixed, data_parallel_rank=0, data_parallel_size=1)
    assert [rows(resumed.step_batches(8 * step)) for step in range(11, 20)] == straight[11:]


def test_batches_are_packed_from_whole_samples(mixed: Config) -> None:
    config = at_topology(mixed, 1, 4)
    batch = build_loader(config, data_parallel_rank=0, data_parallel_size=1).step_batches(0)[0]
    starts = batch.document_start_t.reshape(-1, S)
    assert starts[:, 0].tolist() == [0, 16, 32, 48]
    assert torch.equal(batch.loss_mask_t, batch.input_ids_t != END)
    inputs, labels = batch.input_ids_t.reshape(-1, S), batch.labels_t.reshape(-1, S)
    assert torch.equal(inputs[:, 1:], labels[:, :-1])


def test_document_bounds_off_leaves_only_the_samples(mixed: Config) -> None:
    free = replace(mixed, data=replace(mixed.data, document_bounds=False))
    for bounded, unbounded in zip(
        build_loader(mixed, data_parallel_rank=0, data_parallel_size=1).step_batches(0),
        build_loader(free, data_parallel_rank=0, data_parallel_size=1).step_batches(0),
        strict=True,
    ):
        assert unbounded.document_start_t.unique().tolist() == [0]
        assert torch.equal(bounded.input_ids_t, unbounded.input_ids_t)
        assert torch.equal(bounded.loss_mask_t, unbounded.loss_mask_t)


def test_a_mixture_takes_its_shares(mixed: Config) -> None:
    loader = build_loader(at_topology(mixed, 1, 8, 400), data_parallel_rank=0, data_parallel_size=1)
    of_second = {tuple(document[:3]) for document in random_documents(12, seed=1)}
    tokens = np.array(rows(loader.step_batches(0)))
    second = {token for document in random_documents(12, seed=1) for token in document} - {
        token for document in random_documents(20) for token in document
    }
    from_second = np.isin(tokens, list(second)).any(axis=1).sum()
    assert of_second
    assert 80 <= from_second <= 105  # a quarter of 400, less the samples with shared tokens only


def test_validation_documents_are_not_training_documents(
    write_pair: Callable[..., str], make_config: Callable[..., Config]
) -> None:
    # Every document has a token of its own.
    config = make_config(write_pair("a", [[100 + i] * 30 + [END] for i in range(50)]))
    train = build_loader(config, data_parallel_rank=0, data_parallel_size=1)
    validation = build_loader(config, data_parallel_rank=0, data_parallel_size=1, split="validation")
    trained = {token for step in range(60) for row in rows(train.step_batches(8 * step)) for token in row} - {END}
    validated = {token for row in rows(validation_of(validation)) for token in row} - {END}
    assert trained == set(range(100, 140))
    assert validated == set(range(140, 150))
    assert train.tokens_per_epoch + validation.tokens_per_epoch == 50 * 31


def test_validation_sources_of_their_own(write_pair: Callable[..., str], make_config: Callable[..., Config]) -> None:
    config = make_config(
        write_pair("a", [[100 + i] * 30 + [END] for i in range(50)]),
        validation=(Source(prefix=write_pair("v", [[500 + i] * 30 + [END] for i in range(9)])),),
    )
    train = build_loader(config, data_parallel_rank=0, data_parallel_size=1)
    validation = build_loader(config, data_parallel_rank=0, data_parallel_size=1, split="validation")
    assert train.tokens_per_epoch == 50 * 31
    assert min(min(row) for row in rows(validation_of(validation)) if END not in row) >= 500


@pytest.mark.parametrize(("size", "micro"), [(1, 1), (2, 2), (4, 1), (3, 2)])
def test_every_rank_validates_equally_often_on_the_same_samples(mixed: Config, size: int, micro: int) -> None:
    def batches(config: Config, rank: int, size: int) -> list[tuple[str, MicroBatch]]:
        loader = build_loader(config, data_parallel_rank=rank, data_parallel_size=size, split="validation")
        return list(loader.validation_batches())

    config = at_topology(mixed, size, micro, global_batch=micro * size)
    config = replace(config, train=replace(config.train, validation_samples=7))
    reference = batches(at_topology(config, 1, 1), 0, 1)
    assert len(reference) == 7
    by_rank = [batches(config, rank, size) for rank in range(size)]
    assert all([name for name, _ in found] == [name for name, _ in by_rank[0]] for found in by_rank)
    for source in ("a", "b"):  # one after the other, none mixed
        expected = rows([batch for name, batch in reference if name == source])
        of_source = [[batch for name, batch in found if name == source] for found in by_rank]
        assert {len(found) for found in of_source} == {-(-len(expected) // (size * micro))}
        in_global_order = [sample for turn in zip(*of_source, strict=True) for sample in rows(list(turn))]
        assert in_global_order[: len(expected)] == expected
    assert sum(b.unmasked for found in by_rank for _, b in found) == sum(b.unmasked for _, b in reference)


@pytest.mark.parametrize("weights", [(1, 1), (1, 9), (30, 1)])
def test_validation_reads_no_sample_twice(
    weights: tuple[float, ...], write_pair: Callable[..., str], make_config: Callable[..., Config]
) -> None:
    a = write_pair("a", [[100 + i, *range(500, 515)] for i in range(40)])  # every sample begins with its own token
    b = write_pair("b", [[200 + i, *range(500, 515)] for i in range(40)])
    config = make_config(a, b, weights=weights, validation_frac=0.5, document_bounds=False)
    config = replace(config, train=replace(config.train, validation_samples=10_000))
    loader = build_loader(config, data_parallel_rank=0, data_parallel_size=1, split="validation")
    first = [row[0] for row in rows(validation_of(loader))]
    assert len(first) == len(set(first)) == loader.validation_samples() < 10_000
    of_one_source = [sum(lower <= token < lower + 100 for token in first) for lower in (100, 200)]
    assert max(of_one_source) == loader.samples_per_epoch // 2  # stopped no earlier than needed


def build(config: Config, split: str = "train") -> None:
    loader = build_loader(config, data_parallel_rank=0, data_parallel_size=1, split=split)
    for step in range(20):
        loader.step_batches(8 * step)


def test_the_vocabularies_must_agree(mixed: Config) -> None:
    config = replace(mixed, model=replace(mixed.model, vocabulary=512))
    with pytest.raises(DataError, match=r"has 1000 token ids, but model\.vocabulary = 512: set model\.vocabulary=1000"):
        build(config)


def test_sources_of_different_tokenizers_are_refused(
    write_pair: Callable[..., str], make_config: Callable[..., Config]
) -> None:
    a = write_pair("a", random_documents(30))
    b = write_pair("b", random_documents(30), tokenizer_fingerprint="test:2")
    with pytest.raises(DataError, match=r"b was made with another tokenizer \(test:2.*test:1"):
        build(make_config(a, b))


def test_a_tokenizer_other_than_the_datas_is_refused(
    write_pair: Callable[..., str], make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        vocabulary, end_of_document, fingerprint = VOCABULARY, END, "test:other"

    monkeypatch.setattr("maha_megatron.data.sources.load_tokenizer", lambda _: Other())
    config = make_config(write_pair("a", random_documents(30)), tokenizer="other.model")
    with pytest.raises(DataError, match=r"a was made with another tokenizer \(test:1.*other\.model \(test:other"):
        build(config)
    manifest_path(config.data.train[0].prefix).unlink()
    build(config)  # a pair without a manifest cannot be compared


def test_without_tokenizer_and_manifest_the_end_is_unknown(
    write_pair: Callable[..., str], make_config: Callable[..., Config]
) -> None:
    with pytest.raises(DataError, match=r"set data\.tokenizer"):
        build(make_config(write_pair("a", random_documents(30), manifest=False)))


def test_a_token_outside_the_vocabulary_is_named(
    write_pair: Callable[..., str], make_config: Callable[..., Config]
) -> None:
    documents = random_documents(30)
    documents[3][0] = 4321
    config = make_config(write_pair("a", documents))
    with pytest.raises(DataError, match=r"a\.bin holds the token id 4321, but model\.vocabulary = 1000"):
        build(config)


def test_documents_without_an_end_are_refused(
    write_pair: Callable[..., str], make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Model:
        vocabulary, end_of_document, fingerprint = VOCABULARY, END, "test:1"

    def refused(prefix: str, message: str, **data: str) -> None:
        config = make_config(write_pair("whole", random_documents(30)), prefix, **data)
        with pytest.raises(DataError, match=rf"{message}.*with --append-eod.*data\.document_bounds=false"):
            build(config)
        build(replace(config, data=replace(config.data, document_bounds=False)))

    monkeypatch.setattr("maha_megatron.data.sources.load_tokenizer", lambda _: Model())
    documents = random_documents(100)
    refused(write_pair("a", documents, end_appended=False), "a was preprocessed without --append-eod")
    documents[57][-1] = 5
    message = r"document 57 of .*b ends with token 5, not with the end-of-document token 2"
    refused(write_pair("b", documents, manifest=False), message, tokenizer="the.model")


def test_nothing_to_read_is_refused(write_pair: Callable[..., str], make_config: Callable[..., Config]) -> None:
    with pytest.raises(DataError, match=r"data\.train names no source"):
        build(make_config())
    config = make_config(write_pair("a", random_documents(30)), validation_frac=0.0)
    build(config)
    with pytest.raises(DataError, match=r"set data\.validation or data\.validation_frac"):
        build(config, split="validation")


def test_a_manifest_that_cannot_be_read_says_so(mixed: Config) -> None:
    path = manifest_path(mixed.data.train[0].prefix)
    whole = path.read_text()
    for broken in (
        whole[:50],
        "[]",
        whole.replace('"documents"', '"docs"'),
        whole.replace('"format": 2', '"format": 3'),
    ):
        path.write_text(broken)
        with pytest.raises(DataError, match=r"manifest\.json (is damaged|has format 3).*preprocess again"):
            build(mixed)


def test_the_index_lies_in_the_cache_folder_or_the_runs(
    mixed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("maha_megatron.data.order.STORED_ITEMS", 0)
    build(mixed)
    assert len(list((tmp_path / "run" / "index").glob("[!.]*"))) > 0
    build(replace(mixed, data=replace(mixed.data, cache=str(tmp_path / "cache"))))
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        path.name for path in (tmp_path / "run" / "index").iterdir()
    }


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_no_index_is_built_once_those_of_the_run_are(
    mixed: Config, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    """Skipped samples count too: the range that is left out moves the run's end several epochs on."""
    monkeypatch.setattr("maha_megatron.data.order.STORED_ITEMS", 0)
    data = replace(mixed.data, packing=packing, skip=(SkipRange(first=100, last=499),), validation_frac=0.4)
    loader = build_loader(replace(mixed, data=data), data_parallel_rank=0, data_parallel_size=1)
    first, last = 80, 400
    assert loader.build_indexes(first, last) > 20
    built = len(list(Path(mixed.run.folder, "index").iterdir()))
    validation = build_loader(replace(mixed, data=data), data_parallel_rank=0, data_parallel_size=1, split="validation")
    validation.build_indexes(0, 0)
    with monkeypatch.context() as patch:
        patch.setattr("maha_megatron.data.order.build_index", lambda *_: pytest.fail("an index was built late"))
        loader = build_loader(replace(mixed, data=data), data_parallel_rank=0, data_parallel_size=1)
        for consumed in range(first, last, 8):
            loader.step_batches(consumed)
        assert validation_of(validation)
    longer = loader.build_indexes(last, last + 400)
    assert built < len(list(Path(mixed.run.folder, "index").iterdir())) <= built + 2 + longer


def identity(config: Config) -> dict:
    return build_loader(config, data_parallel_rank=0, data_parallel_size=1).identity


def test_the_identity_names_what_changes_the_samples(mixed: Config, write_pair: Callable[..., str]) -> None:
    def with_data(**changes: object) -> Config:
        return replace(mixed, data=replace(mixed.data, **changes))

    first, second = mixed.data.train
    other = write_pair("other", random_documents(12, seed=2))
    retokenised = write_pair("c", random_documents(20), tokenizer_fingerprint="test:2")
    retokenised = (Source(prefix=retokenised), Source(prefix=retokenised))
    same = identity(mixed)
    for changed, names in [
        (replace(mixed, run=replace(mixed.run, seed=8)), {"run.seed"}),
        (with_data(sequence_tokens=8), {"data.sequence_tokens"}),
        (with_data(train=(first, replace(second, weight=2))), {"data.train[0] share", "data.train[1] share"}),
        (with_data(validation_frac=0.5), {"data.train[0] documents", "data.train[1] documents"}),
        (with_data(train=(first, Source(prefix=other))), {"data.train[1] lengths"}),
        (with_data(train=retokenised), {"tokenizer"}),
    ]:
        now = identity(changed)
        assert names <= {name for name in same if now[name] != same[name]}, names


def test_the_identity_stays_where_the_samples_do(mixed: Config, write_pair: Callable[..., str]) -> None:
    moved = write_pair("moved", random_documents(12, seed=1))
    first, second = mixed.data.train
    train = (replace(first, weight=30), replace(second, prefix=moved, weight=10))
    rebatched = replace(mixed.train, steps=99, global_batch_samples=16, micro_batch_samples=2)
    assert identity(replace(mixed, data=replace(mixed.data, train=train), train=rebatched)) == identity(mixed)
