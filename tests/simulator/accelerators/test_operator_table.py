from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.accelerators.operator_table import Curve, OperatorTable, SkewBuckets, SkewTable
from simulator.batch import Batch
from simulator.errors import SimulationError
from simulator.hardware import Interconnect


def nanoseconds(seconds) -> list[int]:
    return [round(1e9 * part) for part in seconds]


def build(tables, layers: int = 1) -> OperatorTable:
    return OperatorTable(tables, num_hidden_layers=layers, hidden_size=8)


@pytest.mark.parametrize(
    ("at", "ns"),
    [(0, 100), (1, 100), (2, 150), (3, 201), (5, 601), (7, 1001), (9, 1401)],
    ids=["below", "first", "between, truncated", "point", "between", "last", "beyond"],
)
def test_curve_interpolates_clamps_below_and_extends_the_last_segment(at, ns):
    assert Curve([1, 3, 7], [100, 201, 1001]).at(at) == ns


def test_curve_with_one_point_is_constant():
    assert [Curve([4], [77]).at(value) for value in (1, 4, 1000)] == [77, 77, 77]


def test_curve_never_falls_below_one_nanosecond():
    assert Curve([1, 2], [100, 10]).at(50) == 1


@given(
    points=st.lists(st.integers(1, 10_000), min_size=2, max_size=8, unique=True).map(sorted),
    data=st.data(),
)
def test_curve_agrees_with_numpy_between_its_points(points, data):
    ns = data.draw(st.lists(st.integers(1, 10**7), min_size=len(points), max_size=len(points)))
    at = data.draw(st.integers(points[0], points[-1]))
    assert Curve(points, ns).between(at) == pytest.approx(np.interp(at, points, ns), rel=1e-9)


def test_iteration_is_embedding_plus_layers_of_operators_plus_head(tiny_tables):
    parts = build(tiny_tables(), layers=3).step(Batch([], [5]))

    # dense 1000 + 300 + 5000 + 2000; elementwise 2 x 10 + 20 + 30; embedding 40 + 50; head 600 + 70.
    assert nanoseconds(parts) == [3 * 8300, 3 * 70, 3 * 900, 670, 90, 0]
    assert OperatorTable.components == (
        "dense",
        "elementwise",
        "attention",
        "output_head",
        "embedding",
        "collectives",
    )


def test_qk_norm_counts_once_a_layer_where_the_tables_have_it(tiny_tables, constant):
    tables = tiny_tables()
    with_norm = tiny_tables(dense={**tables.dense, "qk_norm": constant(7)})

    difference = np.subtract(build(with_norm, 3).step(Batch([], [5])), build(tables, 3).step(Batch([], [5])))

    assert nanoseconds(difference) == [0, 3 * 7, 0, 0, 0, 0]


def test_token_operators_are_looked_up_at_all_tokens_and_the_head_at_sequences(tiny_tables, constant):
    steps = Curve([1, 1000], [1, 1000])
    tables = tiny_tables()
    tables = tiny_tables(
        dense={**tables.dense, "o_proj": steps}, per_sequence={"lm_head": steps, "sampler": constant(70)}
    )

    dense, _, _, head, *_ = nanoseconds(build(tables).step(Batch([(30, 0), (20, 5)], [9, 9, 9])))

    assert dense == 1000 + 53 + 5000 + 2000
    assert head == 5 + 70


@pytest.fixture
def four_corners(tiny_tables, constant):
    return tiny_tables(
        attention={
            (0, 1): {0: constant(100)},
            (0, 3): {0: constant(300)},
            (16, 1): {0: constant(1000)},
            (16, 3): {0: constant(2000)},
        }
    )


