from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibrate.estimates import NAMES
from calibrate.gate_settings import parse_gate, parse_limit, read_rules, rules_of
from calibrate.gates import Allowance, Gate
from profiles.errors import InputError

KNOWN = [(metric, one) for metric, names in NAMES.items() for one in names]


@given(st.sampled_from(KNOWN), st.floats(0, 1, allow_subnormal=False))
def test_what_a_gate_prints_reads_back_as_the_gate(name, limit):
    gate = Gate(*name, limit)
    assert parse_gate(gate.text) == gate


@given(st.sampled_from(KNOWN), st.integers(0, 1000))
def test_percent_and_fraction_are_the_same(name, tenths):
    text = f"{tenths / 10:g}%"
    gate = parse_gate(f"{name[0]}.{name[1]}:{text}")
    assert gate == parse_gate(f"{name[0]}.{name[1]}:{gate.limit!r}")
    assert gate.text.endswith(f":{text}")


@given(st.text(max_size=20))
def test_any_text_is_a_gate_or_explained(text):
    explained = None
    try:
        assert parse_gate(text).limit >= 0
    except InputError as error:
        explained = error.field
    assert explained in (None, "--fail-on")


@pytest.mark.parametrize(
    ("text", "gate"),
    [
        ("ttft.p99:10%", Gate("ttft", "p99", 0.1)),
        ("e2e.mean: 0.05", Gate("e2e", "mean", 0.05)),
        ("makespan:3%", Gate("throughput", "makespan", 0.03)),
        ("throughput:3%", Gate("throughput", "output_tokens_per_s", 0.03)),
        ("coverage:99%", Gate("coverage", "paired", 0.99)),
        ("ttft.mape:150%", Gate("ttft", "mape", 1.5)),
    ],
)
def test_gates_as_people_write_them(text, gate):
    assert parse_gate(text) == gate


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ttft.p99", ("METRIC.STATISTIC:LIMIT",)),
        ("ttft:10%", ("ttft needs a statistic", "ttft.mape")),
        ("ttft.p98:10%", ("'p98'", "did you mean ttft.p99?")),
        ("tfft.p99:10%", ("'tfft'", "did you mean ttft?")),
        ("ttft.p99:10", ("would be 1000%", "write 10%")),
        ("ttft.p99:ten", ("such as 10% or 0.1", "'ten'")),
        ("ttft.p99:-1%", ("at least 0",)),
        ("ttft.p99:nan", ("at least 0",)),
        ("coverage:101%", ("at most 100%",)),
    ],
)
def test_a_wrong_gate_is_explained(text, parts):
    with pytest.raises(InputError) as caught:
        parse_gate(text)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_limit_is_no_truth_value():
    with pytest.raises(ValueError, match="such as 10%"):
        parse_limit(True)


@pytest.fixture
def gates_file(tmp_path):
    def write(text):
        path = tmp_path / "gates.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_file_says_the_same_as_the_command_line(gates_file, tmp_path):
    rules = read_rules(
        gates_file(
            'coverage = "99%"\nmakespan = 0.03\ninconclusive = "pass"\nttft.p99 = "10%"\n'
            '[e2e]\nmean = "5%"\np99 = 0.07\n'
            '[baseline]\nreport = "old.json"\npoints = "1%"\nrelative = 0.2\nstatistics = ["ttft.p99", "makespan"]\n'
        )
    )
    assert [one.text for one in rules.gates] == [
        "coverage.paired:99%",
        "throughput.makespan:3%",
        "ttft.p99:10%",
        "e2e.mean:5%",
        "e2e.p99:7%",
    ]
    assert rules.inconclusive == "pass"
    assert rules.baseline == str(tmp_path / "old.json")
    assert rules.allowance == Allowance(0.01, 0.2, (("ttft", "p99"), ("throughput", "makespan")))


@pytest.mark.parametrize(
    ("text", "line", "field", "parts"),
    [
        ('# mine\nttft.p98 = "1%"\n', 2, "ttft.p98", ("did you mean ttft.p99?",)),
        ('[e2e]\nmean = "5%"\n\n[ttft]\nmeen = "5%"\n', 5, "ttft.meen", ("did you mean ttft.mean?",)),
        ('tftt = "5%"\n', 1, "tftt", ("did you mean ttft?",)),
        ('[tftt]\nmean = "5%"\n', 1, "tftt", ("did you mean ttft?",)),
        ("[e2e]\nmean = 5\n", 2, "e2e.mean", ("write 5%",)),
        ("[e2e]\nmean = [1]\n", 2, "e2e.mean", ("expected a limit",)),
        ("e2e = 0.1\n", 1, "e2e", ("needs a statistic",)),
        ('e2e = {mean = "5%", maen = "5%"}\n', 1, "e2e.maen", ("did you mean e2e.mean?",)),
        ('makespan = "1%"\n[throughput]\nmakespan = "2%"\n', 3, "throughput.makespan", ("has a limit already",)),
        ('inconclusive = "maybe"\n', 1, "inconclusive", ("report, pass, fail", "'maybe'")),
        ('[baseline]\npoint = "1%"\n', 2, "baseline.point", ("did you mean points?",)),
        ('[baseline]\nstatistics = ["e2e.p98"]\n', 2, "baseline.statistics", ("'p98'",)),
        ("[baseline]\nreport = 3\n", 2, "baseline.report", ("path",)),
        ("baseline = 3\n", 1, "baseline", ("expected a table",)),
        ("coverage = \n", 1, None, ("is no TOML",)),
        ("", None, None, ("has no gate",)),
    ],
)
def test_a_wrong_file_is_explained_with_its_line_and_field(gates_file, text, line, field, parts):
    with pytest.raises(InputError) as caught:
        read_rules(gates_file(text))
    error = caught.value
    assert (error.row, error.field, error.file.name) == (line, field, "gates.toml")
    assert all(part in error.message for part in parts), error.message


def test_files_that_are_none_are_refused(tmp_path):
    (tmp_path / "latin.toml").write_bytes(b"# \xff\n")
    for name, why in (("nowhere.toml", "cannot be read"), ("latin.toml", "UTF-8"), (".", "cannot be read")):
        with pytest.raises(InputError, match=why):
            read_rules(tmp_path / name)


def test_the_command_line_wins_over_the_file(gates_file):
    path = gates_file('e2e.mean = "5%"\nttft.mean = "5%"\n[baseline]\nreport = "old.json"\npoints = "1%"\n')
    rules = rules_of(path, ("e2e.mean:7%",), "new.json", "3%,4%", "fail")
    assert [one.text for one in rules.gates] == ["e2e.mean:7%", "ttft.mean:5%"]
    assert (rules.baseline, rules.inconclusive) == ("new.json", "fail")
    assert (rules.allowance.points, rules.allowance.relative) == (0.03, 0.04)


def test_contradicting_options_are_refused():
    with pytest.raises(InputError, match="has a limit already"):
        rules_of(None, ("makespan:1%", "throughput.makespan:2%"))
    with pytest.raises(InputError, match="--baseline"):
        rules_of(None, (), None, "2%,10%")
    for text in ("2%", "2%;10%", "a,b", "2%,-1"):
        with pytest.raises(InputError, match="--worse-by"):
            rules_of(None, (), "b.json", text)
    assert not rules_of(None, ()).any
