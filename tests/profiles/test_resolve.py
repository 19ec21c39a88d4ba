from __future__ import annotations

import pytest

from profiles.deployment import Facts, parse_settings, resolve
from profiles.errors import InputError
from profiles.import_bundle import import_bundle
from profiles.profile import load_profile
from simulator.accelerators.linear import Linear
from simulator.accelerators.operator_table import OperatorTable
from simulator.accelerators.roofline import Roofline
from simulator.batch import Batch
from simulator.engine_config import known_arguments

LLAMA = "meta-llama/Llama-3.1-8B"
ENGINE = {"max_num_seqs": 256, "max_num_batched_tokens": 2048, "gpu_memory_utilization": 0.9}
FACTS = Facts(model=LLAMA, version="0.19.0", arguments=ENGINE)


def refused(*args, **kwargs) -> str:
    with pytest.raises(InputError) as caught:
        resolve(*args, **kwargs)
    return str(caught.value)


def test_trace_wins_over_profile_and_the_conflict_is_said(write_profile):
    loaded = load_profile(write_profile())
    found = resolve(loaded, Facts(model=LLAMA, version="0.16.1", arguments={"max_num_seqs": 32, "block_size": 8}))

    assert (found.config.max_num_seqs, found.config.block_size) == (32, 8)
    assert found.config.max_num_batched_tokens == 1024
    assert found.config.version == (0, 16)
    assert found.conflicts == (
        "engine.max_num_seqs: profile says 64, trace says 32; trace is used",
        "engine.version: profile says 0.19.0, trace says 0.16.1; 0.16.1 is used",
    )


def test_set_wins_over_both_and_says_whom_it_overrides(write_profile):
    loaded = load_profile(write_profile())
    facts = Facts(model=LLAMA, version="0.19.0", arguments={"max_num_seqs": 32})
    found = resolve(
        loaded, facts, settings=("engine.max_num_seqs=16", "engine.num_gpu_blocks=50", "engine.version=0.24.0")
    )

    assert (found.config.max_num_seqs, found.config.num_gpu_blocks, found.config.version) == (16, 50, (0, 24))
    assert "engine.max_num_seqs: trace says 32, --set says 16; --set is used" in found.conflicts
    assert "engine.num_gpu_blocks: profile says 1000, --set says 50; --set is used" in found.conflicts


def test_agreement_is_no_conflict(write_profile):
    facts = Facts(model=LLAMA, version="0.19.0", arguments={"max_num_seqs": 64})
    found = resolve(load_profile(write_profile()), facts, settings=("engine.max_num_seqs=64",))
    assert found.conflicts == ()


def test_host_terms_can_be_set(write_profile):
    loaded = load_profile(write_profile(host={"per_step": 1e-3}))
    kept = resolve(loaded, FACTS).accelerator.host
    changed = resolve(loaded, FACTS, settings=("host.per_step=0.002", "host.per_sequence=1e-6")).accelerator.host
    assert (kept.per_step, kept.per_sequence) == (1e-3, 0.0)
    assert (changed.per_step, changed.per_sequence) == (2e-3, 1e-6)


@pytest.mark.parametrize(
    "setting",
    ["engine.max_num_seq=4", "max_num_seqs=4", "engine.max_num_seqs", "device.memory=4", "host.per_token=1", "=", ""],
)
def test_setting_with_an_unknown_name_is_refused_with_those_there_are(setting):
    with pytest.raises(InputError, match="with a name of:") as caught:
        parse_settings((setting,))
    assert caught.value.field == "--set"
    assert "max_num_seqs" in str(caught.value) or "per_step" in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("engine.max_num_seqs=many", "engine.max_num_seqs='many': expected int"),
        ("engine.max_num_seqs=0", "engine.max_num_seqs=0: expected at least 1"),
        ("engine.block_size=0", "engine.block_size=0: expected at least 1"),
        ("engine.tensor_parallel_size=0", "engine.tensor_parallel_size=0: expected at least 1"),
        ("engine.pipeline_parallel_size=2", "pipeline parallelism is not simulated"),
        ("engine.gpu_memory_utilization=nan", "engine.gpu_memory_utilization=nan: expected"),
        ("engine.gpu_memory_utilization=inf", "engine.gpu_memory_utilization=inf: expected"),
        ("engine.gpu_memory_utilization=-1", "engine.gpu_memory_utilization=-1.0: expected"),
        ("engine.version=newest", "vLLM version 'newest'"),
        ("host.per_step=nan", "host.per_step=nan: expected seconds"),
        ("host.per_step=-1", "host.per_step=-1: expected seconds"),
        ("host.per_sequence=slow", "host.per_sequence=slow: expected seconds"),
    ],
)
def test_impossible_setting_is_refused_by_name_and_value(setting, words):
    assert words in refused(load_profile("roofline:rtx-4090"), FACTS, settings=(setting,))


