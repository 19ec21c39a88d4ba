from __future__ import annotations

import csv
import hashlib
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from profiles.deployment import Facts, resolve
from profiles.errors import InputError
from profiles.import_bundle import import_bundle
from profiles.operator_tables import load_tables
from profiles.profile import load_profile
from simulator.batch import Batch

FACTS = Facts(
    model="meta-llama/Llama-3.2-1B",
    version="0.19.0",
    arguments={"max_num_seqs": 64, "max_num_batched_tokens": 2048},
)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "mine.yaml"


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder, hidden ones included."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(bundle: Path, degree: int, output: Path, **options: str) -> InputError:
    """The error; what lies where the output goes is as it was."""
    before = contents(output.parent)
    with pytest.raises(InputError) as caught:
        import_bundle(bundle, degree, output, **options)
    assert contents(output.parent) == before
    assert [path.name for path in output.parent.iterdir() if path.name.startswith(".")] == []
    return caught.value


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_import_writes_a_profile_and_its_tables_that_price_as_measured(write_bundle, output):
    profile = import_bundle(write_bundle(), 1, output)

    assert sorted(contents(output.parent)) == [
        "mine.tables/attention.parquet",
        "mine.tables/dense.parquet",
        "mine.tables/per_sequence.parquet",
        "mine.tables/skew_fit.parquet",
        "mine.yaml",
    ]
    assert (profile.name, profile.hardware) == ("rtx-pro-6000-llama-3.2-1b-tp1", "rtx-pro-6000")
    assert load_profile(str(output)).profile == profile
    device = resolve(load_profile(str(output)), FACTS).accelerator.device
    # One decode at context 1024, 16 layers, all times of one token 1 % above the base; in ns.
    dense = sum(round(us * 1010) for us in (30.0, 20.0, 60.0, 40.0))
    elementwise = 2 * 2020 + 3030 + 5050
    parts = [round(1e9 * part) for part in device.step(Batch([], [1024]))]
    assert parts == [16 * dense, 16 * elementwise, 16 * 40_000, 101_000 + 21_000, 4040 + 2525, 0]


def test_skew_of_the_bundle_is_used_where_enabled(write_bundle, output):
    import_bundle(write_bundle(), 1, output)
    device = resolve(load_profile(str(output)), FACTS).accelerator.device

    # Contexts 0 and 1024: mean 512, skew rate 0.5: the one bucket, alpha 0.25. Decodes cost 7 + n + kv / 32 us.
    assert device.attention_ns(Batch([], [0, 1024])) == 25_000 + 16_000 // 4
    # Skew rate 2/3 (0, 1024, 1024: mean 682): no bucket, the default 0.05. 31.3125 and 42 us.
    assert device.attention_ns(Batch([], [0, 1024, 1024])) == round(31_312 + 0.05 * (42_000 - 31_312))


def test_skew_that_the_bundle_switched_off_is_not_used(write_bundle, output):
    profile = import_bundle(write_bundle(skew=False), 1, output)
    device = resolve(load_profile(str(output)), FACTS).accelerator.device

    assert "skew" not in profile.accelerator.options
    assert not (output.parent / "mine.tables/skew_fit.parquet").exists()
    assert device.attention_ns(Batch([], [0, 1024])) == 25_000


def test_two_devices_take_norms_and_sampler_of_one_and_a_link(write_bundle, output):
    profile = import_bundle(write_bundle(), 2, output, link_latency=1e-6, link_bandwidth=1e11)
    tables = load_tables(output.parent / "mine.tables", None)

    assert tables.dense["layernorm"].at(1) == 2020
    assert tables.dense["qkv_proj"].at(1) == round(0.6 * 30_300)
    assert tables.per_sequence["sampler"].at(1) == 21_000
    assert tables.per_sequence["lm_head"].at(1) == round(0.6 * 101_000)
    assert profile.engine == {"tensor_parallel_size": 2}
    assert profile.accelerator.options["link"]["latency"] == 1e-6
    assert profile.accelerator.options["skew"]["default"] == 0.06
    assert resolve(load_profile(str(output)), FACTS).accelerator.device.step(Batch([], [9]))[-1] > 0


def test_same_bundle_gives_the_same_bytes(write_bundle, output):
    bundle = write_bundle()
    import_bundle(bundle, 1, output)
    first = contents(output.parent)
    import_bundle(bundle, 1, output)
    assert contents(output.parent) == first


