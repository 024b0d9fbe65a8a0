"""Checks and times everything on one GPU, in one run of less than ten minutes.

    python benchmarks/gpu.py                               everything, most important first, into benchmarks/results
    python benchmarks/gpu.py --only ceilings fuse          some sections
    python benchmarks/gpu.py --data text.jsonl             train the loss section's models on this text
    python benchmarks/gpu.py --device cpu                  dry run: the same code on tiny shapes; its figures mean nothing

Sections:

    ceilings    what the card can do: copies in its memory, copies over the bus, a matrix product
    correct     every kernel against its slow truth: fresh inputs, poisoned outputs, NaN, the same bits twice, CUDA graphs
    fuse        Engram forward and backward, against the eager module and torch.compile of it
    gather      rows out of device memory and out of pinned host memory, against the bus
    hash        ids a second
    decode      a 4B-shaped model decoding with a table of 100 B parameters in host memory, and without a memory
    train       a step with the table in host memory, against one on the device and none
    sanitizer   the checks once more under compute-sanitizer
    trace       where the fetch lies under the compute: a profile and a picture
    loss        base, additive bigram, capacity-1 and engram on real text: paired differences

Each section prints its table at once and catches its own failure; those that no longer fit into --minutes are skipped and say so.
Times are of CUDA events, while the host is ahead: medians of 25 calls, contenders taking turns, all of it twice, inputs changing
from call to call. OUT/gpu.json keeps every figure (README.md beside it says how to read it), and the same as a table is printed last.
Needed are torch 2.11, Triton 3.6, numpy, safetensors and tokenizers; matplotlib for the picture, compute-sanitizer for its section.

The exit status is 0 if no section failed and every check passed; bars that were missed are figures like others.
"""

import argparse
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SECTIONS = "ceilings correct fuse gather hash decode train sanitizer trace loss".split()


def read_options(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help="these sections alone")
    parser.add_argument(
        "--out",
        type=Path,
        help="directory of the results (default: benchmarks/results; of a dry run: runs/gpu-dry-run)",
    )
    parser.add_argument(
        "--data",
        default="",
        help="text of the loss section, such as a .jsonl file (default: Python's standard library)",
    )
    parser.add_argument("--minutes", type=float, default=9.5, help="what the run may take (default: 9.5)")
    parser.add_argument(
        "--ram", type=float, help="GB of host memory to count on (default: what the system calls available)"
    )
    parser.add_argument("--seed", type=int, help="of all random inputs (default: drawn, printed and kept)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    parser.add_argument(
        "--tiny", action="store_true", help="the shapes of a dry run on the GPU: for sanitizers, figures mean nothing"
    )
    return parser.parse_args(arguments)


def main(arguments=None):
    """Returns the exit status."""
    options = read_options(arguments)
    if options.device == "cpu":  # before torch and Triton are imported
        os.environ |= {"ENGRAM_KERNELS": "triton", "TRITON_INTERPRET": "1"}
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch's determinism switch refuses
    sys.path[:0] = [str(HERE), str(HERE.parent / "src")]
    from card.run import run

    return run(options, options.only or SECTIONS)


if __name__ == "__main__":
    sys.exit(main())
