"""The judge of the house: who may import whom.

Every module of ours stands on a floor of ``FLOORS``. It imports only from its own floor or lower ones, without cycles;
a module that stands nowhere fails until it is placed. Which library may enter at which floor is decided here as well.
"""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("engine", "ops", "recipes", "teacher")

# Low to high. A folder's pattern (``engine.actors.*``) places all that will ever lie in it; single files are named.
FLOORS: tuple[tuple[str, ...], ...] = (
    (
        "engine.clock",
        "engine.errors",
        "engine.messages",
        "engine.streams",
        "engine.types",
        "engine.virtual_time",
    ),
    (
        "engine.actor",
        "engine.costs",
        "engine.evaluations",
        "engine.flow",
        "engine.ledger",
        "engine.metric_catalogue",
        "engine.metrics",
        "engine.megatron_config",
        "engine.objective_config",
        "engine.recipe",
        "engine.recipe_fields",
        "engine.run_dir",
        "engine.schedule",
        "engine.step_log",
        "engine.tracing",
    ),
    (
        "engine.adapter_files",
        "engine.checkpoint",
        "engine.generation.*",
        "engine.packed_linear",
        "engine.precision",
        "engine.prompt_files",
        "engine.prompts",
        "engine.training.*",
        "engine.transport.*",
        "ops",
        "ops.*",
        "teacher.client",
        "teacher.connection",
        "teacher.fingerprint",
        "teacher.health",
        "teacher.places",
        "teacher.pool",
        "teacher.protocol",
        "teacher.replay",
        "teacher.replica",
        "teacher.same_tokens",
        "teacher.self_test",
        "teacher.token",
        "teacher.top_k",
        "teacher.vllm_abilities",
        "teacher.vllm_answers",
        "teacher.vllm_client",
        "teacher.waits",
        "teacher.wire",
    ),
    (
        "engine.actors.*",
        "teacher.backend_*",
        "teacher.batcher",
        "teacher.folder",
        "teacher.local",
        "teacher.server",
        "teacher.vllm_inside",
    ),
    (
        "engine.build.*",
        "engine.check.*",
        "engine.graph",
        "engine.http_port",
        "engine.load_recipe",
        "engine.machine",
        "engine.model_folder",
        "engine.monitor.*",
        "engine.node",
        "engine.parts",
        "engine.port_access",
        "engine.simulate.*",
        "engine.supervisor",
    ),
    (
        "engine.command",
        "engine.export",
        "engine.report",
        "engine.run",
        "engine.trace",
        "recipes.*",
        "teacher.__main__",
    ),
)

# Libraries that are heavy or that carry a decision, and the lowest floor that may import them.
FROM_FLOOR = {"structlog": 1, "prometheus_client": 1, "numpy": 2, "torch": 2, "safetensors": 2, "transformers": 2}
# Below this floor only the standard library, msgspec and what FROM_FLOOR allows.
FIRST_FREE_FLOOR = 2
# Imported in these files alone, and only inside functions: everything else runs on machines that do not have them.
ADAPTERS = {
    "megatron": ("engine.training.megatron",),
    "tensorboard": ("engine.monitor.sinks.tensorboard",),
    "vllm": ("engine.generation.vllm_engine", "teacher.backend_vllm"),
    "wandb": ("engine.monitor.sinks.wandb",),
}
# Modules that a library's own processes import by name, and nobody else: they may import it when they are loaded.
INSIDE = {
    "megatron": ("engine.training.megatron_inside", "engine.training.megatron_inside.*"),
    "vllm": ("engine.generation.vllm_inside.*", "teacher.vllm_inside"),
}
# Packages whose ``__init__`` imports one module for what it does: whatever else is in them must find that done.
PREPARED = {"engine.training.megatron_inside": "engine.training.megatron_inside.start"}
# Packages that are entered through their ``__init__``: their names are imported from there and nowhere else. The names
# of all other packages are imported from the modules that define them.
DOORS = frozenset({"ops"})
# ``engine`` modules that the teacher service, deployable alone, may lean on: none of them knows a run.
OPEN_TO_TEACHER = frozenset(
    {
        "engine.clock",
        "engine.costs",
        "engine.errors",
        "engine.generation.vllm_inside.cpu_faults",
        "engine.packed_linear",
        "engine.precision",
        "engine.recipe",
        "engine.recipe_fields",
        "engine.tracing",
        "engine.training.packing",
        "engine.training.rms_norm",
        "engine.training.tree_attention",
        "engine.transport.handoff",
        "engine.types",
    }
)
# Actors know channels and protocols, never each other.
STRANGERS = tuple(
    f"engine.actors.{name}"
    for name in ("checkpointer", "evaluator", "learner", "prompt_feeder", "sampler", "teacher_proxy", "weight_syncer")
)


