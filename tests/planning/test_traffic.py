import pytest

from jax_instructblip.planning.explain import explain, explain_lines
from jax_instructblip.planning.traffic import Traffic, copies

# Three layers of weights [8, 4] in a loop of six; each turn slices one, multiplies, and writes a
# row of a table. Before the loop the head becomes float32.
PROGRAM = """\
HloModule jit_step, is_scheduled=true

%slice (stack: bf16[3,8,4], at: s32[]) -> bf16[8,4] {
  %stack = bf16[3,8,4]{2,1,0} parameter(0)
  %at = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %below = pred[] compare(%at, %zero.1), direction=LT
  %other = s32[] add(%at, %zero.1)
  %start = s32[] select(%below, %other, %at)
  %one = bf16[1,8,4]{2,1,0} dynamic-slice(%stack, %start, %zero.1, %zero.1), dynamic_slice_sizes={1,8,4}
  ROOT %layer = bf16[8,4]{1,0} bitcast(%one)
}

%widen (kernel: bf16[4,16]) -> f32[4,16] {
  %kernel = bf16[4,16]{1,0} parameter(0)
  ROOT %wide = f32[4,16]{1,0} convert(%kernel)
}

%write (table: f32[6,4], row: f32[4], at.1: s32[]) -> f32[6,4] {
  %table = f32[6,4]{1,0} parameter(0)
  %row = f32[4]{0} parameter(1)
  %at.1 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  %doubled = f32[4]{0} add(%row, %row)
  %line = f32[1,4]{1,0} bitcast(%doubled)
  ROOT %written = f32[6,4]{1,0} dynamic-update-slice(%table, %line, %at.1, %zero.2)
}

%body (carry: (s32[], bf16[3,8,4], f32[6,4], bf16[8])) -> (s32[], bf16[3,8,4], f32[6,4], bf16[8]) {
  %carry = (s32[], bf16[3,8,4]{2,1,0}, f32[6,4]{1,0}, bf16[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %layers = bf16[3,8,4]{2,1,0} get-tuple-element(%carry), index=1
  %rows = f32[6,4]{1,0} get-tuple-element(%carry), index=2
  %x = bf16[8]{0} get-tuple-element(%carry), index=3
  %step = s32[] constant(1)
  %next = s32[] add(%i, %step)
  %weights = bf16[8,4]{1,0} fusion(%layers, %i), kind=kLoop, calls=%slice, metadata={op_name="jit(step)/layers"}
  %product = (f32[4]{0}, s8[4096]{0}) custom-call(%x, %weights), custom_call_target="__cublas$gemm"
  %out = f32[4]{0} get-tuple-element(%product), index=0
  %table.1 = f32[6,4]{1,0} fusion(%rows, %out, %i), kind=kLoop, calls=%write
  ROOT %result = (s32[], bf16[3,8,4]{2,1,0}, f32[6,4]{1,0}, bf16[8]{0}) tuple(%next, %layers, %table.1, %x)
}

%condition (carry.1: (s32[], bf16[3,8,4], f32[6,4], bf16[8])) -> pred[] {
  %carry.1 = (s32[], bf16[3,8,4]{2,1,0}, f32[6,4]{1,0}, bf16[8]{0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carry.1), index=0
  %end = s32[] constant(6)
  ROOT %less = pred[] compare(%i.1, %end), direction=LT
}

ENTRY %main (stack.1: bf16[3,8,4], head: bf16[4,16], x.1: bf16[8], table.2: f32[6,4]) -> (f32[6,4], f32[4,16]) {
  %stack.1 = bf16[3,8,4]{2,1,0} parameter(0), metadata={op_name="params['llm']['layers']"}
  %head = bf16[4,16]{1,0} parameter(1), metadata={op_name="params[\\'llm\\'][\\'head\\']"}
  %x.1 = bf16[8]{0} parameter(2)
  %table.2 = f32[6,4]{1,0} parameter(3)
  %zero = s32[] START
  %head.1 = f32[4,16]{1,0} fusion(%head), kind=kLoop, calls=%widen
  %first = (s32[], bf16[3,8,4]{2,1,0}, f32[6,4]{1,0}, bf16[8]{0}) tuple(%zero, %stack.1, %table.2, %x.1)
  %loop = (s32[], bf16[3,8,4]{2,1,0}, f32[6,4]{1,0}, bf16[8]{0}) while(%first), condition=%condition, body=%body
  %rows.1 = f32[6,4]{1,0} get-tuple-element(%loop), index=2
  ROOT %both = (f32[6,4]{1,0}, f32[4,16]{1,0}) tuple(%rows.1, %head.1)
}
"""


@pytest.fixture(scope="module")
def traffic():
    return Traffic(PROGRAM.replace("START", "constant(0)"))


def test_a_kernel_reads_what_it_uses(traffic):
    found = {each.name: each for each in traffic.kernels}
    # Of the stack one layer, not three; and the index.
    assert found["weights"].read == 64 + 4 and found["weights"].written == 64
    assert found["weights"].times == 6
    # A library's working memory is no result.
    assert found["product"].read == 16 + 64 and found["product"].written == 16
    # The table is written in place: a row of it, of which nothing is read.
    assert found["table.1"].read == 16 + 4 and found["table.1"].written == 16
    assert found["table.1"].made == 96


def test_copies_are_named_with_what_they_copy(traffic):
    layer, head = copies(traffic.kernels)
    assert (layer.copies, layer.source, layer.times) == ("slice", "params['llm']['layers']", 6)
    assert (head.copies, head.source) == ("convert", "params['llm']['head']")
    assert head.dtypes == ("bf16", "f32") and head.made == 256


def test_a_fusion_that_computes_is_no_copy():
    text = PROGRAM.replace("START", "constant(0)").replace(
        "  ROOT %wide = f32[4,16]{1,0} convert(%kernel)",
        "  %half = f32[4,16]{1,0} convert(%kernel)\n  ROOT %wide = f32[4,16]{1,0} add(%half, %half)",
    )
    assert [each.name for each in copies(Traffic(text).kernels)] == ["weights"]


def test_what_one_turn_of_a_loop_reads(traffic):
    loop = traffic.loops()[0]
    turn = [each.name for each in loop.kernels]
    assert turn == ["next", "weights", "product", "table.1"] and loop.trips == 6
    assert loop.read == 8 + 68 + 80 + 20
    assert traffic.decoding() is None
    unknown = Traffic(PROGRAM.replace("START", "parameter(4)"), loops=9)
    assert unknown.decoding().read == loop.read
    assert {each.times for each in unknown.kernels} == {1, 9}


def test_a_weight_that_the_loop_changes_is_no_argument():
    changed = "  %swapped = bf16[3,8,4]{2,1,0} negate(%layers)\n  %out = "
    text = PROGRAM.replace("START", "constant(0)").replace("  %out = ", changed)
    text = text.replace("tuple(%next, %layers, ", "tuple(%next, %swapped, ")
    assert copies(Traffic(text).kernels)[0].source == ""


def test_the_explanation_lists_arrays_and_copies(traffic):
    explained = explain(traffic)
    assert explained["arrays"][0]["bytes"] == 256
    assert [each["copies"] for each in explained["copies"]] == ["slice", "convert"]
    lines = list(explain_lines(explained))
    assert any("x 6" in line and "params['llm']['layers']" in line for line in lines)
    assert list(explain_lines({"arrays": [], "copies": []}))[-1] == "no copies"
