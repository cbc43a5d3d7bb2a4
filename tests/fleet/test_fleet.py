"""A fleet of real ComfyUIs: many clients, workers and a front that are killed, and every latent ComfyUI's own."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import copy
import importlib
import ipaddress
import itertools
import json
import random
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from fleets import fleet
from servers import TINY

from tools import demo
from tools.checkpoints import write_flux
from tools.fleet_host import FleetHost
from tools.host import HostError, PromptFailed, PromptInterrupted, PromptRejected

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 3
CLIENTS, PROMPTS_EACH = 8, 25
SECOND = "second-flux.safetensors"
SEEDS = 10
MOST_WAITING = CLIENTS * PROMPTS_EACH
WAIT_S = 180.0
MB = 1_000_000
KEY = "a-key-of-nobody-5f3a"
# Longer than any test, unless it is interrupted.
ENDLESS_STEPS = 10_000


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FleetHost]:
    options = {
        "arguments": ["--preview-method", "latent2rgb"],
        "fleet_arguments": ["--most-waiting", str(MOST_WAITING)],
    }
    with fleet(tmp_path_factory.mktemp("fleet"), WORKERS, **options) as started:
        path = started.models("diffusion_models") / SECOND
        write_flux(path, size=TINY.shapes, seed=5)
        yield started


@pytest.fixture
def up(host: FleetHost) -> FleetHost:
    """All workers answer, and nothing runs or waits, whatever a test before has left."""
    host.post("/queue", {"clear": True})
    host.interrupt()
    wait_for(lambda: all(worker["state"] == "free" for worker in host.workers) and len(host.workers) == WORKERS)
    return host


def wait_for(holds: Any, seconds: float = WAIT_S) -> None:
    give_up = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < give_up, "it does not come about"
        time.sleep(0.1)


def make_prompt(loader: str, unet: str, lora: bool, seed: int, name: str, steps: int = 2) -> dict[str, Any]:
    """A small prompt. ``name``: of its file, so that no worker has it in its cache."""
    result = copy.deepcopy(demo.api_prompt(TINY, loader, seed))
    result["model"]["inputs"]["unet_name"] = unet
    result["sampler"]["inputs"]["steps"] = steps
    result["save"]["inputs"]["filename_prefix"] = name
    if not lora:
        result["sampler"]["inputs"]["model"] = ["model", 0]
        del result["lora"]
    return result


def submit(host: FleetHost, prompt: dict[str, Any], prompt_id: str, client_id: str) -> None:
    """Queue a prompt once, whatever happens to the front meanwhile."""
    body = {"prompt": prompt, "prompt_id": prompt_id, "client_id": client_id}
    give_up = time.monotonic() + WAIT_S
    while time.monotonic() < give_up:
        try:
            host.post("/prompt", body)
            return
        except PromptRejected:
            raise
        except HostError:  # No front, or none that answers. It may have taken the prompt before it ended.
            time.sleep(0.2)
            try:
                queue = host.get("/queue")
                if host.get(f"/history/{prompt_id}") or prompt_id in str(queue):
                    return
            except HostError:
                continue
    raise AssertionError("the front did not come back")


def wait_result(host: FleetHost, prompt_id: str) -> dict[str, Any]:
    give_up = time.monotonic() + WAIT_S
    while time.monotonic() < give_up:
        try:
            if entry := host.get(f"/history/{prompt_id}").get(prompt_id):
                return entry
        except HostError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"{prompt_id} has no result: {host.log_tail()}")


def latent_of(host: FleetHost, entry: dict[str, Any]) -> demo.Latent:
    assert entry["status"]["completed"], entry["status"]["messages"][-1]
    (item,) = entry["outputs"]["save"]["latents"]
    return demo.read_latent(host.output_file(item))


def reruns_of(entry: dict[str, Any]) -> int:
    return sum(len(data["lost"]) for kind, data in entry["status"]["messages"] if kind == "weightstream_rerun")


def kill(pid: int | None) -> None:
    psutil.Process(pid).kill()


def test_nothing_is_lost_when_workers_and_the_front_are_killed(up: FleetHost) -> None:
    """200 prompts of 8 clients, two models, with LoRA and without; each variant once by ComfyUI's own loader."""
    chance = random.Random(7)
    variants = list(itertools.product((demo.UNET, SECOND), (True, False), range(SEEDS)))
    loaders = (demo.THEIRS, *[demo.OURS] * 4)
    wanted = [(variant, loader) for variant in variants for loader in loaders]
    assert len(wanted) == CLIENTS * PROMPTS_EACH
    chance.shuffle(wanted)
    ids = [str(uuid.UUID(int=chance.getrandbits(128), version=4)) for _ in wanted]
    answered = threading.Semaphore(0)

    def client(number: int) -> dict[int, dict[str, Any]]:
        mine = range(number, len(wanted), CLIENTS)
        for index in mine:
            (unet, lora, seed), loader = wanted[index]
            submit(up, make_prompt(loader, unet, lora, seed, f"storm/{index}"), ids[index], f"client-{number}")
        found = {}
        for index in mine:
            found[index] = wait_result(up, ids[index])
            answered.release()
        return found

    def wait_answers(count: int) -> None:
        for _ in range(count):
            assert answered.acquire(timeout=WAIT_S)

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number) for number in range(CLIENTS)]
        wait_answers(20)
        first, second = chance.sample([worker["pid"] for worker in up.workers if worker["pid"]], 2)
        kill(first)  # The ComfyUI of a worker,
        wait_answers(20)
        kill(psutil.Process(second).ppid())  # the actor of another, with which its ComfyUI ends,
        wait_answers(20)
        left = children_of_front(up)
        kill(up.pid)  # and the front.
        up.stop()
        wait_for(lambda: not any(psutil.pid_exists(pid) for pid in left), 30)
        up.start()
        entries = {index: entry for each in clients for index, entry in each.result().items()}

    assert len(entries) == len(wanted)
    latents = collections.defaultdict(set)
    for index, entry in entries.items():
        latents[wanted[index][0]].add(latent_of(up, entry))
        files = list(up.output.glob(f"gpu-*/storm/{index}_*"))
        assert 1 <= len(files) <= 1 + reruns_of(entry), "it ran again, and does not say so"
    assert all(len(each) == 1 for each in latents.values()), "a latent is not ComfyUI's own"
    assert len({next(iter(each)) for each in latents.values()}) == len(variants)
    assert sum(map(reruns_of, entries.values())) >= 1
    assert up.get("/queue") == {"queue_running": [], "queue_pending": []}
    assert up.get("/api/jobs?limit=1")["pagination"]["total"] == len(wanted)