def test_profile_and_tables_can_be_moved_together(write_bundle, output, tmp_path):
    import_bundle(write_bundle(), 1, output)
    shutil.move(output.parent, tmp_path / "elsewhere")
    resolve(load_profile(str(tmp_path / "elsewhere" / "mine.yaml")), FACTS)


def test_import_again_replaces_profile_and_tables(write_bundle, output):
    bundle = write_bundle()
    import_bundle(bundle, 1, output)
    replace_in(bundle / "tp1/attention.csv", "0,0,1,0,8.0", "0,0,1,0,9.0")
    first = contents(output.parent)
    import_bundle(bundle, 1, output)

    changed = {name for name, digest in contents(output.parent).items() if first[name] != digest}
    assert changed == {"mine.yaml", "mine.tables/attention.parquet"}


def test_provenance_names_every_file_with_its_digest(write_bundle, output):
    bundle = write_bundle()
    provenance = import_bundle(bundle, 1, output).provenance
    wanted = {name: digest for name, digest in contents(bundle).items() if not name.startswith("tp2")}
    assert provenance["files"] == wanted
    assert provenance["vllm_version"] == "0.19.0"


@pytest.mark.parametrize("name", ["dense.csv", "per_sequence.csv", "attention.csv", "skew_fit.csv"])
def test_missing_table_is_named(write_bundle, output, name):
    bundle = write_bundle()
    (bundle / "tp1" / name).unlink()
    error = refused(bundle, 1, output)
    assert (error.file, error.message) == (bundle / "tp1" / name, "is missing")


@pytest.mark.parametrize(
    ("table", "column"),
    [("dense", "tokens"), ("per_sequence", "sequences"), ("attention", "kv_prefill"), ("skew_fit", "alpha")],
)
def test_missing_column_is_named(write_bundle, output, table, column):
    bundle = write_bundle()
    path = bundle / "tp1" / f"{table}.csv"
    with path.open(newline="") as stream:
        rows = [{key: value for key, value in row.items() if key != column} for row in csv.DictReader(stream)]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    error = refused(bundle, 1, output)
    assert error.file == path
    assert column in str(error)


@pytest.mark.parametrize("value", ["0", "-3.5", "nan", "inf", "", "fast"])
def test_time_that_is_no_positive_number_is_refused_with_its_place(write_bundle, output, value):
    bundle = write_bundle()
    replace_in(bundle / "tp1/attention.csv", "0,0,1,1024,40.0", f"0,0,1,1024,{value}")
    error = refused(bundle, 1, output)
    assert error.file == bundle / "tp1/attention.csv"
    if value != "fast":
        assert (error.row, error.field) == (3, "time_us")


def test_alpha_that_is_no_number_is_refused(write_bundle, output):
    bundle = write_bundle()
    replace_in(bundle / "tp1/skew_fit.csv", "0.25", "nan")
    error = refused(bundle, 1, output)
    assert (error.file, error.row, error.field) == (bundle / "tp1/skew_fit.csv", 2, "alpha")


def test_count_that_is_no_integer_is_refused(write_bundle, output):
    bundle = write_bundle()
    replace_in(bundle / "tp1/dense.csv", "embedding,1,", "embedding,one,")
    assert refused(bundle, 1, output).file == bundle / "tp1/dense.csv"


def test_table_without_rows_is_refused(write_bundle, output):
    bundle = write_bundle()
    (bundle / "tp1/dense.csv").write_text("layer,tokens,time_us\n")
    error = refused(bundle, 1, output)
    assert (error.file, error.message) == (bundle / "tp1/dense.csv", "holds no rows")


def test_parallel_degree_that_was_not_measured_is_refused_with_those_that_were(write_bundle, output):
    assert "has no tp4; there are: tp1, tp2" in str(refused(write_bundle(), 4, output))


def test_mixture_of_experts_bundle_is_refused(write_bundle, output):
    bundle = write_bundle()
    (bundle / "tp1/moe.csv").write_text("tokens,activated_experts,time_us\n1,8,50.0\n")
    for degree in (1, 2):
        assert "mixture-of-experts bundle" in str(refused(bundle, degree, output))


