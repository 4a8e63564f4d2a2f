"""Mutation testing: how many small faults, put into a file one at a time, the tests of that file notice.

    make mutate FILES="s3lab/algebra/partition.py s3lab/solvers/admm.py" ARGS="--sample 60 --seed 0"

The files and their tests are those of a commit, ``--at``, HEAD by default; what is not committed has no part in it.
mutmut makes the faults and runs the tests that reach them.  It leaves decorated functions as they are, properties
among them; faults in nothing but the wording of a text, or in the strictness of a
zip, are left out.  Of the others all are tried, or ``--sample`` of them, drawn with ``--seed``.

benchmarks/results/mutation_survivors.csv has what nobody noticed in the last run of a file, and of earlier ones what is
explained: the last column is written by hand, and says why no result can differ, or that it is only slower.
mutation_scores.csv has a row for each run of a file; its score is over the faults that can be noticed, which are all
that were tried but those ``explained``.  ``--recount``, after explaining, brings it up to date.
"""

from __future__ import annotations

import argparse
import ast
import csv
import difflib
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from contextlib import chdir
from operator import itemgetter
from pathlib import Path

from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.stats import status_by_exit_code
from mutmut.utils.format_utils import get_mutant_name

from s3lab.files import write

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TREE = ["s3lab", "tests", "notebooks/profiles", "conftest.py", "pyproject.toml", ":(exclude)s3lab/models/text/weights"]
SURVIVOR = "file", "function", "before", "after", "commit", "seed", "reason"
SCORE = "file", "commit", "mutants", "tried", "seed", "noticed", "explained", "score_percent", "tests"
REFUSALS, PRUNE = "solvers/test_bad_input.py", "solvers/test_prune.py"
SCORES = [
    "solvers/test_truths.py::test_scores_alone_pick_the_masks_of_their_papers",
    "solvers/test_ria.py",
    f"{REFUSALS}::test_options_that_cannot_be",
]
SOBS = [
    "solvers/test_elimination.py",
    "solvers/test_fields.py",
    "solvers/test_sobs_stages.py",
    *(
        f"solvers/test_devices.py::test_solvers_make_their_tensors_where_the_weight_is[sobs-{n}]"
        for n in ("2:4", "50%")
    ),
]
TESTS = {
    "s3lab/algebra/partition.py": ["algebra/test_partition.py", "algebra/test_compose.py"],
    "s3lab/algebra/compose.py": ["algebra/test_compose.py", "algebra/test_text.py", "solvers/test_salient.py"],
    "s3lab/algebra/spec.py": ["algebra/test_partition.py", "algebra/test_text.py"],
    "s3lab/tensors/proximal.py": ["tensors/test_proximal.py"],
    "s3lab/solvers/__init__.py": [
        PRUNE,
        f"{REFUSALS}::test_what_is_given_in_vain_is_named",
        f"{REFUSALS}::test_options_that_cannot_be",
        "solvers/test_wrap.py",
        "solvers/test_damping.py::test_a_solution_says_which_rungs_were_tried",
        "solvers/test_damping.py::test_couplings_are_damped_together",
        "solvers/test_refine.py::test_coupled_tensors_are_refused",
    ],
    "s3lab/solvers/admm.py": ["solvers/test_admm.py", "solvers/test_coupled.py", REFUSALS],
    "s3lab/solvers/base.py": [
        PRUNE,
        f"{REFUSALS}::test_a_weight_beyond_half_precision_is_told",
        "solvers/test_coupled.py::test_a_follower_changes_nothing_for_its_leader",
        "algebra/test_picture.py::test_a_solution_shows_the_corner_of_its_mask",
    ],
    "s3lab/solvers/best.py": [
        "solvers/test_best.py",
        "solvers/test_truths.py::test_what_fits_its_weights_is_near_the_brute_force_optimum",
        f"{REFUSALS}::test_options_that_cannot_be",
    ],
    "s3lab/solvers/damping.py": ["solvers/test_damping.py"],
    "s3lab/solvers/elimination.py": SOBS,
    "s3lab/solvers/fields.py": SOBS,
    "s3lab/solvers/magnitude.py": SCORES,
    "s3lab/solvers/obd.py": SCORES,
    "s3lab/solvers/refine.py": [
        *(
            f"solvers/test_refine.py::test_{name}"
            for name in (
                "the_gain_of_an_exchange_is_the_fall_of_the_loss",
                "at_the_end_no_exchange_in_a_scope_helps",
                "it_ends_where_nothing_gains_and_not_later_than_told",
                "where_all_is_kept_nothing_changes",
                "what_it_cannot_search_is_refused",
            )
        ),
        "solvers/test_devices.py::test_so_does_local_search",
    ],
    "s3lab/solvers/refit.py": [
        "solvers/test_refit.py",
        "solvers/test_truths.py::test_refit_is_least_squares",
        "solvers/test_truths.py::test_each_row_of_a_refit_stops_by_its_own_size",
        "solvers/test_best.py::test_a_fit_is_given_up_only_where_it_cannot_win",
    ],
    "s3lab/solvers/ria.py": SCORES,
    "s3lab/solvers/sobs.py": [*SOBS, REFUSALS],
    "s3lab/solvers/sparsegpt.py": [
        "solvers/test_sparsegpt_stages.py",
        "solvers/test_devices.py::test_solvers_make_their_tensors_where_the_weight_is[sparsegpt-50%]",
        "solvers/test_truths.py::test_sparsegpt_on_one_scope_is_the_plain_derivation",
        REFUSALS,
    ],
    "s3lab/solvers/variance.py": ["solvers/test_variance.py", REFUSALS],
    "s3lab/solvers/wanda.py": SCORES,
    "s3lab/solvers/wrap.py": ["solvers/test_wrap.py"],
    "s3lab/models/correct/equalise.py": ["models/test_equalise.py"],
}
SETTINGS = """
[tool.mutmut]
source_paths = ["s3lab"]
only_mutate = [{file!r}]
pytest_add_cli_args_test_selection = {tests!r}
also_copy = ["conftest.py", "notebooks"]
process_isolation = "forkserver"
use_git_change_detection = false
timeout_multiplier = 4.0
"""


