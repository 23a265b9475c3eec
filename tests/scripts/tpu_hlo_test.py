"""The reader of what a TPU's compiler made: estimates along a path, and what
only moves.
"""

import pytest

from scripts import tpu_hlo

COST = 'backend_config={"estimated_cycles":"%d","other":1}'


def module(body: str, other: str = "") -> tpu_hlo.Module:
  return tpu_hlo.parse(f"""HloModule jit_run, is_scheduled=true
%moves (p: f32[4,8]) -> f32[4,8] {{
  %p = f32[4,8]{{1,0:T(8,128)}} parameter(0)
  ROOT %t = f32[4,8]{{0,1:T(8,128)}} copy(%p)
}}
%adds (p: f32[4,8]) -> f32[4,8] {{
  %q = f32[4,8]{{1,0}} parameter(0)
  ROOT %a = f32[4,8]{{1,0}} add(%q, %q)
}}
{other}
%body (t: (f32[4,8]{{1,0}}, s32[])) -> (f32[4,8], s32[]) {{
  %t = (f32[4,8]{{1,0:T(8,128)}}, s32[]{{:T(256)}}) parameter(0)
{body}
  ROOT %r = (f32[4,8]{{1,0:T(8,128)}}, s32[]{{:T(256)}}) tuple(%t)
}}
%condition (t: s32[]) -> pred[] {{
  ROOT %k = pred[] constant(true)
}}
ENTRY %main (p: f32[4,8]) -> f32[4,8] {{
  %x = f32[4,8]{{1,0}} fusion(%p), calls=%adds, {COST % 1000}
  ROOT %w = (f32[4,8]{{1,0:T(8,128)}}, s32[]) while(%x), condition=%condition, body=%body
}}
""")  # noqa: E501


def fusion(name: str, cycles: int, calls: str = "adds") -> str:
  return (
    f"  %{name} = f32[4,8]{{1,0}} fusion(%t), kind=kLoop, calls=%{calls}, "
    f"{COST % cycles}\n"
  )


def computation(name: str, body: str) -> str:
  return f"%{name} (p: f32[4,8]) -> f32[4,8] {{\n{body}}}\n"


def test_cycles_of_the_loop_alone_are_added():
  made = module(fusion("a", 3) + fusion("b", 4))
  assert tpu_hlo.step_cycles(made, tpu_hlo.Path()) == 7
  assert made.token_loop() == "body"


def nested() -> tpu_hlo.Module:
  """A layer of 10, then 100 if a row stays, then 1000; a fill of 1 where none
  does.
  """
  case = (
    "  %c = f32[4,8]{1,0} conditional(%t), branch_computations={%deeper, "
    "%leaves}\n"
  )
  inner = "true_computation=%leaves, false_computation=%last"
  inner = f"  %d = f32[4,8]{{1,0}} conditional(%t), {inner}\n"
  other = (
    computation("leaves", fusion("s", 1))
    + computation("last", fusion("l", 1000))
    + computation("deeper", fusion("h", 100) + inner)
  )
  return module(fusion("f", 10) + case, other)


@pytest.mark.parametrize(("segments", "cycles"), [(1, 11), (2, 111), (3, 1110)])
def test_nested_conditionals_are_followed_to_the_exit(segments, cycles):
  path = tpu_hlo.Path(deeper=0, leaves=1)
  assert tpu_hlo.step_cycles(nested(), path, segments) == cycles


def in_turn() -> tpu_hlo.Module:
  """A step of 10, two layers behind a conditional each: of no row (1), of two,
  of all (100).
  """
  branches = "branch_computations={%none, %two, %all}"

  def case(name):
    return f"  %{name} = f32[4,8]{{1,0}} conditional(%t), {branches}\n"

  sizes = {"none": 1, "two": 500, "all": 100}
  other = "".join(
    computation(name, fusion(name[0], n)) for name, n in sizes.items()
  )
  return module(fusion("f", 10) + case("c") + case("d"), other)


@pytest.mark.parametrize(("segments", "cycles"), [(1, 111), (2, 210)])
def test_a_first_segment_behind_a_conditional_is_run_as_well(segments, cycles):
  path = tpu_hlo.Path(deeper=-1, leaves=0, first_too=True)
  assert tpu_hlo.step_cycles(in_turn(), path, segments) == cycles
  with pytest.raises(
    ValueError, match="Expected 3 segments of layers in the loop, got 1 few"
  ):
    tpu_hlo.step_cycles(in_turn(), path, 3)


@pytest.mark.parametrize(("segments", "cycles"), [(1, 10), (2, 110), (3, 210)])
def test_loops_of_one_turn_are_segments_and_those_inside_are_fills(
  segments, cycles
):
  loop = (
    "  %%%s = (f32[4,8]{1,0}) while(%%t), condition=%%condition, body=%%%s\n"
  )
  other = computation("fill", fusion("z", 7)) + computation(
    "segment", fusion("s", 100) + loop % ("y", "fill")
  )
  made = module(
    fusion("f", 10) + loop % ("u", "segment") + loop % ("v", "segment"), other
  )
  assert (
    tpu_hlo.step_cycles(made, tpu_hlo.Path(by_loops=True), segments) == cycles
  )


def test_what_only_moves_is_told_from_what_computes():
  copy = "  %c = f32[4,8]{0,1:T(8,128)} copy(%t)\n"
  made = module(fusion("a", 3) + fusion("m", 3, "moves") + copy)
  assert [x.name for x in tpu_hlo.moved(made, 32)] == ["m", "c"]
  assert not tpu_hlo.moved(made, 33)


def test_collectives_are_counted_in_the_loop():
  gather = "  %g = f32[4,8]{1,0} all-gather(%t), dimensions={0}\n"
  assert tpu_hlo.collectives(module(gather + fusion("a", 1))) == {
    "all-gather": 1
  }
  assert not tpu_hlo.collectives(module(fusion("a", 1)))


def test_a_text_without_a_loop_or_an_entry_is_refused():
  with pytest.raises(ValueError, match="without an entry"):
    tpu_hlo.parse("%a (p: f32[]) -> f32[] {\n}\n")
  with pytest.raises(ValueError, match="Expected a loop over tokens"):
    tpu_hlo.parse("ENTRY %a (p: f32[]) -> f32[] {\n}\n").token_loop()
