"""MkDocs hook: adds the pages that have another source, and fills in what is generated from the code.

Pages: README.md (as index.md), CHANGELOG.md, SECURITY.md and CONTRIBUTING.md. Pictures in docs/measurements get their
second file, for dark pages. Markers in pages: `<!-- commands -->` becomes the reference of the command line,
`<!-- fields of module:Type -->` a table of the fields of a dataclass or msgspec Struct, and `<!-- schema of
module:Type -->` its JSON Schema.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import re
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
# Sources outside of docs/, and the pages that they become.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages whose source is outside of docs/."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        text = relink((ROOT / source).read_text(encoding="utf-8"), source)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the markers of a page, and point links that leave docs/ at the pages of the site."""
    text = markdown if page.file.src_uri in PAGES.values() else relink(markdown, f"docs/{page.file.src_uri}")
    text = text.replace("<!-- commands -->", commands())
    text = for_both_themes(text)
    text = re.sub(r"<!-- fields of ([\w.]+):(\w+) -->", lambda found: field_table(found[1], found[2]), text)
    return re.sub(r"<!-- schema of ([\w.]+):(\w+) -->", lambda found: schema(found[1], found[2]), text)


def for_both_themes(text: str) -> str:
    """Show one of the two files of a measured picture, by the theme of the page."""
    pictures = re.compile(r"!\[([^\]]*)\]\((measurements/[\w-]+)\.svg\)")
    return pictures.sub(r"![\1](\2.svg#only-light)![\1](\2-dark.svg#only-dark)", text)


def relink(text: str, source: str) -> str:
    """Rewrite relative links of a document for its place in the site; in README.md names of pages become links."""
    folder = (ROOT / source).parent

    def link(found: re.Match[str]) -> str:
        target = (folder / found[2]).resolve()
        if not target.is_relative_to(ROOT):
            return found[0]
        path = target.relative_to(ROOT).as_posix()
        return f"{found[1]}{PAGES.get(path, path.removeprefix('docs/'))}{found[3]}"

    text = re.sub(r"(\]\()(?!\w+:|#|/)([^)#\s]+)((?:#[^)]*)?\))", link, text)
    if source in PAGES:
        outside = "|".join(re.escape(name) for name in PAGES)
        text = re.sub(
            rf"(?<!\[)`(docs/[\w-]+\.md|{outside})`",
            lambda found: f"[{found[1]}]({PAGES.get(found[1], found[1].removeprefix('docs/'))})",
            text,
        )
    return text


def commands() -> str:
    """Return the reference of all verbs, from the Typer application."""
    import typer

    from lrt_deploy.cli.app import app

    group: Any = typer.main.get_command(app)
    return "\n\n".join(verb(name, command) for name, command in group.commands.items())


def verb(name: str, command: Any) -> str:  # noqa: ANN401 - typer has its own copy of Click
    """Return the section of one verb: usage, what it does, its options by panel."""
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    options = [param for param in command.params if param.param_type_name == "option"]
    words = " ".join(param.metavar or param.name.upper() for param in arguments)
    parts = [
        f"## {name}",
        f"```text\nlrt-deploy {name} {words}".rstrip() + " [OPTIONS]\n```",
        inspect.cleandoc(command.help),
    ]
    if arguments:
        parts.append(
            table("argument", [(f"`{param.metavar or param.name.upper()}`", param.help) for param in arguments])
        )
    parts.append(table("option", [(option_name(param), option_help(param)) for param in options]))
    return "\n\n".join(parts)


def option_name(param: Any) -> str:  # noqa: ANN401
    """Return the names of an option with the name of its value."""
    kind = {"int": "N", "float": "X", "Path": "PATH"}.get(str(param.bare_type()), "TEXT")
    value = "" if param.is_flag else f" {param.metavar or kind}"
    return f"`{', '.join(param.opts)}{value}`"


def option_help(param: Any) -> str:  # noqa: ANN401
    """Return the help of an option with its default, where one is set that the help does not name."""
    default = getattr(param.default, "value", param.default)
    shown = not param.is_flag and isinstance(default, str | int | float | Path) and "default:" not in (param.help or "")
    repeated = " Repeatable." if param.multiple and "repeat" not in (param.help or "").lower() else ""
    return f"{param.help or ''}{repeated}" + (f" Default: `{default}`." if shown else "")


def table(what: str, rows: list[tuple[str, str | None]]) -> str:
    """Return a Markdown table of two columns."""
    lines = [f"| {name} | {cell(text or '')} |" for name, text in rows]
    return "\n".join([f"| {what} | |", "| --- | --- |", *lines])


def cell(text: str) -> str:
    """Return a text for a cell of a table; special tokens and types are code, not markup."""
    text = re.sub(r"<\|\w+\|>", lambda found: f"`{found[0]}`", " ".join(text.split()))
    return text.replace("|", "\\|")


def field_table(module: str, name: str) -> str:
    """Return a table of the fields of a dataclass or Struct, with their types and defaults."""
    kind = getattr(importlib.import_module(module), name)
    hints = typing.get_type_hints(kind)
    lines = [f"| `{field}` | {type_text(hints[field])} | {default} |" for field, default in defaults(kind)]
    return "\n".join(["| field | type | default |", "| --- | --- | --- |", *lines])


def defaults(kind: type) -> list[tuple[str, str]]:
    """Return names and defaults of the fields of a dataclass or Struct, in their order."""
    if dataclasses.is_dataclass(kind):
        missing: Any = dataclasses.MISSING
        found = [(field.name, field.default, field.default_factory) for field in dataclasses.fields(kind)]
    else:
        missing = msgspec.NODEFAULT
        found = [(field.name, field.default, field.default_factory) for field in msgspec.structs.fields(kind)]
    return [
        (name, f"`{json.dumps(value)}`" if value is not missing else "empty" if factory is not missing else "required")
        for name, value, factory in found
    ]


def type_text(kind: Any) -> str:  # noqa: ANN401
    """Return the name of a type for JSON: integers, lists, objects by the name of their class."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (list, tuple):
        items = [item for item in arguments if item is not ...]
        return f"list of {' , '.join(dict.fromkeys(type_text(item) for item in items))}"
    if origin is not None and isinstance(origin, type) and issubclass(origin, typing.Mapping):
        return f"object, {type_text(arguments[0])} to {type_text(arguments[1])}"
    if arguments:
        return " or ".join(dict.fromkeys(type_text(item) for item in arguments))
    plain = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null", Any: "any"}
    plain |= {dict: "object", Path: "string", object: "any"}
    return plain.get(kind, f"`{getattr(kind, '__name__', kind)}`")


def schema(module: str, name: str) -> str:
    """Return the JSON Schema of a type in a block that opens."""
    kind = getattr(importlib.import_module(module), name)
    text = json.dumps(msgspec.json.schema(kind, schema_hook=lambda _: {}), indent=1)
    body = "\n".join(f"    {line}" for line in ["```json", *text.splitlines(), "```"])
    return f'??? note "JSON Schema of `{name}`"\n\n{body}\n'
