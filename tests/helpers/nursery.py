"""Starts the rating page again and again, for tests that kill it: the libraries are imported once.

    python tests/helpers/nursery.py LOG --model ... < lines

For each line of the input the server before is waited for, and a new one is forked, whose number is printed.
"""

import os
import sys

import environment  # noqa: F401  where the scripts are

# isort: split
import feedback
from utils.config import parse_config


def main(log: str, words: list[str]) -> None:
    process = None
    for _ in sys.stdin:
        if process is not None:
            os.waitpid(process, 0)
        process = os.fork()
        if process == 0:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            try:
                page = feedback.Page(parse_config(feedback.FeedbackConfig, None, words))
                page.serve(page.server())
            except BaseException as error:  # the fork must not go on with the loop
                os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        print(process, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