@pytest.mark.parametrize(
    ("chunk", "decodes", "ns"),
    [
        (0, 1, 100),
        (16, 3, 2000),
        (0, 2, 200),
        # between decodes 200 and 1500, a quarter of the way between chunks
        (4, 2, 525),
        # 100 + 0.75 * 900, truncated
        (12, 1, 775),
        # beyond both axes: decodes 400 and 2500 by the last two points, then 400 + 2 * 2100
        (32, 4, 4600),
        # below both axes
        (0, 0, 100),
    ],
)
def test_attention_blends_decodes_then_chunks_of_the_four_nearest_slices(four_corners, chunk, decodes, ns):
    batch = Batch([(chunk, 0)] if chunk else [], [7] * decodes)
    assert build(four_corners).attention_ns(batch) == ns


def test_several_chunks_are_looked_up_as_one_of_summed_length_and_context(tiny_tables):
    tables = tiny_tables(
        attention={(chunk, 0): {0: Curve([0], [chunk]), 100: Curve([0], [2 * chunk])} for chunk in (2, 40)}
    )
    model = build(tables)

    assert model.attention_ns(Batch([(10, 30), (20, 20)], [])) == model.attention_ns(Batch([(30, 50)], [])) == 45


def test_each_row_of_a_slice_brackets_its_own_decode_contexts(tiny_tables):
    tables = tiny_tables(
        attention={(16, 1): {0: Curve([10, 30], [100, 300]), 100: Curve([20, 40, 80], [1000, 2000, 9000])}}
    )
    model = build(tables)

    # context 0 row at 25: 250; context 100 row at 25: 1250; halfway.
    assert model.attention_ns(Batch([(16, 50)], [25])) == 750
    # below the first point each row clamps: 100 and 1000, a quarter of the way
    assert model.attention_ns(Batch([(16, 25)], [1])) == 325
    # beyond the last row the rows' line goes on: 250 + 2 * 1000
    assert model.attention_ns(Batch([(16, 200)], [25])) == 2250


def test_missing_slice_is_stood_in_for_by_the_nearest(tiny_tables, constant):
    tables = tiny_tables(
        attention={(0, 1): {0: constant(100)}, (0, 5): {0: constant(300)}, (16, 1): {0: constant(1000)}}
    )
    # (16, 5) is missing: (16, 1) lies 4 away, (0, 5) 16.
    assert build(tables).attention_ns(Batch([(16, 0)], [7] * 5)) == 1000


def test_nearest_of_two_slices_equally_far_is_the_first_in_order(tiny_tables, constant):
    tables = tiny_tables(attention={(0, 4): {0: constant(100)}, (4, 0): {0: constant(900)}})
    assert build(tables).attention_ns(Batch([(4, 0)], [7] * 4)) == 100


def test_corner_that_lends_another_corners_slice_still_blends_with_the_fourth(tiny_tables, constant):
    tables = tiny_tables(
        attention={(0, 0): {0: constant(100)}, (0, 4): {0: constant(300)}, (4, 4): {0: constant(1100)}}
    )
    # (4, 0) is missing and falls back to (0, 0), which stands first: 200 at chunk 0, 600 at chunk 4.
    assert build(tables).attention_ns(Batch([(2, 0)], [7] * 2)) == 400


@given(
    chunk=st.integers(2, 16),
    decodes=st.integers(1, 3),
    context=st.integers(0, 100),
    decode_context=st.integers(0, 100),
    ns=st.lists(st.integers(1, 10**6), min_size=16, max_size=16),
)
def test_attention_inside_the_grid_stays_within_its_slices(tiny_tables, chunk, decodes, context, decode_context, ns):
    values = iter(ns)
    attention = {
        (at, count): {row: Curve([0, 100], [next(values), next(values)]) for row in (0, 100)}
        for at in (0, 16)
        for count in (1, 3)
    }
    found = build(tiny_tables(attention=attention)).attention_ns(Batch([(chunk, context)], [decode_context] * decodes))
    assert min(ns) <= found + 1
    assert found <= max(ns)


def skew_table(alpha, default: float = 0.0) -> SkewTable:
    return SkewTable(
        decodes=SkewBuckets([2, 4, 1e6], ["n<=2", "n<=4", "n>4"]),
        skew_rate=SkewBuckets([0.4, 1.01], ["low", "high"]),
        longest=SkewBuckets([50, 1e9], ["short", "long"]),
        prefill_context=SkewBuckets([0, 1e9], ["kp=0", "kp>0"]),
        alpha=alpha,
        default=default,
    )


