"""Who imports what from outside, and what is written nowhere: read off the sources.

What rooms import of each other is import-linter's business (pyproject.toml); it does not see these.
"""

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("lumina", "kernels", "megatron_patches")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
EACH = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def name_of(path: Path) -> str:
    """From the root, with slashes, so that a folder is a prefix."""
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    """A source, parsed once for all tests."""
    return ast.parse(path.read_text())


def imported(tree: ast.AST) -> Iterator[str]:
    """Every module that is imported, and every dotted name that begins with an imported module."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from (argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, *rest = ast.unparse(node).split(".")
            if head in names:
                yield ".".join([names[head], *rest])


def uses(tree: ast.AST, package: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for name in imported(tree))


# Where each may be used. Elsewhere a laptop must do without it.
ALLOWED = {
    "torch.distributed": ("lumina/parallel/",),
    "deepspeed": ("lumina/parallel/engine.py",),
    "megatron": ("lumina/parallel/", "megatron_patches/"),
    "flash_attn": (),
    "apex": (),
    "fairscale": (),
}


@pytest.mark.parametrize("package", ALLOWED)
def test_outside_packages_are_used_in_their_room_only(package):
    using = [name_of(path) for path in SOURCES if uses(tree_of(path), package)]
    assert [name for name in using if not name.startswith(ALLOWED[package])] == []


def test_deepspeed_and_torch_distributed_are_found_where_they_are():
    """The look-out is not blind: both are used."""
    using = {p: [name_of(path) for path in SOURCES if uses(tree_of(path), p)] for p in ALLOWED}
    assert using["deepspeed"] == ["lumina/parallel/engine.py"]
    assert "lumina/parallel/mesh.py" in using["torch.distributed"]


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed",
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed import all_reduce",
        "import torch\ntorch.distributed.get_rank()",
        "import torch as t\nt.distributed.get_rank()",
        "def f():\n    import torch.distributed.tensor",
        "import importlib\nimportlib.import_module('torch.distributed')",
    ],
)
def test_every_way_of_importing_is_seen(source):
    assert uses(ast.parse(source), "torch.distributed")
    assert not uses(ast.parse(source.replace("distributed", "nn")), "torch.distributed")


# Settings come from the configuration; a launcher's are read where the mesh is laid, LUMINA_KERNELS by the dispatcher.
# What starts ranks hands its own environment on to them.
MAY_READ_ENVIRONMENT = (
    "lumina/parallel/",
    "lumina/cli.py",
    "lumina/cli_launch.py",
    "lumina/launch/",
    "kernels/dispatch.py",
)


@EACH
def test_no_environment_variables(path):
    if name_of(path).startswith(MAY_READ_ENVIRONMENT):
        return
    found = {name for name in imported(tree_of(path)) if re.match(r"os\.(environ|getenv|putenv)", name)}
    assert found == set()


# They run code that is in the file.
UNPICKLERS = re.compile(
    r"(c?[pP]ickle|cloudpickle|dill|marshal|joblib)\.(load|loads|Unpickler)$|shelve\.open$|pandas\.read_pickle$"
)


@EACH
def test_nothing_from_disk_is_unpickled(path):
    tree = tree_of(path)
    assert [name for name in imported(tree) if UNPICKLERS.match(name)] == []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        for option, wanted in (("weights_only", True), ("allow_pickle", False), ("trust_remote_code", False)):
            if option in given:
                assert isinstance(given[option], ast.Constant), ast.unparse(node)
                assert given[option].value is wanted, ast.unparse(node)
        if ast.unparse(node.func) == "torch.load":
            assert "weights_only" in given, ast.unparse(node)
        assert ast.unparse(node.func) not in ("yaml.unsafe_load", "yaml.full_load", "eval", "exec")


@EACH
def test_no_error_is_swallowed(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: bare except"
            assert [type(statement) for statement in node.body] != [ast.Pass], f"line {node.lineno}: except and pass"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func).split(".")[-1] != "suppress", f"line {node.lineno}: suppress"


@EACH
def test_every_module_says_what_it_is(path):
    docstring = ast.get_docstring(tree_of(path))
    assert docstring
    assert docstring.split("\n\n")[0].rstrip().endswith((".", ":", "`")), docstring


def test_the_model_and_its_pipeline_import_no_cluster():
    """A laptop samples without DeepSpeed and Megatron."""
    code = (
        "import sys, lumina.model.pretrained, lumina.kernels, lumina.flow.solver\n"
        "from lumina import FlagDiT, FlagDiTConfig, LuminaPipeline\n"
        "heavy = ('deepspeed', 'megatron', 'transformers', 'diffusers', 'flash_attn')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_what_starts_ranks_needs_no_torch():
    """It is at work before they are, and lives on when they have died."""
    code = "import sys, lumina.cli, lumina.launch.supervisor\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stdout + done.stderr


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """What setup.py tells setuptools, which is stood in for: no file is written into the tree."""
    code = (
        "import json, setuptools\nfound = {}\nsetuptools.setup = lambda **given: found.update(given)\n"
        "import runpy\nrunpy.run_path('setup.py')\nprint(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return json.loads(done.stdout)


def test_the_wheel_holds_every_room_under_one_name(metadata):
    packages = metadata["packages"]
    assert {"lumina", "lumina.kernels", "lumina.megatron_patches"} <= set(packages)
    # A top-level `kernels` would overwrite Hugging Face's, which transformers imports.
    assert {package.split(".")[0] for package in packages} == {"lumina"}
    assert metadata["package_dir"] == {"lumina.kernels": "kernels", "lumina.megatron_patches": "megatron_patches"}
    folders = {path.parent for path in SOURCES}
    expected = {name_of(folder).replace("/", ".") for folder in folders}
    expected = {name if name.startswith("lumina") else f"lumina.{name}" for name in expected}
    assert set(packages) == expected
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_the_wheel_says_who_it_is(metadata):
    from lumina import __version__

    assert (metadata["name"], metadata["version"]) == ("lumina-t2x", __version__)
    assert metadata["entry_points"] == {"console_scripts": ["lumina = lumina.cli:main"]}
    required = {re.match(r"[\w-]+", line).group().lower() for line in metadata["install_requires"]}
    assert not required & {"flash-attn", "apex", "fairscale", "wandb", "gradio"}


PACKAGE_OF = {
    "megatron": "megatron-core",
    "yaml": "pyyaml",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "huggingface_hub": "transformers",
    "skimage": "scikit-image",
}


def test_what_is_imported_is_required(metadata):
    """Every library that a source imports is installed with the wheel, or is an extra's."""
    lines = metadata["install_requires"] + [line for extra in metadata["extras_require"].values() for line in extra]
    required = {re.match(r"[\w-]+", line).group().lower().replace("-", "_") for line in lines}
    tops = {
        name.split(".")[0]
        for path in SOURCES
        for node in ast.walk(tree_of(path))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom) and node.level == 0
            else []
        )
    }
    outside = tops - set(sys.stdlib_module_names) - {"lumina"}
    assert {PACKAGE_OF.get(name, name).lower().replace("-", "_") for name in outside} <= required
