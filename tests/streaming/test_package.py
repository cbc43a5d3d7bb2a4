from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from weightstream import streaming

ROOT = Path(streaming.__file__).parent.parent


def test_the_public_surface_is_what_init_lists() -> None:
    assert sorted(streaming.__all__) == streaming.__all__
    for name in streaming.__all__:
        assert hasattr(streaming, name)


def test_the_engine_needs_no_host() -> None:
    """In a fresh interpreter that has nothing of ComfyUI on its path."""
    code = "import sys, streaming; assert not [name for name in sys.modules if name.startswith(('comfy', 'nodes'))]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={"PATH": ""})


def test_the_pack_imports_without_torch() -> None:
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('pack', '__init__.py', submodule_search_locations=['.'])\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules and module.WEB_DIRECTORY == './web'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
