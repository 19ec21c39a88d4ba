import pytest
import yaml

from profiles.library import names
from profiles.profile import load_profile

LIBRARY = [(kind, name) for kind in ("fitted", "models", "hardware") for name in names(kind)]


@pytest.fixture(scope="session")
def bundle(traces):
    """A public bundle of operator tables, beside the traces."""
    folder = traces.parent / "operator_tables" / "L4" / "meta-llama" / "Llama-3.2-1B-Instruct" / "bf16"
    if not folder.is_dir():
        pytest.skip(f"no operator tables in {folder}")
    return folder


def test_list_names_everything_in_the_library(called):
    document = called("profiles", "list", "--format", "json").json
    assert document["schema"] == "servecal.profiles/1"
    for kind, key in (("fitted", "profiles"), ("models", "models"), ("hardware", "hardware")):
        assert [one["name"] for one in document[key]] == names(kind)
    text = called("profiles", "list").out
    for _, name in LIBRARY:
        assert name in text
    assert "roofline:<hardware>" in text


def test_list_goes_to_a_file_whole(servecal, tmp_path):
    printed = servecal("profiles", "list")
    assert (printed.code, printed.err) == (0, "")
    assert servecal("profiles", "list", "-o", "list.txt").out == ""
    assert (tmp_path / "list.txt").read_text() == printed.out


@pytest.mark.parametrize(("kind", "name"), LIBRARY)
def test_show_prints_the_entry_as_yaml(called, kind, name):
    finished = called("profiles", "show", name)
    assert (finished.code, finished.err) == (0, "")
    schema = {"fitted": "servecal.profile/1", "models": "servecal.model/1", "hardware": "servecal.hardware/1"}
    document = yaml.safe_load(finished.out)
    assert (document["schema"], document["name"]) == (schema[kind], name)


@pytest.mark.parametrize(
    ("alias", "name"),
    [("meta-llama/Llama-3.1-8B", "llama-3.1-8b"), ("META-LLAMA/LLAMA-3.1-8B", "llama-3.1-8b"), ("H100", "h100-sxm")],
)
def test_show_knows_aliases(called, alias, name):
    assert yaml.safe_load(called("profiles", "show", alias).out)["name"] == name


def test_show_of_a_file_prints_the_profile_that_it_holds(called, tmp_path):
    text = "schema: servecal.profile/1\nname: mine\naccelerator: {kind: linear, seconds: {step: 0.01}}\n"
    (tmp_path / "mine.yaml").write_text(text)
    shown = called("profiles", "show", "mine.yaml").out
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_profile(str(tmp_path / "shown.yaml")).profile == load_profile(str(tmp_path / "mine.yaml")).profile


def test_show_of_a_roofline_prints_the_profile_that_it_makes(called, tmp_path):
    shown = called("profiles", "show", "roofline:h100-sxm").out
    (tmp_path / "shown.yaml").write_text(shown)
    assert load_profile(str(tmp_path / "shown.yaml")).profile == load_profile("roofline:h100-sxm").profile


@pytest.mark.parametrize("name", ["nothing", "../models/x", "", "nothing.yaml", "roofline:", "roofline:x", "x" * 5000])
def test_show_of_what_is_not_there_is_refused(called, name):
    called("profiles", "show", name).refused()


@pytest.mark.parametrize("content", ["", "[1]", "a: [", "schema: servecal.profile/1\nname: x\n", "schema: 2\n"])
def test_show_of_a_broken_file_names_it(called, tmp_path, content):
    (tmp_path / "mine.yaml").write_text(content)
    called("profiles", "show", "mine.yaml").refused("mine.yaml")


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_importing_twice_writes_the_same_bytes(servecal, bundle, tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        finished = servecal("profiles", "import", bundle, "-o", f"{name}/l4.yaml", PYTHONHASHSEED=seed)
        assert (finished.code, finished.err) == (0, "")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    before = contents(tmp_path / "one")
    assert servecal("profiles", "import", bundle, "-o", "one/l4.yaml").code == 0
    assert contents(tmp_path / "one") == before


def test_an_imported_profile_replays_a_trace(called, bundle, bench_folder, tmp_path):
    bench_folder().write(tmp_path / "run")
    assert called("profiles", "import", bundle, "-o", "l4.yaml").code == 0
    finished = called("report", "run", "--profile", "l4.yaml", "--format", "json")
    assert (finished.code, finished.err) == (0, "")
    assert finished.json["profile"]["accelerator"] == "operator_table"


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_a_folder_that_is_no_bundle_is_refused_and_nothing_written(called, tmp_path, folder):
    called("profiles", "import", folder, "-o", "l4.yaml").refused()
    assert not list(tmp_path.iterdir())


def test_a_degree_that_was_not_measured_is_refused(called, bundle, tmp_path):
    called("profiles", "import", bundle, "--tp", "7", "-o", "l4.yaml").refused("tp7")
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_named(called, bundle):
    called("profiles", "import", bundle, "-o", "no/such/folder/l4.yaml").refused("no/such/folder/l4.yaml")
