"""Where every prompt token came from: in each response's ``meta_info`` and in the engine's metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer

    from polarkv_sglang.blend.forward import PassCounts

META_INFO_KEY = "polarkv"


class TokenSources(NamedTuple):
    """Prompt tokens of one request by tier; all but ``prompt`` add up to it."""

    prompt: int
    l1: int
    l2: int
    l3: int
    l4: int
    blended: int
    computed: int


def token_sources(request: Req, blended: int = 0) -> TokenSources:
    """The sources of a request's prompt tokens, as SGLang attributed them at its first prefill.

    ``blended`` of those that SGLang computed took their KV from elsewhere.
    """
    prompt = len(request.origin_input_ids)
    l1, l2, l3 = request.cached_tokens_device, request.cached_tokens_host, request.cached_tokens_storage
    computed = prompt - l1 - l2 - l3 - blended
    return TokenSources(prompt, l1, l2, l3, l4=0, blended=blended, computed=computed)


def accounting_streamer(
    base: type[SchedulerOutputStreamer],
    on_finished: Callable[[list[TokenSources]], None],
    blend_counts: Callable[[Req], PassCounts | None],
) -> type[SchedulerOutputStreamer]:
    """A streamer class that adds (and reports) the sources of finished requests to what ``base`` sends.

    ``blend_counts`` tells what CacheBlend did for a request; None where it is off.
    """

    def parts_of(request: Req) -> tuple[TokenSources, dict[str, int]]:
        counts = blend_counts(request)
        if counts is None:
            sources = token_sources(request)
            return sources, sources._asdict()
        sources = token_sources(request, counts.blended)
        # Of the computed ones, those that had KV elsewhere and were chosen.
        return sources, {**sources._asdict(), "recomputed": counts.recomputed}

    class AccountingStreamer(base):  # a class chosen at run time
        __slots__ = ()
        has_additional_customized_info = True

        def build_additional_customized_info(self, reqs: list[Req]) -> dict[str, list[list[dict[str, int]]]]:
            more: dict[str, list[list[dict[str, int]]]] = {}
            if base.has_additional_customized_info:
                more = super().build_additional_customized_info(reqs)
            parts = [parts_of(req) if req.finished() else None for req in reqs]
            on_finished([each[0] for each in parts if each is not None])
            return {**more, META_INFO_KEY: [[] if each is None else [each[1]] for each in parts]}

        def _stream_output_embedding(self, reqs: list[Req]) -> None:
            # As for those that generate: SGLang (0.5.23) would send the error of one that is computed again.
            super()._stream_output_embedding(
                [req for req in reqs if not (req.finished() and req.finished_output)]
            )

        def is_request_level_customized_info_key(self, key: str) -> bool:
            return key == META_INFO_KEY or bool(super().is_request_level_customized_info_key(key))

    return AccountingStreamer


def flatten_meta_info(
    _result: None,
    _manager: object,
    meta_info: dict[str, object],
    _state: object,
    customized_info: dict[str, list[object]],
    *_rest: object,
) -> None:
    """Hook after TokenizerManager.update_request_meta_info: a dict for its list of one, None until then."""
    if META_INFO_KEY in customized_info:
        found = meta_info.get(META_INFO_KEY)
        meta_info[META_INFO_KEY] = found[0] if isinstance(found, list) and found else None