def children_of_front(host: FleetHost) -> list[int]:
    """The ComfyUIs of its workers."""
    return [worker["pid"] for worker in host.workers if worker["pid"]]


# -- a front as ComfyUI is ---------------------------------------------------------------------------------------------


def test_each_client_hears_of_its_own_prompts(up: FleetHost) -> None:
    """Two clients at once, one of which knows previews with a description and one only those without."""
    heard = asyncio.run(listen(up))
    for client, (prompt_id, messages) in heard.items():
        texts = [message for message in messages if isinstance(message, dict)]
        ids = {message["data"]["prompt_id"] for message in texts if "prompt_id" in (message["data"] or {})}
        assert ids == {prompt_id}
        kinds = [message["type"] for message in texts]
        for kind in ("status", "execution_start", "executing", "progress", "executed", "execution_success"):
            assert kind in kinds
        assert texts[-1]["data"].get("node", "") is None
        binary = [message for message in messages if isinstance(message, bytes)]
        previews = [message for message in binary if int.from_bytes(message[:4], "big") in (1, 4)]
        assert {int.from_bytes(each[:4], "big") for each in previews} == {4 if client == "new" else 1}
        assert all(b"\xff\xd8\xff" in each[:400] for each in previews), "a JPEG"
        assert any(message["type"] == "weightstream.line" for message in texts)


