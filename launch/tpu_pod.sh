#!/usr/bin/env bash
# Train on a Cloud TPU: make it, bring the code, run on all its hosts, go on after a preemption.

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Train on a Cloud TPU slice of any size, from making it to deleting it.

  launch/tpu_pod.sh VERB --name NAME --zone ZONE [options] [-- ARGUMENTS OF launch/run.py]

A run on 16 v5e chips of spot capacity that goes on by itself when it is preempted; then the end:

  launch/tpu_pod.sh all --name dinov3-a --zone us-west4-a --type v5litepod-16 --spot --queue \
    -- --config experiments/gram_vitl.py --workdir gs://my-bucket/runs/a
  launch/tpu_pod.sh delete --name dinov3-a --zone us-west4-a

  create    make the TPU now, or fail if none is free        COSTS MONEY until `delete`
  queue     ask for it and wait in the cloud's queue         COSTS MONEY from when it is granted
  copy      bring the last commit to all its hosts           (untracked files never travel)
  setup     install Python and the packages on all hosts
  run       start launch/run.py on all hosts and follow it; go on after exit code 75
  all       create or queue if need be, copy, setup, run; after a preemption all of it again
  logs      follow the output of one host
  status    state of the TPU and of the run on each host
  stop      SIGTERM: the run saves and ends; the TPU stays   STILL COSTS MONEY
  delete    delete the TPU, after a question; only one that this script has made

The TPU is paid by the second from its creation until `delete`, also when nothing runs on it and
also after the run is done; `status` and `gcloud compute tpus tpu-vm list` show what is there.
Ctrl-C or SIGTERM during `run` and `all` stops the run after a save; `run --detach` only starts it.

  --name NAME              of the TPU, and of its place in the queue
  --zone ZONE              where: gcloud compute tpus locations list
  --type TYPE              which: v5litepod-16, v6e-64, v5p-128, ...; no default, it sets the price
  --spot                   spare capacity, much cheaper, can be taken away at any moment
  --queue                  with `all`: queue instead of create
  --runtime VERSION        of the machines' software (default: what Google names for the type)
  --project ID             (default: the one of `gcloud config`)
  --service-account EMAIL  as whom the hosts read and write buckets (default: Compute Engine's)
  --network, --subnetwork  (default: the project's `default`)
  --reserved               from a reservation of yours
  --worker N               host whose output is followed (default: 0)
  --detach                 with `run`: start and return
  --restarts N             after this many saves, failures and preemptions give up (default: 50)
  --poll-seconds N         between two looks at something that is awaited (default: 60)
  --allow-dirty            copy the last commit although files differ from it
  --yes                    no questions
  --dry-run                print the commands, send none
TEXT
}

name="" zone="" type="" runtime="" project="" service_account="" network="" subnetwork=""
worker=0 restarts=50 poll_seconds=60
spot=no queue=no reserved=no detach=no
answered=no # whether the cloud ever has; when not, waiting for it is of no use
label=created_by=dinojax # on all that this script makes; it deletes nothing else

gcloud_tpu() { # gcloud_tpu tpu-vm|queued-resources VERB WORD...
  send gcloud compute tpus "$@" "--zone=$zone" ${project:+"--project=$project"}
}

# ---- what there is ------------------------------------------------------------------------------

# describe tpu-vm|queued-resources FIELD: its value; NOT_FOUND; UNKNOWN when nobody answers.
describe() {
  local command=(describe "$name" "--format=value($2)") answer
  if [[ $dry_run == yes ]]; then
    gcloud_tpu "$1" "${command[@]}"
  elif answer=$(gcloud_tpu "$1" "${command[@]}" 2> "$scratch/error" < /dev/null); then
    printf '%s\n' "$answer"
  elif grep -Eq 'NOT_FOUND|was not found' "$scratch/error"; then
    echo NOT_FOUND
  else
    cat "$scratch/error" >&2
    echo UNKNOWN
  fi
}

# The state of the TPU; of its place in the queue as long as that has not been granted.
state() {
  local place
  if [[ $queue == yes ]]; then
    place=$(describe queued-resources state.state)
    if [[ $place != ACTIVE ]]; then
      echo "$place"
      return 0
    fi
  fi
  describe tpu-vm state
}

# ---- making and deleting ------------------------------------------------------------------------

# https://cloud.google.com/tpu/docs/runtimes
runtime_of_type() {
  case $type in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v[234]-*) echo tpu-ubuntu2204-base ;;
    *)
      die "--type $type is not one whose software is known here; give --runtime too," \
        "or a type such as v5litepod-16, v6e-64, v5p-128"
      ;;
  esac
}