@pytest.fixture
def linear_in_context(tiny_tables):
    """Attention that costs 10 ns per token of decode context; skew as asked for."""

    def make(skew: SkewTable | None, slope: int = 10) -> OperatorTable:
        curve = Curve([0, 1000], [10_000, 10_000 + 1000 * slope])
        return build(tiny_tables(attention={(0, 1): {0: curve}, (16, 1): {0: curve}}, skew=skew))

    return make


UNEVEN = Batch([], [10, 30])  # mean 20, longest 30: 10,200 and 10,300 ns; skew rate (20 - 10) / (30 - 10) = 0.5
HIT = (0, "n<=2", "high", "short", "kp=0")


def test_uneven_decodes_lie_alpha_of_the_way_from_mean_to_longest(linear_in_context):
    assert linear_in_context(skew_table({HIT: 0.25})).attention_ns(UNEVEN) == 10_225


def test_alpha_blend_is_rounded_not_truncated(linear_in_context):
    assert linear_in_context(skew_table({HIT: 0.257})).attention_ns(UNEVEN) == 10_226


def test_bucket_that_the_table_lacks_takes_the_default_alpha(linear_in_context):
    assert linear_in_context(skew_table({HIT: 0.25}, default=0.5)).attention_ns(Batch([], [10, 30, 110])) == (
        10_500 + 600 // 2
    )


def test_mixed_batch_hits_only_with_exactly_the_profiled_prefill_length(linear_in_context):
    model = linear_in_context(skew_table({(16, *HIT[1:]): 1.0}, default=0.5))

    assert model.attention_ns(Batch([(16, 0)], [10, 30])) == 10_300
    assert model.attention_ns(Batch([(15, 0)], [10, 30])) == 10_250


def test_alpha_zero_and_tables_without_skew_price_the_mean_context(linear_in_context):
    assert linear_in_context(skew_table({HIT: 0.0}, default=0.5)).attention_ns(UNEVEN) == 10_200
    assert linear_in_context(None).attention_ns(UNEVEN) == 10_200


def test_skew_that_would_be_faster_than_the_mean_is_ignored(linear_in_context):
    falling = linear_in_context(skew_table({HIT: 0.25}, default=0.5), slope=-1)
    assert falling.attention_ns(UNEVEN) == 10_000 - 20


@pytest.mark.parametrize("contexts", [[500], [20, 20], [20, 20, 21]])
def test_even_or_single_decodes_are_not_skewed(linear_in_context, contexts):
    """The mean is floored, so contexts of 20, 20 and 21 have mean 20 and are uneven; they alone hit the default."""
    skewed = linear_in_context(skew_table({}, default=1.0)).attention_ns(Batch([], contexts))
    assert skewed == 10_000 + 10 * max(contexts)
    plain = linear_in_context(None).attention_ns(Batch([], contexts))
    assert plain == 10_000 + 10 * (sum(contexts) // len(contexts))


def test_mean_context_is_floored(linear_in_context):
    assert linear_in_context(None).attention_ns(Batch([], [10, 11])) == 10_100


def test_no_alpha_makes_attention_shorter_than_a_nanosecond(linear_in_context):
    assert linear_in_context(skew_table({HIT: -1e6})).attention_ns(UNEVEN) == 1


@pytest.mark.parametrize(("value", "label"), [(-5, "a"), (2, "a"), (2.5, "b"), (4, "b"), (99, "b")])
def test_bucket_is_the_first_whose_bound_is_not_passed(value, label):
    assert SkewBuckets([2, 4], ["a", "b"]).label(value) == label


@pytest.mark.parametrize(("tokens", "ns"), [(2048, 1_280_429), (1, 40_635)])
def test_all_reduce_costs_two_hops_and_one_and_a_half_passes_over_memory(tiny_tables, tokens, ns):
    """operator-tables.md section 4; two hops of 20 us and half the tensor each, hop and memory in whole ns."""
    model = OperatorTable(
        tiny_tables(),
        num_hidden_layers=64,
        hidden_size=5120,
        tensor_parallel_size=2,
        link=Interconnect("link", 16 * 2**30, 20e-6),
        memory_bandwidth=1597e9,
    )
    size = tokens * 5120 * 2
    assert ns == pytest.approx(2 * 20_000 + size / (16 * 2**30 / 1e9) + 1.5 * size / 1597 + 30, abs=3)

    *_, collectives = model.step(Batch([(tokens, 0)], []) if tokens > 1 else Batch([], [9]))

    assert round(1e9 * collectives) == 2 * 64 * ns


def test_one_device_needs_no_collectives(tiny_tables):
    assert build(tiny_tables()).step(Batch([(100, 0)], [3]))[-1] == 0.0


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"link": Interconnect("link", 1e9, 1e-6)},
        {"memory_bandwidth": 1e12},
        {"link": Interconnect(), "memory_bandwidth": 1e12},
    ],
)
def test_tensor_parallel_tables_without_link_or_memory_bandwidth_are_refused(tiny_tables, given):
    with pytest.raises(SimulationError, match="tensor_parallel_size=2"):
        OperatorTable(tiny_tables(), num_hidden_layers=1, hidden_size=8, tensor_parallel_size=2, **given)


