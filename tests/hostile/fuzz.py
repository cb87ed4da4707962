"""A property under a fuzzer that is guided by coverage (atheris): `python -m tests.hostile.fuzz`.

    python -m tests.hostile.fuzz PROPERTY... --corpus FOLDER [--seconds 60] [--seed N]
    python -m tests.hostile.fuzz PROPERTY --input FILE

Begins with the seeds of `seeds.py` and what is in FOLDER; what it finds worth keeping goes there.
An input that breaks the property is written to FOLDER as `crash-...`, and its traceback to stderr;
the exit code is not 0 then. An input that takes ten seconds or 1 GiB counts as broken, too.
`--input` runs one such file again. Of several properties, the first byte says which it is for.
"""

import argparse
import logging
import resource
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["orion_iscsifs"]):
    from tests.hostile.properties import PROPERTIES
from tests.hostile.seeds import SEEDS

_INPUT_SECONDS_MAX = 10
_MEMORY_MAX_MIB = 1024
_INPUT_BYTES_MAX = 4096


def _peak_of_the_parent_mib() -> int:
    """libFuzzer looks at ru_maxrss, in which a new process begins with what its parent had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> None:
    parser = argparse.ArgumentParser(prog="fuzz", description="fuzz properties")
    parser.add_argument("properties", nargs="+", choices=sorted(PROPERTIES))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--corpus", type=Path)
    where.add_argument("--input", type=Path)
    arguments = parser.parse_args()
    # What a hostile peer makes us log is no news here.
    logging.disable(logging.CRITICAL)
    names: list[str] = arguments.properties

    def check(data: bytes) -> None:
        if len(names) == 1:
            PROPERTIES[names[0]](data)
        elif data:
            PROPERTIES[names[data[0] % len(names)]](data[1:])

    if arguments.input is not None:
        check(arguments.input.read_bytes())
        return
    corpus: Path = arguments.corpus
    corpus.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        prefix = bytes((index,)) if len(names) > 1 else b""
        for number, seed in enumerate(SEEDS[name]):
            (corpus / f"seed-{name}-{number:02}").write_bytes(prefix + seed)
    options = {
        "max_total_time": arguments.seconds,
        "seed": arguments.seed,
        "timeout": _INPUT_SECONDS_MAX,
        "rss_limit_mb": _MEMORY_MAX_MIB + _peak_of_the_parent_mib(),
        "max_len": _INPUT_BYTES_MAX,
        "artifact_prefix": f"{corpus}/",
        "print_final_stats": 1,
        "verbosity": 0,
    }
    words = [f"-{name}={value}" for name, value in options.items()]
    atheris.Setup([sys.argv[0], *words, str(corpus)], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
