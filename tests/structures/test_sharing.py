"""Which weights share a basis, and why those that are alone are."""

from __future__ import annotations

from torch import nn

from bases import deep
from twofold.model.settings import Override
from twofold.model.target import Targets
from twofold.model.weights import find_targets
from twofold.structures.sharing import UNSHARED, alone_notes, share_bases

SHARED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def groups_of(model, blocks, kind, overrides=None, **patterns):
    """The blocks that share a basis for the weights of one kind, and why those that are alone are."""
    structures = share_bases(find_targets(model, **patterns), "gauge", blocks, overrides or {})
    found = [s for s in structures if s.targets[0].kind == kind]
    assert all(bool(s.basis) == (len(s.targets) > 1) == (not s.why) for s in found)
    return [([t.layer for t in s.targets], s.why) for s in found]


def test_blocks_in_a_row_share_and_what_is_left_over_is_alone():
    model, left = deep(), "no block is left to share it with"
    assert groups_of(model, 2, "q_proj") == [([0, 1], ""), ([2, 3], ""), ([4], left)]
    assert groups_of(model, 3, "up_proj") == [([0, 1, 2], ""), ([3, 4], "")]
    assert groups_of(model, 9, "v_proj") == [([0, 1, 2, 3, 4], "")]
    alone = groups_of(model, 1, "k_proj")
    assert alone == [([i], "each block was to have its own") for i in range(5)]
    for kind in ("o_proj", "down_proj"):
        assert {why for _, why in groups_of(model, 2, kind)} == {
            "what gives the output of an attention or an MLP is not shared"
        }
    assert {"o_proj", "down_proj", "fc2", "c_proj", "out_proj", "dense_4h_to_h"} <= UNSHARED and not UNSHARED & set(
        SHARED
    )
    notes = alone_notes(share_bases(find_targets(model), "gauge", 2, {}))
    assert notes == [
        "10 weights have a basis of their own: what gives the output of an attention or an MLP is not shared",
        f"5 weights have a basis of their own: {left}",
    ]  # fmt: skip


def test_what_is_excluded_overridden_or_of_another_shape_shares_with_no_one():
    model = deep()
    dense = "the others of its kind in its blocks stay dense"
    assert groups_of(model, 2, "q_proj", exclude=["*.1.self_attn.q_proj"])[0] == ([0], dense)
    assert groups_of(model, 3, "q_proj", exclude=["*.1.self_attn.q_proj"])[0] == ([0, 2], "")
    one = {"*.0.mlp.up_proj": Override(keep=0.5)}
    assert groups_of(model, 2, "up_proj", one)[:3] == [
        ([0], "an override holds for it or for the others"), ([1], "an override holds for it or for the others"), ([2, 3], ""),
    ]  # fmt: skip
    assert groups_of(model, 2, "up_proj", {"up_proj": Override(keep=0.5)})[0] == ([0, 1], "")
    model.model.layers[1].mlp.up_proj = nn.Linear(32, 40, bias=False)
    assert groups_of(model, 2, "up_proj")[:2] == [
        ([0], "the others have another shape"),
        ([1], "the others have another shape"),
    ]
    outside = nn.ModuleDict({"first": nn.Linear(16, 16), "second": nn.Linear(16, 16)})
    assert {why for _, why in groups_of(outside, 2, "first")} == {"it stands in no block"}
    bert = nn.ModuleList(
        nn.ModuleDict({name: nn.ModuleDict({"dense": nn.Linear(16, 16)}) for name in ("intermediate", "output")})
        for _ in range(2)
    )
    assert [len(blocks) for blocks, _ in groups_of(bert, 2, "dense")] == [2, 1, 1]


def test_what_the_text_does_not_call_leaves_the_others_together():
    model = deep()
    targets = find_targets(model)
    found = Targets(targets.targets, targets.dense, structures=tuple(share_bases(targets, "gauge", 3, {})))
    q = "model.layers.{}.self_attn.q_proj".format
    for gone, left in (([1], [[0, 2], [3, 4]]), ([0, 1], [[2], [3, 4]]), ([0, 1, 2], [[3, 4]])):
        rest = found.without({q(i): "not called" for i in gone})
        shared = [s for s in rest.structures if s.targets[0].kind == "q_proj"]
        assert [[t.layer for t in s.targets] for s in shared] == left
        assert {d.name for d in rest.dense if d.reason == "not called"} == {f"{q(i)}.weight" for i in gone}
        assert {m.name for s in rest.structures for m in s.members} == {t.name for t in rest.targets}
    alone = next(s for s in found.without({q(3): "not called"}).structures if s.name == q(4))
    assert alone.why == "the others of its kind in its blocks stay dense" and alone.units == 32
