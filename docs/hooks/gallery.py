"""A page for each notebook: its cells, and after a cell that draws, the committed figure that it draws.

Nothing is run.  Outputs are those that the notebook keeps, or those of its executed copy in ``figures/runs/`` where
there is one of the same cells.
"""

import ast
import json
import re
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbformat import NotebookNode


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    pages = [f"gallery/{path.stem}.md" for path in notebooks(root(config))]
    assert config.nav is not None
    config.nav.append({"Gallery": ["gallery/index.md", *pages]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    here, entries = root(config), []
    for path in notebooks(here):
        page, title, first = write_page(path, here / "figures")
        files.append(File.generated(config, f"gallery/{path.stem}.md", content=page))
        entries.append(write_entry(path.stem, title, first))
    index = "# Gallery\n\nEvery figure is made by a notebook; each notebook asks one question.\n\n"
    files.append(File.generated(config, "gallery/index.md", content=index + "\n".join(entries)))
    return files


def root(config: MkDocsConfig) -> Path:
    return Path(config.config_file_path).parent


def notebooks(here: Path) -> list[Path]:
    return sorted((here / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def write_entry(stem: str, title: str, figure: str | None) -> str:
    picture = f"[![{title}](../figures/{figure}.png){{ width=420 }}]({stem}.md)\n\n" if figure else ""
    return f"## [{title}]({stem}.md)\n\n{picture}"


def write_page(path: Path, figures: Path) -> tuple[str, str, str | None]:
    """Return the page of a notebook, its title, and the name of its first figure if it has any."""
    notebook = nbformat.read(path, as_version=4)
    outputs = find_outputs(notebook, path.stem, figures / "runs")
    drawn = find_drawn(path.stem, figures)
    parts, shown = [], []
    for cell, found in zip(notebook.cells, outputs, strict=True):
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        names = [name for pattern in figure_names(cell.source) for name in drawn if re.fullmatch(pattern, name)]
        parts += [text for output in found if (text := write_output(output, figured=bool(names)))]
        parts += [f"![{name.replace('_', ' ')}](../figures/{name}.png)" for name in names]
        shown += names
    if not parts[0].startswith("# "):
        parts.insert(0, f"# {path.stem[3:].replace('_', ' ').capitalize()}")
    title = parts[0].splitlines()[0].removeprefix("# ")
    parts.append(f"This is `notebooks/{path.name}`; `s3lab reproduce {path.stem[:2]}` makes its figures again.")
    return "\n\n".join(parts) + "\n", title, next(iter(shown), None)


def find_outputs(notebook: NotebookNode, stem: str, runs: Path) -> list[list[NotebookNode]]:
    """Return the outputs of each cell, from an executed copy if its cells are the same."""
    for copy in sorted(runs.glob(f"{stem}*.ipynb")):
        cells = nbformat.read(copy, as_version=4).cells
        ran = [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]
        if [c.source for c in ran] == [c.source for c in notebook.cells]:
            return [c.get("outputs", []) for c in ran]
    return [c.get("outputs", []) for c in notebook.cells]


def find_drawn(stem: str, figures: Path) -> list[str]:
    """Return the names of the figures whose records say that this notebook drew them."""
    records = [path for path in sorted(figures.glob("*.json")) if path.with_suffix(".png").exists()]
    return [path.stem for path in records if Path(json.loads(path.read_text())["notebook"]).stem == stem]


def figure_names(source: str) -> list[str]:
    """Return the second argument of each ``run.figure`` as a pattern: what an f-string fills in is left open."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    names = [c.args[1] for c in calls if ast.unparse(c.func) == "run.figure" and len(c.args) > 1]
    return [pattern for name in names if (pattern := write_pattern(name))]


def write_pattern(name: ast.expr) -> str:
    if isinstance(name, ast.JoinedStr):
        return "".join(re.escape(v.value) if isinstance(v, ast.Constant) else ".+" for v in name.values)
    return re.escape(name.value) if isinstance(name, ast.Constant) else ".+"


def write_output(output: NotebookNode, figured: bool) -> str:
    """Return a stream or a result as Markdown; pictures are left to the committed figures."""
    if output.output_type == "stream":
        return f"```text\n{output.text.rstrip()}\n```" if output.name == "stdout" else ""
    data = output.get("data", {})
    if figured or "image/png" in data or "text/plain" not in data:
        return ""
    return f"```text\n{data['text/plain'].rstrip()}\n```"