@dataclass(frozen=True, kw_only=True)
class Import:
    target: str
    """Full name: of a module of ours, or of whatever is imported from a library."""
    line: int
    lazy: bool
    """Inside a function, or only read by type checkers."""


def module_name(path: Path, *, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module: str) -> int | None:
    for floor, patterns in enumerate(FLOORS):
        if any(fnmatchcase(module, pattern) for pattern in patterns):
            return floor
    return None


def imports_of(source: str, *, modules: frozenset[str]) -> Iterator[Import]:
    """All imports of one file, also those inside functions. ``from package import module`` counts as the module."""
    yield from _walk(ast.parse(source), modules, lazy=False)


def _walk(node: ast.AST, modules: frozenset[str], *, lazy: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(target=alias.name, line=child.lineno, lazy=lazy)
        elif isinstance(child, ast.ImportFrom):
            base = "." * child.level + (child.module or "")
            for alias in child.names:
                full = f"{base}.{alias.name}"
                # A door may hold a function of the same name as the module that defines it: the function is meant.
                is_module = full in modules and base not in DOORS
                yield Import(target=full if is_module else base, line=child.lineno, lazy=lazy)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _is_type_checking(child)
            yield from _walk(child, modules, lazy=lazy or inside)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def faults_of(module: str, source: str, *, modules: frozenset[str], is_package: bool = False) -> list[str]:
    """What is wrong with one module's imports, one sentence each; empty when nothing is."""
    imports = list(imports_of(source, modules=modules))
    if is_package and module not in DOORS:
        return [
            f"{module}/__init__.py imports {found.target}: a second path to one name; import it where it is defined"
            for found in imports
            if found.target.partition(".")[0] in ROOMS and found.target != PREPARED.get(module)
        ]
    floor = floor_of(module)
    if floor is None:
        return [f"{module} stands on no floor; place it in FLOORS of tests/test_layers.py"]
    return [fault for found in imports if (fault := _fault(module, floor, found)) is not None]


def _fault(module: str, floor: int, found: Import) -> str | None:
    room, target = module.partition(".")[0], found.target
    library = target.partition(".")[0]
    where = f"{module}:{found.line}"
    if target.startswith("."):
        return f"{where} imports {target!r} relatively; write the full name"
    if library == "tests":
        return f"{where} imports {target} from the tests"
    if library not in ROOMS:
        return _library_fault(module, floor, found)
    if room == "ops" and library != "ops":
        return f"{where} imports {target}; ops stands alone and takes tensors"
    if room == "teacher" and library == "engine" and target not in OPEN_TO_TEACHER:
        return f"{where} imports {target}; the teacher service is deployable alone and knows no such thing"
    if module in STRANGERS and target in STRANGERS:
        return f"{where} imports {target}; actors know channels, not each other"
    door = target.partition(".")[0]
    if door in DOORS and target != door and room != door:
        return f"{where} imports {target}; its names are imported from {door}"
    for where_in in INSIDE:
        if _is_inside(where_in, target) and not _is_inside(where_in, module):
            return f"{where} imports {target}, which lives in {where_in}'s processes; name it to {where_in} instead"
    other = floor_of(target)
    if other is None:
        return f"{where} imports {target}, which is no module of the house; import the module that defines the name"
    if other > floor:
        return f"{where} (floor {floor}) imports {target} (floor {other}), which lies above it"
    return None


def _library_fault(module: str, floor: int, found: Import) -> str | None:
    library = found.target.partition(".")[0]
    where = f"{module}:{found.line}"
    if library in ADAPTERS:
        if _is_inside(library, module):
            return None
        if module not in ADAPTERS[library]:
            return f"{where} imports {library}, which belongs into {' and '.join(ADAPTERS[library])} alone"
        if not found.lazy:
            return f"{where} imports {library} when it is loaded; import it inside the function that needs it"
        return None
    if floor < FROM_FLOOR.get(library, 0):
        return f"{where} (floor {floor}) imports {library}, which is allowed from floor {FROM_FLOOR[library]} up"
    if floor < FIRST_FREE_FLOOR and library not in {"msgspec", *FROM_FLOOR, *sys.stdlib_module_names}:
        return f"{where} (floor {floor}) imports {library}; down there stand the standard library and msgspec"
    return None


def _is_inside(library: str, module: str) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in INSIDE.get(library, ()))


