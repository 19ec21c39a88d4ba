from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from profiles.errors import InputError
from profiles.library import names
from profiles.profile import Accelerator, Coefficient, Host, Profile, load_profile


def refused(name: str) -> InputError:
    with pytest.raises(InputError) as caught:
        load_profile(name)
    return caught.value


def test_profile_is_read_with_the_folder_and_digest_of_its_file(write_profile):
    path = write_profile()
    loaded = load_profile(path)

    assert loaded.profile.engine["max_num_seqs"] == 64
    assert loaded.profile.accelerator.kind == "linear"
    assert loaded.profile.accelerator.options == {"seconds": {"step": 0.01, "token": 1e-5}}
    assert loaded.folder == Path(path).parent
    assert loaded.digest == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert loaded.origin == path


def test_plain_number_stands_for_a_coefficients_value(write_profile):
    full = {"value": 0.9, "ci95": [0.8, 1.0], "prior": 1.0, "identified": True}
    loaded = load_profile(write_profile(coefficients={"dense": 1.1, "attention": full}))
    assert loaded.profile.coefficients == {
        "dense": Coefficient(value=1.1),
        "attention": Coefficient(value=0.9, ci95=(0.8, 1.0), prior=1.0, identified=True),
    }


def test_host_defaults_to_a_prior_that_says_so(write_profile):
    host = load_profile(write_profile()).profile.host
    assert (host.per_step, host.per_sequence) == (0.4e-3, 0.0)
    assert "default" in host.source


@pytest.mark.parametrize(
    ("changes", "field", "words"),
    [
        ({"engines": {}}, "engines", "is no field here; known: schema, name, description"),
        ({"accelerator": None}, "accelerator", "is missing"),
        ({"name": None}, "name", "is missing"),
        ({"accelerator": {"seconds": {}}}, "accelerator.kind", "is missing"),
        ({"schema": "servecal.profile/9"}, "schema", "servecal.profile/9"),
        ({"engine": [1]}, "engine", "dictionary; found [1]"),
        ({"name": 5}, "name", "string; found 5"),
        ({"host": {"per_step": "fast"}}, "host.per_step", "found 'fast'"),
        ({"host": {"per_step": -1}}, "host.per_step", "found -1"),
        ({"host": {"per_step": float("inf")}}, "host.per_step", "found inf"),
        ({"host": {"per_token": 1}}, "host.per_token", "known: per_step, per_sequence, per_prefill_layer, per_prefill"),
        ({"coefficients": {"dense": -0.1}}, "coefficients.dense.value", "found -0.1"),
        ({"coefficients": {"dense": float("nan")}}, "coefficients.dense.value", "found nan"),
        ({"coefficients": {"dense": float("inf")}}, "coefficients.dense.value", "found inf"),
        ({"coefficients": {"dense": "1,1"}}, "coefficients.dense.value", "found '1,1'"),
        ({"coefficients": {"dense": {"valu": 1}}}, "coefficients.dense.valu", "known: value, ci95"),
        ({"coefficients": [1.1]}, "coefficients", "found [1.1]"),
    ],
)
def test_what_does_not_fit_is_refused_by_field_with_what_was_found(write_profile, changes, field, words):
    path = write_profile(**changes)
    error = refused(path)

    assert (error.file, error.field) == (Path(path), field)
    assert words in str(error)


@pytest.mark.parametrize(
    ("content", "words", "row"),
    [
        (b"name: [1\nengine: }", "is no YAML", 2),
        (b"name: a\n\tengine: b", "is no YAML", 2),
        (b"- a\n- b", "expected a mapping at the top, found ['a', 'b']", None),
        (b"", "expected a mapping at the top, found None", None),
        (b"\xff\xfe", "is no UTF-8 text", None),
        (b"name: !!python/object/apply:os.system [ls]", "is no YAML", 1),
    ],
)
def test_file_that_holds_no_mapping_is_refused_with_its_line(tmp_path, content, words, row):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    error = refused(str(path))

    assert (error.file, error.row) == (path, row)
    assert words in str(error)


def test_profile_that_is_nowhere_is_refused_with_the_ways_to_name_one(tmp_path):
    error = refused(str(tmp_path / "none.yaml"))
    assert error.field == "--profile"
    assert "roofline:<hardware>" in str(error)


def test_roofline_of_a_device_needs_no_file_and_is_the_same_every_time():
    one, two = load_profile("roofline:h100-sxm"), load_profile("roofline:h100-sxm")

    assert one == two
    assert (one.profile.name, one.profile.hardware, one.profile.model) == ("roofline:h100-sxm", "h100-sxm", None)
    assert one.profile.accelerator == Accelerator(kind="roofline")
    assert one.digest != load_profile("roofline:l4").digest


def test_roofline_of_nothing_is_refused():
    assert "roofline:<hardware>" in str(refused("roofline:"))


@pytest.mark.parametrize("name", names("fitted"))
def test_every_profile_of_the_library_loads_under_its_name(name):
    assert load_profile(name).profile.name == name


words = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), max_size=30)
profiles = st.builds(
    Profile,
    name=words,
    description=words,
    model=st.none() | st.just("llama-3.1-8b"),
    hardware=st.none() | st.just("l4"),
    engine=st.dictionaries(st.sampled_from(["max_num_seqs", "max_model_len"]), st.integers(1, 10**6)),
    accelerator=st.builds(Accelerator, kind=st.just("linear"), seconds=st.just({"step": 0.1})),
    coefficients=st.dictionaries(
        st.sampled_from(["step", "token"]),
        st.builds(
            Coefficient,
            value=st.floats(0, 1e6),
            ci95=st.none() | st.tuples(st.floats(0, 1), st.floats(1, 2)),
            prior=st.none() | st.floats(0, 2),
            identified=st.none() | st.booleans(),
        ),
    ),
    host=st.builds(Host, per_step=st.floats(0, 1), per_sequence=st.floats(0, 1), source=words),
    provenance=st.dictionaries(st.sampled_from(["source", "files"]), words),
)


@settings(max_examples=40)
@given(profile=profiles)
def test_yaml_reads_back_as_the_profile_that_was_written(profile):
    text = profile.to_yaml()
    again = Profile.model_validate(yaml.safe_load(text))

    assert again == profile
    assert again.to_yaml() == text
