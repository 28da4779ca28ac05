"""Decoding: the time of one token for B streams, from the state of a context, beside SDPA over a cache of its keys.

MAHA's step reads the state and makes the next one (attention/state.py); its size does not grow with the context but by
its logarithm. Dense attention's step writes its key and value into the cache and reads all of it. States and caches
hold random numbers: no context is run to fill them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from maha_megatron.attention.api import maha_attention
from maha_megatron.attention.benchmark.figures import Goal
from maha_megatron.attention.benchmark.gate import FLOOR, Verdict
from maha_megatron.attention.benchmark.step_clock import Step, StepClock, StepTimes
from maha_megatron.attention.benchmark.subjects import DTYPES, OURS, Setting, draw_parameters
from maha_megatron.attention.spec import AttentionParameters, maha_parameter_specs
from maha_megatron.attention.state import MahaState

CONTEXTS, STREAMS = (4096, 65536, 524288), (1, 32)
CACHED = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
          "efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip
MOST_GROWTH, _FROM, _LONGEST = 1.2, 4096, 524288
_REASON = 160  # characters of what torch says


@dataclass(frozen=True, kw_only=True)
class DecodeRow:
    """One context and number of streams.

    entries: keys of the state, of one stream and KV group; state_bytes, cache_bytes: of all streams.
    """

    dtype: str
    context: int
    streams: int
    entries: int
    state_bytes: int
    cache_bytes: int
    times: dict[str, StepTimes]
    unavailable: dict[str, str]

    def best_cached(self) -> str | None:
        """The kernel over the cache that is fastest; None where none ran."""
        ran = [name for name in self.times if name != OURS]
        return min(ran, key=lambda name: self.times[name].best_s, default=None)


@dataclass(frozen=True, kw_only=True)
class Token:
    """q, k, v of the next token of every stream, and what a layer has learned."""

    q_tnd: torch.Tensor
    k_tgd: torch.Tensor
    v_tgd: torch.Tensor
    learned: AttentionParameters


def state_of(setting: Setting, context: int, streams: int, dtype: torch.dtype) -> MahaState:
    """A state whose next token is the context's last: at powers of the ratio it completes a block of every scale."""
    shape = {"n": setting.heads, "g": setting.groups, "d": setting.width}
    made = MahaState.initial(setting.spec_at(context), streams=streams, dtype=dtype, device=setting.device, **shape)
    drawn = [_random(setting, entry.shape, dtype, seed) for seed, entry in enumerate(made.entries)]
    rows = None if made.rows is None else _random(setting, made.rows.shape, dtype, len(drawn))
    return replace(made, entries=tuple(drawn), rows=rows, offset=torch.full_like(made.offset, context - 1))


def token_of(setting: Setting, context: int, streams: int, dtype: torch.dtype) -> Token:
    spec = setting.spec_at(context)
    shapes = maha_parameter_specs(spec, n=setting.heads, g=setting.groups, d=setting.width)
    learned = {name: value.detach() for name, value in draw_parameters(shapes, setting, dtype).items()}
    heads = (setting.heads, setting.groups, setting.groups)
    qkv = [_random(setting, (streams, many, setting.width), dtype, 100 + seed) for seed, many in enumerate(heads)]
    return Token(q_tnd=qkv[0], k_tgd=qkv[1], v_tgd=qkv[2], learned=AttentionParameters(**learned))


