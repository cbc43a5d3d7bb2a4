"""The host's server and queue, its node API, and its command line."""

from __future__ import annotations

import importlib.util
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.utils
import execution
import pytest
import server
from comfy.cli_args import parser
from comfy_api.latest import ComfyExtension, io

FLAGS = (
    *("--async-offload", "--disable-async-offload", "--disable-pinned-memory", "--reserve-vram", "--novram"),
    *("--highvram", "--gpu-only", "--cpu", "--disable-dynamic-vram", "--vram-headroom", "--base-directory"),
)


def test_the_flags_that_we_respect_are_there() -> None:
    known = {option for action in parser._actions for option in action.option_strings}
    assert set(FLAGS) <= known


def test_the_server_has_routes_and_sends_events_and_texts() -> None:
    events = list(inspect.signature(server.PromptServer.send_sync).parameters)
    texts = list(inspect.signature(server.PromptServer.send_progress_text).parameters)
    assert events[1:4] == ["event", "data", "sid"]
    assert texts[1:4] == ["text", "node_id", "sid"]
    source = inspect.getsource(server.PromptServer.__init__)
    assert "routes = web.RouteTableDef()" in source
    assert "self.routes = routes" in source
    assert "self.client_id = None" in source
    assert "PromptServer.instance = self" in source


def test_a_prompt_is_taken_from_the_queue_under_its_lock() -> None:
    queue = execution.PromptQueue(SimpleNamespace(queue_updated=lambda: None))
    queue.put((0, "id", {"1": {}}, {}, [], {}))
    with queue.mutex:
        assert queue.currently_running == {}
    (_, prompt_id, nodes, *_), number = queue.get(timeout=1)
    assert (prompt_id, nodes) == ("id", {"1": {}})
    assert list(queue.currently_running) == [number]
    assert queue.currently_running[number][2] == {"1": {}}
    queue.set_flag("unload_models", True)
    assert queue.flags == {"unload_models": True}
    assert queue.history == {}


def test_the_executor_ends_what_was_begun_after_each_node() -> None:
    """With dynamic VRAM. Which of the two comes first differs (0.33 and 0.35); each must be there."""
    source = inspect.getsource(execution.execute)
    assert "cleanup_prefetch_queues()" in source
    assert "reset_cast_buffers()" in source
    assert source.index("finally:") < source.index("cleanup_prefetch_queues()")


class Node(io.ComfyNode):
    """A node as ours are."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="WeightStreamContract",
            display_name="Contract",
            category="test",
            description=cls.__doc__,
            search_aliases=["vram"],
            inputs=[
                io.Combo.Input(
                    "choice",
                    options=["a"],
                    default="a",
                    optional=True,
                    tooltip="text",
                    advanced=True,
                    extra_dict={"weightstream": {"a": 1}},
                ),
                io.Float.Input("limit", default=0.0, min=0.0, max=1.0, step=0.05, round=0.01, optional=True),
            ],
            outputs=[io.Model.Output(tooltip="text"), io.Clip.Output(), io.Vae.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, choice: str | None = None) -> bool | str:
        return True

    @classmethod
    def execute(cls, choice: str = "a", limit: float = 0.0) -> io.NodeOutput:
        return io.NodeOutput(cls.hidden.unique_id, choice, limit)


def test_a_node_is_a_schema_and_a_class_that_is_made_anew_for_each_run() -> None:
    schema = Node.GET_SCHEMA()
    assert schema.node_id == "WeightStreamContract"
    kind = Node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: "7"}})
    assert kind.execute("b", 0.5).args == ("7", "b", 0.5)
    kind.state = 1
    assert not hasattr(Node, "state")


class Choices(list[str]):
    """A menu that takes one value more than it shows."""

    def __contains__(self, name: object) -> bool:
        return name == "hidden" or super().__contains__(name)


def test_a_menu_is_asked_whether_it_has_a_value() -> None:
    """The host passes the very list on to its check, and says to the page what is in it."""
    choices = Choices(["a"])
    assert io.Combo.Input("choice", options=choices).as_dict()["options"] is choices
    assert json.loads(json.dumps(choices)) == ["a"]
    source = inspect.getsource(execution.validate_inputs)
    assert "val not in combo_options" in source
    assert "value_not_in_list" in source


def test_what_a_node_says_of_its_values_is_an_error_for_each_that_it_takes() -> None:
    """So ours takes one."""
    assert "for x in input_filtered" in inspect.getsource(execution.validate_inputs)


def test_a_node_can_be_found_by_other_names_and_an_input_can_carry_more() -> None:
    assert Node.GET_SCHEMA().search_aliases == ["vram"]
    assert Node.INPUT_TYPES()["optional"]["choice"][1]["weightstream"] == {"a": 1}
    assert Node.INPUT_TYPES()["optional"]["choice"][1]["advanced"] is True
    assert Node.INPUT_TYPES()["optional"]["limit"][1]["round"] == 0.01


def test_an_extension_gives_its_nodes_when_it_is_asked() -> None:
    for name in ("on_load", "get_node_list"):
        assert inspect.iscoroutinefunction(getattr(ComfyExtension, name))


def test_a_bar_can_be_shown_on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *args, **options: told.append((args, options)))
    comfy.utils.ProgressBar(10, node_id="7").update_absolute(3, 10)
    [(args, options)] = told
    assert args[:2] == (3, 10)
    assert options["node_id"] == "7"


USED_BY_THE_PAGE = ("registerSidebarTab", "extensionManager", "registerExtension", "fetchApi", "addDOMWidget")


def test_the_page_has_what_our_script_uses() -> None:
    """Its package, as it is installed; what it does with them is tested in a browser (tests/browser)."""
    package = importlib.util.find_spec("comfyui_frontend_package")
    assert package is not None
    folder = Path(package.origin).parent / "static"
    assert {"app.js", "api.js"} <= {path.name for path in (folder / "scripts").glob("*.js")}
    text = "".join(path.read_text("utf-8") for path in folder.rglob("*.js"))
    assert [name for name in USED_BY_THE_PAGE if name not in text] == []
