"""What a fresh clone promises: lists of packages that agree, a true README, one command that checks all."""

import ast
import itertools
import os
import re
import stat
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
WANTED = [Requirement(line) for line in itertools.chain(PROJECT["dependencies"], *EXTRAS.values())]
LOCK = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
MACHINES = [
    {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": system,
        "os_name": os_name,
    }
    | {
        "platform_machine": "x86_64",
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
    }
    for python in ("3.11", "3.12", "3.13")
    for system, os_name in (("linux", "posix"), ("darwin", "posix"), ("win32", "nt"))
]


def tracked(*where: str) -> list[Path]:
    """The files that git has, as paths below the root."""
    listed = subprocess.run(["git", "ls-files", "-z", *where], cwd=ROOT, check=True, capture_output=True, text=True)
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run make as a person would: what an outer make says to its children is left out."""
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


# The three lists of packages.


@pytest.mark.parametrize("machine", MACHINES, ids=lambda m: f"{m['python_version']}-{m['sys_platform']}")
def test_the_lock_pins_what_pyproject_asks_for(machine):
    pins = {}
    for pin in LOCK:
        if pin.marker is None or pin.marker.evaluate(machine):
            name = canonicalize_name(pin.name)
            assert name not in pins, f"{name} is pinned twice for this machine"
            (specifier,) = pin.specifier
            assert specifier.operator == "==", f"{pin} is no pin"
            pins[name] = specifier.version
    for wanted in WANTED:
        name = canonicalize_name(wanted.name)
        assert name in pins, f"pyproject.toml asks for {name}, requirements.lock does not pin it"
        assert wanted.specifier.contains(pins[name]), (
            f"{name}=={pins[name]} is pinned, pyproject.toml asks for {wanted}"
        )


def test_the_lock_leaves_the_choice_of_device_to_torch():
    pins = {canonicalize_name(pin.name): str(pin.specifier) for pin in LOCK}
    assert pins["torch"] == "==2.13.0", "without a local suffix: CPU and CUDA builds both satisfy it"
    assert not [name for name in pins if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_conda_and_binder_install_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    conda = [
        Requirement(re.sub(r"=(?=\d)", "==", item)) for item in environment["dependencies"] if isinstance(item, str)
    ]
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert {item.name for item in conda} == {"python", "pip"}, "every other package comes from the lock"
    (python,) = [item for item in conda if item.name == "python"]
    (version,) = [specifier.version for specifier in python.specifier]
    assert SpecifierSet(PROJECT["requires-python"]).contains(version)
    assert [line for line in pip if not line.startswith("--extra-index-url")] == [
        "-r requirements.lock",
        "-e .",
    ]


def test_every_package_that_minipar_imports_is_declared():
    declared = {canonicalize_name(requirement.name) for requirement in WANTED}
    distributions = packages_distributions()
    for path in tracked("minipar/*.py"):
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module else []
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"minipar"}:
                providers = {canonicalize_name(name) for name in distributions.get(top, [top])}
                assert providers & declared, f"{path} imports {top}, which pyproject.toml does not declare"


def test_a_wheel_carries_every_file_of_the_package(tmp_path):
    source = tmp_path / "source"
    package = tracked("minipar")
    for path in [*package, *map(Path, ("pyproject.toml", "README.md", "LICENSE"))]:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert set(map(Path, archive.namelist())) >= set(package)


# The commands.


def test_ci_runs_make_test():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    lines = script.read_text().splitlines()
    assert "set -euo pipefail" in lines and lines[-1] == "exec make test"


def test_make_test_runs_every_check():
    plan = make("-n", "--always-make", "test").stdout
    for check in (
        "ruff check",
        "ruff format --check",
        "mypy",
        "pytest",
        "--nbval-cell-timeout=90 chapters solutions",
    ):
        assert f"python -m {check}" in plan or check in plan, f"make test does not run {check}"


@pytest.mark.parametrize("target", ["lab", "test", "lint", "notebooks", "bench"])
def test_every_command_sets_up_by_itself_and_only_once(tmp_path, target):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    assert "-r requirements.lock" in make("-n", target, cwd=tmp_path).stdout
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "minipar-is-set-up").touch()
    assert "-r requirements.lock" not in make("-n", target, cwd=tmp_path).stdout
    later = (tmp_path / ".venv" / "minipar-is-set-up").stat().st_mtime + 10
    os.utime(tmp_path / "requirements.lock", (later, later))
    assert "-r requirements.lock" in make("-n", target, cwd=tmp_path).stdout


def test_an_old_python_is_named_in_one_line(tmp_path):
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    old = tmp_path / "old-python"
    asked = "import sys; code = sys.argv[1]; sys.version_info = (3, 9, 2); exec(code)"
    old.write_text(
        f"#!/bin/sh\n[ $1 = --version ] && echo Python 3.9.2 && exit\nexec {sys.executable} -c '{asked}' \"$2\"\n"
    )
    old.chmod(0o755)
    refused = make("setup", f"PYTHON={old}", cwd=tmp_path)
    assert refused.returncode != 0 and not (tmp_path / ".venv").exists()
    assert re.search(r"needs Python 3\.11 or newer and '.*' is Python 3\.9\.2", refused.stdout)


def test_make_help_names_every_target():
    helped = {line.split()[1] for line in make("help").stdout.splitlines()}
    assert helped == set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split())


# The README and the files.


def tree() -> list[Path]:
    """The paths of the README's tree: lines of 'path  what it is', indented by folder."""
    block = re.search(r"```text tree\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    folders: list[str] = []
    paths = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, described = re.fullmatch(r"(\S+)  +(\S.*)", line.strip()).groups()
        assert described
        folders[depth:] = [name]
        paths.append(Path(*folders))
    return paths


def test_the_readme_tree_is_true():
    paths = tree()
    assert len(paths) > 20
    for path in paths:
        assert (ROOT / path).exists(), f"the README's tree names {path}, which does not exist"


def test_the_readme_tree_names_every_module():
    top = {Path("minipar") / path.parts[1] for path in tracked("minipar/*.py")}
    assert not top - set(tree()), "every module is in the README's tree"


def test_no_file_names_the_machine_it_was_made_on():
    own = [f"{folder}/" for folder in (ROOT, Path.home(), Path(sys.prefix)) if len(folder.parts) > 1]
    # In pieces, so that this file does not match itself.
    homes = ["/" + "root/", "/" + r"home/\w", "/" + r"Users/\w", "/" + "work/", "/" + "tmp/ipykernel"]
    installed = [r"/[\w./-]*/" + folder for folder in (r"\.venv/", "site-packages/", "dist-packages/")]
    hosts = ["pypi" + r"\.org", "pythonhosted" + r"\.org", "npmjs" + r"\.org"]
    paths = "|".join([*map(re.escape, own), *homes, *installed])
    pattern = re.compile("|".join([rf"(?<![\w.$)-])({paths})", *hosts, *indexes()]))
    for path in tracked():
        if b"\0" in (data := (ROOT / path).read_bytes()):
            continue
        found = pattern.search(data.decode("utf-8", "replace"))
        assert not found, f"{path} names a path or host of one machine: {found[0]}"


def indexes() -> list[str]:
    """Where pip is set to look for packages here, from its files and from the environment, as patterns."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    listed += " ".join(f"'{value}'" for name, value in os.environ.items() if name.startswith(("PIP_", "UV_")))
    urls = [urlsplit(url) for url in re.findall(r"\w+://[^\s']+", listed)]
    folders = re.findall(r"find-links='([^']+)'", listed)
    return [re.escape(place) for place in [*(url.hostname or url.path for url in urls), *folders]]
