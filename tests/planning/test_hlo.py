import pytest

from jax_instructblip.planning.hlo import read_program

PROGRAM = """\
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%piece (p: bf16[2,8]) -> bf16[8,8] {
  %p = bf16[2,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.9 = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=9, replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}, dimensions={0}, backend_config={"estimated_cycles":"1000"}
}

%body (carry: (s32[], f32[4,8], bf16[2,8])) -> (s32[], f32[4,8], bf16[2,8]) {
  %carry = (s32[], f32[4,8], bf16[2,8]) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %row = f32[4,8] get-tuple-element(%carry), index=1
  %part = bf16[2,8] get-tuple-element(%carry), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %summed = f32[4,8]{1,0} all-reduce(%row), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add, backend_config={"estimated_cycles":"7"}
  %fused.1 = bf16[8,8] fusion(%part), kind=kCustom, calls=%piece, backend_config={"estimated_cycles":"100"}
  ROOT %out = (s32[], f32[4,8], bf16[2,8]) tuple(%next, %summed, %part)
}

%condition (carry.1: (s32[], f32[4,8], bf16[2,8])) -> pred[] {
  %carry.1 = (s32[], f32[4,8], bf16[2,8]) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %end = s32[] constant(6)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (a: f32[4,8], b: bf16[2,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = bf16[2,8]{1,0} parameter(1)
  %zero = s32[] constant(START)
  %moved = (f32[4,8]{1,0}, f32[4,8]{1,0}, u32[], u32[]) collective-permute-start(%a), channel_id=3, source_target_pairs={{0,1},{1,0}}
  %arrived = f32[4,8]{1,0} collective-permute-done(%moved)
  %fused.2 = bf16[8,8] fusion(%b), kind=kCustom, calls=%piece
  %first = (s32[], f32[4,8], bf16[2,8]) tuple(%zero, %arrived, %b)
  %loop = (s32[], f32[4,8], bf16[2,8]) while(%first), condition=%condition, body=%body
  %rows = f32[4,8] get-tuple-element(%loop), index=1
  ROOT %shared = f32[1,8]{1,0} reduce-scatter(%rows), channel_id=4, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}
"""


@pytest.mark.parametrize(("start", "trips"), [(0, 6), (2, 4)])
def test_a_loop_counts_as_often_as_it_runs(start, trips):
    program = read_program(PROGRAM.replace("START", str(start)), 8)
    assert program.moved() == {
        "collective-permute": {"count": 1, "bytes": 128},
        # 2 x 128 bytes x 3/4 of each of four devices
        "all-reduce": {"count": trips, "bytes": trips * 192},
        "reduce-scatter": {"count": 1, "bytes": 96},
        # Begun outside of the loop, gone on with in it: one gather of 128 bytes.
        "all-gather": {"count": 1, "bytes": 96},
    }
    assert program.cycles == trips * 107  # of a fusion the whole, not the parts
    assert program.unknown == ()


def test_a_loop_of_unknown_length_is_named():
    text = PROGRAM.replace("constant(START)", "parameter(2)")
    program = read_program(text, 8, loops=5)
    assert program.unknown == ("loop",)
    assert program.moved()["all-reduce"]["count"] == 5


def test_groups_written_in_another_way_are_refused():
    text = PROGRAM.replace("replica_groups=[2,4]<=[8]", "replica_groups=<new>")
    with pytest.raises(ValueError, match="cannot read among which devices"):
        read_program(text.replace("START", "0"), 8)
