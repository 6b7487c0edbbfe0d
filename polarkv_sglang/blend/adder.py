"""How blended requests get into SGLang's prefill batches: each in one of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.managers.schedule_policy import AddReqResult

from polarkv_sglang.blend.blender import Blender

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.schedule_policy import PrefillAdder


def blending_adder(base: type[PrefillAdder], blender: Blender) -> type[PrefillAdder]:
    """``base``, an adder class, that lets no request share a prefill batch with a blended one.

    The queue keeps its order: a blended request ends the batch before it and has the next one, those behind
    it the one after. Neither kind can starve the other.
    """

    class BlendingAdder(base):  # a class chosen at run time
        def add_one_req(self, req: Req, *args: Any, **kwargs: Any) -> AddReqResult:
            if any(blender.is_blended(other) for other in self.can_run_list):
                return AddReqResult.OTHER
            if not blender.plan(req):
                return super().add_one_req(req, *args, **kwargs)
            if self.can_run_list:
                blender.release(req)
                return AddReqResult.OTHER
            try:
                result = super().add_one_req(req, *args, **kwargs)
                if req in self.can_run_list:
                    blender.admit(req)
                    return result
            except BaseException:
                blender.release(req)
                raise
            # Locked donors take room that a plain prefill may need.
            blender.release(req)
            return super().add_one_req(req, *args, **kwargs) if result is AddReqResult.NO_TOKEN else result

    return BlendingAdder
