"""Solvers on one layer in a process of its own, which can be stopped at any moment."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TYPE_CHECKING, Any

from s3lab.errors import S3Error, SolveError

if TYPE_CHECKING:
    from s3lab.models.measure.layers import Layer


class Background:
    """The pruning of a layer by several solvers in turn, begun at once.

    ``tell`` hears, from another thread, of each result as it comes: the solver's name with its weight, mask, errors,
    seconds and damping.  ``end`` hears last, with the error or None.  `stop` ends the process at once.
    """

    def __init__(
        self,
        layer: Layer,
        spec: str,
        solvers: Sequence[str],
        damp: float,
        tell: Callable[[dict[str, Any]], object],
        end: Callable[[S3Error | None], object],
    ) -> None:
        self.stopped = False
        self._order = {"spec": spec, "solvers": list(solvers), "damp": damp}
        self._layer, self._tell, self._end = layer, tell, end
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "s3lab.lab.explore.background"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt of the kernel is not for it
        )
        self._thread = Thread(target=self._listen, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the process, and what it is at with it."""
        self.stopped = True
        self._process.kill()

    def wait(self) -> None:
        """Return when all is done and told."""
        self._thread.join()

    def _listen(self) -> None:
        from safetensors.torch import load_file, save_file

        error: S3Error | None = None
        with TemporaryDirectory(prefix="s3lab-") as folder, self._process as process:
            assert process.stdin is not None and process.stdout is not None and process.stderr is not None
            tensors = {"W": self._layer.W, "H": self._layer.H, "H_test": self._layer.H_test}
            save_file(
                {name: x.detach().cpu().contiguous() for name, x in tensors.items()}, f"{folder}/layer.safetensors"
            )
            try:
                process.stdin.write(json.dumps({**self._order, "folder": folder}))
                process.stdin.close()
                for line in process.stdout:
                    told = json.loads(line)
                    if "refused" in told:
                        error = SolveError(told["refused"])
                    else:
                        self._tell({**told, **load_file(told["file"])})
                said = process.stderr.read().strip()
            except (BrokenPipeError, FileNotFoundError, json.JSONDecodeError):
                said = ""
            if process.wait() and error is None and not self.stopped:
                error = SolveError(f"the pruning ended by itself: {said.splitlines()[-1] if said else 'it was killed'}")
        self._end(error)


def prune_as_told(order: dict[str, Any]) -> None:
    """Prune the layer in the order's folder by each of its solvers, and print a line of JSON for each result."""
    from safetensors.torch import load_file, save_file

    from s3lab.solvers import prune

    folder = Path(order["folder"])
    layer = load_file(folder / "layer.safetensors")
    for number, name in enumerate(order["solvers"]):
        try:
            solution = prune(layer["W"], order["spec"], layer["H"], name, H_test=layer["H_test"], damp=order["damp"])
        except S3Error as error:
            print(json.dumps({"refused": f"{error}"}), flush=True)
            return
        file = str(folder / f"{number}.safetensors")
        save_file({"weight": solution.weight.contiguous(), "mask": solution.mask.contiguous()}, file)
        told = {"solver": name, "error": solution.error, "error_test": solution.error_test}
        stats = {key: solution.stats[key] for key in ("time_s", "damp")}
        print(json.dumps({**told, **stats, "file": file}), flush=True)


if __name__ == "__main__":
    prune_as_told(json.load(sys.stdin))
