"""How the site is made of the repository: hooks of MkDocs, docstrings as Markdown, and the page of settings.

python docs/build.py    # writes docs/settings.md, from the docstrings of the configurations
"""

import ast
import html
import inspect
import json
import posixpath
import re
from pathlib import Path


ROOT = Path(__file__).parent.parent
# Pages that lie elsewhere in the repository, and are read there too.
PAGES = {
    "README.md": "index.md",
    "notebooks/quickstart.ipynb": "notebook.md",
    "notebooks/gsm8k.ipynb": "notebook_gsm8k.md",
    "recipes/README.md": "recipes.md",
    "benchmarks/results/study.md": "study.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
SETTINGS = """\
# Settings

`E3GRPOConfig` is TRL's [`GRPOConfig`](https://huggingface.co/docs/trl/grpo_trainer#trl.GRPOConfig) with these fields
more, of which `FastGRPOConfig` has those that say so. Their defaults are the paper's; all others keep TRL's, and the
paper's objective also needs `loss_type: grpo`. Which to switch on when: [Which switch for what](method.md). A value
that cannot be is refused by a message before a model is loaded: [When something goes wrong](troubleshooting.md).

<!-- Made by `python docs/build.py` from the docstrings of the two classes. -->
"""


def as_markdown(docstring: str, link=lambda name: f"`{name}`") -> str:
    r"""
    A docstring in TRL's style (formulas in `\\( \\)`, names in brackets, sections with an indented body) as Markdown.

    Args:
        docstring (`str`): as `ast` reads it.
        link (`Callable`, *optional*): what is written for a name in brackets. By default the name, as code.
    """
    text = inspect.cleandoc(docstring)
    text = re.sub(r"\\\\\(\s*(.*?)\s*\\\\\)", lambda found: f"${' '.join(found[1].split())}$", text, flags=re.DOTALL)
    text = re.sub(r"\[`~?([\w.]+)`\](?!\()", lambda found: link(found[1].split(".")[-1]), text)
    section = r"^(Args|Parameters|Attributes|Returns|Raises|Yields|Example):\n((?:\n|    .*\n)*)"
    return re.sub(section, _section, text + "\n", flags=re.MULTILINE).strip()


def _section(found: re.Match) -> str:
    """A section, in whose body what has a name is an item of a list."""
    body = inspect.cleandoc(found[2])
    body = re.sub(r"^((?:[*\w]+, )*[*\w]+)((?: \(.*\))?:)\s+", r"- `\1`\2 ", body, flags=re.MULTILINE)
    body = re.sub(r"^(?=`\w+`: )", "- ", body, flags=re.MULTILINE)
    return f"**{found[1]}**\n\n{body}\n\n"


def _class_docstring(path: str) -> str:
    (node,) = [node for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.ClassDef)]
    return ast.get_docstring(node)


def settings_page() -> str:
    """The text of `docs/settings.md`: each field of the two configurations under a heading of its own, by group."""
    groups: dict[str, list[str]] = {}
    for path, note in (("e3_trl/config.py", ""), ("e3_trl/grpo/config.py", " Of `FastGRPOConfig` too.")):
        _, _, body = as_markdown(_class_docstring(path)).partition("**Parameters**\n\n")
        for part in re.split(r"^> Parameters (?:that control|of) ", body, flags=re.MULTILINE)[1:]:
            title, fields = part.split("\n", 1)
            # A paper stands below the heading.
            title = title[0].upper() + re.sub(r" \((http.*)\)", r"\n\n\1", title[1:])
            for field in re.split(r"^- ", fields, flags=re.MULTILINE)[1:]:
                name, kind, text = re.fullmatch(r"(`\w+`) \((.*?)\): (.*)", field.strip(), flags=re.DOTALL).groups()
                default = kind.partition("defaults to ")[2] or "`None`"
                type_ = kind.partition(",")[0]
                text = inspect.cleandoc(" " * 4 + text)
                groups.setdefault(title, []).append(f"### {name}\n\n*{type_}, default {default}.*{note}\n\n{text}\n")
    return "\n".join([SETTINGS, *("\n".join([f"## {title}\n", *groups[title]]) for title in groups)])


def notebook_page(notebook: dict) -> str:
    """A notebook without outputs as Markdown."""
    cells = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in notebook["cells"]]
    return "\n\n".join(f"```python\n{source}\n```" if is_code else source for source, is_code in cells)


def on_files(files, config):
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        text = notebook_page(json.loads(text)) if source.endswith(".ipynb") else text
        files.append(File.generated(config, page, content=text))


def on_page_markdown(markdown, page, config, files):
    """Links are written for the repository: those to another page stay in the site, the others go to the host."""
    source = {made: source for source, made in PAGES.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def relink(found):
        path, hash_, anchor = found[2].partition("#")
        if not path or re.match(r"https?:|mailto:", path):
            return found[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if target in PAGES or (target.startswith("docs/") and not target.endswith(".py")):
            return f"{found[1]}({PAGES.get(target, target.removeprefix('docs/'))}{hash_}{anchor})"
        if not config.repo_url:
            return found[1][1:-1]  # its address is not known, so what lies there is named and not linked
        return f"{found[1]}({config.repo_url}/blob/main/{target}{hash_}{anchor})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    # A label has no other brackets in it, but for code.
    label = r"(!?\[(?:[^\[\]`]|`[^`]*`)*\])\(([^)\s]+)\)"
    return "".join(part if part.startswith("```") else re.sub(label, relink, part) for part in parts)


def on_page_content(content, page, config, files):
    """Formulas as MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert

    def draw(found):
        return convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")

    return re.sub(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', draw, content, flags=re.DOTALL)


try:
    import griffe
except ModuleNotFoundError:  # which the page of settings does not need
    pass
else:

    class Docstrings(griffe.Extension):
        """Gives mkdocstrings the docstrings as Markdown, with links to what stands on the page of the API."""

        def on_object(self, *, obj, **kwargs):
            if obj.docstring:
                obj.docstring.value = as_markdown(obj.docstring.value, self.link)

        @staticmethod
        def link(name: str) -> str:
            if name in ("E3GRPOConfig", "FastGRPOConfig"):
                return f"[`{name}`](settings.md)"
            page = (ROOT / "docs" / "api.md").read_text()
            return f"[`{name}`][e3_trl.{name}]" if f"::: e3_trl.{name}\n" in page else f"`{name}`"


if __name__ == "__main__":
    (ROOT / "docs" / "settings.md").write_text(settings_page())