async def listen(host: FleetHost) -> dict[str, tuple[str, list[Any]]]:
    heard: dict[str, tuple[str, list[Any]]] = {}

    async def client(session: aiohttp.ClientSession, name: str, seed: int) -> None:
        async with session.ws_connect(f"{host.url}/ws?clientId={name}", max_msg_size=0) as socket:
            if name == "new":
                await socket.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            prompt = make_prompt(demo.OURS, demo.UNET, True, seed, f"heard/{name}", steps=4)
            body = {"prompt": prompt, "client_id": name}
            async with session.post(f"{host.url}/prompt", json=body) as answer:
                prompt_id = (await answer.json())["prompt_id"]
            messages: list[Any] = []
            heard[name] = (prompt_id, messages)
            async for message in socket:
                messages.append(message.data if message.type is aiohttp.WSMsgType.BINARY else json.loads(message.data))
                last = messages[-1]
                if isinstance(last, dict) and last["type"] == "executing" and last["data"]["node"] is None:
                    return

    async with aiohttp.ClientSession() as session:
        await asyncio.wait_for(asyncio.gather(client(session, "new", 900), client(session, "old", 901)), WAIT_S)
    return heard


def block_all(host: FleetHost) -> list[str]:
    """A prompt without end on each worker."""
    ids = [
        host.submit(make_prompt(demo.OURS, demo.UNET, True, number, f"block/{uuid.uuid4()}", ENDLESS_STEPS))
        for number in range(WORKERS)
    ]
    wait_for(lambda: len(host.get("/queue")["queue_running"]) == WORKERS)
    return ids


def test_an_interrupt_is_for_one_prompt_or_for_all(up: FleetHost) -> None:
    endless = block_all(up)
    up.post("/interrupt", {"prompt_id": endless[0]})
    with pytest.raises(PromptInterrupted):
        up.wait(endless[0], WAIT_S)
    assert {item[1] for item in up.get("/queue")["queue_running"]} == set(endless[1:])
    assert up.post(f"/api/jobs/{endless[1]}/cancel") == {"cancelled": True}
    with pytest.raises(PromptInterrupted):
        up.wait(endless[1], WAIT_S)
    up.interrupt()
    with pytest.raises(PromptInterrupted):
        up.wait(endless[2], WAIT_S)


def test_what_waits_can_be_taken_back_and_goes_first_if_it_is_said(up: FleetHost) -> None:
    endless = block_all(up)
    taken, later, first = (
        make_prompt(demo.OURS, demo.UNET, True, 930 + number, f"queue/{number}") for number in range(3)
    )
    taken_id, later_id = up.submit(taken), up.submit(later)
    first_id = up.post("/prompt", {"prompt": first, "front": True})["prompt_id"]
    up.post("/queue", {"delete": [taken_id]})
    assert [item[1] for item in sorted(up.get("/queue")["queue_pending"])] == [first_id, later_id]
    up.post("/interrupt", {"prompt_id": endless[0]})
    begun = [up.wait(each, WAIT_S)["status"]["messages"][0][1]["timestamp"] for each in (first_id, later_id)]
    assert begun == sorted(begun)
    assert up.get(f"/history/{taken_id}") == {}
    up.interrupt()
    for each in endless:
        with pytest.raises(PromptInterrupted):
            up.wait(each, WAIT_S)


def test_a_prompt_that_is_queued_is_not_queued_again(up: FleetHost) -> None:
    endless = block_all(up)
    prompt_id = str(uuid.uuid4())
    body = {"prompt": make_prompt(demo.OURS, demo.UNET, True, 985, "once"), "prompt_id": prompt_id}
    up.post("/prompt", body)
    for queued in (prompt_id, endless[0]):
        with pytest.raises(PromptRejected, match="waits or runs already"):
            up.post("/prompt", {**body, "prompt_id": queued})
    up.interrupt()
    assert up.wait(prompt_id, WAIT_S)["status"]["completed"]


