"""The node "Streaming Report": what streaming did, as text and as JSON."""

from __future__ import annotations

import json
from typing import Any

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..streaming import Line, open_vram_reader
from ..streaming.machine.server_status import describe_model as entry_as_text
from .model.patcher import StreamedModelPatcher
from .page.description import describe_models
from .page.status import SCHEMA
from .page.usage import sampler
from .tell import messages
from .tell.markdown import in_markdown
from .tell.notices import describe_notices


class StreamingReport(io.ComfyNode):
    """Tells how a MODEL streams and what its last run did: plan, bytes, GB/s, waits, and how VRAM is used.

    It tells of what has run before it: connect to trigger what the sampler gives. The history of an API prompt has the
    same figures.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WeightStreamReport",
            display_name="Streaming Report",
            category="weightstream",
            description=cls.__doc__,
            search_aliases=["vram", "streaming", "statistics", "benchmark", "offload"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL to tell of."),
                io.AnyType.Input(
                    "trigger",
                    optional=True,
                    tooltip="Anything: the report is made when it is there, as a sampler's LATENT.",
                ),
            ],
            outputs=[
                io.String.Output("text", tooltip="For people, in Markdown."),
                io.String.Output("json", tooltip="For programs: entries of the status route."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs: Any) -> float:
        """Never the same twice, so that the node always runs: figures change while inputs do not."""
        return float("nan")

    @classmethod
    def execute(cls, model: ModelPatcher, trigger: Any = None) -> io.NodeOutput:
        report = make_report(model)
        text = as_markdown(report)
        if (node_id := cls.hidden.unique_id if cls.hidden is not None else None) is not None:
            messages.show(text, node_id)
        return io.NodeOutput(text, json.dumps(report, indent=2), ui={"text": [text], "weightstream": [report]})


def make_report(model: ModelPatcher) -> dict[str, Any]:
    """Return what the status route has on this MODEL (one entry for each of its devices), on devices and on notices."""
    with open_vram_reader() as reader:
        usage = sampler.sample(reader)
    entries, line = [], ""
    if isinstance(model, StreamedModelPatcher):
        streamed = [model.streamed, *(part.streamed for part in model.parts)]
        entries = describe_models(streamed, ended=True)
        line = str(Line.of([each.streamer.snapshot() for each in streamed], ended=True))
    return {
        "schema": SCHEMA,
        "streams": bool(entries),
        "line": line,
        "model": entries[0]["name"] if entries else type(model.model).__name__,
        **usage.as_dict(),
        "models": entries,
        "notices": describe_notices(),
    }


def as_markdown(report: dict[str, Any]) -> str:
    """The report for people: the model in a line, and a list with an item for each device and notice."""
    line = report["line"] if report["streams"] else "does not stream: ComfyUI moves its weights"
    items = [item for entry in report["models"] for item in _items(entry)]
    items += [f"- **{in_markdown(notice['name'])}**: {in_markdown(notice['text'])}" for notice in report["notices"]]
    return "\n".join([f"**{in_markdown(report['model'])}**: {in_markdown(line)}", *([""] if items else []), *items])


def _items(entry: dict[str, Any]) -> list[str]:
    """A device, and what is to be said of it below it."""
    first, *others = entry_as_text(entry)
    said = in_markdown(first.removeprefix(_title(entry)))
    return [f"- **{in_markdown(entry['device'])}**{said}", *(f"  - {in_markdown(line)}" for line in others)]


def _title(entry: dict[str, Any]) -> str:
    return f"{entry['name']} on {entry['device']}"
