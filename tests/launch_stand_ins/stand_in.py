"""Stands in for gcloud, kubectl, sbatch and the like: writes down what it was called with.

Called by tests/test_launchers.py under the name of the tool it stands in for, first in PATH.
STAND_IN names a directory with `answers.json`: [[regular expression, [answer, ...]], ...]. The
first expression found in the command answers, its answers in turn and the last one for ever; an
answer has out, err, rc. A command without an answer succeeds, mute. What was called goes to
`calls.jsonl`.

With STAND_IN_HOSTS=DIR:DIR the commands that `gcloud ... tpu-vm ssh` and `scp` would bring to the
hosts of a TPU are carried out, each DIR being one host's home.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(os.environ["STAND_IN"])


def main() -> int:
    tool, arguments = Path(sys.argv[0]).name, sys.argv[1:]
    reads_manifest = tool == "kubectl" and "apply" in arguments
    call = [tool, *arguments, *([sys.stdin.read()] if reads_manifest else [])]
    with open(HERE / "calls.jsonl", "a") as calls:
        calls.write(json.dumps(call) + "\n")
    answer = next_answer(" ".join(call))
    sys.stdout.write(answer.get("out", ""))
    sys.stderr.write(answer.get("err", ""))
    if answer.get("rc"):
        return answer["rc"]
    at_work = tool == "gcloud" and "STAND_IN_HOSTS" in os.environ
    return on_hosts(arguments) if at_work else 0


def next_answer(command: str) -> dict:
    answers = json.loads((HERE / "answers.json").read_text())
    for pattern, turns in answers:
        if re.search(pattern, command):
            answer = turns.pop(0) if len(turns) > 1 else turns[0]
            fresh = HERE / f"answers.{os.getpid()}"  # two may be called at once
            fresh.write_text(json.dumps(answers))
            fresh.replace(HERE / "answers.json")
            return answer
    return {}


def on_hosts(arguments: list[str]) -> int:
    """The worst exit code of the command on the hosts that --worker names."""
    options = dict(word[2:].split("=", 1) for word in arguments if word.startswith("--"))
    homes = os.environ["STAND_IN_HOSTS"].split(":")
    if "worker" not in options:
        return 0
    chosen = homes if options["worker"] == "all" else [homes[int(options["worker"])]]
    if "scp" in arguments:
        source, target = (word for word in arguments[4:] if not word.startswith("--"))
        for home in chosen:
            shutil.copy(source, Path(home) / target.split(":")[1])
        return 0
    codes = [
        subprocess.run(
            ["bash", "-c", options["command"]], cwd=home, env={**os.environ, "HOME": home}
        ).returncode
        for home in chosen
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
