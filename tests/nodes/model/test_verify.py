"""``WEIGHTSTREAM_VERIFY=1`` in a real host: a damaged copy is found, and the latents are the host's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pytest
import torch
from sampling import MB, Patched, sample, settle, with_lora
from weightstream.nodes.host import devices
from weightstream.nodes.model.patcher import StreamedModelPatcher
from weightstream.nodes.page import status
from weightstream.streaming import ConfigError
from weightstream.streaming.devices.copies import Event, Pair

Load = Callable[..., StreamedModelPatcher]


@pytest.fixture
def verifying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(devices.VERIFY_VARIABLE, "1")


class Damage:
    """Damages the ``wanted`` copies that come next on a model's device.

    Attributes:
        done: so many it has damaged.
    """

    def __init__(self, model: StreamedModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wanted = self.done = 0
        self._backend = model.streamer.backend
        self._copy = self._backend._copy_now
        monkeypatch.setattr(self._backend, "_copy_now", self._copy_and_damage)

    def _copy_and_damage(self, stream: object, pairs: Sequence[Pair], waits: Sequence[Event]) -> Event:
        event = self._copy(stream, pairs, waits)
        if self.done < self.wanted:
            self.done += 1
            self._backend.finish(event)
            words = max((target for target, _ in pairs), key=torch.numel).view(torch.int32)
            words[[100, 1001]] = words[[1001, 100]]
        return event


def test_nothing_is_found_where_nothing_is_wrong(verifying: None, streamed: Load, plain_with_lora: Patched) -> None:
    model = streamed(64 * MB, vram_limit=24 * MB)
    assert model.streamer.config.verify
    for strength in (0.0, 0.6, 0.0):
        assert torch.equal(sample(with_lora(model, strength)), plain_with_lora(strength))
    now = model.status()
    assert (now["mode"], now["counters"]["corrupted"], now["note"]) == ("streamed", 0, "")


@pytest.mark.parametrize("strength", [0.0, 0.6])
def test_a_damaged_copy_is_found_and_the_latents_are_the_hosts(
    verifying: None,
    streamed: Load,
    plain_with_lora: Patched,
    strength: float,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = with_lora(streamed(64 * MB, vram_limit=24 * MB), strength)
    expected = plain_with_lora(strength)
    settle(model)
    model.streamer.drain()
    damage = Damage(model, monkeypatch)
    damage.wanted = 2
    caplog.clear()
    with caplog.at_level(logging.INFO):
        assert torch.equal(sample(model), expected)
    assert damage.done == 2
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 2
    assert all("a copy of diffusion_model." in error and "_blocks." in error for error in errors)
    shown = [entry for entry in status.full_status()["models"] if entry["mode"] == "synchronous"]
    assert [entry["counters"]["corrupted"] for entry in shown] == [2]
    assert "copies are synchronous since one of diffusion_model." in shown[0]["explain"]
    announced = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert any("copies are synchronous since" in text for text in announced)
    assert torch.equal(sample(model), expected)
    assert model.status()["counters"]["corrupted"] == 2


def test_a_first_prompt_with_damage(
    verifying: None, streamed: Load, plain: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file through the reader's ring, residents among it."""
    model = streamed(64 * MB, vram_limit=28 * MB)
    damage = Damage(model, monkeypatch)
    damage.wanted = 5
    assert torch.equal(sample(model), plain)
    assert model.status()["counters"]["corrupted"] >= 1
    assert model.status()["mode"] == "synchronous"


def test_without_the_variable_damage_shows(
    streamed: Load, plain: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = streamed(64 * MB, vram_limit=24 * MB)
    settle(model)
    model.streamer.drain()
    assert not model.streamer.config.verify
    Damage(model, monkeypatch).wanted = 1
    assert not torch.equal(sample(model), plain)
    assert model.status()["counters"]["corrupted"] == 0


@pytest.mark.parametrize(("text", "expected"), [("", False), ("0", False), ("1", True), (" 1 ", True)])
def test_the_variable(monkeypatch: pytest.MonkeyPatch, text: str, expected: bool) -> None:
    monkeypatch.setenv(devices.VERIFY_VARIABLE, text)
    assert devices.verifying() is expected


def test_another_value_is_an_error_that_shows_the_form(
    streamed: Load, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(devices.VERIFY_VARIABLE, "please")
    monkeypatch.setattr(devices, "_virtual", devices._Virtual())
    devices.read_environment()
    assert "WEIGHTSTREAM_VERIFY='please': expected 1" in caplog.text
    with pytest.raises(ConfigError, match="expected 1 to switch it on, or 0"):
        streamed()


def test_it_is_said_at_start_up(
    verifying: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(devices, "_virtual", devices._Virtual())
    with caplog.at_level(logging.INFO):
        devices.read_environment()
    assert "every copy is compared with its source" in caplog.text