def test_a_worker_that_is_killed_while_it_is_free_is_started_again(up: FleetHost) -> None:
    before = [worker["pid"] for worker in up.workers]
    kill(before[0])
    wait_for(lambda: up.workers[0]["pid"] not in (None, before[0]))
    assert [worker["pid"] for worker in up.workers[1:]] == before[1:]


def test_keys_of_paid_services_are_never_written(up: FleetHost) -> None:
    """Neither while their prompt waits nor afterwards: not in the queue's file, a log, or what is told."""
    endless = block_all(up)
    body = {"prompt": make_prompt(demo.OURS, demo.UNET, True, 986, "keys"), "extra_data": {"api_key_comfy_org": KEY}}
    prompt_id = up.post("/prompt", body)["prompt_id"]
    waiting = files_with_key(up)
    told = json.dumps(up.get("/queue"))
    up.interrupt()
    assert up.wait(prompt_id, WAIT_S)["status"]["completed"]
    assert prompt_id in told
    assert KEY not in told
    assert KEY not in json.dumps(up.get(f"/history/{prompt_id}"))
    assert (waiting, files_with_key(up)) == ([], [])
    for each in endless:
        with pytest.raises(PromptInterrupted):
            up.wait(each, WAIT_S)


def files_with_key(host: FleetHost) -> list[Path]:
    folders = (host.base / "user", host.base / "output", host.base / "temp")
    paths = [host.log_path, *(path for folder in folders for path in folder.rglob("*") if path.is_file())]
    assert any(path.name == "queue.sqlite" for path in paths)
    return [path for path in paths if KEY.encode() in path.read_bytes()]


