"""`dsjax NAME --flags`: runs the experiments script installed beside this package.

The script is found by its place, not by the module path, so that a folder named `experiments` in
another repository can never be run in its stead.
"""

import importlib.util
import sys
from pathlib import Path

from dsjax.errors import nearest

_FOLDER = Path(__file__).resolve().parent.parent / "experiments"
_NOT_SCRIPTS = {"__init__", "command", "running"}


def main(argv: list[str] | None = None) -> int:
    """Runs `dsjax NAME ...`.

    Args:
        argv: arguments after the program's name; None takes the process's.

    Returns:
        The script's exit code; 2 for an unknown name.
    """
    argv = sys.argv[1:] if argv is None else argv
    names = sorted(p.stem for p in _FOLDER.glob("*.py") if p.stem not in _NOT_SCRIPTS)
    if not argv:
        print(f"dsjax: a command is needed; known: {', '.join(names)}", file=sys.stderr)
        return 2
    if argv[0] in ("-h", "--help", "help"):
        print(f"usage: dsjax NAME --flags\nnames: {', '.join(names)}\nflags: dsjax NAME --help")
        return 0
    name = argv[0]
    if name not in names:
        print(f"dsjax: unknown command '{name}'{nearest(name, names)}", file=sys.stderr)
        return 2
    _load("experiments", _FOLDER / "__init__.py")
    _load("experiments.command", _FOLDER / "command.py")
    module = _load(f"experiments.{name}", _FOLDER / f"{name}.py")
    return module.main([f"dsjax {name}", *argv[1:]])


def _load(name: str, path: Path):
    """Imports the file at `path` under a name, whatever else bears that name."""
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
    assert spec is not None  # a .py file always has one
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
