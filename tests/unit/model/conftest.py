from tests.support.graphs import graph_work  # noqa: F401
from tests.support.one_rank import one_rank  # noqa: F401
