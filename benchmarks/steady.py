"""Measure many prompts in a row: python benchmarks/steady.py [ROW ...] [--prompts N] [--steps N]

The same prompt again and again in one process, in little memory: whether a step runs out of memory or the plan changes,
after which prompt and what was on the device then; and how much memory nobody ever uses. README.md says what the
figures mean.
"""

from __future__ import annotations

import argparse
from typing import Any

import report
from cases import CASES, GB
from job import Job
from page_cache import PageCache, prepared
from processes import run_worker
from run import describe_machine, ensure_checkpoint, hold_back_vram, parse_with_paths

# By its name: the case, and with which of ComfyUI's two ways of managing memory ours runs.
ROWS = {
    f"{size}gb{end}": (f"flux-1024-{size}gb", contender)
    for end, contender in (("", "weightstream"), ("-static", "weightstream-static"))
    for size in (8, 12, 16, 20)
}


def main() -> None:
    args = parse_args()
    results = {"machine": describe_machine(), "prompts": args.prompts, "steps": args.steps, "rows": {}}
    for name in args.rows or ROWS:
        results["rows"][name] = run_row(name, args)
        print(f"{name}: {say(results['rows'][name])}", flush=True)
        report.write_json(args.out / "steady.json", results)


def run_row(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """One child; its figures and what they come to, or ``{"error": [how it ended, its last lines ...]}``."""
    case_name, contender = ROWS[name]
    case = CASES[case_name].shrunk() if args.tiny else CASES[case_name]
    checkpoint = ensure_checkpoint(case.model, args.work)
    log_to = args.logs / f"steady.{name}.log" if args.logs else None
    with hold_back_vram(case, case.free_gb) as holder, prepared(checkpoint, PageCache.WARM) as shares:
        job = Job(case, contender, checkpoint, args.comfyui, args.steps, holder.settled_free_bytes())
        wanted = job.as_dict() | {"prompts": args.prompts}
        result = run_worker("steady_worker.py", wanted, case, args.timeout, log_to)
    if "prompts" in result:
        result = summarize(result["prompts"]) | result
    return result | {"free_bytes_before": job.free_bytes, "page_cache_share": shares}


def summarize(prompts: list[dict[str, Any]]) -> dict[str, Any]:
    """What all prompts of a row come to. The first one teaches, so its changes of the plan count apart."""
    later = prompts[1:]
    again = [number + 1 for number, prompt in enumerate(prompts) if any(prompt["reruns"])]
    return {
        "reruns": sum(sum(prompt["reruns"]) for prompt in prompts),
        "prompts_with_reruns": again,
        "first_plan_changes": sum(prompts[0]["plan_changes"]),
        "plan_changes": sum(sum(prompt["plan_changes"]) for prompt in later),
        "least_unused_bytes": min(min(_behind_the_first(unused_bytes(prompt))) for prompt in later or prompts),
        "least_free_bytes": min(min(free_at_fullest(prompt)) for prompt in later or prompts),
        "most_kept_by_torch_bytes": max(max(prompt["kept_by_torch_bytes"]) for prompt in prompts),
        "latents_equal": len({prompt["latent_sha256"] for prompt in later}) <= 1,
    }


def unused_bytes(prompt: dict[str, Any]) -> list[int]:
    """For each step, the memory that no tensor had at the step's fullest moment.

    What is free and what torch has reserved come to the same all the time, as long as nobody else takes any; weights in
    pages are in neither, and stay for the step. So it is their sum at the end of the step, less the most that torch had
    allocated in it. Without a GPU: what is free then. In the first step of a prompt torch is made to take one piece for
    what activations need, which no tensor has.
    """
    return _at_fullest(prompt, "allocated_peak_bytes")


def free_at_fullest(prompt: dict[str, Any]) -> list[int]:
    """For each step, what the driver still had to give when torch had reserved the most."""
    return _at_fullest(prompt, "reserved_peak_bytes")


def _behind_the_first(steps: list[int]) -> list[int]:
    return steps[1:] or steps


def _at_fullest(prompt: dict[str, Any], taken: str) -> list[int]:
    if taken not in prompt:
        return prompt["free_bytes"]
    columns = (prompt[name] for name in ("free_bytes", "reserved_bytes", taken))
    return [free + reserved - most for free, reserved, most in zip(*columns, strict=True)]


def say(result: dict[str, Any]) -> str:
    if "error" in result:
        return "failed: " + " | ".join(result["error"])
    prompts = result["prompts"]
    steps = sorted(step for prompt in prompts[1:] or prompts for step in prompt["steps_s"][1:])
    text = f"{len(prompts)} prompts, step {steps[len(steps) // 2]:.3f} s (slowest {steps[-1]:.3f})"
    text += f", {result['reruns']} reruns" + (f" (prompts {result['prompts_with_reruns']})" if result["reruns"] else "")
    text += f", {result['plan_changes']} plan changes after {result['first_plan_changes']} in the first prompt"
    text += f"; at least {result['least_unused_bytes'] / GB:.2f} GB unused, {result['least_free_bytes'] / GB:.2f} free"
    text += f", torch keeps up to {result['most_kept_by_torch_bytes'] / GB:.2f} GB"
    text += f" ({result['allocator']})" if result["allocator"] else ""
    warnings = [warning for prompt in prompts for warning in prompt["warnings"]]
    return text + (f"; first of {len(warnings)} warnings: {warnings[0]}" if warnings else "")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=", ".join(ROWS))
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="of each prompt")
    parser.add_argument("--timeout", type=float, default=240, help="seconds for one row")
    return parse_with_paths(parser)


if __name__ == "__main__":
    main()
