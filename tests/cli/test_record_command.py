"""``servecal record``: how to switch the recorder on, and what a recording holds."""

from reference_traces.library import locate

SCHEDULER = "replay.recorder.RecordingScheduler"


def test_instructions_name_the_argument_and_the_folder(called):
    text = called("record", "a folder").out
    assert f"--scheduler-cls {SCHEDULER}" in text
    assert "SERVECAL_RECORDING='a folder' vllm serve" in text
    document = called("record", "a folder", "--format", "json").json
    assert document["schema"] == "servecal.record/1"
    assert document["argument"] == f"--scheduler-cls {SCHEDULER}"
    assert "vllm serve" in called("record").out


def test_the_argument_names_what_can_be_imported():
    import importlib

    module, _, name = SCHEDULER.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)


def test_a_recording_is_told(called):
    folder = locate("vllm-cpu-served").path
    document = called("record", folder, "--format", "json").json
    assert (document["requests"], document["iterations"]) == ({"ok": 120}, 2938)
    assert document["engine_cores"] == ["dp0"]
    text = called("record", folder).out
    assert "120 ok" in text
    assert "2,938" in text
    assert called("record", f"{folder}#dp0", "--format", "json").json["iterations"] == 2938


def test_what_is_no_recording_is_refused(called, tmp_path):
    (tmp_path / "x").write_text("nothing")
    called("record", "x").refused("x", "of no format")
    called("record", f"{locate('vllm-cpu-served').path}#dp9").refused("dp9")