create_options() {
  local price="at the full price"
  options=("--accelerator-type=$type" "--labels=$label")
  if [[ $spot == yes ]]; then
    options+=(--spot)
    price="spot capacity"
  fi
  if [[ $reserved == yes ]]; then options+=(--reserved); fi
  if [[ -n $service_account ]]; then options+=("--service-account=$service_account"); fi
  if [[ -n $network ]]; then options+=("--network=$network"); fi
  if [[ -n $subnetwork ]]; then options+=("--subnetwork=$subnetwork"); fi
  say "$type in $zone, $price, paid from when it is granted until:" \
    "$script delete --name $name --zone $zone"
}

create() {
  create_options
  gcloud_tpu tpu-vm create "$name" "--version=$runtime" "${options[@]}"
}

queue() {
  create_options
  gcloud_tpu queued-resources create "$name" "--node-id=$name" "--runtime-version=$runtime" \
    "${options[@]}"
}

made_by() { if [[ $queue == yes ]]; then echo queued-resources; else echo tpu-vm; fi; }
make() { if [[ $queue == yes ]]; then queue; else create; fi; }

# owner tpu-vm|queued-resources: whose label it carries.
owner() {
  if [[ $1 == queued-resources ]]; then
    describe "$1" 'tpu.nodeSpec[0].node.labels.created_by'
  else
    describe "$1" labels.created_by
  fi
}

# erase tpu-vm|queued-resources: a place in the queue with its TPU.
erase() {
  local forced=()
  if [[ $1 == queued-resources ]]; then forced=(--force); fi
  gcloud_tpu "$1" delete "$name" "${forced[@]}" --quiet
}

not_ours() {
  die "$name was not made by this script (it has no label $label); nothing was deleted"
}

delete() {
  local kind
  for kind in queued-resources tpu-vm; do
    if [[ $dry_run == yes ]]; then
      owner "$kind"
      note "if that answers ${label#*=}:"
      erase "$kind"
      continue
    fi
    case $(owner "$kind") in
      NOT_FOUND) continue ;;
      UNKNOWN) die "the cloud does not say whose $name is; nothing was deleted" ;;
      "${label#*=}") ;;
      *) not_ours ;;
    esac
    confirm "delete $name in $zone, with everything on its disks?"
    erase "$kind"
    return
  done
  if [[ $dry_run == no ]]; then say "there is no $name in $zone"; fi
}

# What a preemption has left is in the way of its successor.
clear_away() {
  if [[ $(owner "$(made_by)") != "${label#*=}" ]]; then not_ours; fi
  erase "$(made_by)"
}

# Until the TPU is ready: make it, wait for it, or replace one that was taken away.
ensure() {
  local now
  if [[ $dry_run == yes ]]; then
    describe "$(made_by)" "$([[ $queue == yes ]] && echo state.state || echo state)"
    note "unless it is there:"
    make
    return
  fi
  while true; do
    now=$(state)
    if [[ $now != UNKNOWN ]]; then
      answered=yes
    elif [[ $answered == no ]]; then
      die "the cloud does not say what $name is; its answer stands above"
    fi
    case $now in
      READY) return ;;
      NOT_FOUND) make ;;
      PREEMPTED | TERMINATED | SUSPENDED) clear_away ;;
      UNKNOWN | ACCEPTED | WAITING_FOR_RESOURCES | PROVISIONING | CREATING | STARTING | \
        RESTARTING | REPAIRING | REIMAGING | SUSPENDING | DELETING)
        say "$name: $now"
        sleep "$poll_seconds"
        ;;
      *) die "$name is $now; see: $script status --name $name --zone $zone" ;;
    esac
  done
}

# ---- on its hosts -------------------------------------------------------------------------------

on_workers() { # on_workers all|N COMMAND_LINE
  gcloud_tpu tpu-vm ssh "$name" "--worker=$1" "--command=$2" < /dev/null
}

ask_workers() { # ask_workers all|N WORD...: on_worker.sh there
  local who=$1
  shift
  on_workers "$who" "bash dinojax/code/launch/on_worker.sh $(quoted "$@")"
}

# The same code again after a preemption, whatever has been committed since.
copy() {
  if [[ ! -e $scratch/dinojax-code.tar.gz ]]; then pack_code "$scratch/dinojax-code.tar.gz"; fi
  gcloud_tpu tpu-vm scp "$scratch/dinojax-code.tar.gz" "$name:dinojax-code.tar.gz" --worker=all
  on_workers all "rm -rf dinojax/code && mkdir -p dinojax/code &&\
 tar -xzf dinojax-code.tar.gz -C dinojax/code"
}

setup() { ask_workers all setup; }

prepare() {
  ensure
  copy
  setup
}

# ---- the run ------------------------------------------------------------------------------------

start() { ask_workers all start "${run_args[@]}"; }

# In the background and waited for, so that a signal is acted on at once; with a process group of
# its own, so that all of it can be ended.
follow() {
  set -m
  ask_workers "$worker" follow &
  follower=$!
  set +m
  wait "$follower" || true
  follower=""
}

