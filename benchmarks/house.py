"""Measure the source as a house: sizes, density, and imports that run the wrong way.

  python -m benchmarks.house              # a table of the library
  python -m benchmarks.house --root=DIR   # of another checkout, to compare with

tests/test_house.py holds the code to these rules. Needs neither JAX nor a model.
"""

from __future__ import annotations

import ast
import dataclasses
import io
import pathlib
import tokenize
from collections.abc import Iterator

from absl import app, flags

PACKAGE = "safepatch_jax"
# The floors, low to high. A module imports from its own room and from those before it.
FLOORS = (
    ("option", "numerics"),
    ("runtime",),
    ("mesh",),
    ("models",),
    ("io",),
    ("data",),
    ("training",),
    ("patching",),
    ("settings",),
    ("outcome",),
    ("testing",),
    ("patch_file",),
    ("registry",),
    ("evaluation",),
    ("reporting",),
    ("run",),
    ("methods",),
    ("studies", "planning"),
    ("api",),
)
COLUMNS = 100
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)
_ROOT = flags.DEFINE_string("root", None, "The checkout to measure; default: this one.")


@dataclasses.dataclass(frozen=True)
class Module:
    """A Python file and its syntax tree; `name` is dotted."""

    name: str
    path: pathlib.Path
    text: str
    tree: ast.Module


def modules(root: pathlib.Path, package: str = PACKAGE) -> list[Module]:
    """Read every module of a package below `root`, sorted by path."""
    result = []
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts).removesuffix(".__init__")
        text = path.read_text(encoding="utf-8")
        result.append(Module(name, path, text, ast.parse(text)))
    return result


def imports(source: list[Module]) -> dict[str, set[str]]:
    """Return which modules of the package each one imports, also within functions."""
    known = {module.name for module in source}
    graph: dict[str, set[str]] = {}
    for module in source:
        graph[module.name] = set()
        for target in _targets(module.tree):
            while target and target not in known:
                target = target.rpartition(".")[0]  # a name within a module
            if target and target != module.name:
                graph[module.name].add(target)
    return graph


def _targets(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_level_imports(tree: ast.Module) -> list[str]:
    """Return the names that a module imports when it is itself imported."""
    names = []
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += _targets(ast.Module([node], []))
    return names


def room(module: str) -> str:
    """Return the room of a module: the name that follows the package's."""
    return module.split(".")[1] if "." in module else ""


def upward(graph: dict[str, set[str]]) -> list[str]:
    """List imports of a higher floor or of a room beside, as 'importer -> imported'."""
    floors = {}
    for level, names in enumerate(FLOORS):
        floors |= dict.fromkeys(names, level)
    wrong = []
    for importer, targets in sorted(graph.items()):
        for target in sorted(targets):
            here, there = room(importer), room(target)
            if not here or not there or here == there:
                continue
            if floors[there] >= floors[here]:
                wrong.append(f"{importer} -> {target}")
    return wrong


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """List groups of modules that import one another in a circle (Tarjan 1972)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for target in graph[name]:
            if target not in order:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], order[target])
        if lowest[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                groups.append(sorted(group))

    for name in graph:
        if name not in order:
            visit(name)
    return groups


def nested_comprehensions(tree: ast.AST) -> list[int]:
    """Return the lines of comprehensions within comprehensions, or with a second `for`."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, _COMPREHENSIONS):
            inner = [x for x in ast.walk(node) if isinstance(x, _COMPREHENSIONS)]
            if len(inner) > 1 or len(node.generators) > 1:
                lines.append(node.lineno)
    return lines


def named_lambdas(tree: ast.AST) -> list[int]:
    """Return the lines of assignments of a lambda to a name."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Lambda):
            lines.append(node.lineno)
    return lines


def crowded_statements(tree: ast.AST) -> list[int]:
    """Return the lines of simple statements with more than one conditional expression."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            if sum(isinstance(x, ast.IfExp) for x in ast.walk(node)) > 1:
                lines.append(node.lineno)
    return lines


def long_lines(text: str) -> list[int]:
    """Return the numbers of lines beyond COLUMNS, those of a single word (an address) aside."""
    numbers = []
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > COLUMNS and " " in line.strip():
            numbers.append(number)
    return numbers


def figures(source: list[Module]) -> dict[str, str]:
    """Return what the table says of a package, by name."""
    statements = comprehensions = nested = lambdas = crowded = wide = comments = lines = 0
    tokens = code = 0
    longest = (0, "")
    sizes: dict[str, int] = {}
    for module in source:
        height = module.text.count("\n")
        lines += height
        sizes[room(module.name)] = sizes.get(room(module.name), 0) + height
        nested += len(nested_comprehensions(module.tree))
        lambdas += len(named_lambdas(module.tree))
        crowded += len(crowded_statements(module.tree))
        wide += len(long_lines(module.text))
        for node in ast.walk(module.tree):
            statements += isinstance(node, ast.stmt)
            comprehensions += isinstance(node, _COMPREHENSIONS)
            if isinstance(node, ast.FunctionDef):
                size = (node.end_lineno or 0) - node.lineno + 1
                longest = max(longest, (size, f"{module.name}.{node.name}"))
        numbers = set()
        for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
            comments += token.type == tokenize.COMMENT
            if token.type not in _LAYOUT:
                tokens += 1
                numbers.add(token.start[0])
        code += len(numbers)
    graph = imports(source)
    largest, size = max(sizes.items(), key=lambda item: item[1])
    return {
        "files": f"{len(source)}",
        "lines": f"{lines:,}",
        "statements": f"{statements:,}",
        "tokens a code line": f"{tokens / code:.1f}",
        "comprehensions per 1,000 lines": f"{1000 * comprehensions / lines:.0f}",
        "nested comprehensions": f"{nested}",
        "named lambdas": f"{lambdas}",
        "statements with several conditional expressions": f"{crowded}",
        "comments per 1,000 lines": f"{1000 * comments / lines:.0f}",
        f"lines over {COLUMNS} columns": f"{wide} ({wide / lines:.1%})",
        "longest function": f"{longest[0]} lines ({longest[1]})",
        "largest room": f"{largest}, {size / lines:.1%} of all lines",
        "circles of imports": f"{len(circles(graph))}",
    }


def main(_: list[str]) -> None:
    root = pathlib.Path(_ROOT.value or pathlib.Path(__file__).parents[1])
    source = modules(root)
    table = figures(source)
    width = max(map(len, table))
    for name, value in table.items():
        print(f"{name:{width}}  {value}")
    graph = imports(source)
    known = set().union(*FLOORS)
    if {room(module.name) for module in source} - {""} <= known:
        wrong = upward(graph)
        print(f"{'imports that run upwards':{width}}  {len(wrong)}")
        for line in wrong:
            print(f"  {line}")


if __name__ == "__main__":
    app.run(main)