class _Wordless(ast.NodeTransformer):
    """Takes out of a function its texts, and whether a zip is strict, which tells where lengths differ, and nothing."""

    def visit_keyword(self, node: ast.keyword) -> ast.AST | None:
        return None if node.arg == "strict" else self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        return ast.Constant("") if isinstance(node.value, str) else node


def list_mutants(tree: Path, file: str) -> dict[str, tuple[str, str]]:
    """Return the faults that mutmut puts into a file, by its names for them: the lines before and after."""
    with chdir(tree):
        made = mutate_file_contents(file, Path(file).read_text())
    functions = {node.name: node for node in ast.walk(ast.parse(made.code)) if isinstance(node, ast.FunctionDef)}
    texts = {}
    for name, function in functions.items():
        function.name = name.rpartition("__mutmut_")[0].split("ǁ")[-1].removeprefix("x_")
        texts[name] = ast.unparse(function)
    found = {}
    for name in made.mutant_names:
        both = texts[f"{name.rpartition('_')[0]}_orig"], texts[name]
        if len({ast.dump(_Wordless().visit(ast.parse(text))) for text in both}) > 1:
            changed = [line for line in difflib.ndiff(*(text.splitlines() for text in both)) if line[0] in "-+"]
            before, after = (" ".join(line[2:].strip() for line in changed if line[0] == sign) for sign in "-+")
            found[get_mutant_name(Path(file), name)] = before, after
    return found