# What became of the run, one of
# running | done | stopped | failed CODE | again | lost | unreachable | stuck
verdict() {
  local outcomes looks=0
  while outcomes=$(ask_workers all outcome); do
    if ! grep -qvx running <<< "$outcomes"; then
      echo running
      return 0
    elif [[ $outcomes != *running* ]]; then
      judge "$outcomes"
      return 0
    elif ((++looks > 10)); then # hosts end within minutes of each other
      echo stuck
      return 0
    fi
    sleep "$poll_seconds"
  done
  case $(state) in
    READY | UNKNOWN) echo unreachable ;;
    *) echo lost ;;
  esac
}

# judge OUTCOMES: one verdict on what all hosts say. A host that was started anew makes the others
# fail in whatever way, so it comes first; a process that was killed (128 and up) is started again.
judge() {
  local word code failed="" again=no stopped=no
  while read -r word code; do
    case $word in
      interrupted)
        echo again
        return 0
        ;;
      stopped) stopped=yes ;;
      exit)
        if ((code == 75 || code >= 128)); then again=yes; elif ((code)); then failed=$code; fi
        ;;
    esac
  done <<< "$1"
  if [[ -n $failed ]]; then
    echo "failed $failed"
  elif [[ $stopped == yes ]]; then
    echo stopped
  elif [[ $again == yes ]]; then
    echo again
  else
    echo "done"
  fi
}

# On SIGTERM or Ctrl-C: hand it on, wait for the save, end as launch/run.py does. A second one ends
# this script alone. (What a trap calls must `return 0`: a bare `return` gives an older status.)
hand_on_signal() {
  local what=running
  trap - INT TERM
  if [[ -n ${follower:-} ]]; then kill -- "-$follower" 2> /dev/null || true; fi
  say "asking all hosts to save and stop ..."
  ask_workers all stop || true
  while [[ $what == running ]]; do
    sleep 1
    what=$(verdict)
  done
  say "the run: $what; $name still costs money until: $script delete --name $name --zone $zone"
  end_as "$what"
}

# end_as VERDICT: with launch/run.py's exit code.
end_as() {
  case $1 in
    done) exit 0 ;;
    failed*) exit "${1#failed }" ;;
    *) exit 75 ;;
  esac
}

# keep_running RECOVER: start, follow, and start again until the run is done. RECOVER is called when
# the TPU has been taken away.
keep_running() {
  local tries=0 what
  if [[ $dry_run == no ]]; then trap hand_on_signal INT TERM; fi
  start
  if [[ $dry_run == yes ]]; then
    ask_workers "$worker" follow
    ask_workers all outcome
    note "start again after exit code 75, everything again after a preemption; $restarts times"
    return
  fi
  while true; do
    follow
    what=$(verdict)
    say "the run: $what"
    case $what in
      done | stopped | failed*) end_as "$what" ;;
      running) # only the connection has ended
        sleep "$poll_seconds"
        continue
        ;;
      stuck)
        die "one host of $name still runs although another has ended;" \
          "see \`$script logs --worker N\`, then \`$script stop\`"
        ;;
    esac
    if ((++tries > restarts)); then
      say "error: $restarts restarts are used up; look at the log, then allow more with --restarts"
      exit 75
    fi
    case $what in
      lost) "$1" ;;
      unreachable) sleep "$poll_seconds" ;;
    esac
    start || true # a failure shows in the next verdict
  done
}

tell_lost() {
  say "error: $name has been taken away; \`$script all\` makes it again and goes on"
  exit 75
}

run() {
  if [[ $detach == yes ]]; then start; else keep_running tell_lost; fi
}

all() {
  prepare
  keep_running prepare
}

logs() { ask_workers "$worker" follow; }
stop() { ask_workers all stop; }

status() {
  local there
  there=$(describe tpu-vm state)
  if [[ $dry_run == no ]]; then
    printf 'queue: %s\nTPU: %s\n' "$(describe queued-resources state.state)" "$there"
    if [[ $there != READY ]]; then return; fi
  else
    describe queued-resources state.state
  fi
  ask_workers all outcome
}

# ---- the command line ---------------------------------------------------------------------------

main() {
  local takes="name zone type runtime project service-account network subnetwork worker"
  take_verb "create queue copy setup run all logs status stop delete" "$@"
  parse "$takes restarts poll-seconds" "spot queue reserved detach" "${@:2}"
  require name zone
  check_name "$name"
  check_number worker
  check_number restarts
  check_number poll-seconds
  case $verb in
    create | queue | all)
      require type
      runtime=${runtime:-$(runtime_of_type)}
      ;;
  esac
  case $verb in run | all) check_run_args && check_shared_workdir ;; esac
  case $verb in copy | all) check_tree ;; esac # before anything is paid for
  need gcloud "https://cloud.google.com/sdk/docs/install"
  scratch_directory
  "$verb"
}

main "$@"
