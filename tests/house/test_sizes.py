"""Files stay readable: at most 400 lines a file, 60 a function. A listed exception carries its reason."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
FILE_EXCEPTIONS: dict[str, str] = {}
FUNCTION_EXCEPTIONS: dict[str, str] = {}


def sources() -> list[Path]:
    rooms = ("kernels", "launch", "substrate", "eval", "megatron_evolve", "tests")
    return [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))]


def test_files() -> None:
    long = {}
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES and name not in FILE_EXCEPTIONS:
            long[name] = lines
    assert not long, f"files over {MAX_FILE_LINES} lines: {long}"


def test_functions() -> None:
    long = {}
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{path.relative_to(ROOT).as_posix()}:{node.name}"
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES and name not in FUNCTION_EXCEPTIONS:
                    long[name] = lines
    assert not long, f"functions over {MAX_FUNCTION_LINES} lines: {long}"


def test_first_line_says_what_the_room_is_for() -> None:
    for path in sources():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path.relative_to(ROOT)}: no docstring"
