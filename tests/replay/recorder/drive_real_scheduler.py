"""Record vLLM's own schedulers on a virtual clock; runs in vLLM's interpreter (any version that it can import).

The golden schedules' driver (``tests/conformance/generate.py``) runs the workloads of their files, synchronous and
asynchronous, with the recorder's methods mixed into the scheduler. Beside each recording goes what the driver itself
saw, for the test to compare::

    python drive_real_scheduler.py FOLDER SCHEDULE.json.gz...
"""

# mypy: ignore-errors

import functools
import gzip
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2] / "conformance"), str(HERE.parents[3])]
NOW = {"us": 0}
WALL_AHEAD = 1_700_000_000.0


class _Clock:
    """The driver's virtual clock, which stands for both of the recorder's."""

    def __get__(self, engine, kind=None):
        return NOW["us"]

    def __set__(self, engine, value):
        NOW["us"] = value


def main(folder, files):
    import generate
    import vllm

    from replay.recorder import facts
    from replay.recorder import scheduler as recorder

    vllm.__version__ = generate.ENGINE.rpartition(" ")[2]

    def recording(base):
        class Recording(recorder.Notes, base):
            @functools.wraps(base.__init__)  # the driver asks which arguments this version takes
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                assert recorder.own_scheduler(self.vllm_config) is base

        return Recording

    class Engine(generate.Engine):
        clock = _Clock()

        def _make_request(self, number):
            request = super()._make_request(number)
            request.arrival_time += WALL_AHEAD
            return request

    generate.AsyncScheduler = recording(generate.AsyncScheduler)
    generate.Scheduler = recording(generate.Scheduler)
    generate.Engine = Engine
    time.monotonic = lambda: NOW["us"] * 1e-6
    facts.clocks = lambda: {"monotonic": NOW["us"] * 1e-6, "wall": WALL_AHEAD + NOW["us"] * 1e-6}
    for file in map(Path, files):
        name = file.name.removesuffix(".json.gz")
        os.environ["SERVECAL_RECORDING"] = str(Path(folder) / name)
        NOW["us"] = 0
        document = json.loads(gzip.decompress(file.read_bytes()))
        requests = [dict(request) for request in document["requests"]]
        engine = Engine(document["config"], document["step_time"], requests)
        engine.run()
        engine.scheduler.recorder.close()
        seen = {"engine": generate.ENGINE, "iterations": engine.iterations, "results": engine.results}
        (Path(folder) / f"{name}.json").write_text(json.dumps(seen | {"requests": requests}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
