"""Pure: from the contenders' results to one case's JSON, and from the JSON files to tables.

``python benchmarks/report.py`` makes these anew, in benchmarks/README.md and in the pack's own README.md, from results
that were measured elsewhere and copied here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from cases import CASES, FAST_DISK, GB, Case

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
OURS = ("weightstream", "weightstream-static", "weightstream-no-fast-disk", "weightstream-fast-disk")
COLUMNS = (
    "case",
    "who",
    "step, s",
    "predicted, s",
    "to its floor",
    "to ComfyUI dynamic",
    "kept, GB",
    "peak of tensors, GB",
    "peak of the device, GB",
    "load + first step, s",
    "latent",
)

# Rows of the pack's README: model and picture, which are named once, and the case.
FRONT_ROWS = (
    ("FLUX.1-dev bf16 (23.8 GB), 1024 x 1024", "flux-1024-6gb"),
    ("", "flux-1024-8gb"),
    ("", "flux-1024-12gb"),
    ("", "flux-1024-16gb"),
    ("", "flux-1024-20gb"),
    ("FLUX.1-dev bf16, 2048 x 2048", "flux-2048-4gb"),
    ("Qwen-Image bf16 (40.9 GB), 1328 x 1328", "qwen-1328-12gb"),
    ("", "qwen-1328-24gb"),
    ("SD3.5-large fp16 (16.3 GB), 1024 x 1024", "sd35-1024-8gb"),
    ("Wan 2.1 14B bf16 (28.6 GB), 480p, 33 frames", "wan-480p-8gb"),
)
# Of a picture, in the last columns there.
PICTURE_STEPS = 20


def summarize(case: Case, machine: dict, limits: dict[str, dict], runs: dict[str, dict]) -> dict[str, Any]:
    """The result file of ``case``.

    A contender's floor is max(compute with everything resident, the bytes that it streams per step / H2D bandwidth).
    """
    resident, h2d = limits.get("resident", {}), limits.get("h2d", {})
    runs = {name: annotate(run, resident, h2d, runs.get(native_of(name), {})) for name, run in runs.items()}
    ours = next((runs[name] for name in OURS if "step_s" in runs.get(name, {})), {})
    return {
        "case": case.name,
        "tiny": case.tiny,
        "picture": [case.width, case.height],
        "frames": case.frames,
        "gpus": case.gpus,
        "free_gb": case.free_gb,
        "vram_limit_gb": case.vram_limit_gb,
        "compiled": case.compiled,
        "machine": machine,
        "versions": merge_versions([*limits.values(), *runs.values()]),
        "resident_step_s": resident.get("step_s"),
        "h2d_bytes_per_s": h2d.get("h2d_bytes_per_s"),
        "h2d_of_all_gpus_bytes_per_s": h2d.get("h2d_of_all_gpus_bytes_per_s"),
        "h2d_s": ours.get("h2d_s"),
        "floor_s": ours.get("floor_s"),
        "ratio_to_floor": ours.get("ratio_to_floor"),
        "ratio_to_comfy_dynamic": ours.get("ratio_to_comfy_dynamic"),
        "limits": limits,
        "runs": runs,
    }


def native_of(contender: str) -> str:
    """Whose time a contender's is compared to: ComfyUI's own with dynamic VRAM, and with the same of the fast disk."""
    return FAST_DISK[contender].native if contender in FAST_DISK else "comfy-dynamic"


def annotate(run: dict, resident: dict, h2d: dict, dynamic: dict) -> dict:
    """``run`` with everything that follows from the limits, from ComfyUI's own run and from our prediction."""
    run = dict(run)
    if "step_s" not in run:
        return run
    on_several = run.get("gpus", 1) > 1
    predicted = run.get("status", {}).get("predicted_step_seconds")
    if predicted:
        run["predicted_step_s"] = predicted
        run["predicted_to_measured"] = predicted / run["step_s"]
    rate = h2d.get("h2d_of_all_gpus_bytes_per_s" if on_several else "h2d_bytes_per_s")
    if rate is not None and run.get("streamed_bytes") is not None:
        run["h2d_s"] = run["streamed_bytes"] / rate
        if "step_s" in resident:
            run["floor_s"] = max(resident["step_s"], run["h2d_s"])
            run["ratio_to_floor"] = run["step_s"] / run["floor_s"]
    if "step_s" in dynamic:
        run["ratio_to_comfy_dynamic"] = run["step_s"] / dynamic["step_s"]
    if "latent_sha256" in run and "latent_sha256" in resident:
        run["identical_to_resident"] = run["latent_sha256"] == resident["latent_sha256"]
    return run


def merge_versions(results: list[dict]) -> dict[str, str]:
    return {name: version for result in results for name, version in result.get("versions", {}).items()}