def test_a_queue_that_is_full_says_so(up: FleetHost) -> None:
    prompts = [make_prompt(demo.OURS, demo.UNET, True, 980, f"full/{number}") for number in range(MOST_WAITING)]
    endless = block_all(up)
    for each in prompts:
        up.submit(each)
    with pytest.raises(PromptRejected, match=f"{MOST_WAITING} prompts wait already"):
        up.submit(prompts[0])
    request = urllib.request.Request(
        f"{up.url}/api/prompt", json.dumps({"prompt": prompts[0]}).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    refused.value.close()
    assert refused.value.code == 429
    assert int(refused.value.headers["Retry-After"]) > 0
    up.post("/queue", {"clear": True})
    up.interrupt()
    for prompt_id in endless:
        with pytest.raises(PromptInterrupted):
            up.wait(prompt_id, WAIT_S)
    assert up.get("/queue") == {"queue_running": [], "queue_pending": []}


def test_nothing_listens_beyond_this_machine(up: FleetHost) -> None:
    front = psutil.Process(up.pid)
    ours = {front.pid, *(child.pid for child in front.children(recursive=True))}
    listening = [each for each in psutil.net_connections("inet") if each.pid in ours and each.status == "LISTEN"]
    assert len(listening) > WORKERS
    assert {ipaddress.ip_address(each.laddr.ip.removeprefix("::ffff:")).is_loopback for each in listening} == {True}


class Ready:
    """Stands in for the class in a script that would start a fleet like ``host``, which runs already."""

    def __init__(self, host: FleetHost) -> None:
        self._host = host

    def __call__(self, *_: Any, workers: int, **__: Any) -> contextlib.AbstractContextManager[FleetHost]:
        assert workers == WORKERS
        return contextlib.nullcontext(self._host)


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmarks measure on Linux alone")
def test_throughput_is_measured(up: FleetHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("throughput")
    monkeypatch.setattr(script, "FleetHost", Ready(up))
    monkeypatch.setattr(script, "write_models", lambda *_: None)
    arguments = ("--size", "tiny", "--prompts", "1", "--steps", "2", "--work", str(tmp_path), "--out", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["throughput.py", f"fleet-{WORKERS}", *arguments])
    script.main()
    row = json.loads((tmp_path / "throughput.json").read_text("utf-8"))["rows"][f"fleet-{WORKERS}"]
    assert row["prompts_per_minute"] > 0
    assert len(row["first_steps_s"]) > 0
    assert [worker["name"] for worker in row["workers"]] == [f"gpu-{number}" for number in range(WORKERS)]


def test_errors_are_the_hosts_own(up: FleetHost) -> None:
    with pytest.raises(PromptRejected, match="not in"):
        up.submit(make_prompt(demo.OURS, "no-such.safetensors", True, 1, "never"))
    broken = make_prompt(demo.OURS, demo.UNET, True, 940, "never")
    broken["latent"]["inputs"]["width"] = 16
    broken["latent"]["inputs"]["height"] = 16
    broken["sampler"]["inputs"]["scheduler"] = "simple"
    path = up.models("diffusion_models") / "cut.safetensors"
    path.write_bytes((up.models("diffusion_models") / demo.UNET).read_bytes()[:100_000])
    broken["model"]["inputs"]["unet_name"] = path.name
    with pytest.raises(PromptFailed, match=r"cut\.safetensors"):
        up.run(broken, WAIT_S)
    path.unlink()
    assert {worker["state"] for worker in up.workers} == {"free"}, "an error ends no worker"


def test_a_model_that_came_later_is_found(up: FleetHost) -> None:
    path = up.models("diffusion_models") / "later.safetensors"
    path.hardlink_to(up.models("diffusion_models") / demo.UNET)
    up.run(make_prompt(demo.OURS, path.name, True, 950, "later"), WAIT_S)


def test_the_status_tells_of_all_workers(up: FleetHost) -> None:
    for seed in range(WORKERS * 2):
        up.submit(make_prompt(demo.OURS, demo.UNET, True, 960 + seed, f"status/{seed}"))
    wait_for(lambda: not up.get("/prompt")["exec_info"]["queue_remaining"])
    status = demo.read_status(up)
    assert [device["device"] for device in status["devices"]] == [f"gpu-{number}" for number in range(WORKERS)]
    for model in status["models"]:
        assert model["id"].startswith(f"{model['device']}.")
        steps = up.get(f"/weightstream/v1/steps?model={model['id']}")
        assert steps["model"] == model["id"]
        assert steps["runs"]
    freed = up.post("/weightstream/v1/unload", {"model": status["models"][0]["id"], "what": "model"})
    assert freed["freed_device"] > 0
    with pytest.raises(HostError, match=r"there is no model gpu-9\.1"):
        up.get("/weightstream/v1/steps?model=gpu-9.1")


@pytest.mark.skipif(sys.platform != "linux", reason="copies are shared on Linux alone")
def test_workers_have_one_copy_of_the_weights(up: FleetHost) -> None:
    for seed in range(WORKERS * 3):
        up.submit(make_prompt(demo.OURS, demo.UNET, True, 990 + seed, f"shared/{seed}"))
    wait_for(lambda: not up.get("/prompt")["exec_info"]["queue_remaining"])
    assert sum(worker["done"] > 0 for worker in up.workers) == WORKERS

    def shared_once() -> bool:
        host = demo.read_status(up)["host"]
        return host["shared_bytes"] > 0 and host["pinned"] - host["shared_bytes"] < MB

    wait_for(shared_once)
    assert demo.read_status(up)["host"]["why_unshared"] == ""


def test_free_reaches_all_workers(up: FleetHost) -> None:
    for seed in range(WORKERS * 2):
        up.submit(make_prompt(demo.OURS, demo.UNET, True, 970 + seed, f"free/{seed}"))
    wait_for(lambda: not up.get("/prompt")["exec_info"]["queue_remaining"])
    assert demo.read_status(up)["models"]

    def freed() -> bool:
        # A host that collects garbage after a prompt misses what it is told.
        up.free()
        time.sleep(1)
        return not demo.read_status(up)["models"]

    wait_for(freed)
    assert not any(worker["loaded"] for worker in up.workers)
