"""CacheBlend in one scheduler process: which requests are blended from what, and their passes."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

from polarkv_sglang.blend.donors import Gone, Held, held_end, hold, prefix_kept
from polarkv_sglang.blend.forward import BlendPass, NotAsExpected, PassCounts
from polarkv_sglang.blend.index import ChunkIndex, Match, Space
from polarkv_sglang.blend.matches import Matches, gaps_left
from polarkv_sglang.blend.model import BlendModel
from polarkv_sglang.blend.options import Refusal, Wish, wish_of
from polarkv_sglang.blend.plan import Plan
from polarkv_sglang.blend.search import Arrived
from polarkv_sglang.blend.searches import Searches
from polarkv_sglang.blend.select import Selection, selection_of
from polarkv_sglang.blend.shared import Landing, SharedDonors
from polarkv_sglang.blend.spans import Span, parts
from polarkv_sglang.blend.stages import require_layers
from polarkv_sglang.config import PolarConfig

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.unified_radix_cache import TreeLock
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner, ModelRunnerOutput

    from polarkv_sglang.config import BlendMode
    from polarkv_sglang.radix.cache import PolarRadixCache
    from polarkv_sglang.weights import WeightsIdentity

logger = logging.getLogger(__name__)

# Which of the numbers are the same on all ranks; a collective, for as many on each.
Agreement = Callable[[Sequence[int]], list[bool]]


class _Blended(NamedTuple):
    """A request that was admitted with a plan, until its prompt is computed."""

    plan: Plan
    selection: Selection
    locks: list[TreeLock]  # of the donors' tree nodes
    weights: WeightsIdentity  # that the donors' KV is of
    landing: Landing | None = None  # of donors from the pool
    landed: bool = False  # whether they are in L1


class _Outlook(NamedTuple):
    """Whether a request can be blended, by what was there when the tree was in a certain state."""

    blends: bool
    state: tuple[int, int]


class Blender:
    """Plans, locks and passes of blended requests.

    A blended request's KV is approximate: from its admission on SGLang keeps it out of the radix tree, and so
    out of L2, the pool and the index, which learns from what enters the tree. A request is either planned by
    all ranks alike, or by none. Donors' tree nodes are locked while a prompt is computed from them. Donors
    have KV of the weights in memory: nothing is blended from a weight update until the tree was emptied.

    What fails leads to a full prefill. One thing raises into SGLang: with several ranks, a pass that may have
    failed on this one alone, for the others wait in it. Scheduler thread only.
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
        self._selection = selection_of(config)
        require_layers(self._selection.stages, len(model.layers))
        self._alone = agree is None
        self._agree_on = agree or (lambda numbers: [True] * len(numbers))
        self.index = ChunkIndex(config.blend_chunk_tokens, config.blend_index_tokens)
        self._matches = Matches(self.index)
        self._blended: dict[str, _Blended] = {}  # by request id
        self._counts: weakref.WeakKeyDictionary[Req, PassCounts] = weakref.WeakKeyDictionary()
        self._requests: weakref.WeakValueDictionary[str, Req] = weakref.WeakValueDictionary()
        self._given_up = False
        self._any_weights = True
        self._checked: WeightsIdentity | None = None  # unless any weights may be blended
        self.shared: SharedDonors | None = None  # None: donors of this engine only
        self._searches: Searches | None = None
        self.plans = 0  # that were made
        self._outlooks: weakref.WeakKeyDictionary[Req, _Outlook] = weakref.WeakKeyDictionary()

    def share(self, shared: SharedDonors) -> None:
        """Use donors that are in the pool, and tell it of those that this engine puts there."""
        self.shared = shared
        self._searches = Searches(self._cache, self._matches, shared, self._agree_on, self._least_tokens)

    def only_for(self, checked: WeightsIdentity | None) -> None:
        """Blend under these weights and, after an update, no others; None: under none."""
        self._any_weights, self._checked = False, checked

    # What the radix tree tells

    def learn(self, key: RadixKey) -> None:
        """A prompt's exact KV has entered the tree."""
        try:
            donor = self.index.add(key.raw_token_ids(), Space(key.extra_key, key.cache_salt))
            if donor is not None and self.shared is not None:
                self.shared.learn(donor.tokens, donor.space)
        except Exception:  # a chunk that is not known is computed
            logger.exception("PolarKV: a prompt could not be indexed for CacheBlend")

    def forget(self) -> None:
        """The tree was emptied."""
        self.index.clear()

    def release(self, request: Req) -> None:
        """The request's prompt is computed, or it is leaving: let go of its donors, and of what was found."""
        self.withdraw(request)
        if self._searches is not None:
            self._searches.drop(request)

    def withdraw(self, request: Req) -> None:
        """The request has no plan any more, but can have another: let go of its donors."""
        blended = self._blended.pop(request.rid, None)
        if blended is not None:
            self._let_go(blended.locks, blended.landing)

    # Admission

    def begin_pass(self) -> None:
        """Requests are about to be chosen for a batch. With several ranks a collective, while some wait."""
        if self._searches is not None:
            self._searches.settle()

    def is_blended(self, request: Req) -> bool:
        """Whether the request was admitted with a plan and its prompt is not computed yet."""
        return request.rid in self._blended

    def awaits_donors(self, request: Req) -> bool:
        """Whether donors of the request are on their way from the pool, so that it is too early to plan."""
        if self._searches is None or self._given_up or self._weights() is None:
            return False
        wish = _wish(request, self._mode)
        return isinstance(wish, Wish) and self._searches.awaits(request, wish)

    def may_blend(self, request: Req) -> bool:
        """Whether there was a plan for the request, or can be one: made once while it waits behind others."""
        outlook = self._outlooks.get(request)
        if outlook is not None and (outlook.blends or outlook.state == self._state()):
            return outlook.blends
        wish = _wish(request, self._mode)
        if not isinstance(wish, Wish) or self._given_up:
            return False
        state, enough = self._state(), False
        try:
            enough = self._reusable(request, wish) >= self._least_tokens
        except Exception:  # all ranks agree below that it cannot
            logger.exception("PolarKV: a prompt's donors could not be counted; it is computed in full")
        enough = self._agree(int(enough)) and enough
        self._outlooks[request] = _Outlook(enough, state)
        return enough

    def plan(self, request: Req) -> bool:
        """Whether the request can be blended now; its donors are then locked until ``release``."""
        wish = _wish(request, self._mode)
        if isinstance(wish, Refusal):
            _log_refusal(wish.reason)
        if not isinstance(wish, Wish) or self._given_up:
            return False
        state, outlook = self._state(), self._outlooks.get(request)
        if outlook is not None and not outlook.blends and outlook.state == state:
            return False
        self.plans += 1
        found, digest = None, 0
        try:
            found = self._plan(request, wish)
            digest = found.plan.digest() if found is not None else 0
        except Exception:  # all ranks agree below that there is no plan
            logger.exception("PolarKV: no plan could be made; the prompt is computed in full")
        # Every rank comes here for the same requests: a wish depends on nothing else.
        agreed = self._agree(digest)
        self._outlooks[request] = _Outlook(found is not None and agreed, state)
        if found is None:
            return False
        self._blended[request.rid] = found
        if not agreed:
            logger.warning("PolarKV: ranks have different plans for a prompt; it is computed in full")
            self.withdraw(request)
        return agreed

    def has_no_room(self, request: Req) -> None:
        """Its donors and the request do not fit together, as things are."""
        self._outlooks[request] = _Outlook(blends=False, state=self._state())

    def pass_by(self, request: Req) -> None:
        """A request is in the next batch without a plan: what was found for it is not needed."""
        if self._searches is not None:
            self._searches.drop(request)

    def admit(self, request: Req) -> None:
        """A request with a plan is in the next batch: from here on its KV is its own."""
        request.skip_radix_cache_insert = True
        self._requests[request.rid] = request

    def counts(self, request: Req) -> PassCounts:
        """Tokens of the request's prompt that were blended and, though cached, recomputed."""
        return self._counts.get(request, PassCounts(0, 0))

    def _agree(self, number: int) -> bool:
        """Whether all ranks have the same number. A collective."""
        return self._agree_on([number])[0]

    def _weights(self) -> WeightsIdentity | None:
        """The weights in memory, if the tree holds their KV alone and they may be blended."""
        weights = self._cache.runtime.weights.current
        return weights if self._any_weights or weights == self._checked else None

    def _state(self) -> tuple[int, int]:
        """What plans depend on; the same on all ranks."""
        free = self._cache.token_to_kv_pool_allocator.available_size() + self._cache.full_evictable_size()
        return self._cache.inserts, int(free)

    def _plan(self, request: Req, wish: Wish) -> _Blended | None:
        weights = self._weights()
        if weights is None:
            return None
        matches, arrived = self._matches.of(request, wish), self._arrived(request, weights)
        if not self._may_suffice(matches, arrived, wish):
            return None
        held: list[Held] = []
        landing: Landing | None = None
        try:
            with prefix_kept(self._cache, request):
                for match in matches:
                    found = hold(self._cache, match, self._room(request))
                    if isinstance(found, Held):
                        held.append(found)
                    elif isinstance(found, Gone):
                        self.index.remove(match.donor)
                pieces = [each.piece(start, end) for each, start, end in parts(held, wish.spans)]
                if arrived and self.shared is not None:
                    gaps = gaps_left(request, pieces, wish)
                    landed, landing = self.shared.land(arrived, gaps, self._room(request))
                    pieces = sorted([*pieces, *landed], key=lambda piece: piece.start)
            plan = Plan(pieces)
        except BaseException:
            self._let_go([each.lock for each in held], landing)
            raise
        locks = [each.lock for each in held]
        if plan.tokens < self._least_tokens:
            self._let_go(locks, landing)
            return None
        selection = self._selection if wish.ratio is None else self._selection.with_ratio(wish.ratio)
        return _Blended(plan, selection, locks, weights, landing)

    def _arrived(self, request: Req, weights: WeightsIdentity) -> Sequence[Arrived]:
        """What of the prompt has come from the pool."""
        search = self._searches.over(request, weights) if self._searches is not None else None
        return search.found if search is not None else ()

    def _may_suffice(self, matches: Sequence[Match], arrived: Sequence[Arrived], wish: Wish) -> bool:
        """Whether there is enough to reuse if all donors are there yet: that takes no walk down the tree."""
        wanted = (end - start for each in (matches, arrived) for _, start, end in parts(each, wish.spans))
        return sum(wanted) >= self._least_tokens

    def _reusable(self, request: Req, wish: Wish) -> int:
        """How many tokens a plan would be of, about; brings nothing to L1, and nothing out of it."""
        weights = self._weights()
        if weights is None:
            return 0
        matches, arrived = self._matches.of(request, wish), self._arrived(request, weights)
        if not self._may_suffice(matches, arrived, wish):
            return 0
        room = self._room(request)
        here = [Span(match.start, held_end(self._cache, match, room)) for match in matches]
        count = sum(end - start for _, start, end in parts(here, wish.spans))
        if arrived and self.shared is not None:
            count += self.shared.tokens(arrived, gaps_left(request, here, wish), room)
        return count

    def _room(self, request: Req) -> int:
        """Tokens that can be brought to L1 beside what the request needs there, as SGLang admits it."""
        prompt = len(request.full_untruncated_fill_ids) - request.prefix_len
        # One that says nothing of its answer's length may have all of L1 for it; no room is kept for so much.
        answer = min(request.sampling_params.max_new_tokens, CLIP_MAX_NEW_TOKENS)
        needed = prompt + answer + 2 * self._cache.page_size
        free = self._cache.token_to_kv_pool_allocator.available_size() + self._cache.full_evictable_size()
        return max(0, int(free - needed))

    def _let_go(self, locks: Iterable[TreeLock], landing: Landing | None) -> None:
        for lock in locks:
            self._cache.unlock(lock)
        if landing is not None and self.shared is not None:
            self.shared.leave(landing)

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
            if blended.landing is not None and not blended.landed and self.shared is not None:
                self.shared.enter(blended.landing)
                self._blended[batch.rids[0]] = blended._replace(landed=True)
            first = int(batch.extend_prefix_lens_cpu[0])
            cached = blended.plan.rows(first, first + int(batch.extend_seq_lens_cpu[0]))
            return BlendPass(self._model, runner, batch, cached, blended.selection) if len(cached) else None
        except Exception:  # a full prefill is always right
            logger.exception("PolarKV: a blended pass could not be prepared; it is computed in full")
            return None


def _wish(request: Req, mode: BlendMode) -> Wish | Refusal | None:
    try:
        return wish_of(request, mode)
    except (AttributeError, TypeError, ValueError) as error:  # on all ranks alike
        return Refusal(f"what it wants could not be told ({type(error).__name__})")


@functools.cache
def _log_refusal(reason: str) -> None:
    """Once per reason."""
    logger.warning("PolarKV: a request is not blended, its prompt is computed in full: %s", reason)
