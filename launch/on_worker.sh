#!/usr/bin/env bash
# What launch/tpu_pod.sh asks of each host of a TPU over ssh; it lies there inside the copied code.
#
#   on_worker.sh setup           Python, a virtual environment, the packages
#   on_worker.sh start ARG...    launch/run.py in the background, unless it is running already
#   on_worker.sh follow          its output, until it ends
#   on_worker.sh outcome         running | exit CODE | stopped | interrupted
#   on_worker.sh stop            SIGTERM: it saves and ends
#
# Everything lies in ~/dinojax: code/, venv/, run/ (pid, log, exit, stopped).
set -euo pipefail

home=$HOME/dinojax
run=$home/run

# uv, because these machines come with Python 3.10 and the project needs 3.11: it fetches one. The
# extra `cloud` is for buckets.
setup() {
  python3 -m pip install --quiet --user --upgrade uv
  python3 -m uv venv --quiet --allow-existing --python '>=3.11,<3.13' "$home/venv"
  python3 -m uv pip install --quiet --python "$home/venv/bin/python" \
    --editable "$home/code[tpu,cloud]"
}

# A process number alone could be another program's after the machine has been started anew.
running() {
  [[ -s $run/pid ]] && grep -qsz 'launch/run.py' "/proc/$(< "$run/pid")/cmdline"
}

# The first host's address, if there are several. jax asks the same metadata who it is itself, but
# only when something tells the run that there are others: nothing in the environment does.
coordinator() {
  local attributes=http://metadata.google.internal/computeMetadata/v1/instance/attributes
  local endpoints first
  endpoints=$(curl --silent --fail --header 'Metadata-Flavor: Google' \
    "$attributes/worker-network-endpoints" || true)
  if [[ $endpoints != *,* ]]; then return; fi
  first=${endpoints%%,*}
  printf '%s:8482\n' "${first##*:}" # an address, or name:number:address on older machines
}

start() {
  local first
  if running; then
    echo "already running as process $(< "$run/pid")"
    return
  fi
  mkdir -p "$run"
  rm -f "$run"/{pid,exit,stopped}
  first=$(coordinator)
  if [[ -n $first ]]; then export JAX_COORDINATOR_ADDRESS=$first; fi
  cd "$home/code"
  nohup setsid bash "$home/code/launch/on_worker.sh" supervise "$@" >> "$run/log" 2>&1 < /dev/null &
  until [[ -s $run/pid ]]; do sleep 0.1; done
  echo "started as process $(< "$run/pid")"
}

# Only this leaves the exit code; a machine that goes down in between leaves none.
supervise() {
  local code=0
  "$home/venv/bin/python" launch/run.py "$@" &
  echo $! > "$run/pid"
  wait $! || code=$?
  echo "$code" > "$run/exit"
}

follow() {
  if running; then
    tail --lines=50 --follow --pid="$(< "$run/pid")" "$run/log"
  else
    tail --lines=50 "$run/log"
  fi
}

outcome() {
  if running; then
    echo running
  elif [[ ! -s $run/exit ]]; then
    echo interrupted
  elif [[ -e $run/stopped && $(< "$run/exit") == 75 ]]; then
    echo stopped
  else
    echo "exit $(< "$run/exit")"
  fi
}

# Only launch/run.py itself: its own helpers must live until the save is done.
stop() {
  if ! running; then return; fi
  touch "$run/stopped"
  kill -TERM "$(< "$run/pid")"
}

case ${1:-} in
  setup | start | supervise | follow | outcome | stop) "$@" ;;
  *)
    echo "error: only launch/tpu_pod.sh calls this: setup, start, follow, outcome, stop" >&2
    exit 2
    ;;
esac