def try_mutants(file: str, commit: str, sample: int | None, seed: int) -> tuple[dict, list[dict], set]:
    """Return what a file's tests noticed, a row for each fault that they did not, and the lines of those not tried."""
    with tempfile.TemporaryDirectory(prefix="s3lab-mutate-") as folder:
        tree = Path(folder)
        packed = subprocess.run(["git", "archive", commit, *TREE], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=packed.stdout, check=True)
        tests = [f"tests/{name}" for name in TESTS[file]]
        with (tree / "pyproject.toml").open("a") as settings:
            settings.write(SETTINGS.format(file=file, tests=tests))
        mutants = list_mutants(tree, file)
        tried = sorted(mutants)
        if sample is not None and sample < len(tried):
            tried = sorted(random.Random(seed).sample(tried, sample))
        if tried:
            environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            # one thread: workers are forked, and would wait for ever for the other threads of the process they left
            environment |= {"TERM": "dumb", "OMP_NUM_THREADS": "1", "PYTEST_XDIST_WORKER_COUNT": f"{os.cpu_count()}"}
            command = [str(Path(sys.executable).with_name("mutmut")), "run", "--max-children", "1", *tried]
            done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"mutmut did not get through {file}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
            told = json.loads((tree / "mutants" / f"{file}.meta").read_text())["exit_code_by_key"]
    lived = [name for name in tried if status_by_exit_code[told[name]] in ("survived", "no tests")]
    unclear = [name for name in tried if status_by_exit_code[told[name]] in ("suspicious", "not checked")]
    if unclear:
        raise SystemExit(f"no verdict on {', '.join(unclear)}")
    score = {
        "file": file,
        "commit": commit,
        "mutants": len(mutants),
        "tried": len(tried),
        "seed": f"{seed}" if len(tried) < len(mutants) else "",
        "noticed": len(tried) - len(lived),
        "tests": " ".join(tests),
    }
    function = {name: re.split("x_|ǁ", name.rpartition("__mutmut_")[0])[-1] for name in lived}
    told = {"commit": commit, "seed": score["seed"], "reason": ""}
    rows = [dict(zip(SURVIVOR, (file, function[name], *mutants[name]), strict=False)) | told for name in lived]
    return score, rows, {mutants[name] for name in mutants if name not in tried}


def read_table(name: str) -> list[dict]:
    path = RESULTS / f"{name}.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def write_table(name: str, fields: Iterable[str], rows: list[dict]) -> None:
    """Write a table, files in alphabetical order, and the rows of each in that in which they come."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(fields), restval="", lineterminator="\n")
    table.writeheader()
    table.writerows(sorted(rows, key=lambda row: row["file"]))
    write(RESULTS / f"{name}.csv", text.getvalue().encode())


def note(score: dict, lived: list[dict], untried: set[tuple[str, str]]) -> None:
    """Put a run into both tables, with the reasons that are known; those of faults that were not tried stay."""
    old, change = read_table("mutation_survivors"), itemgetter("file", "before", "after")
    reasons = {change(row): row["reason"] for row in old}
    lived = [row | {"reason": reasons.get(change(row), "")} for row in lived]
    stay = [r for r in old if r["file"] != score["file"] or (r["reason"] and change(r)[1:] in untried)]
    write_table("mutation_survivors", SURVIVOR, [*stay, *lived])
    run = itemgetter("file", "commit", "seed")
    write_table("mutation_scores", SCORE, [*(r for r in read_table("mutation_scores") if run(r) != run(score)), score])


def recount() -> dict[str, dict]:
    """Count the survivors of each file's last run that are explained, and return these runs by file."""
    scores, run = read_table("mutation_scores"), itemgetter("file", "commit", "seed")
    last = {row["file"]: row for row in scores}
    explained = Counter(run(row) for row in read_table("mutation_survivors") if row["reason"])
    for row in last.values():
        row["explained"] = explained[run(row)]
        noticeable = int(row["tried"]) - row["explained"]
        row["score_percent"] = f"{100 * int(row['noticed']) / noticeable:.1f}" if noticeable else ""
    write_table("mutation_scores", SCORE, scores)
    return last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(TESTS), metavar="FILE", help="of those that have tests here")
    parser.add_argument("--sample", type=int, help="faults of each file to try; all by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at", default="HEAD", help="the commit whose files and tests are taken")
    parser.add_argument("--recount", action="store_true", help="try nothing, and count what has been explained since")
    options = parser.parse_args()
    if unknown := [file for file in options.files if file not in TESTS]:
        parser.error(f"no tests are named for {', '.join(unknown)}: add a line to TESTS in {__file__}")
    shown = subprocess.run(
        ["git", "rev-parse", "--short=7", options.at], cwd=ROOT, capture_output=True, text=True, check=True
    )
    commit = shown.stdout.strip()
    for file in options.files:
        if not options.recount:
            note(*try_mutants(file, commit, options.sample, options.seed))
        if row := recount().get(file):
            print(
                "{file}: {score_percent} %, {noticed} of {tried} noticed, {explained} explained".format(**row),
                flush=True,
            )


if __name__ == "__main__":
    main()
