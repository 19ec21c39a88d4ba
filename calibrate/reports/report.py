"""A report: a Comparison and how it came about. Every output is a view of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from calibrate.aggregates import WHY_NOT, AggregateComparison
from calibrate.attribution import Attribution
from calibrate.errors import BATCH_METRICS, Comparison
from calibrate.gates import Judgement
from profiles.deployment import Deployment
from replay.domain import outside_sentences
from replay.quality import Finding
from replay.run import Replay
from replay.trace import Trace


@dataclass(frozen=True)
class Report:
    """What ``servecal report`` found.

    ``command`` is the command line that makes it again, without where the output went; empty if nobody gave one.
    """

    trace: Trace
    deployment: Deployment
    replay: Replay
    comparison: Comparison
    findings: tuple[Finding, ...] = ()
    attribution: Attribution | None = None
    judgement: Judgement | None = None
    command: str = ""

    @property
    def cold_start(self) -> dict[str, Any] | None:
        """The measured cold start that was imposed, if any."""
        found: dict[str, Any] | None = self.replay.predicted.meta.get("cold_start")
        return found

    @property
    def notes(self) -> list[str]:
        """Sentences that a reader of the numbers must know."""
        notes = [*self.trace.meta.get("notes", []), *self.replay.predicted.meta.get("notes", [])]
        way = self.deployment.front_end
        if self.trace.meta.get("vantage") == "client" and (way.per_request or way.per_prompt_token):
            notes.append(
                f"measured at the client: the profile's front end, {1e3 * way.per_request:.2f} ms a request and "
                f"{1e6 * way.per_prompt_token:.2f} us a prompt token, delays every request"
            )
        elif self.trace.meta.get("vantage") == "client":
            notes.append(
                "measured at the client: its latencies hold network and front end, which the simulation does not"
            )
        cold = self.cold_start
        if cold:
            notes.append(
                f"cold start: the first request ({cold['request']}) took {cold['measured_ttft']:.3f} s to its first "
                f"token, a warm engine would by this profile take {cold['predicted_ttft']:.3f} s; the difference is "
                "imposed on the first iteration and the request is not scored (one request cannot tell a cold "
                "engine from an error of the profile; --no-cold-start replays without)"
            )
        notes += outside_sentences(self.replay.summary["outside_domain"])
        rejected = self.replay.summary["rejected"]
        if rejected:
            notes.append(f"{rejected} prompts are longer than max_model_len: a vLLM server would refuse them")
        return notes

    @property
    def headline(self) -> str:
        """The result in one to three sentences."""
        return f"{self._errors} {self.judgement.headline}" if self.judgement else self._errors

    @property
    def _errors(self) -> str:
        metrics = self.comparison.metrics
        if isinstance(self.comparison, AggregateComparison):
            return self._aggregate_headline(self.comparison) + self._datasheet
        shown = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E"}
        shown |= {name: name.replace("_", " ") for name in BATCH_METRICS}
        parts = [f"{label} {100 * metrics[name].mape:.1f} %" for name, label in shown.items() if name in metrics]
        text = f"Mean error per {'request' if self.trace.batches is None else 'batch'}: {', '.join(parts)}."
        name = next((one for one in ("e2e", "ttft", "makespan") if one in metrics), "")
        main = metrics.get(name)
        if main is not None and abs(main.bias) > 0.5 * main.mape and main.mape >= 0.02:
            name = shown[name]
            side = "too short" if main.bias < 0 else "too long"
            text += f" Predicted {name} is {100 * abs(main.bias):.0f} % {side} on average."
        return text + self._datasheet

    def _aggregate_headline(self, comparison: AggregateComparison) -> str:
        parts = []
        for metric, errors in comparison.metrics.items():
            level = errors.percentiles.get("mean") or next(iter(errors.percentiles.values()))
            statistic = "mean" if "mean" in errors.percentiles else next(iter(errors.percentiles))
            parts.append(f"{statistic} {metric.upper()} {100 * level.error:+.1f} %")
        rate = comparison.throughput.get("output_tokens_per_s")
        parts += [f"throughput {100 * rate['error']:+.1f} %"] if rate else []
        return f"Errors of the load level: {', '.join(parts)}. {WHY_NOT[0].upper()}{WHY_NOT[1:]}: none are compared."

    @property
    def _datasheet(self) -> str:
        if self.deployment.loaded.profile.accelerator.kind == "roofline" and not self._fitted:
            return (
                " This profile is a datasheet: kernels at peak arithmetic and bandwidth, nothing measured; take"
                " the error as the distance from the datasheet to this deployment."
            )
        return ""

    @property
    def _fitted(self) -> bool:
        return bool(self.deployment.loaded.profile.coefficients)
