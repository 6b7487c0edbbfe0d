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
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            blender.begin_pass()

        def add_one_req(self, req: Req, *args: Any, **kwargs: Any) -> AddReqResult:
            if any(blender.is_blended(other) for other in self.can_run_list):
                return AddReqResult.OTHER
            if blender.awaits_donors(req):
                return AddReqResult.CONTINUE  # with the next one; this one keeps its place in the queue
            if self.can_run_list and blender.may_blend(req):
                return AddReqResult.OTHER
            if blender.plan(req):
                try:
                    result = super().add_one_req(req, *args, **kwargs)
                except BaseException:
                    blender.withdraw(req)
                    raise
                if req in self.can_run_list:
                    blender.admit(req)
                    return result
                # Locked donors take room that a plain prefill may need.
                blender.withdraw(req)
                if result is not AddReqResult.NO_TOKEN:
                    return result
                blender.has_no_room(req)
            result = super().add_one_req(req, *args, **kwargs)
            if req in self.can_run_list:
                blender.pass_by(req)
            return result

    return BlendingAdder
