#!/usr/bin/env bash
# Train on GPU nodes of a Slurm cluster: a job that saves before its time is over and queues again.

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'TEXT'
Train on GPU nodes of a Slurm cluster, from its login node.

  launch/slurm.sh VERB --base DIR [options] [-- ARGUMENTS OF launch/run.py]

Two nodes of eight GPUs, four hours at a time, for as long as the run takes:

  launch/slurm.sh setup  --base /shared/me/dinojax
  launch/slurm.sh submit --base /shared/me/dinojax --nodes 2 --gpus-per-node 8 --time 04:00:00 \
    -- --config experiments/gram_vitl.py --workdir /shared/me/runs/a
  launch/slurm.sh logs   --base /shared/me/dinojax

  setup     make the virtual environment in DIR/venv with the packages for GPUs
  render    print the job script, send nothing
  submit    copy the last commit to DIR/code-COMMIT, queue a job for it     USES YOUR SHARE
  status    where the job stands
  logs      follow its output
  stop      the run saves and ends, and does not queue again (scancel alone would not let it save)

Two minutes before its time is over the job gets SIGTERM, saves, ends with exit code 75 and queues
itself again; it goes on from there, with the code it was submitted with. It also queues again when
a process of it was killed (137, 143: mostly for want of memory), from its last checkpoint.

  --base DIR              directory that login and compute nodes share: code, packages, logs
  --nodes N               how many nodes
  --gpus-per-node N       GPUs of each, as Slurm names them: 8, or h100:8; one process runs per GPU
  --time LIMIT            of one stretch, for example 04:00:00
  --partition NAME, --account NAME      as your cluster wants them
  --cpus-per-gpu N        cores that prepare images for one GPU (default: 8)
  --sbatch=--OPTION=VALUE one more option of sbatch, such as --sbatch=--constraint=infiniband
  --name NAME             of the job (default: dinojax)
  --job ID                for status, logs, stop (default: the last one submitted from DIR)
  --restarts N            queue again at most so often, for whatever reason (default: 50)
  --python PROGRAM        a Python of 3.11 or newer for setup (default: python3)
  --allow-dirty           copy the last commit although files differ from it
  --dry-run               print the commands, send none
TEXT
}

base="" nodes="" gpus_per_node="" time="" partition="" account="" cpus_per_gpu=8 sbatch=""
name=dinojax job="" restarts=50 python=python3

