"""vimfast-prepare: an ImageNet folder becomes shards that every loader reads fast.

    vimfast-prepare imagenet_data/ --out shards/
    vimfast-prepare --reindex shards/
    vimfast-prepare --index-only tars/ --out shards/

The same as ``python -m vimfast.prepare``. Run again after a crash it resumes; the manifest is written last.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from vimfast import __version__
from vimfast.cli import Parser, fit_terminal, path, run_main, whole
from vimfast.errors import one_line
from vimfast.stores import is_url


def parser() -> Parser:
    """Of the command line."""
    parser = Parser(
        "vimfast-prepare",
        "Turn a folder in the ImageNet layout into WebDataset shards with an index for random access. "
        "RGB and grey JPEGs are stored byte for byte unless --resize is given; other images are converted to RGB JPEG. "
        "If it is interrupted, run it again: it resumes.",
        epilog="example: vimfast prepare imagenet_data/ --out shards/",
    )
    add = parser.add_argument
    text = "folder that holds train/ and val/ (or one of them) or ImageNet's archives; or its URL in a store"
    add("root", metavar="IMAGENET_ROOT", type=_place, nargs="?", help=text)
    add("--out", metavar="FOLDER", type=_place, help="folder to write the shards into, or its URL in a store")
    add("--resize", metavar="N", type=whole(1), help="shrink to a short side of N pixels, as JPEGs of --quality")
    add("--quality", metavar="Q", type=whole(1, 100), help="JPEG quality of resized images, 1 to 100 [90]")
    add("--seed", type=whole(0), default=0, help="seed of the training set's shuffle [0]")
    add("--workers", metavar="W", type=whole(1), help="processes, or tasks of the cluster at a time [one a core]")
    text = "what makes the shards: processes of this machine, or a cluster of Ray whose nodes see the images and --out"
    add("--engine", choices=("processes", "ray"), default="processes", help=f"{text} [processes]")
    text = "of the Ray cluster's head, such as 10.0.0.1:6379 [RAY_ADDRESS, or else this machine alone]"
    add("--address", metavar="HOST:PORT", help=text)
    add("--shard-samples", metavar="S", type=whole(1), default=4096, help="most images in a shard [4096]")
    add("--skip-bad", action="store_true", help="leave unreadable images out and record them in the manifest")
    text = "only rebuild damaged or missing indexes of these finished shards, from their tars; needs no images"
    add("--reindex", metavar="SHARDS", type=path, help=text)
    text = "IMAGENET_ROOT holds WebDataset tars that something else wrote: write links to them and indexes into --out"
    add("--index-only", action="store_true", help=text)
    text = "of --index-only: a file with the name of a class on each line, in the order of the labels [their numbers]"
    add("--class-names", metavar="FILE", type=path, help=text)
    add("--overwrite", action="store_true", help="delete the shards that lie in --out first")
    add("--version", action="version", version=f"vimfast {__version__}")
    return parser


def _place(text: str) -> Path | str:
    """An argparse type: a folder of this machine, or the URL of one in a store."""
    return text if is_url(text) else path(text)


def _parse(words: list[str]) -> argparse.Namespace:
    args = (own := parser()).parse_args(words)
    if args.reindex is not None and (args.root is not None or args.out is not None):
        own.error("--reindex takes the folder of shards alone, without IMAGENET_ROOT and --out")
    if args.reindex is None and (args.root is None or args.out is None):
        own.error(f"{'IMAGENET_ROOT' if args.root is None else '--out'} is missing")
    if args.index_only and (args.resize is not None or args.reindex is not None):
        own.error(f"--index-only stores no images: drop {'--reindex' if args.resize is None else '--resize'}")
    if args.address is not None and args.engine != "ray":
        own.error("--address is of a Ray cluster: add --engine ray")
    if args.engine == "ray" and (args.index_only or args.reindex is not None):
        own.error(f"--engine ray writes shards: drop it for {'--index-only' if args.index_only else '--reindex'}")
    if args.index_only and any(isinstance(place, str) for place in (args.root, args.out)):
        own.error("--index-only links to tars of this machine, not of a store")
    if args.class_names is not None and not args.index_only:
        own.error("--class-names needs --index-only: other classes are named by their folders")
    if args.quality is not None and args.resize is None:
        own.error("--quality needs --resize: without it images keep their bytes")
    return args


def run() -> None:
    """Do as the command line says."""
    args = _parse(sys.argv[1:])
    # Here, where a package that is missing can be said in a sentence.
    from vimfast.shards.cluster import RayCluster
    from vimfast.shards.convert import classes_without_images, convert
    from vimfast.shards.format import ConversionOptions
    from vimfast.shards.indexing import index_tars
    from vimfast.shards.reindex import reindex
    from vimfast.shards.workers import report

    workers = args.workers or len(os.sched_getaffinity(0))
    if args.reindex is not None:
        print(fit_terminal(one_line(reindex(args.reindex, workers=workers)), sys.stdout))
        return
    if args.index_only:
        done = index_tars(
            args.root,
            args.out,
            names=args.class_names,
            workers=workers,
            skip_bad=args.skip_bad,
            overwrite=args.overwrite,
        )
        print(fit_terminal(one_line(done), sys.stdout))
        return
    quality = None if args.resize is None else args.quality or 90
    options = ConversionOptions(args.seed, args.resize, quality, args.shard_samples)
    chosen = {"workers": workers, "skip_bad": args.skip_bad, "overwrite": args.overwrite}
    if args.engine == "ray":
        cluster = RayCluster(args.address, args.workers)
        # Nodes do not run in this folder.
        root, out = (place if isinstance(place, str) else place.absolute() for place in (args.root, args.out))
        with cluster.opened():
            done = convert(root, out, options, engine=cluster, **chosen)
    else:
        done = convert(args.root, args.out, options, **chosen)
    print(fit_terminal(one_line(done), sys.stdout), flush=True)
    for line in classes_without_images(args.out):  # last, for the line before says that all is complete
        report(f"warning: {line}")


def main() -> None:
    """The console script."""
    run_main(run)


if __name__ == "__main__":
    main()
