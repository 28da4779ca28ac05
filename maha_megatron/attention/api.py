"""The public functions of attention: MAHA and its dense peer, on raw projections of packed documents.

Letters: t packed rows, n query heads, g KV groups, d head width, L scales, r ratio. Query head i reads
group i // (n/g).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from maha_megatron.attention.aggregation.solvers import SolveReport
from maha_megatron.attention.aggregation.stated_program import UnsolvedProgram
from maha_megatron.attention.dispatch import backend as backend_named
from maha_megatron.attention.scale_attention.attended import Attended
from maha_megatron.attention.spec import (
    AttentionParameters,
    DenseSpec,
    MahaSpec,
    ParameterSpec,
    dense_parameter_specs,
    maha_parameter_specs,
)
from maha_megatron.attention.state import MahaState, Past, check_document_start, check_state


@dataclass(frozen=True, kw_only=True)
class MahaOutput:
    """What `maha_attention` returns.

    `out_tnd` in q's dtype; `scale_weights_tnl` [t, n, L], detached, in at least fp32, where it was asked for, with one
    more weight, the last, where a refined layer opens keys; `solves`
    where a program was solved for them, None where the weights have a closed form; `state` for the next piece, where
    one was given.
    """

    out_tnd: torch.Tensor
    scale_weights_tnl: torch.Tensor | None
    solves: SolveReport | None
    state: MahaState | None


def maha_attention(
    q_tnd: torch.Tensor,
    k_tgd: torch.Tensor,
    v_tgd: torch.Tensor,
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: MahaSpec,
    *,
    backend: str = "eager",
    with_weights: bool = False,
    state: MahaState | None = None,
) -> MahaOutput:
    """Causal multiscale attention over the packed documents of one sequence, or of the next piece of B sequences.

    Args:
        q_tnd, k_tgd, v_tgd: raw projections [t, n, d] and [t, g, d], float64, float32 or bfloat16, strided views
            welcome: before convolution, normalisation and rotation. d is even, g divides n.
        document_start_t: [t] int32 or int64, the row where each row's document starts. A wrong one gives wrong
            positions and blocks of the wrong rows: on a CPU it is refused, elsewhere nothing would tell.
        parameters: learned tensors as `maha_parameter_specs` names and shapes them, in any floating dtype.
        spec: the numbers of the operator.
        backend: implementation by name (dispatch.py).
        with_weights: also return the weight of each scale by row and head.
        state: of the B streams whose next pieces, of equal length and stream after stream, the rows are; t is then B
            times that length. Rows of each piece count from 0, so the document that a stream goes on with starts at
            row -offset; `state.document_start` and `piece_document_start` (state.py) say it.
            Kernels take a few rows of all streams at once where no gradient is asked for; else streams go one by one.

    Returns:
        MahaOutput. A row's output depends on rows of its document up to itself and on nothing else.

    Raises:
        ConfigError: there is no such backend; a state with pooled queries.
        StateError: document_start_t names a row where no document can start, or does not go on where the state ends
            (checked on a CPU).
        UnsolvedProgram: the stated program has no solution for a row and head, which it names.

    Sharding: heads and groups are this rank's; nothing is exchanged between ranks.

    Source: README.md of this folder; the idea is arXiv 2512.14925.
    """
    _check_inputs(q_tnd, k_tgd, v_tgd, document_start_t)
    n, g, d = q_tnd.shape[1], k_tgd.shape[1], q_tnd.shape[2]
    _check_parameters(parameters, maha_parameter_specs(spec, n=n, g=g, d=d))
    operators = backend_named(backend)
    if state is None:
        check_document_start(document_start_t)
        attended = _attend_whole(operators, q_tnd, k_tgd, v_tgd, document_start_t, parameters, spec, with_weights)
        return _output([attended], with_weights, None)
    check_state(state, spec, q_tnd, k_tgd)
    document_start_t = document_start_t.long()
    check_document_start(document_start_t, state)
    if operators.advance is not None:
        inputs = (q_tnd, k_tgd, v_tgd, document_start_t, parameters, spec, state, with_weights)
        advanced = operators.advance(*inputs)
        if advanced is not None:
            attended, after = advanced
            return _output([attended], with_weights, after)
    by_stream = [x.unflatten(0, (state.streams, -1)) for x in (q_tnd, k_tgd, v_tgd, document_start_t)]
    streams, states = [], []
    for stream, piece in enumerate(zip(*by_stream, strict=True)):
        try:
            attended, levels = _attend_piece(operators, *piece, parameters, spec, with_weights, state.past(stream))
        except UnsolvedProgram as error:
            row = stream * len(piece[0]) + error.row
            raise UnsolvedProgram(error.reason, row=row, head=error.head) from error
        streams.append(attended)
        states.append(state.after(stream, levels, piece[:3], piece[3]))
    return _output(streams, with_weights, MahaState.stack(states))


def _attend_whole(operators, q_tnd, k_tgd, v_tgd, document_start_t, parameters, spec, with_weights) -> Attended:
    """Of one whole sequence."""
    if spec.convolution:
        q_tnd, k_tgd, v_tgd = operators.convolve(q_tnd, k_tgd, v_tgd, document_start_t, parameters.convolution)
    if operators.attend_sequence is not None:
        attended = operators.attend_sequence(q_tnd, k_tgd, v_tgd, document_start_t, parameters, spec, with_weights)
        if attended is not None:
            return attended
    levels = operators.build_pyramid((k_tgd, v_tgd), document_start_t, parameters, spec)
    return operators.attend(q_tnd, levels, document_start_t, parameters, spec, None, with_weights)


def _attend_piece(operators, q_tnd, k_tgd, v_tgd, document_start_t, parameters, spec, with_weights, past: Past):
    """Attended of a stream's next piece, and the packed keys and values of every scale."""
    if spec.convolution:
        rows = (q_tnd, k_tgd, v_tgd, document_start_t, parameters.convolution, past.rows)
        q_tnd, k_tgd, v_tgd = operators.convolve(*rows)
    levels = operators.build_pyramid((k_tgd, v_tgd), document_start_t, parameters, spec, past.entries)
    return operators.attend(q_tnd, levels, document_start_t, parameters, spec, spec.held_entries, with_weights), levels


