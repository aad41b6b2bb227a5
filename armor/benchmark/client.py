"""vLLM's own benchmark client (`vllm bench serve`) on a server, load after load, in the environment of vLLM.

    python -m armor.benchmark.client <LOADS

LOADS is a JSON list of the client's arguments for each load. The last line of the output is the list of its results. It
is one process for all, for it takes seconds to import. `vllm bench` itself asks for a distribution called vllm, and
builds for CPUs have another name.
"""

import json
import sys

from vllm.benchmarks.serve import add_cli_args, main  # pyright: ignore[reportMissingImports]  not installed here
from vllm.utils.argparse_utils import FlexibleArgumentParser  # pyright: ignore[reportMissingImports]  the same

if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    results = [main(parser.parse_args(arguments)) for arguments in json.load(sys.stdin)]
    print(json.dumps(results))
