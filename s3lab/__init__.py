"""s3lab: structured sparsity as an algebra, and every pruning solver on all of it."""

from s3lab.algebra.compose import Plus, Then
from s3lab.algebra.couple import Coupled, Group, Member
from s3lab.algebra.layout import Layout
from s3lab.algebra.partition import Partition
from s3lab.algebra.patterns import PATTERNS, parse
from s3lab.algebra.spec import Block, Pattern, Scope, Spec, View
from s3lab.errors import DataError, S3Error, ShapeError, SolveError, SpecError
from s3lab.models.inputs.activations import Activation
from s3lab.models.inputs.calibrate import sparsify
from s3lab.models.prune.sequential import prune_model
from s3lab.models.search.allocate import Allocation, allocate
from s3lab.models.storage.quantizer import install as _install
from s3lab.solvers import (
    ADMM,
    OBD,
    RIA,
    SOBS,
    SOLVERS,
    Best,
    Magnitude,
    MatchVariance,
    Refine,
    Refit,
    Solution,
    SparseGPT,
    Wanda,
    Wrap,
    Wrapped,
    prune,
    wrap,
)
from s3lab.tensors.hessian import Moment, hessian, output_error
from s3lab.tensors.problem import Problem
from s3lab.training import (
    METHODS,
    S2FT,
    SPP,
    SRSTE,
    STE,
    Fixed,
    Gradual,
    LoRA,
    Proximal,
    RigL,
    Sparsity,
    densify,
    sparse,
)
from s3lab.version import __version__ as __version__

__all__ = [
    "ADMM",
    "METHODS",
    "OBD",
    "PATTERNS",
    "RIA",
    "S2FT",
    "SOBS",
    "SOLVERS",
    "SPP",
    "SRSTE",
    "STE",
    "Activation",
    "Allocation",
    "Best",
    "Block",
    "Coupled",
    "DataError",
    "Fixed",
    "Gradual",
    "Group",
    "Layout",
    "LoRA",
    "Magnitude",
    "MatchVariance",
    "Member",
    "Moment",
    "Partition",
    "Pattern",
    "Plus",
    "Problem",
    "Proximal",
    "Refine",
    "Refit",
    "RigL",
    "S3Error",
    "Scope",
    "ShapeError",
    "Solution",
    "SolveError",
    "SparseGPT",
    "Sparsity",
    "Spec",
    "SpecError",
    "Then",
    "View",
    "Wanda",
    "Wrap",
    "Wrapped",
    "allocate",
    "densify",
    "hessian",
    "output_error",
    "parse",
    "prune",
    "prune_model",
    "sparse",
    "sparsify",
    "wrap",
]

_install()