def test_bundle_that_is_no_folder_or_has_no_meta_is_refused(write_bundle, output, tmp_path):
    assert "is no folder" in str(refused(tmp_path / "nowhere", 1, output))
    bundle = write_bundle()
    (bundle / "meta.yaml").unlink()
    assert refused(bundle, 1, output).file == bundle / "meta.yaml"


@pytest.mark.parametrize(
    "fit",
    [
        {"enabled": True},
        {"enabled": True, "bucket_axes": {}, "per_tp": {1: {"alpha_default": 0.1}}},
        {"enabled": True, "bucket_axes": [1], "per_tp": {1: {}}},
        [1],
        "yes",
    ],
)
def test_unusable_skew_entry_is_refused(write_bundle, output, fit):
    error = refused(write_bundle(skew_fit=fit), 1, output)
    assert (error.file.name, error.field) == ("meta.yaml", "skew_fit")
    assert "\n" not in str(error)


def test_skew_axis_with_more_labels_than_bounds_is_refused(write_bundle, output):
    bundle = write_bundle()
    replace_in(bundle / "meta.yaml", "    - n>2\n", "    - n>2\n    - n>9\n")
    error = refused(bundle, 1, output)
    assert (error.file, error.field) == (bundle / "meta.yaml", "skew_fit")


def test_model_and_hardware_that_the_library_lacks_can_be_given(write_bundle, output, write_config):
    bundle = write_bundle(model=None, gpu="abacus", hardware="abacus")
    assert "--model" in str(refused(bundle, 1, output))
    assert "--hardware" in str(refused(bundle, 2, output, model="llama-3.2-1b"))
    assert import_bundle(bundle, 2, output, model="llama-3.2-1b", hardware="l4").hardware == "l4"
    assert import_bundle(bundle, 1, output, model=str(write_config())).hardware is None


def test_foreign_folder_in_the_way_is_left_alone(write_bundle, output):
    folder = output.parent / "mine.tables"
    folder.mkdir()
    (folder / "diary.txt").write_text("dear diary")
    assert "holds no operator tables" in str(refused(write_bundle(), 1, output))


def test_output_that_is_a_folder_is_refused_and_older_tables_are_kept(write_bundle, output):
    bundle = write_bundle()
    import_bundle(bundle, 1, output)
    output.unlink()
    output.mkdir()
    (output / "diary.txt").write_text("dear diary")
    replace_in(bundle / "tp1/attention.csv", "0,0,1,0,8.0", "0,0,1,0,9.0")
    assert refused(bundle, 1, output).file == output


def test_folder_that_does_not_exist_is_refused(write_bundle, tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        import_bundle(write_bundle(), 1, tmp_path / "nowhere" / "mine.yaml")
    assert not (tmp_path / "nowhere").exists()


def test_failed_import_keeps_the_older_one(write_bundle, output):
    bundle = write_bundle()
    import_bundle(bundle, 1, output)
    replace_in(bundle / "tp1/dense.csv", "embedding,1,4.04", "embedding,1,-4.04")
    refused(bundle, 1, output)
    resolve(load_profile(str(output)), FACTS)


@pytest.mark.parametrize("damage", ["missing", "truncated", "column", "type", "layer"])
def test_damaged_tables_beside_a_profile_are_refused_by_file(write_bundle, output, damage):
    import_bundle(write_bundle(), 1, output)
    path = output.parent / "mine.tables/dense.parquet"
    table = pq.read_table(path)
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:50])
    elif damage == "column":
        pq.write_table(table.drop_columns(["tokens"]), path)
    elif damage == "type":
        words = pa.array(["slow"] * len(table))
        pq.write_table(table.set_column(table.column_names.index("time_us"), "time_us", words), path)
    else:
        pq.write_table(table.filter(pa.compute.not_equal(table["layer"], "o_proj")), path)
    with pytest.raises(InputError) as caught:
        resolve(load_profile(str(output)), FACTS)
    assert ("o_proj" if damage == "layer" else "dense.parquet") in str(caught.value)


def test_profile_with_an_unknown_skew_axis_is_refused(write_bundle, output):
    import_bundle(write_bundle(), 1, output)
    document = yaml.safe_load(output.read_text())
    del document["accelerator"]["skew"]["bounds"]["kp"]
    output.write_text(yaml.safe_dump(document))
    with pytest.raises(InputError, match="kp") as caught:
        resolve(load_profile(str(output)), FACTS)
    assert "skew" in caught.value.field
