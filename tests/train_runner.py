"""Runs of `perceptual-at train` as real processes: imported once, then forked, so that each starts in no time.

Started by `Runner` of runs.py. Reads one order per line of standard input, as JSON: `argv`, `processes`,
`log` (a file), `code` (what to run; the command itself if left out). Answers with one line of process numbers,
and, when all have ended, one line of exit statuses.
"""

import json
import os
import socket
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

torch.set_num_threads(1)
torch.optim.SGD([torch.zeros(1)], lr=0.1)  # imports much, once instead of in every child

from perceptual_at import commands  # noqa: E402
from perceptual_at.commands import train  # noqa: E402
from perceptual_at.commands.main import main as command  # noqa: E402


def say(what):
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


def child(order, rank, port):
    """What one process does; never returns."""
    status = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        processes = order.get("processes", 1)
        if processes > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        sys.argv = ["perceptual-at", "train", *order["argv"]]
        if order.get("code"):
            exec(order["code"], {"__name__": "worker", "train": train, "commands": commands, "command": command})
        else:
            command()
        status = 0
    except SystemExit as end:
        say(end.code)
        status = 0 if end.code in (None, 0) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main():
    say("ready")
    for line in sys.stdin:
        order = json.loads(line)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids = []
        for rank in range(order.get("processes", 1)):
            pid = os.fork()
            if pid == 0:
                child(order, rank, port)
            pids.append(pid)
        say(json.dumps(pids))
        say(json.dumps([os.waitpid(pid, 0)[1] for pid in pids]))


if __name__ == "__main__":
    main()