VALUES = ("-1", "0", "1", "2", "7.5", "1e9", "4294967296", "nan", "-inf", "true", "no", "", "fp8", "fcfs")


@pytest.mark.parametrize("name", ["version", *known_arguments()])
def test_any_value_of_a_setting_gives_a_deployment_or_an_input_error(name):
    facts = Facts(model="meta-llama/Llama-3.2-1B", version="0.24.0", arguments=ENGINE)
    for value in VALUES:
        try:
            found = resolve(load_profile("roofline:l4"), facts, settings=(f"engine.{name}={value}",))
        except InputError:
            continue
        assert all(part >= 0 for part in found.accelerator.step(Batch([(4, 0)], [5])))


def test_unknown_engine_argument_of_a_profile_is_refused_by_its_name(write_profile):
    path = write_profile(engine={"max_num_seq": 4})
    text = refused(load_profile(path), FACTS)
    assert "engine.max_num_seq" in text
    assert path in text


def test_version_that_yaml_reads_as_a_number_is_refused(write_profile):
    """Unquoted, 0.10 is the number 0.1, which would be another version."""
    loaded = load_profile(write_profile(engine={"version": 0.10, "max_num_seqs": 1, "max_num_batched_tokens": 1}))
    text = refused(loaded, Facts(model=LLAMA))
    assert "engine.version" in text
    assert "quotes" in text


def test_missing_engine_arguments_name_the_flags_that_give_them():
    text = refused(load_profile("roofline:h100-sxm"), Facts(model=LLAMA, arguments={"max_num_seqs": 8}))
    assert "max_num_batched_tokens, version" in text
    assert "--set engine.max_num_batched_tokens=... --set engine.version=..." in text
    assert "--assume-defaults" in text
    assert "--set engine.max_num_seqs" not in text


@pytest.mark.parametrize(
    ("device", "version", "limits"),
    [
        ("b200", "0.28.0", (16384, 1024)),
        ("mi300x", "0.28.0", (16384, 1024)),
        ("b200", "0.24.0", (8192, 1024)),
        ("h100-sxm", "0.32.0", (8192, 1024)),
        ("h200", "0.28.0", (8192, 1024)),
        ("rtx-pro-6000", "0.19.0", (8192, 1024)),
        ("a100-80g", "0.32.0", (2048, 256)),
        ("a100-40g", "0.32.0", (2048, 256)),
        ("l40s", "0.32.0", (2048, 256)),
        ("rtx-4090", "0.32.0", (2048, 256)),
        ("a10g", "0.19.0", (2048, 256)),
    ],
)
def test_assume_defaults_takes_vllms_for_the_device_and_says_so(device, version, limits):
    facts = Facts(model="meta-llama/Llama-3.2-1B", version=version)
    found = resolve(load_profile(f"roofline:{device}"), facts, assume_defaults=True)

    assert (found.config.max_num_batched_tokens, found.config.max_num_seqs) == limits
    assert (found.assumed["max_num_batched_tokens"], found.assumed["max_num_seqs"]) == limits
    assert found.assumed["max_model_len"] == found.config.max_model_len == 131072
    assert found.assumed["num_gpu_blocks"] == found.config.num_gpu_blocks > 1


def test_assumed_version_is_said():
    found = resolve(load_profile("roofline:l4"), Facts(model="llama-3.2-1b"), assume_defaults=True)
    assert found.assumed["version"] == "0.32"


