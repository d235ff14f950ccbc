"""Environments with a given version of triton, and the ahead-of-time compilation in each of them.

`python benchmarks/triton_versions.py` runs `triton_static.py` with the newest triton and with the one that the
installed torch asks for on machines with a GPU, and writes results/triton_static.json: all of the newest's results,
and both summaries. The exit code is 1 when that of either run is.

An environment lies below build/environments and sees the packages of the one that made it beneath its own, so that
torch is not installed again.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from triton_static import RESULTS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "environments"


def commands(folder: Path, requirements: Sequence[str]) -> tuple[list[str], list[str]]:
    """What makes an empty environment, and what installs the requirements in it."""
    constraints = str(ROOT / "constraints-dev.txt")
    pip = [str(interpreter(folder)), "-m", "pip", "install", "--quiet"]
    return [sys.executable, "-m", "venv", "--clear", str(folder)], [*pip, "-c", constraints, *requirements]


def interpreter(folder: Path) -> Path:
    """The Python of an environment."""
    return folder / "bin" / "python"


def make(name: str, requirements: Sequence[str]) -> Path:
    """The Python of an environment that holds the requirements; it is made unless it was made of the same before.

    Raises:
        subprocess.CalledProcessError: the environment could not be made.
    """
    folder = FOLDER / name
    seen = sysconfig.get_path("purelib")
    made_of = folder / "made-of.txt"
    wanted = "\n".join((sys.version, seen, *requirements))
    if made_of.exists() and made_of.read_text() == wanted:
        return interpreter(folder)
    empty, install = commands(folder, requirements)
    subprocess.run(empty, check=True)
    own = Path(sysconfig.get_path("purelib", scheme="venv", vars={"base": str(folder)}))
    # Not a bare path: editable packages are found by .pth files, which are read in site folders only.
    (own / "seen.pth").write_text(f"import site; site.addsitedir({seen!r})\n")
    subprocess.run(install, check=True)
    made_of.write_text(wanted)
    return interpreter(folder)


def versions() -> dict[str, str]:
    """Versions of triton to run with, the newest first, and why each.

    Raises:
        subprocess.CalledProcessError: the package index does not answer.
        ValueError: torch asks for no one version.
    """
    newest = str(_metadata("triton")["version"])
    release = metadata.version("torch").partition("+")[0]
    # The release itself, by `===`: a build for CPUs asks for no triton.
    asked = asked_by(_metadata(f"torch==={release}"))
    why = f"asked for by torch {release}"
    return {newest: f"newest, {why}"} if asked == newest else {newest: "newest", asked: why}


def asked_by(torch: Mapping[str, Any]) -> str:
    """The version of triton in the metadata of a torch.

    Raises:
        ValueError: there is none.
    """
    found = re.findall(r"^triton==([\w.]+)", "\n".join(torch.get("requires_dist", ())), re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"torch {torch['version']} must ask for one version of triton, got {found}")
    return str(found[0])


def _metadata(requirement: str) -> Mapping[str, Any]:
    """The metadata of what pip would install, which is not fetched."""
    # Older ones fetch the whole package.
    python = make("pip", ["pip>=23.3"])
    options = ["--quiet", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-"]
    command = [str(python), "-m", "pip", "install", *options, requirement]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: Mapping[str, Any] = json.loads(text)["install"][0]["metadata"]
    return found


def run_each(script: Path, options: Sequence[str] = (), requirements: Sequence[str] = ()) -> tuple[int, Any]:
    """Run a script with each version of triton; returns the greatest exit code and its results, merged.

    Args:
        script: takes `--results FILE` and writes them there.
        options: of the script.
        requirements: packages that it needs beside triton.

    Raises:
        FileNotFoundError: a run wrote no results.
    """
    codes, reports = [], []
    why = versions()
    for version, reason in why.items():
        print(f"== triton {version}, {reason}", flush=True)
        name = f"{script.stem}-{version}"
        python = make(name, [f"triton=={version}", *requirements])
        report = FOLDER / f"{name}.json"
        report.unlink(missing_ok=True)
        command = [str(python), str(script), *options, "--results", str(report)]
        codes.append(subprocess.run(command, check=False).returncode)
        reports.append(json.loads(report.read_text()))
    return max(codes), merged(reports, why)


def merged(reports: Sequence[Mapping[str, Any]], why: Mapping[str, str]) -> dict[str, Any]:
    """All that the first report says, and `tritons`: what each says but for its lists, by its version of triton."""
    tritons = {}
    for report in reports:
        short = {key: value for key, value in report.items() if not _is_long(value)}
        version = short.pop("triton")
        tritons[version] = {"why": why[version], **short}
    return {"tritons": tritons, **reports[0]}


def _is_long(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(one, dict) for one in value)


def main() -> int:
    """Run, print, write; returns the exit code."""
    code, results = run_each(Path(__file__).with_name("triton_static.py"))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