# directive OPTION VALUE: a line that sbatch reads; inside its quotes \ and " need a \.
directive() {
  local value=$2
  if [[ -z $value ]]; then return; fi
  if [[ ! $value =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
    value=${value//\\/\\\\}
    value="\"${value//\"/\\\"}\""
  fi
  printf '#SBATCH --%s=%s\n' "$1" "$value"
}

# One task per GPU, and each task sees all GPUs of its node: that is what jax expects of Slurm. It
# takes the GPU of its own number on the node, so neither --gpus-per-task nor binding must hide any.
render() {
  local gpus=${gpus_per_node##*:}
  echo '#!/usr/bin/env bash'
  directive job-name "$name"
  directive nodes "$nodes"
  directive gpus-per-node "$gpus_per_node"
  directive ntasks-per-node "$gpus"
  directive cpus-per-task "$cpus_per_gpu"
  directive time "$time"
  directive partition "$partition"
  directive account "$account"
  directive signal TERM@120
  echo '#SBATCH --requeue'
  directive open-mode append
  directive output "$base/logs/%j.log"
  if [[ -n $sbatch ]]; then printf '#SBATCH %s\n' "$sbatch"; fi
  cat <<TEXT

cancelled=no
trap 'cancelled=yes' TERM # the signal at the end of the time goes to the run, not to this script
cd $(quoted "$code") || exit 2
export PYTHONPATH=$(quoted "$code") # this job's code, whatever has been installed since
code=0
srun --ntasks=$((nodes * gpus)) --cpus-per-task=$cpus_per_gpu --gpu-bind=none \\
  --kill-on-bad-exit=0 --wait=300 \\
  $(quoted "$base/venv/bin/python" launch/run.py "${run_args[@]}") || code=\$?
case \$code in
  75 | 137 | 143) again=yes ;; # saved; a process killed, by SIGKILL or SIGTERM
  *) again=no ;;
esac
if [[ \$again\$cancelled == yesno ]] && ((\${SLURM_RESTART_COUNT:-0} < $restarts)); then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
TEXT
}

# The last commit, unpacked once.
copy_code() {
  if [[ -d $code ]]; then return; fi
  check_tree
  scratch_directory
  pack_code "$scratch/code.tar.gz"
  send mkdir -p "$code.part"
  send tar -xzf "$scratch/code.tar.gz" -C "$code.part"
  send mv "$code.part" "$code"
}

setup() {
  check_python "$python"
  copy_code
  send "$python" -m venv "$base/venv"
  send "$base/venv/bin/python" -m pip install --quiet --editable "${code}[cuda]"
}

submit() {
  local file="$base/jobs/${name//[^A-Za-z0-9._-]/_}.sbatch"
  need sbatch "run this on the login node of a Slurm cluster"
  if [[ $dry_run == no && ! -x $base/venv/bin/python ]]; then
    die "$base/venv is not there yet; first: $script setup --base $(quoted "$base")"
  fi
  copy_code
  send mkdir -p "$base/jobs" "$base/logs"
  if [[ $dry_run == yes ]]; then
    printf "cat > %s <<'TEXT'\n%s\nTEXT\n" "$(quoted "$file")" "$(render)"
    send sbatch --parsable "$file"
    return
  fi
  render > "$file"
  job=$(send sbatch --parsable "$file")
  job=${job%%;*} # ID;CLUSTER where there are several
  echo "$job" > "$base/jobs/last"
  say "job $job; its output: $script logs --base $(quoted "$base")"
}

# Sets job to the one asked for, or to the last one submitted.
find_job() {
  if [[ -n $job ]]; then return; fi
  if [[ -s $base/jobs/last ]]; then
    job=$(< "$base/jobs/last")
  elif [[ $dry_run == yes ]]; then
    job=JOB
  else
    die "no job has been submitted from $base; give its number as --job"
  fi
}

status() {
  find_job
  need squeue "run this on the login node of a Slurm cluster"
  send squeue "--jobs=$job" '--format=%i %j %T %M of %l, %D nodes, %R'
}

logs() {
  find_job
  send tail --lines=50 --follow=name --retry "$base/logs/$job.log"
}

# The first signal tells the job script not to queue again, the second one the run to save. One
# signal to both would reach srun too, which then kills the run at once.
stop() {
  find_job
  need scancel "run this on the login node of a Slurm cluster"
  if [[ $dry_run == no && $(squeue --noheader "--jobs=$job" --format=%T) != RUNNING ]]; then
    send scancel "$job"
    return
  fi
  send scancel --batch --signal=TERM "$job"
  send scancel --signal=TERM "$job"
}

main() {
  local takes="base nodes gpus-per-node time partition account cpus-per-gpu sbatch name job"
  take_verb "setup render submit status logs stop" "$@"
  parse "$takes restarts python" "" "${@:2}"
  require base
  if [[ $base != /* ]]; then die "--base $base must be an absolute path that all nodes share"; fi
  check_number restarts
  check_number cpus-per-gpu
  code=$base/code-$(git -C "$root" rev-parse --short=12 HEAD)
  case $verb in
    render | submit)
      require nodes gpus-per-node time
      check_number nodes
      if [[ ! $gpus_per_node =~ ^([A-Za-z0-9_.-]+:)?[1-9][0-9]*$ ]]; then
        die "--gpus-per-node $gpus_per_node is neither a number nor TYPE:NUMBER, such as h100:8"
      fi
      check_run_args
      check_shared_workdir
      ;;
  esac
  "$verb"
}

main "$@"