PATHS = {module_name(path): path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}
MODULES = frozenset(PATHS)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_its_floor_allows(module: str) -> None:
    path = PATHS[module]

    faults = faults_of(module, path.read_text(), modules=MODULES, is_package=path.name == "__init__.py")

    assert not faults, "\n".join(faults)


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {
        module: {found.target for found in imports_of(path.read_text(), modules=MODULES) if found.target in MODULES}
        for module, path in PATHS.items()
    }

    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the circle


def test_the_lower_floors_load_without_torch() -> None:
    """A recipe can be checked, and a schedule decided, on a machine that has neither torch nor numpy."""
    low = sorted(module for module in MODULES if (floor := floor_of(module)) is not None and floor < FIRST_FREE_FLOOR)
    program = (
        f"import sys, {', '.join(low)}\nheavy = {{'torch', 'numpy', 'transformers', 'aiohttp'}} & set(sys.modules)"
        "\nassert not heavy, heavy"
    )

    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        (
            "engine.flow",
            "import engine.actors.sampler",
            r"flow:1 \(floor 1\) imports engine.actors.sampler \(floor 3\)",
        ),
        (
            "engine.flow",
            "def f():\n    from engine.build import life",
            r"flow:2 .* imports engine.build.life \(floor 4\)",
        ),
        ("engine.recipe", "import torch", r"imports torch, which is allowed from floor 2 up"),
        ("engine.types", "from structlog import get_logger", r"imports structlog, which is allowed from floor 1 up"),
        ("engine.recipe", "import aiohttp", r"imports aiohttp; down there stand the standard library and msgspec"),
        ("engine.actors.sampler", "from . import learner", r"relatively; write the full name"),
        ("engine.actors.sampler", "from engine.actors.learner import Learner", r"actors know channels, not each other"),
        ("engine.transport.channel", "from tests.support import models", r"from the tests"),
        ("ops.losses", "from engine.errors import EngineError", r"ops stands alone"),
        ("teacher.server", "from engine.schedule import Schedule", r"knows no such thing"),
        ("teacher.client", "from teacher.server import Server", r"\(floor 2\) imports teacher.server \(floor 3\)"),
        (
            "engine.training.hf",
            "def f():\n    import vllm",
            r"belongs into engine.generation.vllm_engine and teacher.backend_vl",
        ),
        (
            "engine.generation.vllm_engine",
            "def f():\n    from engine.generation.vllm_inside import worker",
            r"imports engine.generation.vllm_inside.worker, which lives in vllm's processes",
        ),
        ("engine.training.megatron", "from megatron.core import tensor_parallel", r"inside the function that needs it"),
        ("engine.novelty", "import json", r"stands on no floor; place it in FLOORS"),
        ("engine.actors.sampler", "from engine import Sampler", r"imports engine, which is no module of the house"),
        ("engine.training.hf", "from ops.linear import head", r"imports ops.linear; its names are imported from ops"),
    ],
)
def test_the_judge_finds_a_planted_fault(module: str, source: str, fault: str) -> None:

    known = MODULES | {"engine.build.life", "engine.actors.sampler", "engine.actors.learner", "engine.schedule"}

    (found,) = faults_of(module, source, modules=known)

    assert re.search(fault, found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.flow", "import heapq, msgspec, structlog\nfrom engine.types import Prompt"),
        ("engine.generation.vllm_engine", "def f():\n    from vllm import SamplingParams"),
        ("engine.generation.vllm_engine", "if TYPE_CHECKING:\n    import vllm"),
        ("engine.generation.vllm_inside.worker", "from vllm.platforms import current_platform"),
        ("engine.actors.sampler", "from engine.transport.channel import Sender\nimport torch"),
        ("engine.training.hf", "from ops import divergence"),
        ("teacher.server", "from engine.errors import UserError\nfrom teacher.protocol import Scores"),
    ],
)
def test_the_judge_lets_pass_what_is_right(module: str, source: str) -> None:
    assert faults_of(module, source, modules=MODULES | {"engine.transport.channel"}) == []


def test_a_package_gives_no_second_path_to_a_name() -> None:
    (fault,) = faults_of("engine.actors", "from engine.actors.sampler import Sampler", modules=MODULES, is_package=True)

    assert "a second path to one name" in fault