def _output(streams: Sequence[Attended], with_weights: bool, state: MahaState | None) -> MahaOutput:
    """The streams, one after the other."""
    return MahaOutput(
        out_tnd=_joined([attended.out_tnd for attended in streams]),
        scale_weights_tnl=_joined([attended.weights_tnl for attended in streams]) if with_weights else None,
        solves=None if streams[0].report is None else _joined_reports([attended.report for attended in streams]),
        state=state,
    )


def _joined_reports(reports: list[SolveReport]) -> SolveReport:
    steps = [report.steps_tn for report in reports]
    return SolveReport(
        residual_tn=_joined([report.residual_tn for report in reports]),
        steps_tn=None if steps[0] is None else _joined(steps),
        missed=torch.stack([report.missed for report in reports]).sum(),
    )


def _joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def dense_attention(
    q_tnd: torch.Tensor,
    k_tgd: torch.Tensor,
    v_tgd: torch.Tensor,
    document_start_t: torch.Tensor,
    parameters: AttentionParameters,
    spec: DenseSpec,
    *,
    backend: str = "eager",
    document_lengths: Sequence[int] | None = None,
    document_bounds: torch.Tensor | None = None,
    longest_document: int | None = None,
) -> torch.Tensor:
    """Causal softmax attention within documents, with the same convolution, normalisation and rotation as MAHA.

    Args:
        q_tnd, k_tgd, v_tgd, document_start_t: as for `maha_attention`.
        parameters: learned tensors as `dense_parameter_specs` names and shapes them.
        spec: which of the optional parts are on.
        backend: implementation by name.
        document_lengths: rows of every document in order, host integers that sum to t; the eager backend needs them,
            since it never reads a tensor back.
        document_bounds: int32 [documents + 1] on q's device, the first row of every document in order, then t; with
            `longest_document`, the greatest length, needed by eager where the lengths differ, on CUDA.

    Returns:
        [t, n, d] in q's dtype.

    Raises:
        ConfigError: there is no such backend.
        StateError: document_start_t names a row where no document can start (checked on a CPU).

    Sharding: heads and groups are this rank's; nothing is exchanged between ranks.
    """
    _check_inputs(q_tnd, k_tgd, v_tgd, document_start_t)
    check_document_start(document_start_t)
    n, g, d = q_tnd.shape[1], k_tgd.shape[1], q_tnd.shape[2]
    _check_parameters(parameters, dense_parameter_specs(spec, n=n, g=g, d=d))
    operators = backend_named(backend)
    if spec.convolution:
        q_tnd, k_tgd, v_tgd = operators.convolve(q_tnd, k_tgd, v_tgd, document_start_t, parameters.convolution)
    documents = (document_lengths, document_bounds, longest_document)
    return operators.attend_dense(q_tnd, k_tgd, v_tgd, document_start_t, parameters, spec, *documents)


def _check_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, document_start: torch.Tensor) -> None:
    t, n, d = q.shape
    assert t > 0, "an empty sequence"
    assert d % 2 == 0, f"head width {d} is odd"
    assert k.shape == v.shape == (t, k.shape[1], d), (q.shape, k.shape, v.shape)
    assert n % k.shape[1] == 0, f"{n} query heads over {k.shape[1]} KV groups"
    assert document_start.shape == (t,), document_start.shape
    assert q.dtype == k.dtype == v.dtype, (q.dtype, k.dtype, v.dtype)


def _check_parameters(parameters: AttentionParameters, expected: dict[str, ParameterSpec]) -> None:
    given = {name: tuple(value.shape) for name, value in vars(parameters).items() if value is not None}
    assert given == {name: spec.shape for name, spec in expected.items()}, (given, expected)
