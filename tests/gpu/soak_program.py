"""Prompts at random, in which things go wrong: every latent is that of ComfyUI without us, or an error says why.

    python soak_program.py COMFYUI FOLDER PROMPTS SEED DEVICES [host flags]

FOLDER is empty, for files. PROMPTS is 1-200, or 17-17 for prompt 17 alone. On one or two devices: GPUs, or with --cpu
those of WEIGHTSTREAM_VIRTUAL (2x14MB streams). WEIGHTSTREAM_SOAK_FAULTS names the kinds of faults (soak_cases.py), with
commas between; all by default, none if it is empty. Prints a table, and in the last line JSON: how the prompts ended,
what they had, what happened in them, how many steps ran again, and each failure with the prompts that it takes to see
it again: it alone, where a model that has run nothing before fails too.

Among the programs of programs.py it asks for WEIGHTSTREAM_SOAK_PROMPTS prompts of the seed WEIGHTSTREAM_SOAK_SEED, on
WEIGHTSTREAM_SOAK_DEVICES devices.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import programs

FAULTS_VARIABLE = "WEIGHTSTREAM_SOAK_FAULTS"
# Many times what a prompt takes.
PROMPT_SECONDS = 20
# 0.96 to 1 of 50 were seen; one in ten is interrupted or ends where a single copy fails while the model is loaded.
LEAST_SAME = 0.8

if TYPE_CHECKING:
    import torch
    from soak_cases import Picture, Prompt


class Again(logging.Handler):
    """Counts the steps of which the pack says that they run again."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self.count += "running it again" in message or message.startswith("a step runs again")


class Soak:
    """Asks for prompts and compares.

    Attributes:
        ended: how prompts ended, and how often so.
        features, faults, hit: what prompts had, what was to go wrong in them, and what did.
        packed: prompts behind which weights stream packed.
        said: the errors of prompts that ended early for a fault.
        failures: prompts with another latent, or with an error that nobody could expect.
    """

    def __init__(self, models: Any, seed: str, devices: int) -> None:
        self._models, self._seed, self._devices = models, seed, devices
        self._references: dict[Picture, torch.Tensor] = {}
        self.ended: Counter[str] = Counter()
        self.features: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.hit: Counter[str] = Counter()
        self.packed = 0
        self.said: Counter[str] = Counter()
        self.failures: list[dict[str, Any]] = []

    def ask_for(self, prompt: Prompt) -> None:
        """Ask for it as it is, and without faults behind it where it has ended early: nothing may be left of it."""
        self.features.update(prompt.features)
        self.faults.update(fault.kind for fault in prompt.faults)
        how = self._try(prompt)
        self.ended[how] += 1
        if how.startswith("failed"):
            self._models.forget()
            self._tell_whether_alone(prompt)
        elif how != "same":
            self._try(prompt._replace(faults=()), "behind it: ")

    def _tell_whether_alone(self, prompt: Prompt) -> None:
        """It has failed: say which prompts it takes to see that again."""
        failure, many = self.failures[-1], len(self.failures)
        alone = self._try(prompt).startswith("failed")
        del self.failures[many:]
        first = prompt.number if alone else 1
        failure["replay"] = f"PROMPTS {first}-{prompt.number} SEED {self._seed} DEVICES {self._devices}"
        print(f"  again with: {failure['replay']}", file=sys.stderr, flush=True)
        self._models.forget()

    def _try(self, prompt: Prompt, when: str = "") -> str:
        import comfy.model_management as mm
        import torch
        from soak_faults import planted

        mm.cleanup_models_gc()
        hit: Counter[str] = Counter()
        expected = self._reference(prompt.picture)
        try:
            model = self._models.dressed(self._models.streamed(prompt), prompt.picture, prompt.hook_mode)
            with planted(model, prompt.faults, hit) as model:
                found = self._models.sample(model, prompt.picture)
                plans = [streamer.plan for streamer in model.streamers]
                self.packed += any(plan is not None and plan.packed for plan in plans)
        except mm.InterruptProcessingException as error:
            return "interrupted" if hit["interrupt"] else self._failed(prompt, when, hit, error)
        except Exception as error:
            return self._said(error, hit) or self._failed(prompt, when, hit, error)
        finally:
            mm.interrupt_current_processing(False)
            self.hit.update(hit)
        if torch.equal(found, expected):
            return "same"
        return self._failed(prompt, when, hit, (found - expected).abs().max().item())

    def _said(self, error: Exception, hit: Counter[str]) -> str | None:
        """How a prompt ended whose error says honestly what happened; None for another error."""
        if type(error).__name__ == "StepNotRepeatedError":
            self.said[str(error)] += 1
            return "said that the step cannot be run again"
        text = f"{type(error).__name__}: {error}"
        if any("memory runs out" in kind for kind in hit) and ("memory" in text.lower() or "no room" in text):
            self.said[text.splitlines()[0]] += 1
            return "said that memory ran out"
        return None

    def _failed(self, prompt: Prompt, when: str, hit: Counter[str], why: BaseException | float) -> str:
        text = f"the latent differs by {why}" if isinstance(why, float) else f"{type(why).__name__}: {why}"
        if isinstance(why, BaseException):
            traceback.print_exception(why)
        said = f"{when}{text}"
        self.failures.append({"why": said, "happened": dict(hit), "prompt": str(prompt)})
        print(f"prompt {prompt.number}: {said}\n  {prompt}", file=sys.stderr, flush=True)
        return "failed: another latent" if isinstance(why, float) else "failed: an error"

    def _reference(self, picture: Picture) -> torch.Tensor:
        """The latent of the plain host. Its first with new weights may differ from others (docs/same-picture.md)."""
        if picture not in self._references:
            model = self._models.dressed(self._models.whole(picture), picture, "MinVram")
            for _ in range(2):
                self._references[picture] = self._models.sample(model, picture)
        return self._references[picture]


