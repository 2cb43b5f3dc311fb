"""Tests the count of bytes between chips, on programs written by hand and compiled for eight virtual devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rmr1_jax.distributed.mesh import MeshConfig, make_mesh
from rmr1_jax.plan.traffic import COLLECTIVES, read_traffic

ALL_DEVICES = "replica_groups={{0,1,2,3,4,5,6,7}}"


def program(*lines: str, more: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule jit_f\n\n{more}\nENTRY %main.1 (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def links(text: str, **options) -> dict[str, float]:
    """The bytes that one of eight devices sends, without the collectives that do not occur."""
    traffic = read_traffic(text, 8, **options)
    assert set(traffic.links) == set(COLLECTIVES)
    return {kind: size for kind, size in traffic.links.items() if size}


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        # The output has 64 floats, 7/8 of which come from the other devices.
        (f"%a = f32[64]{{0}} all-gather(%p), channel_id=1, {ALL_DEVICES}, dimensions={{0}}", "all-gather", 224),
        (f"%a = f32[64]{{0}} all-reduce(%p), channel_id=1, {ALL_DEVICES}, to_apply=%add", "all-reduce", 448),
        # The output is an eighth of the input.
        (f"%a = f32[8]{{0}} reduce-scatter(%p), channel_id=1, {ALL_DEVICES}, to_apply=%add", "reduce-scatter", 224),
        (f"%a = (f32[4]{{0}}, bf16[8]{{0}}) all-to-all(%p, %q), channel_id=1, {ALL_DEVICES}", "all-to-all", 28),
        (
            "%a = bf16[64]{0:T(256)(128)(2,1)} collective-permute(%p), channel_id=1, source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            128,
        ),
        # The type of a start has the operand and the result.
        (f"%a = (f32[8]{{0}}, f32[64]{{0}}) all-gather-start(%p), channel_id=1, {ALL_DEVICES}", "all-gather", 224),
        (f"%a = f32[64]{{0}} all-reduce-start(%p), channel_id=1, {ALL_DEVICES}, to_apply=%add", "all-reduce", 448),
        (
            "%a = (s8[64], s8[64]) collective-permute-start(%p), channel_id=1, source_target_pairs={{0,1}}, x={a={}}",
            "collective-permute",
            64,
        ),
    ],
)
def test_bytes_of_a_collective(line, kind, size):
    assert links(program(line)) == {kind: size}


@pytest.mark.parametrize(
    ("groups", "n"),
    [
        ("{}", 8),
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=8] {'a'}", 8),
        ("mesh['a'=2,'b'=4] {'a'}", 2),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=1,'b'=2,'c'=1,'d'=4], device_ids=([4,2]T(1,0)) {'d'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
    ],
)
def test_group_size(groups, n):
    line = f"%a = f32[64]{{0}} all-gather(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    assert links(program(line)) == {"all-gather": 256 * (n - 1) / n}


@pytest.mark.parametrize("groups", ["mesh['a'=2,'b'=4] {'b':(1)2}", "mesh['a'=2,'b'=2] {'b'}", "<new>"])
def test_groups_in_an_unknown_notation_raise(groups):
    with pytest.raises(ValueError, match="device groups"):
        links(program(f"%a = f32[64]{{0}} all-gather(%p), channel_id=1, replica_groups={groups}"))


@pytest.mark.parametrize(
    ("kind", "slices", "across"), [("ALL_REDUCE", 2, 256), ("ALL_REDUCE", 4, 384), ("ONE_TO_ONE", 2, 128)]
)
def test_bytes_between_slices(kind, slices, across):
    handler = '_xla_host_transfer_handler_name="xla_megascale_runtime"'
    attributes = f'frontend_attributes={{{handler},_xla_megascale_transfer_type="{kind}"}}'
    send = f"(f32[64], u32[], token[]) send(%p, %t), channel_id=4, {attributes}"
    done = f"token[] send-done(%s), channel_id=4, frontend_attributes={{{handler}}}"
    other = "(f32[64], u32[], token[]) send(%p, %t), channel_id=5, is_host_transfer=true"
    text = program(f"%s = {send}", f"%d = {done}", f"%o = {other}")
    traffic = read_traffic(text, 8, slices=slices)
    assert (traffic.network, traffic.total) == (across, 0)
    looped = program(loop("cond", "sends"), more=CONDITION + body("sends", f"%s = {send}"))
    assert read_traffic(looped, 8, slices=slices).network == 5 * across


CONDITION = """%cond (c: (s32[], f32[8])) -> pred[] {
  %five = s32[]{:T(128)} constant(5)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%i, %five), direction=LT
}
%open (c: (s32[], f32[8])) -> pred[] {
  %zero = s32[] constant(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}
"""
GATHER = f"%g = f32[64]{{0}} all-gather(%p), channel_id=7, {ALL_DEVICES}, dimensions={{0}}"


def body(name: str, *lines: str) -> str:
    return f"%{name} (c: (s32[], f32[8])) -> (s32[], f32[8]) {{\n" + "\n".join(f"  {x}" for x in lines) + "\n}\n"


def loop(condition: str, body_name: str, more: str = "") -> str:
    return f"%w = (s32[], f32[8]) while(%t), condition=%{condition}, body=%{body_name}{more}"


def test_a_loop_counts_as_often_as_it_runs():
    once = body("inner", GATHER)
    assert links(program(loop("cond", "inner"), more=CONDITION + once)) == {"all-gather": 5 * 224}
    known = loop("open", "inner", ', backend_config={"known_trip_count":{"n":"3"}}')
    assert links(program(known, more=CONDITION + once)) == {"all-gather": 3 * 224}
    dynamic = program(loop("open", "inner"), more=CONDITION + once)
    assert links(dynamic, dynamic_trips=11) == {"all-gather": 11 * 224}
    assert links(dynamic, dynamic_trips=0) == {}
    nested = once + body("outer", loop("cond", "inner"), GATHER)
    assert links(program(loop("cond", "outer"), GATHER, more=CONDITION + nested)) == {"all-gather": (5 * 6 + 1) * 224}


def test_a_transfer_in_pieces_counts_once():
    # The TPU compiler splits a gather that overlaps matrix products into fusions, each of which names the channel.
    piece = body("piece", GATHER)
    calls = [f"%f{i} = f32[64] fusion(%p), kind=kCustom, calls=%piece" for i in range(3)]
    assert links(program(*calls, more=piece)) == {"all-gather": 224}
    assert links(program(loop("cond", "both"), more=CONDITION + piece + body("both", *calls))) == {
        "all-gather": 5 * 224
    }
    # Two instructions are two transfers even on the same channel; so are two calls.
    assert links(program(GATHER, GATHER)) == links(program(*["%c = f32[64] call(%p), to_apply=%piece"] * 2, more=piece))
    assert links(program(GATHER, GATHER)) == {"all-gather": 448}
    wrapped = "%s = ((f32[8]), f32[64], u32[]) async-start(%p), calls=%piece"
    done = "%d = f32[64] async-done(%s), calls=%piece"
    assert links(program(wrapped, done, more=piece)) == {"all-gather": 224}


def test_a_compiled_scan_against_a_count_by_hand():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    spec = PartitionSpec(None, "fsdp")

    def layer(x, w):  # w: [32, 16] of one device
        whole = jax.lax.all_gather(w, "fsdp", tiled=True)  # [128, 16]
        return jax.lax.psum(jnp.tanh(x @ whole), "tensor"), None  # [8, 16]

    def local(x, w):
        return jax.lax.scan(layer, x, w)[0].sum(keepdims=True)

    def run(x, w):
        return jax.shard_map(
            local, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=PartitionSpec("fsdp"), check_vma=False
        )(x, w)

    arrays = [
        jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())),
        jax.ShapeDtypeStruct((6, 128, 128), jnp.float32, sharding=NamedSharding(mesh, spec)),
    ]
    text = jax.jit(run).lower(*arrays).compile().as_text()
    gathered, reduced = 128 * 128 * 4 * 3 / 4, 2 * 8 * 128 * 4 / 2
    assert links(text) == {"all-gather": 6 * gathered, "all-reduce": 6 * reduced}
