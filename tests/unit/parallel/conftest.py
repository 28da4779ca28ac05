from tests.support.one_rank import one_rank  # noqa: F401