def test_what_somebody_said_is_not_called_assumed(write_profile):
    found = resolve(load_profile(write_profile()), Facts(model=LLAMA, arguments={"block_size": 16}))
    assert not {"max_num_seqs", "max_num_batched_tokens", "num_gpu_blocks", "block_size", "version"} & set(
        found.assumed
    )


def test_v0_engine_is_replayed_with_a_warning():
    found = resolve(load_profile("roofline:l4"), Facts(model="llama-3.2-1b", version="0.6.3", arguments=ENGINE))
    assert any("0.6.3 ran the V0 engine" in one for one in found.conflicts)


def test_kv_blocks_of_an_rtx_4090_are_what_vllm_found():
    """vLLM 0.19 logged 2,588 blocks for Llama-3.1-8B at 0.9, 2,048 tokens and 256 sequences."""
    found = resolve(load_profile("roofline:rtx-4090"), FACTS)
    assert found.config.num_gpu_blocks == pytest.approx(2588, rel=0.03)
    assert found.assumed["num_gpu_blocks"] == found.config.num_gpu_blocks


def blocks(device: str = "h100-sxm", model: str = LLAMA, **given: object) -> int:
    facts = Facts(model=model, version="0.19.0", arguments={**ENGINE, **given})
    return resolve(load_profile(f"roofline:{device}"), facts).config.num_gpu_blocks


def test_kv_blocks_grow_with_memory_and_shrink_with_what_else_needs_it():
    plain = blocks()
    assert blocks(gpu_memory_utilization=0.8) < plain < blocks(gpu_memory_utilization=0.95)
    assert blocks("h200") > plain
    assert blocks(max_num_batched_tokens=16384) < plain
    assert blocks(max_num_seqs=1024) < plain
    assert blocks(block_size=32) == pytest.approx(plain / 2, abs=1)
    assert blocks(kv_cache_dtype="fp8") == pytest.approx(2 * plain, abs=2)
    # Two devices: half the weights and half the heads on each.
    assert blocks(tensor_parallel_size=2) > 2 * plain


def test_given_kv_blocks_are_kept():
    assert blocks(num_gpu_blocks=77) == 77


def test_model_too_big_for_the_device_is_refused_unless_blocks_are_given():
    facts = Facts(model="llama-3.1-70b", version="0.19.0", arguments=ENGINE)
    loaded = load_profile("roofline:rtx-4090")

    text = refused(loaded, facts)
    assert "llama-3.1-70b leaves no room for a KV cache on 1 x rtx-4090 (24 GiB)" in text
    assert "tensor_parallel_size" in text
    assert resolve(loaded, facts, settings=("engine.num_gpu_blocks=100",)).config.num_gpu_blocks == 100


def test_kv_blocks_without_hardware_must_be_given(write_profile):
    loaded = load_profile(write_profile(engine={}))
    assert "--set engine.num_gpu_blocks=..." in refused(loaded, FACTS)


def test_model_asked_for_wins_over_the_traces(write_config):
    loaded = load_profile("roofline:l4")
    found = resolve(loaded, FACTS, model="llama-3.2-1b")
    assert (found.model.name, resolve(loaded, FACTS, model=str(write_config())).model.name) == (
        "llama-3.2-1b",
        "config",
    )


def test_config_in_the_trace_describes_a_model_that_the_library_lacks(llama_config):
    facts = Facts(model="me/mine", model_config=llama_config, version="0.19.0", arguments=ENGINE)
    found = resolve(load_profile("roofline:l4"), facts)
    assert (found.model.name, found.model.hidden_size) == ("me/mine", 2048)


def test_model_that_nobody_knows_is_refused_with_the_flag_that_gives_it():
    unknown = Facts(model="me/mine", version="0.19.0", arguments=ENGINE)
    assert "--model NAME|config.json" in refused(load_profile("roofline:l4"), unknown)
    nameless = Facts(version="0.19.0", arguments=ENGINE)
    assert "--model NAME|config.json" in refused(load_profile("roofline:l4"), nameless)


