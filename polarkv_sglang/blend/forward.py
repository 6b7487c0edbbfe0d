"""One prefill pass of one request that computes some rows only, layer by layer inside SGLang's own model."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import torch

from polarkv_sglang.blend.model import BlendModel
from polarkv_sglang.blend.plan import PassRows
from polarkv_sglang.blend.select import Selection, choose_first, choose_together, chosen_rows
from polarkv_sglang.blend.stages import Stage
from polarkv_sglang.errors import PolarError
from polarkv_sglang.kernels.attention import SparseQueries, sparse_query_attention
from polarkv_sglang.kernels.deviation import Rows, deviation_sums
from polarkv_sglang.kernels.rotate import Moves, Turns, rotate_keys, turns_of
from polarkv_sglang.kernels.rows import put_rows, take_rows

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

T = TypeVar("T")

# By which SGLang's Qwen3-MoE has its rotary kernel write KV to the pool, on CUDA in bf16.
_FUSED: Final = "compatible_with_fused_kv_buffer"


class PassCounts(NamedTuple):
    """Tokens of one pass that had cached KV."""

    blended: int  # their KV of most layers is the cached one
    recomputed: int  # chosen at the check layer


class _KeysAndValuesKnown(Exception):
    """A layer that only its keys and values are wanted of is left here."""


class NotAsExpected(PolarError):
    """The model is not called as a pass needs it; on all ranks alike, since all run the same code."""


class BlendPass:
    """Computes one request's tokens [first, end), of which ``cached`` have KV from elsewhere.

    Layers before the check layer compute all rows. There all rows' keys and values are computed, the ones
    with cached KV that differ most are chosen, and from there on only those and the rows without cached KV
    go on, each seeing all tokens up to its own position; the others' KV is the cached one, with its keys
    rotated. After the last layer rows stand where they stood, so that the last one can be sampled from.

    The request's own slots are written, the cached slots only read. The model's modules are changed while
    ``run`` is under way, and as they were after it, whatever happens.

    Every rank of a tensor-parallel group runs it alike: ranks add their shares of the deviation up, and the
    first one's choice is everybody's.
    """

    def __init__(
        self,
        model: BlendModel,
        runner: ModelRunner,
        batch: ForwardBatch,
        cached: PassRows,
        selection: Selection,
    ) -> None:
        """``batch`` is an extend batch with the one request. Raises ValueError where they do not fit."""
        if batch.batch_size != 1 or not len(cached):
            raise ValueError(
                f"{batch.batch_size} requests, {len(cached)} cached rows; one, and some, are needed"
            )
        if selection.stages[-1].layer >= len(model.layers):
            raise ValueError(f"stage at layer {selection.stages[-1].layer} of {len(model.layers)}")
        self._model = model
        self._pool = runner.token_to_kv_pool
        self._selection = selection
        self._first = int(batch.extend_prefix_lens_cpu[0])
        self._count = int(batch.extend_seq_lens_cpu[0])
        self._table = runner.req_to_token_pool.req_to_token
        request = batch.req_pool_indices[:1]
        device = self._table.device
        self._request = request.to(torch.int64)
        self._slots = self._table[request[0], self._first : self._first + self._count].to(torch.int64)
        self._cached = cached.to(device)
        self._rows = torch.arange(self._count, device=device)  # that are computed now, ascending
        self._kept = torch.arange(len(cached), device=device)  # which cached ones, by index, are among them
        # Where the KV of the others comes from, once there are others, and on a CPU how it is turned.
        self._left: Moves | None = None
        self._turns: Turns | None = None
        self._uncached = _without(self._count, cached.rows).to(device)
        self._queries: SparseQueries | None = None  # None: all rows, by SGLang's own attention
        self._fresh: tuple[torch.Tensor, torch.Tensor] | None = None
        self._probing = False
        self._stages = {stage.layer: stage for stage in selection.stages}

    @property
    def counts(self) -> PassCounts:
        """What becomes of the cached rows; known before ``run``, and the same on all ranks."""
        recomputed = chosen_rows(len(self._cached), self._selection.stages[0].ratio)
        return PassCounts(len(self._cached) - recomputed, recomputed)

    @property
    def computed_rows(self) -> torch.Tensor:
        """int64 ascending: the rows that the last layer computed; all before ``run``."""
        return self._rows

    def run(self, forward: Callable[[], T]) -> T:
        """What ``forward``, the model's forward pass over the batch, returns with this pass in effect.

        Raises NotAsExpected, or what the model raises; ``forward`` alone then computes the batch in full,
        whatever was written.
        """
        with self._installed():
            return forward()

    @contextlib.contextmanager
    def _installed(self) -> Iterator[None]:
        """Layers and attentions from the check layer on go through us, and no kernel writes KV without us."""
        with contextlib.ExitStack() as changes:
            for layer in self._model.layers:
                owner: Any = layer.self_attn
                if _FUSED in owner.__dict__:
                    changes.enter_context(_attribute(owner, _FUSED, False))
            for number in range(self._selection.stages[0].layer, len(self._model.layers)):
                layer, attention = self._model.layers[number], self._model.attentions[number]
                for module, ours in ((layer, self._layer), (attention, self._attention)):
                    forward = functools.partial(ours, number, module.forward)
                    changes.enter_context(_attribute(module, "forward", forward))
            yield

    def _layer(self, number: int, original: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        from sglang.srt.layers.layer_boundary.residual.batch import fold, set_written

        given = inspect.signature(original).bind(*args, **kwargs).arguments
        if not given.keys() >= {"positions", "hidden_states", "forward_batch"}:
            raise NotAsExpected(f"layer {number} takes {sorted(given)}")
        batch = given["forward_batch"]  # a copy that SGLang makes for the pass
        stage = self._stages.get(number)
        if stage is not None:
            hidden = fold(given["hidden_states"], batch)
            if len(hidden) != len(self._rows):
                raise NotAsExpected(f"layer {number} has {len(hidden)} rows instead of {len(self._rows)}")
            kept = self._narrow(number, original, given, hidden, stage)
            given["hidden_states"] = set_written(kept, batch)
            batch.out_cache_loc = self._slots[self._rows]
        hidden = original(**{**given, "positions": given["positions"][self._rows]})
        if number < len(self._model.layers) - 1:
            return hidden
        computed = fold(hidden, batch)
        whole = computed.new_zeros(self._count, computed.shape[1])
        whole[self._rows] = computed
        batch.out_cache_loc = self._slots
        return set_written(whole, batch)

    def _narrow(
        self,
        number: int,
        original: Callable[..., torch.Tensor],
        given: dict[str, Any],
        hidden: torch.Tensor,
        stage: Stage,
    ) -> torch.Tensor:
        """Choose the rows that go on from here, and return what ``hidden`` has of them."""
        before = hidden.clone()  # norms write to their input
        self._probing = True
        try:
            original(**{**given, "hidden_states": hidden, "positions": given["positions"][self._rows]})
        except _KeysAndValuesKnown:
            pass
        finally:
            self._probing = False
        if self._fresh is None:
            raise NotAsExpected(f"layer {number} did not come to its attention")
        keys, values = self._fresh
        self._fresh = None
        chosen = self._choose(number, keys, values, stage)
        # What is computed here is better than what is cached, also of rows that end here.
        key_pool, value_pool = self._pool.get_kv_buffer(number)
        self._reuse(key_pool, value_pool)
        own = self._slots[self._rows]
        put_rows(key_pool, own, keys)
        put_rows(value_pool, own, values)
        rows = torch.cat([self._uncached, self._cached.rows[chosen]]).sort().values
        at = torch.searchsorted(self._rows, rows)
        self._kept = chosen
        left = _without_indices(len(self._cached), chosen)
        places, slots, old, new, _ = (vector[left] for vector in self._cached)
        self._left = Moves(slots, self._slots[places], old, new)
        self._turns = turns_of(self._left, self._model.rotary) if slots.device.type == "cpu" else None
        self._rows = rows
        self._queries = SparseQueries(
            positions=rows + self._first,
            bounds=torch.tensor([0, len(rows)], device=rows.device),
            rows=self._request,
            slots=self._table,
            most=len(rows),
        )
        return before[at]

    def _choose(self, number: int, keys: torch.Tensor, values: torch.Tensor, stage: Stage) -> torch.Tensor:
        """Which cached rows go on, as ascending indices; the same on all ranks."""
        from sglang.srt.runtime_context import get_parallel

        count = min(chosen_rows(len(self._cached), stage.ratio), len(self._kept))
        if count == len(self._kept):
            return self._kept
        if self._selection.strategy == "first":
            return self._kept[choose_first(self._cached.offsets[self._kept], count)]
        among = torch.searchsorted(self._rows, self._cached.rows[self._kept])
        sums = self._deviations(number, keys[among], values[among])
        return self._kept[choose_together(sums, count, get_parallel().tp_group)]

    def _deviations(self, number: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """How far the kept rows' KV is from the cached one, as ``deviation_sums`` of this rank's heads."""
        metric = self._selection.metric
        key_pool, value_pool = self._pool.get_kv_buffer(number)
        _, slots, old, new, _ = (vector[self._kept] for vector in self._cached)
        sums = torch.zeros(2, len(slots), device=slots.device)
        if "v" in metric:
            sums += deviation_sums([Rows(values, value_pool)], slots)
        if "k" in metric:
            moved = torch.empty_like(keys)
            places = torch.arange(len(slots), device=slots.device)
            rotate_keys(key_pool, moved, Moves(slots, places, old, new), self._model.rotary)
            sums += deviation_sums([Rows(keys, moved)], places)
        return sums

    def _attention(
        self,
        number: int,
        original: Callable[..., torch.Tensor],
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        batch: ForwardBatch,
        save_kv_cache: bool = True,
        **more: object,
    ) -> torch.Tensor:
        attention = self._model.attentions[number]
        if more or keys is None or values is None or not save_kv_cache:
            raise NotAsExpected(
                f"attention of layer {number} is called with save_kv_cache={save_kv_cache}, {sorted(more)}"
            )
        keys = keys.view(-1, attention.tp_k_head_num, attention.qk_head_dim)
        values = values.view(-1, attention.tp_v_head_num, attention.v_head_dim)
        if self._probing:
            self._fresh = keys, values
            raise _KeysAndValuesKnown
        assert self._queries is not None
        key_pool, value_pool = self._pool.get_kv_buffer(number)
        own = self._slots[self._rows]
        put_rows(key_pool, own, keys)
        put_rows(value_pool, own, values)
        if number not in self._stages:
            self._reuse(key_pool, value_pool)
        out = sparse_query_attention(
            query.view(-1, attention.tp_q_head_num, attention.qk_head_dim),
            key_pool,
            value_pool,
            self._queries,
            attention.scaling,
        )
        return out.flatten(1)

    def _reuse(self, key_pool: torch.Tensor, value_pool: torch.Tensor) -> None:
        """Copy the cached KV of the rows that are not computed to the request's slots, its keys rotated."""
        if self._left is None:
            return
        rotate_keys(key_pool, key_pool, self._left, self._model.rotary, self._turns)
        put_rows(value_pool, self._left.target_rows, take_rows(value_pool, self._left.source_rows))


@contextlib.contextmanager
def _attribute(module: torch.nn.Module, name: str, value: object) -> Iterator[None]:
    """A module's own attribute meanwhile; others, too, replace a module's forward on the module itself."""
    before = {key: module.__dict__[key] for key in (name,) if key in module.__dict__}
    module.__dict__[name] = value
    try:
        yield
    finally:
        del module.__dict__[name]
        module.__dict__.update(before)


def _without(count: int, rows: torch.Tensor) -> torch.Tensor:
    """Of range(count) what is not in ``rows``; on a CPU, so that no length has to come from a GPU."""
    mask = torch.ones(count, dtype=torch.bool)
    mask[rows.cpu()] = False
    return mask.nonzero().flatten()


def _without_indices(count: int, chosen: torch.Tensor) -> torch.Tensor:
    """Of range(count) what is not in ``chosen`` (distinct), ascending; without a wait for a GPU."""
    mask = torch.zeros(count, dtype=torch.int8, device=chosen.device)
    mask[chosen] = 1
    return mask.argsort(stable=True)[: count - len(chosen)]
