"""The pages of the API: the public names, and each floor with its modules, as they are in the package."""

import inspect
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import s3lab

FLOORS = {
    "algebra": "Layouts, specs and their bound forms. Pure Python.",
    "tensors": "Second moments, problems, and rows shared over processes. Torch.",
    "solvers": "One paper, one file; each a frozen dataclass of its options.",
    "packing": "Pruned weights as bytes, their files, and layers that hold them packed.",
    "training": "Training under a pattern. One method, one file; each a frozen dataclass of its options.",
    "models": "Language models: calibration, the run over decoder layers, evaluation, files.",
    "lab": "Figures, records, notebooks and the command line.",
}
DICTIONARIES = {"METHODS": "s3lab.training", "PATTERNS": "s3lab.algebra.patterns", "SOLVERS": "s3lab.solvers"}
ROOT = Path(s3lab.__file__).parent


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    pages = ["api/index.md", *(f"api/{floor}.md" for floor in FLOORS)]
    assert config.nav is not None
    config.nav.append({"API": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "api/index.md", content=write_index()))
    for floor, told in FLOORS.items():
        files.append(File.generated(config, f"api/{floor}.md", content=write_floor(floor, told)))
    return files


def write_index() -> str:
    lines = ["# The public names", "", "All of `import s3lab as s3`.", "", "| name | what it is |", "|---|---|"]
    for name in s3lab.__all__:
        thing = getattr(s3lab, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            place = f"{thing.__module__}.{thing.__qualname__}"
            lines.append(f"| [`{name}`][{place}] | {first_sentence(thing)} |")
        else:
            place = {"METHODS": "s3lab.training", "PATTERNS": "s3lab.algebra.patterns", "SOLVERS": "s3lab.solvers"}[
                name
            ]
            lines.append(f"| [`{name}`][{place}] | A dictionary: {', '.join(f'`{key}`' for key in thing)}. |")
    return "\n".join(lines) + "\n"


def first_sentence(thing: object) -> str:
    paragraph = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    return paragraph.replace("|", "\\|")


def write_floor(floor: str, told: str) -> str:
    modules = [f"s3lab.{floor}" if floor in ("solvers", "training") else None]
    paths = [path.relative_to(ROOT.parent).with_suffix("") for path in (ROOT / floor).rglob("*.py")]
    named = [path for path in sorted(paths) if path.stem != "__init__" and not {"kernels", "explore"} & {*path.parts}]
    modules += [".".join(path.parts) for path in named]
    if floor == "algebra":
        modules.append("s3lab.errors")
    entries = [f"::: {module}\n" for module in modules if module]
    return "\n".join([f"# {floor}\n", f"{told}\n", *entries])