def table(seen: dict[str, Any]) -> str:
    """The counts, for people."""
    lines = []
    for title in ("ended", "features", "happened"):
        lines.append(f"{title}:")
        lines += [f"  {count:5}  {name}" for name, count in sorted(seen[title].items())]
    return "\n".join([*lines, f"steps that ran again: {seen['steps_run_again']}", f"failures: {len(seen['failures'])}"])


def run(folder: Path, numbers: str, seed: str, devices: int) -> dict[str, Any]:
    """Ask for all prompts of these ``numbers``, and say how they ended."""
    import comfy.model_management as mm
    from soak_cases import FAULTS, draw
    from soak_models import Models

    again = Again()
    logging.getLogger("weightstream").addHandler(again)
    kinds = [kind for kind in os.environ.get(FAULTS_VARIABLE, ",".join(FAULTS)).split(",") if kind]
    assert set(kinds) <= set(FAULTS), f"{FAULTS_VARIABLE} names none of {', '.join(FAULTS)}"
    first, last = (int(number) for number in numbers.split("-"))
    soak, began = Soak(Models(folder), seed, devices), time.monotonic()
    for number in range(first, last + 1):
        soak.ask_for(draw(seed, number, devices, kinds))
    return {
        "device": mm.get_torch_device_name(mm.get_torch_device()),
        "seconds": round(time.monotonic() - began, 1),
        "seed": seed,
        "prompts": last - first + 1,
        "ended": soak.ended,
        "features": soak.features,
        "planned": soak.faults,
        "happened": soak.hit,
        "packed": soak.packed,
        "said": soak.said,
        "steps_run_again": again.count,
        "failures": soak.failures,
    }


def cases(found: programs.Found) -> None:
    number, seed, devices = (
        os.environ.get(f"WEIGHTSTREAM_SOAK_{name}", default)
        for name, default in (("PROMPTS", "20"), ("SEED", "1"), ("DEVICES", "1"))
    )
    programs.end_after(PROMPT_SECONDS * int(number) + programs.PROGRAM_SECONDS)
    seen = run(found.folder, f"1-{number}", seed, int(devices))
    found.facts |= seen
    found.agree |= {json.dumps(failure): False for failure in seen["failures"]}
    # Errors that say honestly what happened pass too, so they must be few.
    found.agree["most latents are the host's"] = seen["ended"]["same"] >= LEAST_SAME * int(number)
    found.agree["steps have run again"] = seen["steps_run_again"] > 0


def main() -> None:
    comfyui, folder, numbers, seed, devices, *flags = sys.argv[1:]
    programs.start_host(Path(comfyui), flags)
    seen = run(Path(folder), numbers, seed, int(devices))
    print(table(seen))
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
