"""Checks before a version is published: `python -m tools.release.check`, which `make release-check` runs.

Every check runs and prints one line; the exit status is 1 if one failed. With --tag, for the release workflow, the
version must be the tag's, and no wheel is built.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fused_kd.core.catalogue import LOSSES
from tools.release.wheel import ROOT, Failure, run

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
#: Links to pages of the code host, not to files.
HOSTED = "../../actions/"
#: Pages that only the site has, which checks its own links.
GENERATED = {f"docs/api/{name}.md" for name in LOSSES}


def version() -> str:
    names: dict[str, str] = {}
    exec((ROOT / "fused_kd" / "_version.py").read_text(encoding="utf-8"), names)
    return names["__version__"]


def check_version(root: Path, tag: str | None) -> str:
    """The package, the citation and the changelog's newest, dated entry have the same version."""
    here = version()
    if tag not in (None, f"v{here}"):
        raise Failure(f"the tag is {tag}, and the version {here}")
    cited = re.search(r"^version: (\S+)$", (root / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if cited is None or cited[1] != here:
        raise Failure(f"CITATION.cff: expected version {here}, got {cited and cited[1]}")
    newest = re.search(r"^## (.*)$", (root / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    if newest is None or not re.fullmatch(rf"{re.escape(here)} \(\d{{4}}-\d\d-\d\d\)", newest[1]):
        raise Failure(f"CHANGELOG.md: expected its first heading to be {here} and a date, got {newest and newest[1]!r}")
    return f"{here} in the package, CITATION.cff and CHANGELOG.md"


def check_tree(tag: str | None) -> str:
    """Nothing is left to commit, and the tag, if given, points at this commit."""
    if left := run("git", "status", "--porcelain", cwd=ROOT).splitlines():
        raise Failure(f"not committed: {', '.join(line[3:] for line in left)}")
    tags = run("git", "tag", "--points-at", "HEAD", cwd=ROOT).split()
    if tag and tag not in tags:
        raise Failure(f"{tag} is not a tag of this commit; its tags: {', '.join(tags) or 'none'}")
    return f"clean; tags of this commit: {', '.join(tags) or 'none yet'}"


def broken_links(root: Path) -> Iterator[str]:
    """Links in tracked Markdown files to missing files."""
    for name in run("git", "ls-files", "*.md", cwd=root).splitlines():
        text = re.sub(r"^```.*?^```", "", (root / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in LINK.findall(text):
            if re.match(r"[a-z]+:|#", target) or target.startswith(HOSTED):
                continue
            path = os.path.normpath(Path(name).parent / target.partition("#")[0])
            if path not in GENERATED and not (root / path).exists():
                yield f"{name}: {target}"


def check_links(root: Path) -> str:
    if broken := sorted(broken_links(root)):
        raise Failure(f"links to missing files: {', '.join(broken)}")
    text = (root / "README.md").read_text(encoding="utf-8")
    inside = [target for target in LINK.findall(text) if not re.match(r"[a-z]+:|#", target)]
    note = f"; {len(inside)} of the README's are relative and broken on the package index" if inside else ""
    return f"every link between files works{note}"


def check_readme(root: Path) -> str:
    """The package index can render the README."""
    from readme_renderer import markdown

    html = markdown.render((root / "README.md").read_text(encoding="utf-8"))
    if html is None:
        raise Failure("README.md: the package index's renderer rejects it")
    return f"the package index renders it, {html.count('<table>')} tables and {html.count('<pre')} blocks of code"


def check_sdist() -> str:
    test = "tests/package/test_packages.py::test_the_sdist_has_what_git_tracks"
    run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test, cwd=ROOT)
    return "the sdist has the files that git tracks, and no others"


def check_wheel() -> str:
    run(sys.executable, "-m", "tools.release.wheel", cwd=ROOT)
    (newest, *_) = sorted((ROOT / "dist").glob("*.whl"), key=lambda path: path.stat().st_mtime, reverse=True)
    return f"{newest.name} built, checked, installed and used"


def check_docs(root: Path) -> str:
    """Run `make docs` if the Makefile has this target; else make would accept the folder docs/ as up to date."""
    if not re.search(r"^docs:", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE):
        return "not built: the Makefile has no target docs"
    run("make", "docs", cwd=root)
    return "make docs builds them"


def passed(name: str, check: Callable[[], str]) -> bool:
    try:
        print(f"{name:<8} ok      {check()}", flush=True)
    except Failure as failure:
        print(f"{name:<8} failed  {failure}", flush=True)
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.release.check", description=__doc__)
    parser.add_argument("--tag", help="the tag to publish, such as v0.2.0; builds no wheel")
    tag = parser.parse_args(arguments).tag
    checks: list[tuple[str, Callable[[], str]]] = [
        ("version", lambda: check_version(ROOT, tag)),
        ("tree", lambda: check_tree(tag)),
        ("links", lambda: check_links(ROOT)),
        ("README", lambda: check_readme(ROOT)),
        ("sdist", check_sdist),
        ("docs", lambda: check_docs(ROOT)),
        *([] if tag else [("wheel", check_wheel)]),
    ]
    failures = sum(not passed(name, check) for name, check in checks)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
