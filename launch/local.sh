#!/usr/bin/env bash
# Train on this machine: a virtual environment, the installation that fits, launch/run.py.

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Train on this machine: makes a virtual environment, installs what its accelerator needs, runs.

  launch/local.sh [options] -- ARGUMENTS OF launch/run.py

  launch/local.sh -- --config experiments/demo.py --workdir runs/demo
  launch/local.sh -- --config experiments/gram_vitl.py:tiny --workdir runs/a \
    '--config.phases[0].steps=50'

Several GPUs are used by one process; so are the chips of one TPU host. Run the same command again
to go on. Ctrl-C and SIGTERM end the run after a save, with exit code 75. Nothing here costs money
that the machine does not cost anyway; the first call downloads packages.

  --extra cpu|cuda|tpu   what to install (default: found out from this machine)
  --venv DIR             the virtual environment (default: .venv of the project)
  --python PROGRAM       a Python of 3.11 or newer to make it with (default: python3)
  --no-install           use the environment as it is
  --dry-run              print the commands, run none
TEXT
}

extra=""
venv=$root/.venv
python=python3
no_install=no

# A TPU host shows its chips as /dev/accel0 (to v4) or /dev/vfio/0 (since v5e) of vendor Google.
detect_extra() {
  if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then
    echo cuda
  elif [[ -e /dev/accel0 ]]; then
    echo tpu
  elif [[ -e /dev/vfio/0 ]] && grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor; then
    echo tpu
  else
    echo cpu
  fi
}

# Once per environment and state of setup.py: .dinojax-EXTRA is written when pip has succeeded.
install() {
  local stamp=$venv/.dinojax-$extra package=$root
  if [[ $stamp -nt $root/setup.py ]]; then return; fi
  if [[ $extra != cpu ]]; then package="${root}[$extra]"; fi
  if [[ ! -x $venv/bin/python ]]; then
    check_python "$python"
    send "$python" -m venv "$venv"
  fi
  send "$venv/bin/python" -m pip install --quiet --editable "$package"
  send touch "$stamp"
}

main() {
  parse "extra venv python" "no-install" "$@"
  check_run_args
  if [[ -z $extra ]]; then extra=$(detect_extra); fi
  case $extra in
    cpu | cuda | tpu) ;;
    *) die "--extra $extra is none of cpu, cuda, tpu" ;;
  esac
  if [[ $no_install == no ]]; then install; fi
  local command=("$venv/bin/python" "$root/launch/run.py" "${run_args[@]}")
  if [[ $dry_run == yes ]]; then
    send "${command[@]}"
  else # in this process's place, so that signals and the exit code are launch/run.py's own
    exec "${command[@]}" 3>&-
  fi
}

main "$@"
