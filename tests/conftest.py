"""The host and the pack, in this process, as ComfyUI would load them on a machine without a GPU.

``python3 dev.py test`` sets ``COMFYUI_PATH``. ComfyUI reads ``sys.argv`` and puts its modules at the top level
(``nodes`` among them, a name that this pack has too), so its folder goes first on the path, and the pack is loaded by
the location of its file, under the name ``weightstream``.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tools.host import HeadlessHost

ROOT = Path(__file__).resolve().parent.parent
# One virtual device: small enough that the tiny FLUX (35 MB) must stream.
VIRTUAL_DEVICES = "2x24MB"
# Torch's own threads, here and in the processes that tests start. The matrices are small and the tests run in as many
# processes as there are cores: with a thread for each core in each process the whole takes twice as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Of several processes that run tests, each takes a file at a time. These files share servers, and their tests run in
# one process: a server needs 8 s of a core to start.
SHARING = {
    "servers": (
        *(
            "tests/nodes/page/test_server.py",
            "tests/nodes/page/test_watching.py",
            "tests/nodes/page/test_converting.py",
        ),
        *("tests/tools/test_benchmarks.py", "tests/tools/test_examples.py"),
    ),
    # Each of these starts several ComfyUIs, 1.2 GB each: one fleet at a time.
    "fleet": ("tests/fleet/test_fleet.py", "tests/fleet/test_fleet_hosts.py", "tests/browser/test_fleet_page.py"),
    "browser": tuple(
        f"tests/browser/test_{name}.py" for name in ("first_minute", "page", "serve_workflow", "takeover", "widget")
    ),
}


def _start_host() -> None:
    """Import the host's core with the command line of a CPU machine."""
    arguments, sys.argv = sys.argv, ["main.py", "--cpu"]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.cli_args
    finally:
        sys.argv = arguments


def _load_pack() -> None:
    spec = importlib.util.spec_from_file_location(
        "weightstream", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None
    assert spec.loader is not None
    pack = importlib.util.module_from_spec(spec)
    sys.modules["weightstream"] = pack
    spec.loader.exec_module(pack)


def _prepare() -> None:
    comfyui = os.environ.get("COMFYUI_PATH")
    if not comfyui or not (Path(comfyui) / "comfy").is_dir():
        raise pytest.UsageError("COMFYUI_PATH must name a ComfyUI folder; run the tests with: python3 dev.py test")
    os.environ["WEIGHTSTREAM_VIRTUAL"] = VIRTUAL_DEVICES
    helpers = [str(ROOT / "tests" / folder) for folder in ("streaming", "nodes", "browser", "gpu", "fleet")]
    sys.path[:0] = [comfyui, *helpers]
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    _start_host()
    _load_pack()


# At import, not in a hook: the conftest files of the folders below import the host and the pack.
_prepare()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-table", action="store_true", help="write docs/families.md anew from what is found")
    parser.addoption("--write-images", action="store_true", help="write docs/images anew from what the page shows")


def pytest_report_header() -> str:
    """The host that the tests run in. dev.py says why it is this one; without dev.py it can only be COMFYUI_PATH."""
    from comfyui_version import __version__

    chosen = os.environ.get("WEIGHTSTREAM_HOST_CHOSEN", "COMFYUI_PATH")
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "comfy-aimdo", "comfy-kitchen"))
    return f"host: ComfyUI {__version__} in {os.environ['COMFYUI_PATH']} ({chosen}), {versions}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """As with ``--dist loadfile``, but files that share something come together."""
    from xdist.scheduler import LoadFileScheduling

    class SharingFiles(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((name for name, files in SHARING.items() if file in files), file)

    return SharingFiles(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(scope="session")
def two_gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HeadlessHost]:
    """A server with two devices. Who counts models has to free those of others first."""
    from servers import started

    with started(tmp_path_factory.mktemp("two_gpus"), VIRTUAL_DEVICES) as host:
        yield host


@pytest.fixture(scope="session")
def nodes_of_pack() -> dict[str, type]:
    """The pack's nodes by their ids, from its entry point."""
    import weightstream

    async def load() -> dict[str, type]:
        extension = await weightstream.comfy_entrypoint()
        await extension.on_load()
        return {node.define_schema().node_id: node for node in await extension.get_node_list()}

    return asyncio.run(load())
