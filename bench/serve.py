"""`make bench`: serve a model on a free port and drive it with `edgekv bench serve`.

python bench/serve.py [MODEL]        MODEL: a folder, by default the demo model
"""

import subprocess
import sys

from edgekv.cli.chat import own_server

RUNS = (
    ["--requests", "16", "--concurrency", "1", "--system-tokens", "0"],
    ["--requests", "32", "--concurrency", "8"],
    ["--shared-prefix", "1500", "--max-tokens", "8"],
)


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else None
    with own_server(model) as url:
        for options in RUNS:
            print(f"\n$ edgekv bench serve {' '.join(options)}", flush=True)
            subprocess.run([sys.executable, "-m", "edgekv", "bench", "serve", "--url", url, *options], check=True)


if __name__ == "__main__":
    main()
