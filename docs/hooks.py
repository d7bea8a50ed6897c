"""What mkdocs does for this site beside its plugins: see mkdocs.yml."""

import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code)")


def on_files(files, config):
    """The measurements are written beside their experiments, and belong to the site, too."""
    folder = ROOT / "experiments"
    for path in (folder / "README.md", *folder.glob("results/*.png")):
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links are as they are in the repository, where experiments/ lies beside docs/ and not in it."""
    return re.sub(r"\]\(\.\./((?:\.\./)*experiments/)", r"](\1", markdown)


def on_page_content(html, page, config, files):
    """Formulas as MathML, which browsers lay out by themselves; no names of roles before names in docstrings."""

    def formula(found):
        return convert(unescape(found[2]), display="block" if found[1] == "div" else "inline")

    return ROLE.sub("", FORMULA.sub(formula, html))
