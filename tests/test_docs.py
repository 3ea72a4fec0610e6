"""The documentation: its links lead somewhere, and what it names is there."""

import ast
import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest
from trl import GRPOConfig

from e3_trl import E3GRPOConfig
from e3_trl.cli import COMMANDS


ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), ROOT / "recipes" / "README.md", *(ROOT / "docs").glob("*.md")])
SOURCE = "\n".join(path.read_text() for path in sorted((ROOT / "e3_trl").rglob("*.py")))


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}"


def test_docstrings_link_to_what_is_there():
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path in sorted((ROOT / "e3_trl").rglob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, documented)]
        docstrings = "\n".join(ast.get_docstring(node) or "" for node in nodes)
        for link in re.findall(r"\]\(([^)\s]+)\)", docstrings):
            assert link.startswith("http") or (path.parent / link).exists(), f"{path} links to {link}"


def test_the_readme_is_short_and_lists_every_command():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| `e3-trl ...`") : text.index("## Limits")]
    assert re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE) == [*COMMANDS]
    assert len(text.split()) <= 1000
    assert [line for line in text.splitlines() if len(line) > 120] == []


def test_the_page_of_settings_is_made_of_the_docstrings_and_has_every_setting():
    page = (ROOT / "docs" / "settings.md").read_text()
    assert runpy.run_path(str(ROOT / "docs" / "build.py"))["settings_page"]() == page, "Run python docs/build.py."
    described = re.findall(r"^### `(\w+)`\n\n\*`.*?`, default `(.*?)`\.\*", page, re.MULTILINE)
    inherited = {field.name for field in fields(GRPOConfig)}
    own = {field.name: field.default for field in fields(E3GRPOConfig) if field.name not in inherited}
    assert {name: ast.literal_eval(default) for name, default in described} == own


def test_every_metric_is_explained():
    """Those that the code logs by a literal name; and no row is about one that is gone."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    logged = set(re.findall(r'add_metric\("([\w/]+)"', SOURCE)) | set(
        re.findall(r'^ +"(rollouts/\w+)":', SOURCE, re.MULTILINE)
    )
    explained = {
        name for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)
    }
    assert len(logged) > 8
    assert logged <= explained
    own = {name for name in explained if name.startswith(("rollouts/", "prompt_perplexity/", "entropy_weight/"))}
    assert own <= logged


def message_parts(node) -> str:
    """The text of a message, with a gap where it names a value."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(message_parts, values))
        case ast.BinOp(left=left, right=right):
            return message_parts(left) + message_parts(right)
        case ast.IfExp(body=body, orelse=orelse):
            return message_parts(body) + message_parts(orelse)
        case ast.FormattedValue() | ast.Name() | ast.Attribute() | ast.Subscript():
            return "\0"
        case ast.Call():  # of a function that makes the error
            return " ".join(map(message_parts, node.args))
    return "\0"


def raised_messages() -> tuple[list[str], list[str]]:
    """The messages that the code raises, and all texts in it that are no docstrings."""
    raised, texts = [], []
    for path in sorted((ROOT / "e3_trl").rglob("*.py")):
        tree = ast.parse(path.read_text())
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp) and id(node) not in docstrings:
                texts.append(message_parts(node))
            is_message = isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args
            if is_message and ast.unparse(node.exc.func) != "AttributeError":
                raised.append(" ".join(map(message_parts, node.exc.args)))
    of_tables = [f"{name} is \0. {remedy}" for name, _, remedy in E3GRPOConfig._settings]
    of_tables += [re.sub(r"\{.*?\}", "\0", message) for _, message in E3GRPOConfig._combinations]
    return raised + of_tables, texts + of_tables


def test_every_message_is_explained_and_can_come():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| (`.+?`) \|", text, re.MULTILINE)
    explained = [part for row in rows for part in re.findall(r"`([^`]+)`", row)]
    raised, texts = raised_messages()
    assert len(explained) > 80
    assert [part for part in explained if not any(part in one for one in texts)] == []
    # A message that is put together elsewhere, or that only passes on another one, has no words of its own.
    own = [message for message in raised if len(message.replace("\0", "").split()) > 3]
    assert len(own) > 100
    assert [message for message in own if not any(part in message for part in explained)] == []


def test_code_in_the_guides_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "your_own.md").read_text()
    code = re.search(r"```python\n# my_rewards.py\n(.*?)```", text, re.DOTALL)[1]
    scope: dict = {}
    exec(code, scope)
    assert scope["starts_with"](["ab", [{"role": "assistant", "content": "b"}]], prefix=["a", "a"]) == [1.0, 0.0]
