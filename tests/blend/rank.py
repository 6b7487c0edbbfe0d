"""One rank of a tiny model over several: prints what it chose and computed, as JSON."""

from __future__ import annotations

import json
import sys

import torch

from polarkv_sglang.blend.offline import OfflineModel
from polarkv_sglang.blend.plan import Plan
from polarkv_sglang.blend.select import Selection
from polarkv_sglang.blend.stages import Stage
from tests.engine.servers import prompt

if __name__ == "__main__":
    path, rank, ranks, port = sys.argv[1], *(int(text) for text in sys.argv[2:])
    model = OfflineModel(path, max_tokens=12288, rank=rank, ranks=ranks, port=port)
    head, one, two, question = prompt(3, 37), prompt(1, 300), prompt(2, 250), prompt(4, 20)
    donor = model.prefill(head + one + two)
    plan = Plan([donor.pieces(337, 587, 11), donor.pieces(37, 337, 261)])
    asked = head[:11] + two + one + question
    results = [
        model.prefill(asked, plan=plan, selection=Selection((Stage(1, ratio),)), passes=passes).computed_rows
        for ratio in (0.05, 0.3, 1.0)
        for passes in ((), (300,))
    ]
    errors = []
    full = model.prefill(asked, tail=20)
    for ratio in (0.3, 1.0):
        blended = model.prefill(asked, plan=plan, selection=Selection((Stage(1, ratio),)))
        keys, exact = model.kv(blended.slots)[0], model.kv(full.slots)[0]
        errors.append(float((keys - exact).norm() / exact.norm()))
    exact = []
    for passes in ((), (100, 320), (48,)):
        blended = model.prefill(
            asked, plan=plan, selection=Selection((Stage(1, 1.0),)), passes=passes, tail=20
        )
        # Of this rank's share of the vocabulary.
        difference = (blended.logits - full.logits).abs().max() / full.logits.abs().max()
        exact.append([float(difference), torch.equal(blended.logits.argmax(-1), full.logits.argmax(-1))])
    print("RESULT", json.dumps([results, errors, exact]), flush=True)
