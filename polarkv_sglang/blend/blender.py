"""CacheBlend in one scheduler process: which requests are blended from what, and their passes."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from polarkv_sglang.blend.donors import Gone, Held, hold, prefix_kept
from polarkv_sglang.blend.forward import BlendPass, NotAsExpected, PassCounts
from polarkv_sglang.blend.index import ChunkIndex, Match, Space
from polarkv_sglang.blend.model import BlendModel
from polarkv_sglang.blend.options import Refusal, Wish, wish_of
from polarkv_sglang.blend.plan import Piece, Plan
from polarkv_sglang.blend.select import Selection
from polarkv_sglang.blend.stages import parse_stages, require_layers
from polarkv_sglang.config import PolarConfig

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_radix_cache import TreeLock
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner, ModelRunnerOutput

    from polarkv_sglang.radix.cache import PolarRadixCache
    from polarkv_sglang.weights import WeightsIdentity

logger = logging.getLogger(__name__)


# Whether all ranks have the same number; a collective.
Agreement = Callable[[int], bool]


class _Blended(NamedTuple):
    """A request that was admitted with a plan, until its prompt is computed."""

    plan: Plan
    selection: Selection
    locks: list[TreeLock]  # of the donors' tree nodes
    weights: WeightsIdentity  # that the donors' KV is of


class Blender:
    """Plans, locks and passes of blended requests.

    A blended request's KV is approximate: from its admission on SGLang keeps it out of the radix tree, and so
    out of L2, the pool and the index, which learns from what enters the tree. A request is either planned by
    all ranks alike, or by none. Donors' tree nodes are locked while a prompt is computed from them. Donors
    have KV of the weights in memory: nothing is blended from a weight update until the tree was emptied.

    Nothing here raises into SGLang: what fails leads to a full prefill. Scheduler thread only.
    """

    def __init__(
        self,
        cache: PolarRadixCache,
        model: BlendModel,
        config: PolarConfig,
        agree: Agreement | None = None,
    ) -> None:
        """``agree`` is None where there is one rank. Raises ConfigError for layers that the model lacks."""
        self._cache = cache
        self._model = model
        self._mode = config.blend
        self._least_tokens = config.blend_min_tokens
        stages = parse_stages(config.blend_check_layer, config.blend_ratio, config.blend_stages)
        require_layers(stages, len(model.layers))
        self._selection = Selection(stages, config.blend_metric, config.blend_strategy)
        self._alone = agree is None
        self._agree = agree or (lambda _number: True)
        self.index = ChunkIndex(config.blend_chunk_tokens, config.blend_index_tokens)
        self._blended: dict[str, _Blended] = {}  # by request id
        self._counts: weakref.WeakKeyDictionary[Req, PassCounts] = weakref.WeakKeyDictionary()
        self._requests: weakref.WeakValueDictionary[str, Req] = weakref.WeakValueDictionary()
        self._given_up = False

    # What the radix tree tells

    def learn(self, key: RadixKey) -> None:
        """A prompt's exact KV has entered the tree."""
        try:
            self.index.add(key.raw_token_ids(), Space(key.extra_key, key.cache_salt))
        except Exception:  # a chunk that is not known is computed
            logger.exception("PolarKV: a prompt could not be indexed for CacheBlend")

    def forget(self) -> None:
        """The tree was emptied."""
        self.index.clear()

    def release(self, request: Req) -> None:
        """The request's prompt is computed, or it is leaving: let go of its donors."""
        blended = self._blended.pop(request.rid, None)
        self._unlock(blended.locks if blended is not None else ())

    # Admission

    def is_blended(self, request: Req) -> bool:
        """Whether the request was admitted with a plan and its prompt is not computed yet."""
        return request.rid in self._blended

    def plan(self, request: Req) -> bool:
        """Whether the request can be blended now; its donors are then locked until ``release``."""
        wish: Wish | Refusal | None
        try:
            wish = wish_of(request, self._mode)
        except (AttributeError, TypeError, ValueError) as error:  # on all ranks alike
            wish = Refusal(f"what it wants could not be told ({type(error).__name__})")
        if isinstance(wish, Refusal):
            _log_refusal(wish.reason)
        if not isinstance(wish, Wish) or self._given_up:
            return False
        found, digest = None, 0
        try:
            found = self._plan(request, wish)
            digest = found.plan.digest() if found is not None else 0
        except Exception:  # all ranks agree below that there is no plan
            logger.exception("PolarKV: no plan could be made; the prompt is computed in full")
        # Every rank comes here for the same requests: a wish depends on nothing else.
        agreed = self._agree(digest)
        if found is None:
            return False
        self._blended[request.rid] = found
        if not agreed:
            logger.warning("PolarKV: ranks have different plans for a prompt; it is computed in full")
            self.release(request)
        return agreed

    def admit(self, request: Req) -> None:
        """A request with a plan is in the next batch: from here on its KV is its own."""
        request.skip_radix_cache_insert = True
        self._requests[request.rid] = request

    def counts(self, request: Req) -> PassCounts:
        """Tokens of the request's prompt that were blended and, though cached, recomputed."""
        return self._counts.get(request, PassCounts(0, 0))

    def _plan(self, request: Req, wish: Wish) -> _Blended | None:
        weights = self._cache.runtime.weights.current
        if weights is None:  # what the tree holds may be of others
            return None
        tokens = request.full_untruncated_fill_ids
        space = Space(request.extra_key, request.cache_salt)
        known = request.prefix_len + request.host_hit_length
        matches = list(self.index.find(tokens, space, known))
        if sum(match.end - match.start for match in matches) < self._least_tokens:
            return None
        pieces: list[Piece] = []
        locks: list[TreeLock] = []
        try:
            with prefix_kept(self._cache, request):
                for match in matches:
                    held = hold(self._cache, match, self._room(request))
                    if isinstance(held, Held):
                        locks.append(held.lock)
                        pieces += _pieces(match, held.slots, wish.spans)
                    elif isinstance(held, Gone):
                        self.index.remove(match.donor)
            plan = Plan(pieces)
        except BaseException:
            self._unlock(locks)
            raise
        if plan.tokens < self._least_tokens:
            self._unlock(locks)
            return None
        selection = self._selection if wish.ratio is None else self._selection.with_ratio(wish.ratio)
        return _Blended(plan, selection, locks, weights)

    def _room(self, request: Req) -> int:
        """Tokens that can be brought to L1 beside what the request needs there itself."""
        prompt = len(request.full_untruncated_fill_ids) - request.prefix_len
        needed = prompt + request.sampling_params.max_new_tokens + 2 * self._cache.page_size
        free = self._cache.token_to_kv_pool_allocator.available_size() + self._cache.full_evictable_size()
        return max(0, int(free - needed))

    def _unlock(self, locks: Iterable[TreeLock]) -> None:
        for lock in locks:
            self._cache.unlock(lock)

    def see_batch(self, requests: Iterable[Req]) -> bool:
        """Whether a computed batch was of a blended request; lets go of donors that are no longer needed."""
        blended = False
        for request in requests:
            # One that has its whole answer was released already.
            blended |= request in self._counts or self.is_blended(request)
            if request.output_ids:
                self.release(request)
        return blended

    # Passes

    def forward(
        self, runner: ModelRunner, batch: ForwardBatch, compute: Callable[[], ModelRunnerOutput]
    ) -> ModelRunnerOutput:
        """The batch's forward pass: blended if it is one with a plan and cached rows, else ``compute()``.

        A blended pass that fails is computed again in full. With several ranks it may have failed on this
        one alone, and the others would wait: there anything but NotAsExpected, which all ranks meet, is
        raised, as SGLang raises what its passes raise.
        """
        blended = self._blended.get(batch.rids[0]) if self._blended and batch.rids else None
        if blended is None or not batch.forward_mode.is_extend():
            return compute()
        ours = self._prepared(runner, batch, blended)
        # Ranks have the same plans, but one may have failed to prepare.
        if not self._agree(int(ours is not None)) or ours is None:
            return compute()
        graphs = runner.prefill_cuda_graph_runner
        runner.prefill_cuda_graph_runner = None  # a captured pass has the rows it was captured with
        try:
            result = ours.run(compute)
        except Exception as error:
            if not self._alone and not isinstance(error, NotAsExpected):
                raise
            failed = True
            logger.exception("PolarKV: a blended pass failed; it is computed in full, and CacheBlend is off")
        else:
            failed = False
        finally:
            runner.prefill_cuda_graph_runner = graphs
        if failed:
            self._given_up = True  # the same would happen to the next one
            return compute()
        request = self._requests.get(batch.rids[0])
        if request is not None:
            before = self.counts(request)
            self._counts[request] = PassCounts(*(sum(pair) for pair in zip(before, ours.counts)))
        return result

    def _prepared(self, runner: ModelRunner, batch: ForwardBatch, blended: _Blended) -> BlendPass | None:
        """The pass over a batch; None if no row of it has cached KV that holds, or it cannot be made."""
        try:
            if self._cache.runtime.weights.current != blended.weights:
                return None  # they changed between two passes of a prompt
            first = int(batch.extend_prefix_lens_cpu[0])
            cached = blended.plan.rows(first, first + int(batch.extend_seq_lens_cpu[0]))
            return BlendPass(self._model, runner, batch, cached, blended.selection) if len(cached) else None
        except Exception:  # a full prefill is always right
            logger.exception("PolarKV: a blended pass could not be prepared; it is computed in full")
            return None


def _pieces(match: Match, slots: torch.Tensor, spans: tuple[tuple[int, int], ...] | None) -> Iterator[Piece]:
    """What of a match the donor's ``slots`` hold, within ``spans``."""
    shift = match.donor_start - match.start
    end = len(slots) - shift
    for one, other in [(match.start, end)] if spans is None else spans:
        start, stop = max(one, match.start), min(other, end)
        if start < stop:
            yield Piece(start, start + shift, slots[start + shift : stop + shift])


@functools.cache
def _log_refusal(reason: str) -> None:
    """Once per reason."""
    logger.warning("PolarKV: a request is not blended, its prompt is computed in full: %s", reason)
