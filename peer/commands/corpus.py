"""`corpus`: make the data that a run trains on from text files."""

import argparse
import sys
from pathlib import Path

from peer.commands.options import AddParser


def add(add_parser: AddParser) -> None:
    """Add `corpus`."""
    corpus = add_parser("corpus", help="make token shards of text files, for a run on data of your own")
    corpus.add_argument(
        "files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help='text files (a document each), .jsonl (each line\'s "text" is one), both also as .gz or .xz; or folders',
    )
    corpus.add_argument("--out", type=Path, required=True, help="folder to make; its name becomes the corpus's")
    kind = corpus.add_mutually_exclusive_group()
    kind.add_argument("--tokenizer", type=Path, metavar="TOKENIZER.json", help="tokenizer to use (default: bytes)")
    kind.add_argument("--vocabulary", type=int, metavar="TOKENS", help="learn a tokenizer of so many tokens")
    corpus.add_argument(
        "--validation-fraction", type=float, default=0.01, help="share of the documents to hold out, the last ones"
    )
    corpus.set_defaults(command=_corpus)


def _corpus(arguments: argparse.Namespace) -> int:
    from peer.corpus import make_corpus

    dataset, tokenizer = make_corpus(
        arguments.files,
        arguments.out,
        tokenizer=arguments.tokenizer,
        vocabulary=arguments.vocabulary,
        validation_fraction=arguments.validation_fraction,
        stream=sys.stderr,
    )
    name, vocab_size = arguments.out.absolute().name, dataset.train.vocab_size
    print(
        f"{len(dataset.train.tokens):,} tokens to train on and {len(dataset.validation.tokens):,} to validate on are in"
        f" {arguments.out}.\nWrite into RUN.toml:\n",
        file=sys.stderr,
    )
    print(f'[model]\nvocab_size = {vocab_size}\n\n[data]\ncorpus = "{name}"\ntokenizer = "{tokenizer}"')
    print(
        f"\nThen: sparseloco-peer run new RUN.toml --data {arguments.out} ...\nEvery peer needs a copy of this folder:"
        f' in its home as data/{name}, or named in its settings under [data_paths] as {name} = "/path/of/it".',
        file=sys.stderr,
    )
    return 0