def write_json(path: Path, content: dict) -> None:
    """Whole or not at all, whatever ends this process meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(as_json(content) + "\n", "utf-8")
    os.replace(part, path)


def as_json(value: Any, indent: str = "") -> str:
    """JSON for people: one value in a line, but a list of numbers or texts in one."""
    inner = indent + " "
    if isinstance(value, dict) and value:
        lines = [f"{json.dumps(str(name))}: {as_json(each, inner)}" for name, each in value.items()]
        return "{\n" + ",\n".join(inner + line for line in lines) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(each, (dict, list)) for each in value):
        lines = [as_json(each, inner) for each in value]
        return "[\n" + ",\n".join(inner + line for line in lines) + f"\n{indent}]"
    return json.dumps(value)


# ------------------------------------------------------------------------------------------------------- table


def number(value: float | None, form: str = "{:.3f}") -> str:
    return "" if value is None else form.format(value)


def gigabytes(value: float | None) -> str:
    return "" if value is None else f"{value / GB:.1f}"


def latent_cell(run: dict) -> str:
    if run.get("latent_finite") is False:
        return "not finite"
    same = run.get("identical_to_resident")
    return "" if same is None else ("identical" if same else "differs")


def run_row(case: str, name: str, run: dict) -> list[str]:
    if "error" in run:
        cells = [case, name, f"failed: {escape(run['error'][0])}; {escape(run['error'][-1])}"]
        return cells + [""] * (len(COLUMNS) - len(cells))
    return [
        case,
        name,
        number(run.get("step_s")),
        number(run.get("predicted_step_s")),
        number(run.get("ratio_to_floor"), "{:.2f}"),
        number(run.get("ratio_to_comfy_dynamic"), "{:.2f}"),
        gigabytes(run.get("kept_bytes")),
        gigabytes(run.get("peak_bytes", {}).get("torch_allocated")),
        gigabytes(run.get("peak_bytes", {}).get("device")),
        number(run.get("load_s"), "{:.1f}"),
        latent_cell(run),
    ]


def escape(text: str) -> str:
    return text.replace("|", "\\|")[:160]


def limit_row(result: dict) -> list[str]:
    rate = result.get("h2d_bytes_per_s")
    of_all = result.get("h2d_of_all_gpus_bytes_per_s")
    wire = f"H2D {rate / GB:.1f} GB/s" if rate else "H2D not measured"
    wire += f", of {result['gpus']} GPUs together {of_all / GB:.1f} GB/s" if of_all else ""
    load = number(result["limits"].get("resident", {}).get("load_s"), "{:.1f}")
    return [result["case"], f"all resident ({wire})", number(result["resident_step_s"]), *[""] * 6, load, ""]


def table(results: list[dict]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for result in results:
        lines.append(limit_row(result))
        lines += [run_row(result["case"], name, run) for name, run in result["runs"].items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine_line(results: list[dict]) -> str:
    """One line per different machine and set of versions among ``results``."""
    lines = []
    for result in results:
        facts = [f"{name} {value}" for name, value in (result["machine"] | result["versions"]).items()]
        line = ", ".join(facts)
        if line not in lines:
            lines.append(line)
    return "\n".join(f"Measured on: {line}.  " for line in lines)


def front_table(results: dict[str, dict]) -> str:
    """What is gained, for somebody who has not read how it was measured. The floor is that of our own row."""
    pictures = (f"{PICTURE_STEPS} steps, ComfyUI", f"{PICTURE_STEPS} steps, WeightStream")
    head = ["model and picture", "free VRAM", "ComfyUI 0.30", "WeightStream", "floor", "all in VRAM", *pictures]
    lines = [head, ["---"] * len(head)]
    for name, case in FRONT_ROWS:
        result = results[case]
        host, ours = (result["runs"].get(who, {}).get("step_s") for who in ("comfy-dynamic", "weightstream"))
        limits = [number(result["floor_s"]), number(result["resident_step_s"])]
        whole = [number(step and PICTURE_STEPS * step, "{:.1f}") for step in (host, ours)]
        free = f"{result['free_gb']:.0f} GB"
        lines.append([name, free, number(host), f"**{number(ours)}**", *limits, *whole])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def read_results(folder: Path) -> list[dict]:
    """Every result file, in the order of ``CASES``."""
    paths = [folder / f"{name}.json" for name in CASES]
    return [json.loads(path.read_text("utf-8")) for path in paths if path.exists()]


def update_readme(readme: Path, results_folder: Path) -> None:
    results = read_results(results_folder)
    rewrite(readme, f"{machine_line(results)}\n\n{table(results)}" if results else "No results yet.")


def update_front_page(readme: Path, results_folder: Path) -> None:
    rewrite(readme, front_table({result["case"]: result for result in read_results(results_folder)}))


def rewrite(readme: Path, body: str) -> None:
    """Put this between the two markers."""
    before, rest = readme.read_text("utf-8").split(BEGIN)
    after = rest.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    HERE = Path(__file__).resolve().parent
    update_readme(HERE / "README.md", HERE / "results")
    update_front_page(HERE.parent / "README.md", HERE / "results")
