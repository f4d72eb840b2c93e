"""The front page is short, and no page names a file, a folder or a heading that does not exist."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (".github", "configs", "docker", "launch", "tests", "vaescale")
FRONT = ROOT / "README.md"
PAGES = [FRONT, *sorted(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
# As a word of its own, not the end of /opt/vaescale/runs; not with a placeholder in it, as in configs/….yaml.
NAMED = re.compile(r"(?<![\w/.$~-])(?:launch|configs|vaescale|tests|docker)/[\w./-]*(?![\w…*{$<-])")


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page: its headings in lower case, without punctuation, with hyphens for spaces."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path, text: str) -> Iterator[str]:
    """Returns the links and paths in a page's text that do not exist."""
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            yield link
    for named in NAMED.findall(re.sub(LINK, "]", text)):
        if not (ROOT / named.rstrip(".")).exists():
            yield named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_exist(page: Path) -> None:
    assert list(broken(page, page.read_text())) == []


def test_a_wrong_link_or_path_is_found() -> None:
    text = (
        "[a](launch/README.md) [b](launch/none.md) [c](launch/README.md#none) [d](https://example.org/none) "
        "`configs/none.yaml`, launch/train.py. configs/….yaml /opt/vaescale/none configs/${family}.yaml"
    )
    assert list(broken(FRONT, text)) == ["launch/none.md", "launch/README.md#none", "configs/none.yaml"]


def test_the_front_page_is_short() -> None:
    text = FRONT.read_text()
    assert len(text.splitlines()) <= 110
    assert len(text.split()) <= 1000


def test_the_page_of_configs_has_each_of_them() -> None:
    named = set(re.findall(r"`(\w+\.yaml)`", (ROOT / "configs" / "README.md").read_text()))
    assert named == {path.name for path in (ROOT / "configs").glob("*.yaml")}
