"""Rules about the shape of the code, checked like any other behaviour."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE_ROOTS = ("services", "kernels", "clients/python")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
MAX_PARAMETERS = 7
MAX_NESTING = 3
BANNED_NAMES = {"utils", "common", "helpers", "misc", "base", "manager"}

# "path" or "path:function" -> why it may be larger.
EXCEPTIONS: dict[str, str] = {
    "kernels/luthier/kernels/attention_varlen/__init__.py:attention_varlen": "the arguments of torch's own attention",
}


def sources() -> Iterator[Path]:
    for root in (*SOURCE_ROOTS, "tests", "examples", "benchmarks", "deploy"):
        for path in sorted((ROOT / root).rglob("*.py")):
            if "_pb2" not in path.name and "build" not in path.parts:
                yield path


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parts(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what stands directly in a node and can hold statements: an expression cannot, and most nodes are some."""
    return (child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in parts(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        yield from functions(node)


def nesting(node: ast.AST, depth: int = 0) -> int:
    """Deepest block below a function, itself not counted; nested functions count for themselves."""
    blocks = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.AsyncFor, ast.AsyncWith, ast.Match)
    deepest = depth
    for child in parts(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        step = 1 if isinstance(child, blocks) and not is_elif else 0
        deepest = max(deepest, nesting(child, depth + step))
    return deepest


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, its docstring not counted."""
    assert function.end_lineno is not None
    total = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None and first.end_lineno is not None:
        total -= first.end_lineno - first.lineno + 1
    return total


def test_imports_obey_the_contracts() -> None:
    # In a process of its own: it silences every logger that there is.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_source_root_owns_the_namespace() -> None:
    """An __init__.py directly under luthier/ would hide every other source root."""
    assert [root for root in SOURCE_ROOTS if (ROOT / root / "luthier" / "__init__.py").exists()] == []


def test_every_package_is_in_the_wheel() -> None:
    """An editable install finds a package that the wheel map forgot; a user's install would not."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    mapped = settings["tool"]["scikit-build"]["wheel"]["packages"]
    found = {
        f"luthier/{path.parent.relative_to(ROOT / root / 'luthier')}": relative(path.parent)
        for root in ("services", "kernels")
        for pattern in ("*/__init__.py", "worker/*/__init__.py", "stored/*/__init__.py")
        for path in (ROOT / root / "luthier").glob(pattern)
    }
    assert mapped == found


@pytest.mark.parametrize("path", list(sources()), ids=relative)
def test_source_stays_small(path: Path) -> None:
    name = relative(path)
    text = path.read_text()
    if name not in EXCEPTIONS:
        assert text.count("\n") <= MAX_FILE_LINES
    for function in functions(ast.parse(text)):
        if f"{name}:{function.name}" in EXCEPTIONS:
            continue
        where = f"{name}:{function.lineno} {function.name}"
        assert code_lines(function) <= MAX_FUNCTION_LINES, where
        assert nesting(function) <= MAX_NESTING, where
        arguments = function.args
        parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        counted = [one for one in parameters if one.arg not in {"self", "cls"}]
        if not name.startswith("tests/") and not is_triton_kernel(function):
            assert len(counted) <= MAX_PARAMETERS, where


def is_triton_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A kernel takes every pointer, stride and size by itself: it has no structures."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def test_exceptions_are_still_needed() -> None:
    names = {relative(path) for path in sources()}
    assert {key.partition(":")[0] for key in EXCEPTIONS} <= names


def test_modules_are_named_by_their_job() -> None:
    assert [relative(path) for path in sources() if path.stem in BANNED_NAMES] == []


# What rules know besides: messages, and what resources may be called and hold.
KNOWN_TO_RULES = (
    "google.protobuf",
    "luthier.errors",
    "luthier.v1",
    "luthier.worker.v1",
    "luthier.stored.v1",
    "luthier.runtime.digests",
    "luthier.runtime.field_limits",
    "luthier.runtime.labels",
    "luthier.runtime.names",
    "luthier.runtime.result_limits",
    "luthier.runtime.webhook_limits",
    "re2",  # whether a text is a regular expression only its reader can tell
)


PURE = (
    "luthier.grading.",
    "luthier.lm.kept",
    "luthier.lm.made",
    "luthier.lm.module_patterns",
    "luthier.lm.precision",
)


def pure_imports(path: Path, service: str) -> Iterator[str]:
    """Imports of a module that rules may not have; those of its service and of `PURE` are to be as pure as it is."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        packages = ("luthier.runtime", "luthier.grading")
        if isinstance(node, ast.ImportFrom) and node.module in packages:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] in sys.stdlib_module_names or name.startswith(KNOWN_TO_RULES):
                continue
            sibling = ROOT / "services" / f"{name.replace('.', '/')}.py"
            if name.startswith((f"luthier.{service}.", *PURE)) and sibling.exists():
                yield from pure_imports(sibling, service)
            else:
                yield f"{relative(path)} imports {name}"


RULES = sorted((ROOT / "services").rglob("rules.py"))


def test_every_family_has_rules_and_is_in_their_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = (one for one in contracts if one["name"].startswith("Rules know"))
    named = {".".join(path.relative_to(ROOT / "services").with_suffix("").parts) for path in RULES}
    assert len(named) == 9
    assert named <= set(contract["source_modules"])


@pytest.mark.parametrize("path", RULES, ids=relative)
def test_rules_know_neither_the_wire_nor_storage(path: Path) -> None:
    service = path.relative_to(ROOT / "services" / "luthier").parts[0]
    assert list(pure_imports(path, service)) == []


def test_only_the_configuration_reader_reads_the_environment() -> None:
    allowed = {
        "services/luthier/runtime/config.py",
        "clients/python/luthier/client/config.py",
    }
    readers = {
        relative(path)
        for root in SOURCE_ROOTS
        for path in (ROOT / root).rglob("*.py")
        if re.search(r"os\.(environ|getenv)|from os import .*environ", path.read_text())
    }
    assert readers <= allowed


def test_only_the_bindings_include_python() -> None:
    including = {
        relative(path)
        for path in (ROOT / "kernels" / "csrc").rglob("*.[ch]pp")
        if re.search(r'#include [<"](pybind11|Python|torch)', path.read_text())
    }
    assert including == {"kernels/csrc/bindings.cpp"}


def test_templates_are_run_in_one_place() -> None:
    """The sandbox, and with it the limited process that holds it, is where it is alone."""
    importing = [
        relative(path)
        for root in ("services", "clients/python")
        for path in (ROOT / root).rglob("*.py")
        if re.search(r"^\s*(import|from) jinja2\b", path.read_text(), re.MULTILINE)
    ]
    assert sorted(importing) == ["services/luthier/text/sandbox.py", "services/luthier/text/templates.py"]


def test_services_never_fork_with_threads() -> None:
    """fork in a process that runs gRPC deadlocks: children are started by exec or spawn.

    One module forks in processes that it looks at before each fork: they have one thread. Another forks what reads the
    tokenizers of models, in children, which have no gRPC.
    """
    forking = [
        relative(path)
        for path in sorted((ROOT / "services").rglob("*.py"))
        if re.search(r"os\.fork\b|get_context\(\s*[\"']fork|multiprocessing\.Process\(", path.read_text())
    ]
    assert forking == ["services/luthier/work/forking.py", "services/luthier/work/limited_fork.py"]
    assert imported_by("luthier.work.forking", "forked") == ["services/luthier/work/child.py"], (
        "it is no worker's and no service's"
    )
    apart = "services/luthier/training/worker/tokenizers_apart.py"
    assert imported_by("luthier.work.limited_fork", "in_fork") == [apart]
    assert imported_by("luthier.training.worker.tokenizers_apart", "tokenizers_apart") == [
        "services/luthier/training/worker/child.py"
    ]


def imported_by(module: str, *names: str) -> list[str]:
    """Files of services that import one of some names from a module."""
    found = []
    for path in sorted((ROOT / "services").rglob("*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if module in text else ():
            if isinstance(node, ast.ImportFrom) and node.module == module:
                found += [relative(path) for alias in node.names if alias.name in names]
    return found


MAKES_TOKENIZERS = {
    "tokenizers": r"^\s*(import|from) tokenizers\b",
    "of transformers": r"\b(AutoTokenizer|PreTrainedTokenizer\w*|LlamaTokenizer\w*)\b",
    "ours": r"\bTokenizerBundle\b",
}
RUNS_TOKENIZERS = ("luthier.lm.tokenizer_files", "luthier.lm.read_tokenizer")
"""Modules of which every function runs a tokenizer; what they import of one another they do so too."""


def test_tokenizers_are_made_in_limited_processes_alone() -> None:
    """In text, which is given one; in the modules that limited processes run; and where `lm.apart` says."""
    making = {
        relative(path)
        for path in (ROOT / "services").rglob("*.py")
        if re.search("|".join(MAKES_TOKENIZERS.values()), path.read_text(), re.MULTILINE)
    }
    assert making == {
        "services/luthier/data/worker/record_rendering.py",
        "services/luthier/lm/gguf_tokenizer.py",
        "services/luthier/lm/read_tokenizer.py",
        "services/luthier/lm/tokenizer_files.py",
        "services/luthier/lm/written_tokenizer.py",
        "services/luthier/text/boundaries.py",
        "services/luthier/text/rendering.py",
        "services/luthier/text/tokenizer.py",
        "services/luthier/work/text_child.py",
    }
    rendering = imported_by("luthier.data.worker.record_rendering", "RecordRenderer")
    assert rendering == ["services/luthier/data/worker/render_child.py"]
    assert imported_by("luthier.lm.gguf_tokenizer", "stored_tokenizer") == [
        "services/luthier/lm/read_tokenizer.py"
    ]


def test_what_runs_tokenizers_in_models_is_handed_to_apart() -> None:
    handing = {
        relative(path): calls_outside_of_facts(ast.parse(path.read_text()))
        for path in (ROOT / "services").rglob("*.py")
        if f"luthier.{path.relative_to(ROOT / 'services/luthier').with_suffix('').as_posix().replace('/', '.')}"
        not in RUNS_TOKENIZERS
        and re.search(rf"from ({'|'.join(map(re.escape, RUNS_TOKENIZERS))}) import", path.read_text())
    }
    assert handing == {
        f"services/luthier/lm/{name}.py": [] for name in ("comparing", "exporting", "merging", "register")
    }


def calls_outside_of_facts(tree: ast.Module) -> list[str]:
    """Calls of what runs tokenizers that are not in the last argument, a lambda, of a call of `facts`."""
    runs = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module in RUNS_TOKENIZERS
        for alias in node.names
        if alias.name[0].islower()
    }
    handed = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "facts"
        if isinstance(node.args[-1], ast.Lambda)
        for inner in ast.walk(node.args[-1])
    }
    return [
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id in runs and node not in handed
    ]