def _random(setting: Setting, shape: Sequence[int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator(setting.device).manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, device=setting.device, dtype=dtype)


def maha_step(token: Token, state: MahaState, setting: Setting, context: int) -> Step:
    """One token from `state`; every call starts from it again, and makes the next state."""
    spec, qkv = setting.spec_at(context), (token.q_tnd, token.k_tgd, token.v_tgd)

    def step() -> object:
        starts = state.document_start(1)
        return maha_attention(*qkv, starts, token.learned, spec, backend=setting.backend, state=state)

    return step


def cached_step(token: Token, setting: Setting, context: int, kernel: SDPBackend) -> Step:
    """One token over a cache [B, g, context, d] of keys and of values, whose last place it fills, by one kernel."""
    streams = len(token.q_tnd)
    shape = (streams, setting.groups, context, setting.width)
    keys, values = (_random(setting, shape, token.q_tnd.dtype, seed) for seed in range(2))
    q_bn1d, grouped = token.q_tnd[:, :, None], setting.heads != setting.groups

    def step() -> object:
        keys[:, :, -1], values[:, :, -1] = token.k_tgd, token.v_tgd
        with sdpa_kernel([kernel]):
            return F.scaled_dot_product_attention(q_bn1d, keys, values, enable_gqa=grouped)

    return step


@torch.no_grad()
def measured(
    setting: Setting, context: int, streams: int, dtype: str, clock: StepClock, *, repeats: int, cache: bool = True
) -> DecodeRow:
    """Times of one context and number of streams; what has no kernel or no memory is named.

    Args:
        cache: whether dense attention over a cache is measured beside it.
    """
    token = token_of(setting, context, streams, DTYPES[dtype])
    state = state_of(setting, context, streams, DTYPES[dtype])
    times = {OURS: clock.step(maha_step(token, state, setting, context), repeats)}
    unavailable = {}
    for name, kernel in CACHED.items() if cache else ():
        try:
            times[name] = clock.step(cached_step(token, setting, context, kernel), repeats)
        except RuntimeError as error:  # no such kernel here, or too little memory
            unavailable[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:_REASON]}"
    itemsize = DTYPES[dtype].itemsize
    held = [tensor.nbytes for tensor in (*state.entries, *([] if state.rows is None else [state.rows]))]
    return DecodeRow(
        dtype=dtype,
        context=context,
        streams=streams,
        entries=sum(entry.shape[1] for entry in state.entries),
        state_bytes=sum(held),
        cache_bytes=2 * streams * setting.groups * context * setting.width * itemsize,
        times=times,
        unavailable=unavailable,
    )


@torch.no_grad()
def check_step(setting: Setting, dtype: torch.dtype, context: int, streams: int = 2) -> Verdict:
    """Compare a step of the setting's backend with one of the naive backend in fp64, new state included.

    It may be twice as far from exact as the naive backend is in the same dtype.
    """
    on_cpu = replace(setting, device="cpu", backend="naive")
    token, state = token_of(on_cpu, context, streams, dtype), state_of(on_cpu, context, streams, dtype)

    def results(of: Setting, precision: torch.dtype) -> dict[str, torch.Tensor]:
        def moved(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.to(of.device, precision)

        learned = AttentionParameters(**{name: moved(value) for name, value in vars(token.learned).items()})
        own = Token(q_tnd=moved(token.q_tnd), k_tgd=moved(token.k_tgd), v_tgd=moved(token.v_tgd), learned=learned)
        found = maha_step(own, state.to(of.device, precision), of, context)()
        named = {name: x for name, x in found.state.tensors().items() if x.is_floating_point()}
        return {name: x.cpu().double() for name, x in ({"out": found.out_tnd} | named).items()}

    exact, plain, found = results(on_cpu, torch.float64), results(on_cpu, dtype), results(setting, dtype)
    errors, bounds = {}, {}
    for name, reference in exact.items():
        scale = max(reference.abs().max().item(), 0.1)
        errors[name] = (found[name] - reference).abs().max().item() / scale
        bounds[name] = max(2 * (plain[name] - reference).abs().max().item() / scale, FLOOR[dtype])
    return Verdict(errors=errors, bounds=bounds)


def goals(setting: Setting, rows: Sequence[DecodeRow]) -> list[Goal]:
    """One stream at 512 k takes at most 1.2 x of 4 k; several grow by at most 1.2 x of what a state's entries grow.

    Times are those of replayed graphs where both have one, else of calls. None on a CPU, where what Python does for
    each scale decides.
    """
    if setting.device != "cuda":
        return []
    first = {(row.dtype, row.streams): row for row in rows if row.context == _FROM}
    found = []
    for row in rows:
        start = first.get((row.dtype, row.streams))
        if start is None or row.context == _FROM or (row.streams == 1 and row.context != _LONGEST):
            continue
        allowed = MOST_GROWTH * (1 if row.streams == 1 else row.entries / start.entries)
        grown = row.times[OURS].over(start.times[OURS])
        text = f"{row.dtype}, {row.streams} streams: {row.context} tokens <= {allowed:.2f} x the time at {_FROM}"
        found.append(Goal(text=text, found=grown, met=grown <= allowed))
    return found
