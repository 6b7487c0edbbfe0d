"""What a request says about blending, in its sampling parameters' ``custom_params``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from polarkv_sglang.blend.spans import Span

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from polarkv_sglang.config import BlendMode

ASK: Final = "polarkv_blend"  # true or false
RATIO: Final = "polarkv_blend_ratio"  # number from 0 to 1
SPANS: Final = "polarkv_blend_spans"  # start, end, start, end, ...: tokens that may be reused
MAX_SPANS: Final = 1024  # each is a piece of its own, in the scheduler's thread


class Wish(NamedTuple):
    """A request that may be blended."""

    ratio: float | None  # None: the engine's
    spans: tuple[Span, ...] | None  # what may be reused, ascending; None: whatever matches


class Refusal(NamedTuple):
    """Why a request that asked for it, or would have been, is not blended; one of few texts."""

    reason: str


def wish_of(request: Req, mode: BlendMode) -> Wish | Refusal | None:
    """What the request wants; None for one that does not want to be blended. The same on all ranks."""
    given = request.sampling_params.custom_params
    given = given if isinstance(given, Mapping) else {}
    asked = given.get(ASK, mode == "all" or None)
    if asked is None or asked is False:
        return None
    if asked is not True:
        return Refusal(f"{ASK} is neither true nor false")
    reason = _unsupported(request)
    if reason is not None:
        return Refusal(reason)
    ratio = given.get(RATIO)
    if ratio is not None and not (_is_number(ratio) and 0 <= ratio <= 1):
        return Refusal(f"{RATIO} is not a number from 0 to 1")
    spans = given.get(SPANS)
    if spans is None:
        return Wish(ratio, None)
    valid = isinstance(spans, list | tuple) and len(spans) % 2 == 0 and all(type(at) is int for at in spans)
    if not valid or any(one > other for one, other in zip([0, *spans], spans)):
        return Refusal(f"{SPANS} is not a list of ascending token positions start, end, start, end, ...")
    if len(spans) > 2 * MAX_SPANS:
        return Refusal(f"{SPANS} has more than {MAX_SPANS} spans")
    return Wish(ratio, tuple(map(Span, spans[::2], spans[1::2])))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _unsupported(request: Req) -> str | None:
    """Why this request needs every row of its prompt, or is no plain text."""
    prompt = len(request.origin_input_ids)
    needs = {
        "prompt logprobs are asked for": request.return_logprob and request.logprob_start_len < prompt,
        "hidden states are asked for": bool(request.return_hidden_states),
        "the prompt has images, audio or embeddings": request.multimodal_inputs is not None
        or request.input_embeds is not None
        or request.positional_embed_overrides is not None,
        "it belongs to a session": request.session is not None,
        "it uses a LoRA adapter": request.lora_id is not None,
        "it is a beam search": request.beam_group is not None,
        "it is an embedding of chosen tokens": request.token_indices_to_pool is not None,
        # What it has answered so far belongs to KV that is gone.
        "it was retracted": request.retraction_count > 0,
    }
    return next((reason for reason, holds in needs.items() if holds), None)
