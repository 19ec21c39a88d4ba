from __future__ import annotations

import math
from pathlib import Path

import pytest

from calibrate.differences import ProfileDifference
from calibrate.profile_changes import coefficient_changes, setting_changes
from profiles.profile import LoadedProfile, Profile, load_profile


def profile(coefficients, **fields):
    document = {"name": "p", "hardware": "l4", "accelerator": {"kind": "roofline"}, **fields}
    return Profile.model_validate({**document, "coefficients": coefficients})


def one(value, low, high, **fields):
    return {"value": value, "ci95": [low, high], **fields}


def test_a_coefficient_has_moved_if_the_difference_exceeds_both_intervals_combined():
    before = profile({"near": one(1.0, 0.9, 1.1), "far": one(1.0, 0.9, 1.1)})
    after = profile({"near": one(1.12, 1.02, 1.22), "far": one(1.2, 1.1, 1.3)})
    near, far = coefficient_changes(before, after)
    # Reach of both: 0.1 * sqrt(2) = 0.1414.
    assert near.difference_ci95 == pytest.approx((0.12 - 0.02**0.5, 0.12 + 0.02**0.5))
    assert (near.moved, far.moved) == (False, True)


def test_the_outer_bounds_of_a_profile_count():
    before = profile({"step": {**one(1.0, 0.95, 1.05), "ci95_bootstrap": [0.7, 1.02]}})
    change = coefficient_changes(before, profile({"step": one(1.2, 1.19, 1.21)}))[0]
    assert change.a_ci95 == (0.7, 1.05)
    assert change.moved
    back = coefficient_changes(profile({"step": one(0.8, 0.79, 0.81)}), before)[0]
    assert back.moved is False


def test_a_value_that_nobody_fitted_is_exact_beside_one_that_was():
    change = coefficient_changes(profile({"step": 1.0}), profile({"step": one(1.2, 1.1, 1.3)}))[0]
    assert change.difference_ci95 == pytest.approx((0.1, 0.3))
    assert change.moved


def test_without_any_interval_nothing_is_said_to_have_moved():
    before, after = profile({"step": 1.0, "same": 2.0}), profile({"step": 1.5, "same": 2.0, "new": 1.0})
    step, same, new = coefficient_changes(before, after)
    assert (step.moved, step.difference, math.isnan(step.difference_ci95[0])) == (None, 0.5, True)
    assert same.moved is False
    assert (new.a, new.b, new.moved) == (None, 1.0, None)


def test_the_front_end_is_compared_too():
    fields = [{"per_request": value, "per_request_ci95": [value - 1e-3, value + 1e-3]} for value in (5e-3, 9e-3)]
    before, after = (profile({}, front_end=one) for one in fields)
    changes = {change.name: change for change in coefficient_changes(before, after)}
    assert changes["front_end.per_request"].moved
    assert changes["front_end.per_prompt_token"].moved is False


def test_settings_that_differ_are_named():
    before = profile({}, engine={"version": "0.19.0", "max_num_seqs": 64})
    after = profile({}, engine={"version": "0.20.0", "max_num_seqs": 64}, host={"per_step": 0.001, "source": "mine"})
    assert setting_changes(before, after) == [("engine.version", "0.19.0", "0.20.0"), ("host.per_step", 0.0004, 0.001)]


def test_a_profile_of_the_library_has_not_moved_from_itself_and_a_planted_drift_is_found():
    loaded = load_profile("rtx-pro-6000-llama-3.1-8b")
    same = ProfileDifference(loaded, loaded)
    assert not any(change.moved for change in same.coefficients)
    assert not same.settings
    document = loaded.profile.model_dump(by_alias=True)
    name, sure = min(
        ((name, one) for name, one in loaded.profile.coefficients.items() if one.ci95 and one.value),
        key=lambda item: (item[1].ci95[1] - item[1].ci95[0]) / item[1].value,
    )
    far = 2 * (sure.ci95[1] - sure.ci95[0])
    document["coefficients"][name] |= {
        "value": sure.value + far,
        "ci95": [one + far for one in sure.ci95],
        "ci95_bootstrap": [one + far for one in sure.ci95_bootstrap],
    }
    drifted = LoadedProfile(Profile.model_validate(document), Path(), "0" * 64, "drifted")
    found = ProfileDifference(loaded, drifted)
    assert [change.name for change in found.coefficients if change.moved] == [name]
    assert found.sentences[0].startswith(f"{name} moved from")