def test_linear_profile_does_without_the_models_shape(write_profile):
    found = resolve(load_profile(write_profile(model=None)), Facts(model="me/mine", version="0.19.0", arguments=ENGINE))
    assert found.model is None
    assert isinstance(found.accelerator.device, Linear)
    assert any("does not know the trace's model 'me/mine'" in one for one in found.conflicts)


def test_profile_of_another_model_than_the_traces_says_so(write_profile):
    found = resolve(load_profile(write_profile(model="llama-3.2-1b")), FACTS)
    assert any(f"measured with {LLAMA}, the profile describes llama-3.2-1b" in one for one in found.conflicts)


def test_roofline_prices_by_the_model_device_and_parallel_degree():
    found = resolve(load_profile("roofline:h100-sxm"), FACTS, settings=("engine.tensor_parallel_size=2",))
    assert isinstance(found.accelerator.device, Roofline)
    assert found.accelerator.device.tensor_parallel_size == 2
    assert (found.model.name, found.hardware.name) == ("llama-3.1-8b", "h100-sxm")


def test_roofline_of_an_unknown_device_is_refused():
    assert "no hardware 'abacus'" in refused(load_profile("roofline:abacus"), FACTS)


def test_coefficients_of_the_profile_reach_the_accelerator(write_profile):
    plain = resolve(load_profile(write_profile()), FACTS).accelerator.step(Batch([], [5]))
    scaled = resolve(load_profile(write_profile(coefficients={"step": 2.0})), FACTS).accelerator.step(Batch([], [5]))
    assert scaled[0] == 2 * plain[0]
    assert scaled[1:] == plain[1:]


def test_coefficient_of_no_component_is_refused(write_profile):
    loaded = load_profile(write_profile(coefficients={"dense": 1.1}))
    assert "'dense'" in refused(loaded, FACTS)


@pytest.mark.parametrize(
    ("accelerator", "words"),
    [
        ({"kind": "abacus"}, "no accelerator model 'abacus'; there are linear, operator_table, regression, roofline"),
        ({"kind": "linear"}, "'seconds': is missing"),
        ({"kind": "linear", "seconds": {"warp": 1}}, "'warp' is no feature"),
        ({"kind": "linear", "seconds": {"step": float("inf")}}, "step"),
        ({"kind": "roofline", "speed": 2}, "'speed': is no field"),
        ({"kind": "roofline"}, "needs hardware"),
        ({"kind": "operator_table"}, "'tables': is missing"),
    ],
)
def test_accelerator_options_that_do_not_fit_are_refused(write_profile, accelerator, words):
    assert words in refused(load_profile(write_profile(accelerator=accelerator)), FACTS)


@pytest.fixture
def imported(write_bundle, tmp_path):
    """A profile of operator tables at one degree."""

    def make(degree: int) -> str:
        output = tmp_path / f"tables-tp{degree}.yaml"
        import_bundle(write_bundle(), degree, output)
        return str(output)

    return make


TABLE_FACTS = Facts(model="meta-llama/Llama-3.2-1B", version="0.19.0", arguments=ENGINE)


def test_operator_tables_resolve_from_the_folder_beside_the_profile(imported):
    found = resolve(load_profile(imported(1)), TABLE_FACTS)
    assert isinstance(found.accelerator.device, OperatorTable)
    assert found.accelerator.device.num_hidden_layers == 16


@pytest.mark.parametrize(("degree", "asked"), [(1, 2), (2, 1)])
def test_operator_tables_of_another_parallel_degree_are_refused(imported, degree, asked):
    text = refused(load_profile(imported(degree)), TABLE_FACTS, settings=(f"engine.tensor_parallel_size={asked}",))
    assert f"measured at tensor_parallel_size={degree}, the engine has {asked}" in text
    assert f"--tp {asked}" in text


def test_missing_table_folder_is_named(write_profile, tmp_path):
    options = {"tensor_parallel_size": 1, "num_hidden_layers": 1, "hidden_size": 8}
    loaded = load_profile(write_profile(accelerator={"kind": "operator_table", "tables": "gone.tables", **options}))
    text = refused(loaded, FACTS)
    assert str(tmp_path / "gone.tables" / "dense.parquet") in text
    assert "is missing" in text
