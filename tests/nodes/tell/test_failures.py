"""An error of ours that ends a node: it stands on the node, and in the status until the node has run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from execution import full_type_name
from sampling import MB, sample
from weightstream import streaming
from weightstream.nodes.gpu_placement import GpuPlacement
from weightstream.nodes.settings import AsyncOffloadSettings
from weightstream.nodes.tell import messages
from weightstream.nodes.tell.failures import told_on_node
from weightstream.nodes.tell.notices import describe_notices

NODE = "failing"
Run = Callable[..., Any]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    monkeypatch.setattr(messages, "show", lambda text, node_id: found.append((node_id, text)))
    return found


def as_node(kind: type) -> Any:
    """The class as the host runs it, with the id of its node."""
    clone = type(kind.__name__, (kind,), {})
    clone.hidden = type("Hidden", (), {"unique_id": NODE})()  # type: ignore[attr-defined]
    return clone


def failed() -> list[str]:
    return [notice["text"] for notice in describe_notices() if (notice["kind"], notice["node_id"]) == ("failed", NODE)]


@pytest.mark.parametrize(
    ("node", "inputs", "fixed", "says"),
    [
        (AsyncOffloadSettings, {"vram_limit_gb": 0.001}, {}, "Set vram_limit_gb to that or more"),
        (GpuPlacement, {"devices": "gpu:7", "on_missing": "error"}, {"devices": "gpu:0"}, "choose among these"),
    ],
)
def test_the_node_says_what_failed_and_what_to_do(
    node: type, inputs: dict[str, Any], fixed: dict[str, Any], says: str, streamed: Run, shown: list[tuple[str, str]]
) -> None:
    model = streamed(64 * MB)
    with torch.inference_mode():
        with pytest.raises(streaming.StreamingError) as caught:
            as_node(node).execute(model, **inputs)
        assert (NODE, str(caught.value)) in shown
        assert says in str(caught.value)
        assert failed() == [str(caught.value)]
        as_node(node).execute(model, **fixed)
    assert failed() == [], "it has run"


def test_a_step_that_fails_says_so_on_the_node_of_its_model(streamed: Run, shown: list[tuple[str, str]]) -> None:
    model = streamed(24 * MB, node_id=NODE)
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda *_: fail())

    def fail() -> None:
        raise streaming.CorruptionError("what is on the device is not what was sent")

    with pytest.raises(streaming.CorruptionError):
        sample(model)
    assert shown[-1] == (NODE, "what is on the device is not what was sent")
    assert failed() == ["what is on the device is not what was sent"]
    handle.remove()
    sample(model)
    assert failed() == []


def test_other_errors_are_the_hosts_to_tell(shown: list[tuple[str, str]]) -> None:
    with pytest.raises(KeyError), told_on_node("model", NODE):
        raise KeyError("something else")
    assert shown == []
    assert failed() == []


def test_errors_have_short_names() -> None:
    """The host shows them with their modules, and that of a pack is the path of its folder."""
    named = [getattr(streaming, name) for name in streaming.__all__]
    kinds = [kind for kind in named if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) >= 10
    assert {full_type_name(kind) for kind in kinds} == {f"weightstream.{kind.__name__}" for kind in kinds}
