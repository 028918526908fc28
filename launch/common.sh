# shellcheck shell=bash
# What the launch scripts share: options, quoting, dry runs, packing the code. Sourced, never run.
#
# A script names its options and their defaults as variables, calls `parse`, and sends every command
# that leaves a trace through `send`, which shows it and, with --dry-run, does nothing else.

set -euo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "error: bash $BASH_VERSION is older than 4.4 (on a Mac: brew install bash)" >&2
  exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
script=$(basename "$0")
dry_run=no
yes=no
allow_dirty=no
verb=""
run_args=() # what follows `--`, for launch/run.py
exec 3>&1   # where a dry run prints, also from inside $(...)

say() { printf '%s\n' "$*" >&2; }

die() {
  say "error: $*"
  exit 2
}

# quoted WORD...: one line that a shell reads back as exactly these words.
quoted() {
  local word line=""
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then word=${word@Q}; fi
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

# send COMMAND...: shows it and runs it; in a dry run only prints it, ready to be pasted.
send() {
  if [[ $dry_run == yes ]]; then
    quoted "$@" >&3
  else
    say "\$ $(quoted "$@")"
    "$@"
  fi
}

# note TEXT: a remark between the commands of a dry run.
note() { if [[ $dry_run == yes ]]; then printf '# %s\n' "$*" >&3; fi; }

# take_verb "VERBS" ARGUMENT...: sets verb to the first argument; shows the help if that is asked.
take_verb() {
  verb=${2:---help}
  case $verb in
    -h | --help | help)
      usage
      exit 0
      ;;
  esac
  if [[ " $1 " != *" $verb "* ]]; then
    die "$script does not know $(quoted "$verb"); it knows ${1// /, }"
  fi
}

# parse "OPTIONS" "SWITCHES" ARGUMENT...: sets the variable of each option (--poll-seconds 3 sets
# poll_seconds) and of each switch (--spot sets spot=yes); what follows -- goes into run_args.
parse() {
  local options=" $1 " switches=" $2 dry-run yes allow-dirty " option
  shift 2
  while (($#)); do
    case $1 in
      --)
        run_args=("${@:2}")
        return
        ;;
      -h | --help)
        usage
        exit 0
        ;;
      --*=*)
        option=${1%%=*}
        option=${option#--}
        if [[ $options != *" $option "* ]]; then
          die "$script has no option --$option that takes a value; see $script --help"
        fi
        printf -v "${option//-/_}" '%s' "${1#*=}"
        shift
        continue
        ;;
    esac
    option=${1#--}
    if [[ $1 == --* && $options == *" $option "* ]]; then
      if (($# < 2)) || [[ $2 == --* ]]; then die "$1 needs a value"; fi
      printf -v "${option//-/_}" '%s' "$2"
      shift 2
    elif [[ $1 == --* && $switches == *" $option "* ]]; then
      printf -v "${option//-/_}" yes
      shift
    else
      die "$script does not know $(quoted "$1"); what launch/run.py shall get follows --," \
        "the rest is in $script --help"
    fi
  done
}

# require OPTION...: each must have been given.
require() {
  local option variable
  for option in "$@"; do
    variable=${option//-/_}
    if [[ -z ${!variable} ]]; then die "--$option is missing; see $script --help"; fi
  done
}

# need PROGRAM HOW_TO_GET_IT; a dry run needs no program.
need() {
  if [[ $dry_run == no ]] && ! command -v "$1" > /dev/null; then die "$1 is not installed: $2"; fi
}

# check_name NAME: the clouds' own rule, told before anything is sent.
check_name() {
  if [[ ! $1 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]]; then
    die "--name $(quoted "$1") cannot be one: at most 40 small letters, digits and -," \
      "a letter first; for example dinov3-a"
  fi
}

check_number() { # check_number OPTION
  local variable=${1//-/_}
  if [[ ! ${!variable} =~ ^[0-9]+$ ]]; then die "--$1 ${!variable} is not a whole number"; fi
}

# The value of --workdir among what launch/run.py gets.
workdir() {
  local i
  for ((i = 0; i < ${#run_args[@]}; i++)); do
    case ${run_args[i]} in
      --workdir=*) printf '%s\n' "${run_args[i]#*=}" ;;
      --workdir) printf '%s\n' "${run_args[i + 1]:-}" ;;
    esac
  done
}

# What launch/run.py gets must say what to train and where to keep it.
check_run_args() {
  if [[ " ${run_args[*]} " != *" --config"[\ =]* ]]; then
    die "say what to train after --, for example:" \
      "-- --config experiments/gram_vitl.py --workdir DIR"
  fi
  if [[ -z $(workdir) ]]; then
    die "--workdir is missing after --; it keeps the checkpoints to go on from"
  fi
}

# A directory that outlives the machines and that all of them see.
check_shared_workdir() {
  case $(workdir) in
    *://* | /*) ;;
    *)
      die "--workdir $(workdir) would lie on one machine's own disk and vanish with it;" \
        "give gs://BUCKET/runs/a or an absolute path that all machines share"
      ;;
  esac
}

# confirm QUESTION: only y or yes goes on; --yes has answered already.
confirm() {
  local answer=""
  if [[ $yes == yes || $dry_run == yes ]]; then return; fi
  printf '%s [y/N] ' "$1" >&2
  read -r answer || true
  if [[ ! $answer =~ ^([yY]|yes)$ ]]; then
    say "nothing was done"
    exit 1
  fi
}

# What is sent is the last commit and nothing else, so untracked files and credentials stay here.
check_tree() {
  if [[ $allow_dirty == no && -n $(git -C "$root" status --porcelain) ]]; then
    die "the working tree differs from the last commit, which alone is sent; commit," \
      "or send the commit as it is with --allow-dirty"
  fi
}

# Sets `scratch`, a directory that is removed at the end; a dry run only speaks of one.
scratch_directory() {
  scratch=/tmp/$script
  if [[ $dry_run == no ]]; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
  fi
}

# pack_code FILE [OPTION...]: the last commit as a .tar.gz; options are git archive's.
pack_code() {
  send git -C "$root" archive --format=tar.gz "--output=$1" "${@:2}" HEAD
}

# check_python PROGRAM: the project needs 3.11.
check_python() {
  if [[ $dry_run == yes ]]; then return; fi
  need "$1" "name another with --python"
  if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    die "$1 is $("$1" --version 2>&1), 3.11 or newer is needed; name another with --python"
  fi
}