@pytest.mark.parametrize("layer", ["qkv_proj", "final_layernorm", "embedding"])
def test_tables_without_a_layer_are_refused_by_its_name(tiny_tables, layer):
    dense = {name: curve for name, curve in tiny_tables().dense.items() if name != layer}
    with pytest.raises(SimulationError, match=layer):
        tiny_tables(dense=dense)


def test_tables_without_head_or_attention_are_refused(tiny_tables, constant):
    with pytest.raises(SimulationError, match="sampler"):
        tiny_tables(per_sequence={"lm_head": constant(1)})
    with pytest.raises(SimulationError, match="attention"):
        tiny_tables(attention={})


@given(
    prefills=st.lists(st.tuples(st.integers(2, 4000), st.integers(0, 20_000)), max_size=3),
    decodes=st.lists(st.integers(0, 40_000), max_size=20),
)
def test_components_are_finite_and_not_negative_and_repeatable(tiny_tables, prefills, decodes):
    curve = Curve([0, 64, 1024], [5000, 5500, 9000])
    attention = {(chunk, count): {0: curve, 512: curve} for chunk in (0, 16, 512) for count in (0, 1, 8)}
    model = build(tiny_tables(attention=attention, skew=skew_table({HIT: -40.0}, default=-3.0)), layers=32)
    batch = Batch(prefills, decodes)

    parts = model.step(batch)

    assert all(math.isfinite(part) and part >= 0 for part in parts)
    assert tuple(parts) == tuple(model.step(batch))


def test_separate_prompts_cost_their_own_attention_not_that_of_one_long_prompt(tiny_tables):
    curve = Curve([1], [100])
    attention = {
        (0, 1): {0: Curve([1, 1000], [50, 150])},
        (16, 0): {0: curve},
        (512, 0): {0: Curve([1], [1100])},
        (1024, 0): {0: Curve([1], [4100])},
        (16, 1): {0: curve},
        (512, 1): {0: Curve([1], [1200])},
        (1024, 1): {0: Curve([1], [4300])},
    }
    summed, apart = (
        OperatorTable(tiny_tables(attention=attention), num_hidden_layers=1, hidden_size=8, separate_prompts=separate)
        for separate in (False, True)
    )
    batch = Batch([(512, 0), (512, 0)], [])
    assert summed.attention_ns(batch) == 4100
    # The second prompt beside the first: its own 1,100 less the launch that a chunk of 16 tokens stands for.
    assert apart.attention_ns(batch) == 1100 + 1100 - 100
    assert apart.attention_ns(Batch([(512, 0), (512, 0)], [1])) == 1200 + 1100 - 100
    for same in (Batch([(512, 0)], [1]), Batch([], [500])):
        assert apart.attention_ns(same) == summed.attention_ns(same)
