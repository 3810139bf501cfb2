"""The layers of docs/architecture.md hold: imports only go down, and a config is not passed in circles."""

from __future__ import annotations

import ast
from pathlib import Path

import recsys_ssm

PACKAGE = Path(recsys_ssm.__file__).parent

LAYERS = [
    ["__main__", "batched_seeds", "evaluate", "export", "recommend", "report", "search", "train"],
    ["exporting", "reports"],
    ["cli"],
    ["sweeps"],
    ["run"],
    ["streaming"],
    ["models"],
    ["text"],
    ["data"],
    ["ops"],
    ["batches", "metrics", "recommendations"],
    ["features"],
    ["instantiate"],
    ["errors", "paths"],
]
"""From the commands down."""

# One command may use another's parts: testing a run again, and loading its model.
BESIDE = {("recommend", "evaluate"), ("batched_seeds", "train")}


def imports_of(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, also inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name == "recsys_ssm" or name.startswith("recsys_ssm.")}


def room_of(name: str) -> str:
    """Return the folder or top-level module that a dotted name lies in."""
    return name.split(".")[1] if "." in name else "__init__"


def test_every_room_has_a_layer() -> None:
    rooms = {
        path.stem if path.is_file() else path.name
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path.is_dir() and (path / "__init__.py").is_file())
    }
    assert rooms - {"__init__"} <= {room for layer in LAYERS for room in layer}


def test_no_import_goes_up() -> None:
    height = {room: -number for number, layer in enumerate(LAYERS) for room in layer}
    upward = []
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(PACKAGE)
        room = relative.parts[0].removesuffix(".py")
        if room == "__init__":  # the public names, imported when they are used
            continue
        for name in imports_of(path):
            other = room_of(name)
            if other in ("__init__", "__version__") or other == room or other not in height:
                continue
            if height[other] >= height[room] and (room, other) not in BESIDE:
                upward.append(f"{relative} imports {name}")
    assert not upward, "\n".join(sorted(upward))


def test_no_module_imports_one_that_imports_it() -> None:
    names = {
        path: ".".join(
            ("recsys_ssm", *path.relative_to(PACKAGE).with_suffix("").parts)
        ).removesuffix(".__init__")
        for path in PACKAGE.rglob("*.py")
    }
    known = set(names.values()) - {"recsys_ssm"}
    graph = {name: imports_of(path) & known - {name} for path, name in names.items()}

    def reaches(start: str, goal: str) -> bool:
        seen, todo = set(), [start]
        while todo:
            for each in graph.get(todo.pop(), ()):
                if each == goal:
                    return True
                if each not in seen:
                    seen.add(each)
                    todo.append(each)
        return False

    circles = [name for name in known if reaches(name, name)]
    assert not circles, circles
