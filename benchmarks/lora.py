"""Measure LoRA: python benchmarks/lora.py [WHO ...] [--case CASE]

A LoRA of rank 32 on every matrix of every block: what it adds to the first step of the prompt that brings it, what it
adds to the steps after that, and how long another strength and its absence take. README.md says what the figures mean.
"""

from __future__ import annotations

import argparse

import report
from cases import CASES, GB, Model
from job import Job
from page_cache import PageCache, prepared
from processes import run_worker
from run import describe_machine, ensure_checkpoint, hold_back_vram, parse_with_paths

STEPS = 6
RANK = 32
LORA = Model("flux-dev-lora-random", "flux-lora", ("--size", "dev", "--rank", str(RANK)), context=(0, 0))
LORA_TINY = Model("flux-tiny-lora-random", "flux-lora", ("--size", "tiny", "--rank", str(RANK)), context=(0, 0))

# Who is measured, whose loader that is, and whether the whole card is free: the last one's pictures are the right ones.
WHO = {
    "weightstream": ("weightstream", False),
    "weightstream-unpacked": ("weightstream-unpacked", False),
    "comfy-dynamic": ("comfy-dynamic", False),
    "comfy-whole-card": ("comfy-dynamic", True),
}


def main() -> None:
    args = parse_args()
    case = CASES[args.case].shrunk() if args.tiny else CASES[args.case]
    lora = LORA_TINY if args.tiny else LORA
    # The small one first: to make a file others may be deleted.
    files = {"lora": ensure_checkpoint(lora, args.work), "checkpoint": ensure_checkpoint(case.model, args.work)}
    results = {"machine": describe_machine(), "case": case.name, "rank": RANK, "rows": {}}
    results |= {f"{name}_bytes": path.stat().st_size for name, path in files.items()}
    for who in args.who or WHO:
        contender, whole_card = WHO[who]
        with hold_back_vram(case, None if whole_card else case.free_gb) as holder:
            job = Job(case, contender, files["checkpoint"], args.comfyui, STEPS, holder.settled_free_bytes())
            wanted = job.as_dict() | {"lora": str(files["lora"])}
            log_to = args.logs / f"lora.{who}.log" if args.logs else None
            with prepared(job.checkpoint, PageCache.WARM) as shares:
                row = run_worker("lora_worker.py", wanted, case, args.timeout, log_to)
            results["rows"][who] = row | {"page_cache_share": shares}
        report.write_json(args.out / "lora.json", results)
    right = results["rows"].get("comfy-whole-card", {})
    for who, row in results["rows"].items():
        print(f"{who}: {say(row, right)}", flush=True)


def say(row: dict, right: dict) -> str:
    if "error" in row:
        return "failed: " + " | ".join(row["error"])
    before = row["prompts"]["before"]
    text = f"first step of a prompt {before['first_step_s']:.2f} s, steady {before['steady_step_s']:.4f}"
    for name, prompt in row["prompts"].items():
        if name == "before":
            continue
        added = prompt["first_step_s"] - before["first_step_s"]
        change = prompt["steady_step_s"] / before["steady_step_s"] - 1
        text += f"; {name} {added:+.2f} s, {change:+.1%}"
    if "prompts" in right:
        same = [
            row["prompts"][name]["latent_sha256"] == right["prompts"][name]["latent_sha256"] for name in row["prompts"]
        ]
        text += f"; {sum(same)} of {len(same)} latents are those of the whole card"
    return text + f"; RAM {row['anonymous_bytes'] / GB:.1f} GB"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("who", nargs="*", help=", ".join(WHO))
    parser.add_argument("--case", default="flux-1024-16gb", choices=CASES)
    parser.add_argument("--timeout", type=float, default=150, help="seconds for one row")
    return parse_with_paths(parser)


if __name__ == "__main__":
    main()
